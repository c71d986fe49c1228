"""File content for a replica: where it is read from, and how little of it. Sparse stays sparse.

The source is read below one directory only, component by component with O_NOFOLLOW, only regular files, and of its own file
system only: nothing that is mounted below it. Two places can hold the content of a file as of a state: what the feed calls
`content` (a snapshot's, below `.snapfeed`, it does not change), and any other place where the file may be (live, or in a tree of
a later snapshot), which counts only if it is the same inode, and its size and times are those of that state both before and
after the copying.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from comparer.errors import DamageError, OperatorError
from comparer.model import Attr, ByteRanges, Ident
from feed.escape import printable
from feed.replica_tree import SYSTEM, parts, read_xattrs

_CHUNK = 1 << 20
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEVER = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS})
_NOT_THIS = frozenset({errno.EINVAL, errno.EPERM, errno.ETXTBSY, errno.EAGAIN, errno.EACCES})


class ShortError(Exception):
    """The source holds less than it must, or cannot be read."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What the kernel does for us: FICLONE (source, destination), a hole (descriptor, offset, length), syncfs."""

    clone: Callable[[int, int], None]
    punch: Callable[[int, int, int], None]
    sync: Callable[[int], None]


@dataclass(slots=True)
class Tally:
    """Bytes read from the source, bytes shared with it instead, and bytes shared within the replica."""

    copied: int = 0
    cloned: int = 0


def check_kept(path: bytes, what: str) -> None:
    """Raises DamageError, naming it, for a path that cannot be a snapshot's: see `parts`, and what is not below `.snapfeed`."""
    found = parts(path, what)
    if len(found) < 2 or found[0] != SYSTEM:
        raise DamageError(
            f"{what} {printable(path)}: it is not below {SYSTEM.decode()}, where snapshots are; nothing was written"
        )


