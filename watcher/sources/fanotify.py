"""The fanotify event source: one filesystem mark, every event with handles instead of paths. Needs CAP_SYS_ADMIN.

The mark belongs to the superblock: it holds no mount and no file, so a user's `umount` succeeds as if nobody watched.
After the last umount the mark is gone and the source stays silent for ever, also if the device is mounted again: whoever
follows the mount table closes it and makes a new one.

btrfs has one superblock for all subvolumes and marks only its top level, so the mark is placed through a detached mount
of the top level; events of other subvolumes are dropped by the root objectid in their handles.
"""

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator

from comparer.dirty import Dirty
from comparer.errors import DamageError
from snapshotter.linux import fanotify as kernel
from snapshotter.linux import handles, mount_api

from . import fanotify_events as events
from .base import SourceError
from .batched import BatchedReader

READ_SIZE = 256 << 10  # bytes
READS_IN_A_BATCH = 64  # then the loop's other tasks have their turn
LIMIT = 500_000  # different records kept; about 200 bytes each

# A directory entry that goes or comes tells of its object too, so FAN_DELETE_SELF and FAN_MOVE_SELF would say nothing new.
_MASK = (
    events.FAN_CREATE
    | events.FAN_DELETE
    | events.FAN_MODIFY
    | events.FAN_ATTRIB
    | events.FAN_CLOSE_WRITE
    | events.FAN_ONDIR
)
_INIT = kernel.FAN_CLASS_NOTIF | kernel.FAN_CLOEXEC | kernel.FAN_NONBLOCK
_IGNORE = kernel.FAN_MARK_ADD | kernel.FAN_MARK_IGNORE_SURV | kernel.FAN_MARK_EVICTABLE | kernel.FAN_MARK_ONLYDIR
_MARK = kernel.FAN_MARK_ADD | kernel.FAN_MARK_FILESYSTEM | kernel.FAN_MARK_ONLYDIR
_REMEDY = {
    errno.EPERM: "needs CAP_SYS_ADMIN",
    errno.ENOSYS: "the kernel has none",
    errno.EINVAL: "the kernel is too old (5.9 needed)",
    errno.EMFILE: "too many groups: raise fs.fanotify.max_user_groups",
    errno.ENOSPC: "too many marks: raise fs.fanotify.max_user_marks",
    errno.EOPNOTSUPP: "this file system has no file handles",
    errno.ENODEV: "this file system has no fsid",
    errno.EXDEV: "the subvolume's file system cannot be reached as a whole",
}


