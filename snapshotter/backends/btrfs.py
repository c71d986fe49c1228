"""btrfs: read-only subvolume snapshots; the difference comes from the kernel's send stream. Needs no events to be exact.

.snapfeed/              a subvolume of its own, so that it is in no snapshot
.snapfeed/snapshots/N   the snapshot with seq N
"""

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterable

from comparer.dirty import Dirty
from comparer.errors import DamageError, OperatorError
from comparer.model import FileType, Ident
from snapshotter.linux import btrfs

from .base import SYSTEM_DIR, Backend, Capture
from .btrfs_ranges import FileRanges
from .btrfs_touched import SlowStreamError, searched, sent
from .btrfs_view import SubvolumeView, root_refs

SNAPSHOTS = b"snapshots"
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BUSY = frozenset({errno.EBUSY, errno.EPERM})  # mounted by somebody; being read by a send

log = logging.getLogger(__name__)


class BtrfsBackend:
    """The snapshot backend of one btrfs subvolume.

    `last_generation`: the subvolume's generation as of the last snapshot that this object took (committed or discarded), None
    before the first; see `generation`. `last_search`: why the last capture searched the trees instead of using a send stream,
    None if it did not. The views of a capture hold descriptors of their own until they are garbage or it is discarded.
    """

    kind = "btrfs"
    consistency = "subvolume"
    needs_events = False

    def __init__(self) -> None:
        self.last_generation: int | None = None
        self.last_search: str | None = None

    def prepare(self, root_fd: int) -> None:
        """Make the system directory as a subvolume, 0700 root, with `snapshots/` in it; nothing to do if it is there.

        Raises OperatorError if `root_fd` is not a subvolume's root or the system directory is an ordinary directory; OSError.
        """
        root = btrfs.reopen(root_fd)
        try:
            if os.fstat(root).st_ino != btrfs.BTRFS_FIRST_FREE_OBJECTID:
                raise OperatorError(
                    "not the root of a btrfs subvolume: mount the subvolume itself, not a directory of it"
                )
            self._make_system_directory(root)
            system = os.open(SYSTEM_DIR, _FLAGS, dir_fd=root)
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(SNAPSHOTS, 0o700, dir_fd=system)
            finally:
                os.close(system)
        finally:
            os.close(root)

    @staticmethod
    def _make_system_directory(root: int) -> None:
        try:
            there = os.stat(SYSTEM_DIR, dir_fd=root, follow_symlinks=False)
        except FileNotFoundError:
            btrfs.subvol_create_v2(root, SYSTEM_DIR)
        else:
            if there.st_ino == btrfs.BTRFS_EMPTY_SUBVOL_DIR_OBJECTID:
                os.rmdir(SYSTEM_DIR, dir_fd=root)  # the partition is itself a writable snapshot of an adopted one
                btrfs.subvol_create_v2(root, SYSTEM_DIR)
            elif there.st_ino != btrfs.BTRFS_FIRST_FREE_OBJECTID or not stat.S_ISDIR(there.st_mode):
                raise OperatorError(
                    f"{os.fsdecode(SYSTEM_DIR)} exists and is not a btrfs subvolume, so it would be in every snapshot: "
                    "move it away and let it be made again"
                )
        system = os.open(SYSTEM_DIR, _FLAGS, dir_fd=root)
        try:  # also of one that is there: whoever made it may have been killed
            os.fchown(system, 0, 0)
            os.fchmod(system, 0o700)
        finally:
            os.close(system)

    def generation(self, root_fd: int) -> int:
        """The transaction of the subvolume's last change; commits what is pending first (free if nothing is).

        Nothing has changed since the last snapshot if it equals `last_generation`. Any write moves it on, also one that makes no
        change to report (an access time, an attribute set back). A snapshot moves it on too, to the snapshot's own transaction:
        that is the value to compare with, not what this method said before.
        """
        root = btrfs.reopen(root_fd)
        try:
            btrfs.syncfs(root)
            return btrfs.get_subvol_info(root).generation
        finally:
            os.close(root)

    def sweep(self, root_fd: int, kept: Collection[int]) -> int:
        keep = {b"%d" % seq for seq in kept}
        with _snapshots(root_fd) as directory:
            names = [os.fsencode(name) for name in os.listdir(directory)]
            return sum(_destroy(directory, name) for name in sorted(names) if name.isdigit() and name not in keep)

    def capture(self, root_fd: int, seq: int, head: int | None, dirty: Dirty, more: Callable[[], Dirty]) -> Capture:
        """See the contract; events are not needed and not looked at. The snapshot is on the disk when this returns.

        Raises DamageError if the snapshot `head` is gone or not one of this subvolume, OSError.
        """
        del dirty, more
        name = b"%d" % seq
        root = btrfs.reopen(root_fd)
        try:
            with _snapshots(root) as directory:
                try:
                    btrfs.snap_create_v2(directory, name, root)
                except FileExistsError:  # left by a capture that was never committed
                    btrfs.snap_destroy(directory, name)
                    btrfs.snap_create_v2(directory, name, root)
                try:
                    new = SubvolumeView.open(directory, name)
                    self.last_generation = new.info.otransid
                    return self._compared(root, directory, seq, head, new)
                except BaseException:
                    with contextlib.suppress(OSError):
                        btrfs.snap_destroy(directory, name)
                    raise
        finally:
            os.close(root)

    def _compared(self, root: int, directory: int, seq: int, head: int | None, new: SubvolumeView) -> Capture:
        path = b"/".join((SYSTEM_DIR, SNAPSHOTS, b"%d" % seq))

        def content(ident: Ident, name: bytes) -> bytes | None:
            attr = new.attr(ident)
            if attr is None or attr.type is not FileType.FILE:
                return None
            if head is None:
                return path + b"/" + name
            # a step may speak of a name that a later one changes; the snapshot has those of the end
            for last in new.names(ident):
                prefix = new.path(last.parent)
                if prefix is not None:
                    return b"/".join((path, prefix, last.name) if prefix else (path, last.name))
            return None

        capture = Capture(seq, None, new, content=content, snapshot=path, excluded=_excluded(root, new))
        self.last_search = None
        if head is None:
            return capture
        old = _previous(directory, head, new)
        try:
            capture.touched, named = sent(old, new)
            capture.ranges = FileRanges(old, new, lambda ident: named.get(ident, ()))
        except (OSError, DamageError, SlowStreamError) as error:
            # Whatever kept the kernel from making a stream, or us from following it, the trees themselves hold the whole truth;
            # if it is the disk that fails, this fails too.
            self.last_search = str(error)
            log.warning("snapshot %d: no usable send stream (%s); searching both trees", seq, ascii(self.last_search))
            capture.touched = searched(old, new)
            capture.ranges = FileRanges(old, new)
        capture.old = old
        return capture

    def commit(self, capture: Capture) -> None:
        """Nothing to record: the snapshot holds its metadata itself."""

    def note(self, again: Dirty) -> None:
        """Nothing to remember: events are not needed."""

    def release(self, capture: Capture) -> None:
        for view in (capture.old, capture.new):
            if isinstance(view, SubvolumeView):
                view.close()

    def discard(self, root_fd: int, capture: Capture) -> None:
        self.release(capture)
        self.expire(root_fd, [capture.seq])

    def expire(self, root_fd: int, seqs: Iterable[int]) -> None:
        """See the contract. What is in use (mounted, being sent by somebody) stays for the next `sweep`."""
        with _snapshots(root_fd) as directory:
            for seq in seqs:
                _destroy(directory, b"%d" % seq)