class Source:
    """The partition that a replica is of. Raises OperatorError if the directory is none."""

    def __init__(self, top: bytes) -> None:
        self.top = top
        self.trouble: str | None = None  # why something could not be read, the last time
        try:
            self.fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.stat(SYSTEM, dir_fd=self.fd, follow_symlinks=False)
            except OSError as error:
                os.close(self.fd)
                raise OperatorError(
                    f"--source {printable(top)}: no {SYSTEM.decode()} in it ({error.strerror}); is the partition mounted there?"
                ) from error
        except OSError as error:
            raise OperatorError(
                f"--source {printable(top)}: {error.strerror}; give the partition's mount point"
            ) from error
        self._dev = os.fstat(self.fd).st_dev
        try:
            self._mount = _mount_id(self.fd)
        except OSError as error:
            os.close(self.fd)
            raise OperatorError(
                f"--source {printable(top)}: its mount is not to be known from /proc/self/fdinfo ({error.strerror}); mount /proc"
            ) from error

    def close(self) -> None:
        os.close(self.fd)

    def holds(self, directory_fd: int) -> bool:
        """Whether a directory lies in the source (it would be told of its own replica, for ever)."""
        top = os.fstat(self.fd)
        at = os.open(b".", _DIRECTORY, dir_fd=directory_fd)
        try:
            while True:
                here = os.fstat(at)
                if (here.st_dev, here.st_ino) == (top.st_dev, top.st_ino):
                    return True
                above = os.open(b"..", _DIRECTORY, dir_fd=at)
                os.close(at)
                at = above
                up = os.fstat(above)
                if (up.st_dev, up.st_ino) == (here.st_dev, here.st_ino):
                    return False
        finally:
            os.close(at)

    def open(self, path: bytes) -> int | None:
        """A regular file of the source; None, with the reason in `trouble`, if it cannot be had. Raises as `parts`."""
        names = parts(path, "content")
        fd = self.fd
        try:
            for name in names[:-1]:
                below = os.open(name, _DIRECTORY, dir_fd=fd)
                if fd != self.fd:
                    os.close(fd)
                fd = below
            # O_PATH first: opening a device could do something
            found = os.stat(names[-1] if names else b".", dir_fd=fd, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                self.trouble = f"{printable(path)} is no regular file of the source"
                return None
            opened = os.open(names[-1], _FILE, dir_fd=fd)
        except OSError as error:
            self.trouble = f"{printable(path)} of the source: {error.strerror}"
            return None
        finally:
            if fd != self.fd:
                os.close(fd)
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            self.trouble = f"{printable(path)} is no regular file of the source"
        elif not self._ours(opened, kept=names[0] == SYSTEM):
            self.trouble = f"{printable(path)} of the source is of another file system, which is mounted below it"
        else:
            return opened
        os.close(opened)
        return None

    def _ours(self, fd: int, *, kept: bool) -> bool:
        """Whether an object below the source is of its own file system.

        A mount below it has another mount id, also a bind mount of the same file system. A subvolume of btrfs has the mount id of
        what it lies in, but a device number of its own: snapshots, below `.snapfeed`, are such; elsewhere it is another tree.
        """
        return _mount_id(fd) == self._mount and (kept or os.fstat(fd).st_dev == self._dev)

    def kept(self, path: bytes | None, attr: Attr) -> int | None:
        """A snapshot's file, if it is there and has the size it must have."""
        if path is None:
            return None
        check_kept(path, "content")
        fd = self.open(path)
        if fd is not None and os.fstat(fd).st_size != attr.size:
            self.trouble = f"{printable(path)} of the source is of another size"
            os.close(fd)
            return None
        return fd

    def live(self, path: bytes, ident: Ident, attr: Attr) -> int | None:
        """The live file, or that of any tree which moves on, if it is still what the feed said of it."""
        fd = self.open(path)
        if fd is not None and not same(fd, ident, attr):
            self.trouble = f"{printable(path)} of the source has changed since"
            os.close(fd)
            return None
        return fd

    def still(self, fd: int, ident: Ident, attr: Attr) -> bool:
        """Whether a live file did not change while it was copied."""
        if same(fd, ident, attr):
            return True
        self.trouble = "a file of the source changed while it was copied"
        return False

    def xattrs(self, path: bytes, ident: Ident, attr: Attr) -> dict[bytes, bytes] | None:
        """The extended attributes of the live object (of a file or directory), if it is still what the feed said of it."""
        names = parts(path)
        fd = os.open(b".", _DIRECTORY, dir_fd=self.fd)
        try:
            for name in names[:-1]:
                below = os.open(name, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
            it = os.open(names[-1] if names else b".", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = it
            before = self._ours(fd, kept=False) and same(fd, ident, attr, size=False)
            found = read_xattrs(b"/proc/self/fd/%d" % fd)
            return found if before and same(fd, ident, attr, size=False) else None
        except OSError:
            return None
        finally:
            os.close(fd)


def _mount_id(fd: int) -> bytes:
    """Which mount an open object was reached by: proc(5), fdinfo. Raises OSError: EOPNOTSUPP, ENOENT without /proc."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        for line in file:
            if line.startswith(b"mnt_id:"):
                return line
    raise OSError(errno.EOPNOTSUPP, "the kernel does not tell the mount of an open file")


def same(fd: int, ident: Ident, attr: Attr, *, size: bool = True) -> bool:
    """Whether an open object is the one the feed told of, unchanged: a change that a time was set back after shows in ctime."""
    found = os.fstat(fd)
    return (
        (found.st_ino, found.st_mtime_ns, found.st_ctime_ns) == (ident.ino, attr.mtime_ns, attr.ctime_ns)
        and (not size or found.st_size == attr.size)
    )  # fmt: skip


@dataclass(slots=True)
class Copier:
    """Moves content by sharing blocks where the file systems allow it, else by copying data, never holes."""

    kernel: Kernel
    tally: Tally = field(default_factory=Tally)
    from_source: bool = True  # until the kernel says that these two file systems share no blocks
    within: bool = True

    def whole(self, source: int, destination: int, size: int) -> None:
        """Fill an empty file. Raises ShortError."""
        if self.take(source, destination, size):
            return
        os.ftruncate(destination, size)
        for offset, length, is_data in _segments(source, 0, size):
            if is_data:
                self._copy(source, destination, offset, length)

    def take(self, source: int, destination: int, size: int) -> bool:
        """Make an empty file share the blocks of the source's; False if that cannot be. Raises ShortError."""
        if not self.from_source or not size:
            return False
        verdict = self._clone(source, destination)
        self.from_source = verdict is not None
        if verdict and os.fstat(destination).st_size != size:
            raise ShortError("it is of another size")
        self.tally.cloned += size if verdict else 0
        return bool(verdict)

    def share(self, old: int, new: int) -> bool:
        """Make an empty file of the replica share the blocks of another one of it; False if that cannot be."""
        if not self.within:
            return False
        verdict = self._clone(old, new)
        self.within = verdict is not None
        return bool(verdict)

    def changes(self, source: int, destination: int, size: int, ranges: ByteRanges) -> None:
        """Bring a file from one state to the next; may be done again. Raises ShortError."""
        have = os.fstat(destination).st_size
        for offset, length in ranges.cleared:
            self._clear(destination, offset, min(offset + length, have) - offset)
        os.ftruncate(destination, size)
        for begin, much in ranges.written:
            for offset, length, is_data in _segments(source, begin, min(begin + much, size)):
                if is_data:
                    self._copy(source, destination, offset, length)
                else:
                    self._clear(destination, offset, length)

    def _clone(self, source: int, destination: int) -> bool | None:
        """None: not between these file systems; False: not this file."""
        try:
            self.kernel.clone(source, destination)
        except OSError as error:
            if error.errno in _NEVER:
                return None
            if error.errno in _NOT_THIS:
                os.ftruncate(destination, 0)
                return False
            raise
        return True

    def _copy(self, source: int, destination: int, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            data = _read(source, min(_CHUNK, end - offset), offset)
            if not data:
                raise ShortError("it has become shorter")
            self.tally.copied += len(data)
            _write(destination, data, offset)
            offset += len(data)

    def _clear(self, destination: int, offset: int, length: int) -> None:
        if length <= 0:
            return
        try:
            self.kernel.punch(destination, offset, length)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.ENOSYS}:
                raise
            data = [(o, n) for o, n, is_data in _segments(destination, offset, offset + length) if is_data]
            for begin, much in data:
                for at in range(begin, begin + much, _CHUNK):
                    _write(destination, bytes(min(_CHUNK, begin + much - at)), at)


def _read(source: int, count: int, offset: int) -> bytes:
    try:
        return os.pread(source, count, offset)
    except OSError as error:  # a device error of the source is one file's trouble
        raise ShortError(error.strerror) from error


def _write(destination: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(destination, view, offset)
        offset += written
        view = view[written:]


def _segments(fd: int, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, whether it is data) of a file's bytes, in order; all of it data where holes are not known."""
    while begin < end:
        data, hole = begin, end
        try:
            data = min(os.lseek(fd, begin, os.SEEK_DATA), end)
            if data < end:
                hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole from here on
                data = end
            elif error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                raise
        if data > begin:
            yield begin, data - begin, False
        if hole > data:
            yield data, hole - data, True
        begin = max(hole, data)


@contextlib.contextmanager
def closing(fd: int | None) -> Iterator[int | None]:
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)