class FanotifySource:
    """Watches the file system mounted at `root` (an EventSource).

    `ignored_pids`: whose changes are not to be seen, besides this process; may be changed any time (`ignored_pids`).
    `device`: the device to reach a btrfs's top level through; found in the mount table if None. `unlimited=False`: the
    kernel's queue of 16,384 events, which can overflow. `limit`: how many different things touched are kept between two
    takes; with more, the source gives up being complete (`Dirty.lost`) instead of growing.
    """

    kind = "fanotify"

    def __init__(
        self,
        root: bytes | str,
        *,
        ignored_pids: Iterable[int] = (),
        device: bytes | str | None = None,
        unlimited: bool = True,
        limit: int = LIMIT,
    ) -> None:
        self.root = os.fsencode(root)
        self.ignored_pids = set(ignored_pids)
        self._device = os.fsencode(device) if device is not None else None
        self._unlimited = unlimited
        self._limit = limit
        self._fd = -1
        self._subvolume = b""
        self._reader: BatchedReader | None = None
        self._found: dict[bytes, int] = {}
        self._events = 0
        self._lost: str | None = None
        self._expected: asyncio.Event | None = None

    @property
    def pending(self) -> bool:
        return bool(self._found) or self._lost is not None

    def start(self, wake: Callable[[], None]) -> None:
        """Place the mark. Raises SourceError."""
        if self._fd >= 0:
            raise ValueError("already started")
        try:
            root_fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise SourceError(f"fanotify: cannot open {self.root!r}: {error.strerror}") from error
        try:
            self._subvolume = _subvolume(root_fd)
            self._fd = self._group(root_fd)
        except handles.UnknownHandleError as error:
            raise SourceError(f"fanotify: {error} on {self.root!r}") from error
        except OSError as error:
            reason = _REMEDY.get(error.errno or 0, error.strerror)
            raise SourceError(
                f"fanotify on {self.root!r}: {reason} ({errno.errorcode.get(error.errno or 0)})"
            ) from error
        finally:
            os.close(root_fd)
        self._reader = BatchedReader(self._fd, self._batch, wake)

    def _group(self, root_fd: int) -> int:
        """A group with its mark, as good as this kernel can. Raises OSError."""
        queue = kernel.FAN_UNLIMITED_QUEUE if self._unlimited else 0
        try:  # since 5.17
            return self._marked(_INIT | queue | kernel.FAN_REPORT_DFID_NAME_TARGET, _MASK | events.FAN_RENAME, root_fd)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        moved = events.FAN_MOVED_FROM | events.FAN_MOVED_TO
        return self._marked(_INIT | queue | kernel.FAN_REPORT_DFID_NAME | kernel.FAN_REPORT_FID, _MASK | moved, root_fd)

    def _marked(self, flags: int, mask: int, root_fd: int) -> int:
        group = kernel.fanotify_init(flags)
        try:
            try:
                kernel.fanotify_mark(group, _MARK, mask, root_fd)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                top = mount_api.btrfs_top_level(self._device or mount_api.mount_of(root_fd).source)
                try:
                    kernel.fanotify_mark(group, _MARK, mask, top, b".")
                finally:
                    os.close(top)
        except BaseException:
            os.close(group)
            raise
        return group

    def leave_out(self, directory: int) -> None:
        """No more events of what is in a directory, which is ours: making a million clones makes millions of them. In any thread.

        A favour, not a promise: the kernel forgets it with the directory's inode, and cannot do so before Linux 6.0.
        """
        with contextlib.suppress(OSError):
            kernel.fanotify_mark(self._fd, _IGNORE, _MASK | events.FAN_EVENT_ON_CHILD, directory)

    def take(self) -> Dirty:
        """Drain and return; after `close` what was collected before, then nothing."""
        if self._fd >= 0:
            self._drain(kernel.queued(self._fd))
        found, count, lost = self._found, self._events, self._lost
        self._found, self._events, self._lost = {}, 0, None
        dirty = events.decode(found, self._subvolume)
        dirty.events = count
        dirty.lost = lost or dirty.lost
        return dirty

    def _batch(self) -> bool:
        return self._drain(None) > 0

    def _drain(self, wanted: int | None) -> int:
        """Read until the queue is empty, but no more than `wanted` events, or a batch if None. How many were not our own."""
        ignored = frozenset((os.getpid(), *self.ignored_pids))
        count = others = reads = 0
        while (reads < READS_IN_A_BATCH) if wanted is None else (count < wanted):
            try:
                buffer = os.read(self._fd, READ_SIZE)
            except BlockingIOError:
                break
            except OSError as error:
                self._lost = f"fanotify: {error.strerror}"
                others += 1
                break
            reads += 1
            try:
                read, own = events.collect(buffer, self._found, ignored, self._subvolume)
            except DamageError as error:
                self._lost = str(error)
                others += 1
                continue
            count += read
            others += read - own
            if own and self._expected is not None:
                self._expected.set()
            if len(self._found) > self._limit:
                self._lost = f"more than {self._limit} different things were touched"
                self._found.clear()
            elif self._lost is not None and self._found:
                self._found.clear()
        self._events += count
        return others

    @contextlib.contextmanager
    def expect_own(self) -> Iterator[asyncio.Event]:
        """For `canary.self_test`: events of this process, which are otherwise dropped as they are read, set the Event."""
        if self._fd >= 0:
            self._drain(kernel.queued(self._fd))
        self._expected = asyncio.Event()
        try:
            yield self._expected
        finally:
            self._expected = None

    def close(self) -> None:
        """Stop watching; any number of times."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _subvolume(root_fd: int) -> bytes:
    """On btrfs the root objectid of the subvolume as it is in handles, else nothing. Raises as name_to_handle_at."""
    handle = handles.name_to_handle_at(root_fd)
    handles.decode(*handle)
    return handle.data[8:16] if handle.type == 0x4D else b""
