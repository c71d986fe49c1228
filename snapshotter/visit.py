"""A short visit to a partition: its root through a private mount, its system file, the view of what is there now.

The root is opened through a detached clone of the mount where that is permitted: what others mount on top of the partition
does not hide it from us, and our being there does not make its mount busy. The system file is opened by its path for as long
as the visit lasts; visits are short.
"""

import contextlib
import os
import stat
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from comparer.errors import DamageError, OperatorError, TransientError

from . import witness
from .backends.base import SYSTEM_DIR, Backend
from .backends.btrfs import BtrfsBackend
from .backends.clones import MAX_EXTENTS, nothing
from .backends.ficlone import FicloneBackend
from .backends.metadata import MetadataBackend
from .fill_xfs import BULKSTAT
from .linux.fiemap import ficlone
from .linux.handles import Codec, UnknownHandleError, name_to_handle_at, open_by_handle_at
from .linux.identity import Identifier
from .live import LiveTree
from .partition import Partition, uuid_of
from .root import open_root, open_system
from .scan import WALK
from .systemfile import SYSTEM_FILE, SystemFile
from .table import Table


class Abilities(NamedTuple):
    """What was found out about a partition when it was first visited. `backend`: btrfs, ficlone or metadata."""

    backend: str
    by_handle: bool
    private_mount: bool


def probe(partition: Partition, root_fd: int, *, private: bool) -> Abilities:
    """Try what works here; ask for no version. Leaves nothing behind."""
    by_handle = partition.kind == "partition" and _opens_handles(root_fd)
    if partition.fs_type == "btrfs" and partition.kind == "partition" and by_handle:
        return Abilities("btrfs", by_handle, private)
    if by_handle and _reflinks(root_fd):
        return Abilities("ficlone", by_handle, private)
    return Abilities("metadata", by_handle, private)


def _opens_handles(root_fd: int) -> bool:
    try:
        handle = name_to_handle_at(root_fd)
        Codec(handle)
        os.close(open_by_handle_at(root_fd, handle, os.O_PATH | os.O_DIRECTORY))
    except (OSError, UnknownHandleError):
        return False
    return True


def _reflinks(root_fd: int) -> bool:
    system = os.open(SYSTEM_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root_fd)
    names = (b"probe-source", b"probe-clone")
    fds: list[int] = []
    try:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=system)
            fds.append(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=system))
        os.write(fds[0], b"x" * 4096)
        ficlone(fds[0], fds[1])
    except OSError:
        return False
    else:
        return True
    finally:
        for fd, name in zip(fds, names, strict=False):
            os.close(fd)
            os.unlink(name, dir_fd=system)
        os.close(system)


def _is_open(wanted: os.stat_result) -> bool:
    """Whether one of this process's descriptors is of that file."""
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            found = os.fstat(int(number))
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def is_damaged(partition: Partition) -> bool:
    """Whether a check of the whole system file finds damage: an error of the disk that has passed is none. Raises as Visit."""
    try:
        with Visit(partition, check=True):
            return False
    except DamageError:
        return True


