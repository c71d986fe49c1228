"""The partition as it is now: objects looked up by (directory, name) or by handle, never by a path that could be swapped.

Two ways in: with CAP_DAC_READ_SEARCH a directory is opened by its handle; without, component by component from the root, no
symbolic link followed, and its identity checked at the end. Nothing outside the partition is ever opened.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from cachetools import LRUCache

from comparer.model import Attr, FileType, Ident, file_type

from .backends.base import SYSTEM_DIR
from .linux import batch
from .linux.handles import Codec, open_by_handle_at
from .linux.statx import Stat, statx
from .root import open_system

_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)
_ANYTHING = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = _ANYTHING | os.O_DIRECTORY
_TRIES = 5
LOOKS = batch.AT_ONCE


class CoveredError(OSError):
    """Something is mounted on the way to what was asked for, so what is there of this partition cannot be seen."""


class Identify(Protocol):
    def __call__(self, dirfd: int, name: bytes = b"") -> tuple[Ident, Stat]:
        """Identity and metadata of one object, of the same moment; raises OSError."""


class Found(NamedTuple):
    ident: Ident
    attr: Attr


class _Descriptors(LRUCache[Ident, int]):
    """Open directories; the one that falls out is closed."""

    def popitem(self) -> tuple[Ident, int]:
        ident, fd = super().popitem()
        os.close(fd)
        return ident, fd

    def drop(self, ident: Ident) -> None:
        fd = self.pop(ident, None)
        if fd is not None:
            os.close(fd)


class LiveTree:
    """One partition for the length of one piece of work. `root_fd` is the caller's; everything opened here is closed by `close`.

    Methods raise OSError for what is not plain absence: EACCES, EIO, ELOOP. Absence is None.
    """

    def __init__(self, root_fd: int, identify: Identify, codec: Codec | None) -> None:
        self.root_fd = root_fd
        self.identify = identify
        self.codec = codec
        self.root, self._root_stat = identify(root_fd)
        self.dev = self._root_stat.dev
        self._directories = _Descriptors(256)
        self._system = -1
        self._look_at_many = codec is not None and batch.can_open(codec.sample)

    def system_directory(self) -> int:
        """A descriptor of the system directory; ours. What is below it is root's alone, so that a path there cannot be swapped.

        Raises OperatorError for what somebody has put in its place, OSError.
        """
        if self._system < 0:
            self._system = open_system(self.root_fd, "the partition")
        return self._system

    def close(self) -> None:
        if self._system >= 0:
            os.close(self._system)
            self._system = -1
        while self._directories:
            self._directories.popitem()

    def directory(self, ident: Ident, path: Callable[[Ident], list[bytes] | None]) -> int | None:
        """A descriptor (O_PATH) of a directory, None if it is gone; ours, valid until the next call. Raises CoveredError.

        `path` gives the components to try where handles cannot be opened.
        """
        if ident == self.root:
            return self.root_fd
        fd = self._directories.get(ident)
        if fd is None:
            fd = self._by_handle(ident, _DIRECTORY) if self.codec else self._by_path(ident, path(ident))
            if fd is None:
                return None
            self._directories[ident] = fd
        return fd

    def enter(self, parent: int, name: bytes, ident: Ident) -> int | None:
        """As `directory`, by its name in its parent, which may itself be on the move. None if the name leads elsewhere."""
        try:
            fd = os.open(name, _DIRECTORY, dir_fd=parent)
        except OSError as error:
            if error.errno in _GONE or error.errno == errno.ELOOP:
                return None
            raise
        if self.identify(fd)[0] != ident:
            os.close(fd)
            return None
        self._directories[ident] = fd
        return fd

    def _by_handle(self, ident: Ident, flags: int) -> int | None:
        assert self.codec is not None  # noqa: S101 - asked only where there are handles
        handle = self.codec.encode(ident)
        for attempt in range(_TRIES, -1, -1):
            try:
                fd = open_by_handle_at(self.root_fd, handle, flags)
                break
            except OSError as error:
                if error.errno in _GONE:
                    return None
                # the kernel's answer also where a directory is renamed while it looks for the way up (fs/exportfs/expfs.c)
                if error.errno != errno.ENOMEM or not attempt:
                    raise
        # to ext4 generation 0 (what mkfs made) means any: whoever has the inode number now is opened
        if ident.gen == 0 and self.identify(fd)[0] != ident:
            os.close(fd)
            return None
        return fd

    def _by_path(self, ident: Ident, components: list[bytes] | None) -> int | None:
        """Raises CoveredError if something is mounted on the way."""
        if components is None:
            return None
        fd = os.dup(self.root_fd)
        try:
            for component in components:
                below = os.open(component, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
            if self.identify(fd)[0] == ident:
                return fd
        except OSError as error:
            os.close(fd)
            if error.errno not in _GONE and error.errno != errno.ELOOP:
                raise
        else:
            os.close(fd)
        self._check_cover(components)
        return None

    def _check_cover(self, components: list[bytes]) -> None:
        fd = os.dup(self.root_fd)
        try:
            for component in components:
                if self.covered(fd, component):
                    raise CoveredError(errno.EXDEV, "something else is mounted here", b"/".join(components))
                below = os.open(component, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
        except OSError as error:
            if error.errno not in _GONE and error.errno != errno.ELOOP:
                raise
        finally:
            os.close(fd)

    def open_directory(self, ident: Ident) -> int | None:
        """A directory opened for listing, by its handle; the caller closes it. None if it is gone."""
        if ident == self.root:
            return _open_to_list(self.root_fd)
        return self._by_handle(ident, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NOATIME)

    def open_object(self, ident: Ident) -> int | None:
        """An object by its handle (O_PATH: nothing is opened); the caller closes it. None if it is gone."""
        return self._by_handle(ident, _ANYTHING)

    def forget(self, ident: Ident) -> None:
        """Do not trust an open descriptor of this directory any longer (it may have been moved or removed)."""
        self._directories.drop(ident)

    def look(self, dirfd: int, name: bytes) -> Found | None:
        """What a name in a directory is now; None if nothing, or nothing of this partition (a mount, the system directory)."""
        if name == SYSTEM_DIR and dirfd == self.root_fd:
            return None
        try:
            fd = os.open(name, _ANYTHING, dir_fd=dirfd)
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise
        try:
            ident, now = self.identify(fd)
            if now.dev != self.dev or now.mount_root:
                return None
            return Found(ident, self._settled(fd, now))
        finally:
            os.close(fd)

    def covered(self, dirfd: int, name: bytes) -> bool:
        """Whether something is mounted on a name, so that what is there of this partition cannot be seen. Raises OSError."""
        try:
            return statx(dirfd, name).mount_root
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise

    def look_at(self, ident: Ident) -> Attr | None:
        """An object by its handle, None if it is gone or has no name left. Only where there are handles.

        open_by_handle_at(2) answers ESTALE for every error, also where the disk cannot be read: None is believed only if what
        names the object had do not lead to it either.
        """
        fd = self._by_handle(ident, _ANYTHING)
        if fd is None:
            return None
        try:
            now = self.identify(fd)[1]
            return self._settled(fd, now) if now.nlink else None
        finally:
            os.close(fd)

    def look_at_many(self, idents: Sequence[Ident]) -> dict[Ident, Attr]:
        """Those of at most LOOKS objects that could be looked at in one call, as look_at does; for the others, ask it."""
        if len(idents) < 2 or self.codec is None or not self._look_at_many:
            return {}
        found = batch.look(self.root_fd, self.codec.sample, idents)
        self._look_at_many = bool(found)  # under SELinux everything has an xattr: not again in vain
        return {ident: plain_attributes(now) for ident, now in found.items() if now.nlink}

    def look_at_root(self) -> Attr:
        return self._settled(self.root_fd, self.identify(self.root_fd)[1])

    def _settled(self, fd: int, now: Stat) -> Attr:
        """All attributes of one moment: read again if the object changed meanwhile."""
        for _ in range(_TRIES):
            attr = attributes(fd, now)
            after = self.identify(fd)[1]
            if (after.ctime_ns, after.size, after.nlink) == (now.ctime_ns, now.size, now.nlink):
                break
            now = after
        return attr

    def open_file(self, ident: Ident) -> int | None:
        """A regular file opened for reading its layout (never its data), by handle; None if it is gone."""
        return self._by_handle(ident, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME)

    def list(self, dirfd: int) -> Iterator[tuple[bytes, int]]:
        """(name, inode number) of every entry of a directory, the system directory left out; raises OSError if unreadable."""
        fd = _open_to_list(dirfd)
        try:
            at_root = os.fstat(fd).st_ino == self.root.ino
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if not (at_root and name == SYSTEM_DIR):
                        yield name, entry.inode()
        finally:
            os.close(fd)


def _open_to_list(dirfd: int) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(b".", flags | os.O_NOATIME, dir_fd=dirfd)
    except PermissionError:  # O_NOATIME is for the owner and for root
        return os.open(b".", flags, dir_fd=dirfd)


def plain_attributes(
    now: Stat, rdev: int | None = None, xattrs: tuple[tuple[bytes, bytes], ...] = (), target: bytes | None = None
) -> Attr:
    """The attributes statx gave, and what it does not give of devices, symbolic links, and what has xattrs."""
    return Attr(
        file_type(now.mode),
        now.size,
        now.blocks,
        stat.S_IMODE(now.mode),
        now.uid,
        now.gid,
        now.nlink,
        now.mtime_ns,
        now.ctime_ns,
        now.btime_ns,
        rdev,
        xattrs,
        target,
    )


def attributes(fd: int, now: Stat) -> Attr:
    """The attributes statx gave, with xattrs and a symlink's target read through `fd` (O_PATH does); raises OSError."""
    kind = file_type(now.mode)
    return plain_attributes(
        now,
        now.rdev if kind in (FileType.CHAR, FileType.BLOCK) else None,
        read_xattrs(b"/proc/self/fd/%d" % fd),
        os.readlink(b"", dir_fd=fd) if kind is FileType.SYMLINK else None,
    )


def read_xattrs(path: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """Sorted (name, value) pairs; none where the file system has no xattrs. One removed meanwhile is left out."""
    try:
        names = os.listxattr(path)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return ()
        raise
    pairs = []
    for name in names:
        try:
            pairs.append((os.fsencode(name), os.getxattr(path, name)))
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
    return tuple(sorted(pairs))