_CHECK: Callable[[], Backend] = BtrfsBackend


class _snapshots(contextlib.AbstractContextManager[int]):  # noqa: N801 - used as a function
    """A descriptor of the directory of snapshots. Raises OSError: ENOENT (not prepared), ELOOP (a symbolic link)."""

    def __init__(self, root_fd: int) -> None:
        system = os.open(SYSTEM_DIR, _FLAGS, dir_fd=root_fd)
        try:
            self.fd = os.open(SNAPSHOTS, _FLAGS, dir_fd=system)
        finally:
            os.close(system)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def _destroy(directory: int, name: bytes) -> bool:
    """Remove a snapshot; False if it was not there, is in use or is not one."""
    try:
        btrfs.snap_destroy(directory, name)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _BUSY and error.errno != errno.EINVAL:
            raise
        log.warning("snapshot %s cannot be removed now: %s", os.fsdecode(name), error.strerror)
        return False
    return True


def _previous(directory: int, head: int, new: SubvolumeView) -> SubvolumeView:
    try:
        old = SubvolumeView.open(directory, b"%d" % head)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamageError(
            f"snapshot {head} is gone, so what changed since cannot be known: {error.strerror}"
        ) from error
    if old.root != new.root or not old.info.read_only:
        raise DamageError(f"snapshot {head} is not a read-only snapshot of this subvolume")
    return old


def _excluded(root: int, new: SubvolumeView) -> tuple[bytes, ...]:
    """The paths of the subvolumes inside this one but the system directory; one moved since the snapshot may be missing."""
    paths = []
    for ino, name in root_refs(root, btrfs.get_subvol_info(root).treeid):
        directory = new.ident(ino)
        if directory is None or (directory == new.root and name == SYSTEM_DIR):
            continue
        prefix = new.path(directory)
        if prefix is not None:
            paths.append(prefix + b"/" + name if prefix else name)
    return tuple(sorted(paths))