class Visit:
    """Use as a context manager, in one thread. `file` is open, `root_fd` and `tree` show the partition as it is now.

    Files with more extents than `max_extents` are not cloned. `leave_out` is told of open directories of ours, of whose content
    no events are wanted.
    Entering raises TransientError if the partition is not there (unmounted, replaced by another file system), DamageError if its
    system file is damaged or another partition's, OperatorError if it has none.
    """

    def __init__(
        self,
        partition: Partition,
        abilities: Abilities | None = None,
        *,
        check: bool = False,
        max_extents: int = MAX_EXTENTS,
        leave_out: Callable[[int], None] = nothing,
    ) -> None:
        self.partition = partition
        self._max_extents = max_extents
        self._leave_out = leave_out
        self._known = abilities
        self._check = check
        self._stack = contextlib.ExitStack()
        self._late: list[int] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        for fd in self._late:
            os.close(fd)

    def close_last(self, fd: int) -> None:
        """Close a descriptor of the system file after the file: closing it takes the process's locks away (fcntl(2), F_SETLK)."""
        self._late.append(fd)

    def _open(self, stack: contextlib.ExitStack) -> None:
        path, shown = self.partition.path, os.fsdecode(self.partition.path)
        try:
            wants_private = self.partition.kind == "partition" and (self._known is None or self._known.private_mount)
            self.root_fd, private = open_root(stack, path, private=wants_private)
            if self.partition.uuid is not None and uuid_of(self.root_fd, self.partition.fs_type) != self.partition.uuid:
                raise TransientError(f"{shown!r}: not mounted (another file system is seen there)")
        except OSError as error:
            raise TransientError(f"{shown!r}: not mounted or not readable: {error.strerror}") from error
        self.file = stack.enter_context(self._open_file(shown))
        self.abilities = self._known or probe(self.partition, self.root_fd, private=private)
        codec = Codec(name_to_handle_at(self.root_fd)) if self.abilities.by_handle else None
        self.tree = LiveTree(self.root_fd, Identifier(self.root_fd).identify, codec)
        stack.callback(self.tree.close)

    def _open_file(self, shown: str) -> SystemFile:
        try:
            system = open_system(self.root_fd, shown, strict=self.partition.kind == "partition")
            try:
                inside = os.stat(SYSTEM_FILE, dir_fd=system, follow_symlinks=False)
            finally:
                os.close(system)
        except FileNotFoundError as error:
            raise OperatorError(
                f"{shown!r} is not adopted (it has no system file); run `snapfeed init {shown}`"
            ) from error
        except PermissionError as error:
            raise OperatorError(f"{shown!r}: no permission to its system file: run as its owner (root)") from error
        if not stat.S_ISREG(inside.st_mode):
            raise DamageError(f"{shown!r}: its system file is not a file")
        if os.fstatvfs(self.root_fd).f_flag & os.ST_RDONLY:
            raise TransientError(f"{shown!r} is mounted read-only; remount it writable")

        def opened_is() -> None:
            # by its descriptor: SQLite goes by a path, which may lead elsewhere for the moment in which it opens the file
            if not _is_open(inside):
                raise TransientError(f"{shown!r}: not mounted (another file system is seen there)")

        file = SystemFile.open(self.partition.system_file, check=self._check, opened_is=opened_is)
        try:
            settings = file.settings()
            if self.partition.uuid is not None and settings.uuid != self.partition.uuid:
                raise DamageError(f"{shown!r}: its system file belongs to another partition ({settings.uuid})")
            seen_last = witness.read(self._system_directory)
            if seen_last is not None and (seen_last.epoch != settings.epoch or seen_last.seq > (file.head() or 0)):
                raise DamageError(f"{shown!r}: its system file is not the one written last (replaced, or an old copy)")
        except BaseException:
            file.close()
            raise
        return file

    @property
    def _system_directory(self) -> bytes:
        return b"/proc/self/fd/%d/%b" % (self.root_fd, SYSTEM_DIR)

    def bear_witness(self) -> None:
        """Note beside the system file what was committed last, before anything of it is published. Raises OSError."""
        witness.write(self._system_directory, witness.Witness(self.file.settings().epoch, self.file.head() or 0))

    def witness_late(self) -> None:
        """Bear witness of a commit after which the daemon could not any more. Raises OSError."""
        seen = witness.read(self._system_directory)
        if seen is not None and seen.seq < (self.file.head() or 0):
            self.bear_witness()

    def backend(self, progress: Callable[[int], None] = lambda _: None) -> Backend:
        """The snapshot backend for this visit."""
        if self.abilities.backend == "btrfs":
            return BtrfsBackend()
        table = Table(self.file.db, self.tree.root)
        # by handle nothing is mounted on top of only in a mount of our own
        fast = self.partition.fs_type == "xfs" and self.abilities.by_handle and self.abilities.private_mount
        scan = BULKSTAT if fast else WALK
        if self.abilities.backend == "ficlone":
            return FicloneBackend(self.tree, table, progress, self._max_extents, scan=scan, leave_out=self._leave_out)
        return MetadataBackend(self.tree, table, progress, scan=scan)
