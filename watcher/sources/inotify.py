"""The inotify event source: a watch on every directory. Needs no privilege. Source: inotify(7).

What inotify cannot see (a reconcile finds it): writes through mmap; a write to a file through a name that was removed
while another hard link stays; files opened by handle (NFS). And it does not tell who did it, so the system directory is
left unwatched.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator

from comparer.dirty import Dirty
from comparer.errors import DamageError
from comparer.model import Name
from snapshotter.linux.identity import Identifier

from . import inotify_watches as inotify
from .base import SourceError
from .batched import BatchedReader
from .directory_tree import Directory
from .watched_tree import SYSTEM_DIRECTORY, WatchedTree

READ_SIZE = 256 << 10  # bytes
BATCH = 16 * READ_SIZE
LIMIT = 500_000  # different (directory, name) pairs kept

OVERFLOW = "inotify event queue overflow: raise fs.inotify.max_queued_events"
UNMOUNTED = "the file system was unmounted"


class InotifySource:
    """Watches the directory tree at `root` (an EventSource), without `.snapfeed` and without other file systems in it.

    `identifier`: the file system's rule of identity, found out if None. Too few watches make every `take` incomplete
    (`Dirty.lost`) and the source `pending` until all directories are watched; each `take` tries again. Directories this
    process may not read are left out: a scan cannot read them either. `limit`: as for fanotify.
    """

    kind = "inotify"

    def __init__(self, root: bytes | str, identifier: Identifier | None = None, *, limit: int = LIMIT) -> None:
        self.root = os.fsencode(root)
        self._identifier = identifier
        self._limit = limit
        self._watched: WatchedTree | None = None
        self._reader: BatchedReader | None = None
        self._found: dict[tuple[Directory, bytes], int] = {}
        self._deferred: set[tuple[Directory, bytes]] = set()
        self._detached: set[Directory] = set()
        self._detached_before: set[Directory] = set()
        self._events = 0
        self._lost: str | None = None
        self._expected: asyncio.Event | None = None
        self._canary = -1

    @property
    def pending(self) -> bool:
        gap = self._watched is not None and self._watched.gap is not None
        return bool(self._found) or self._lost is not None or gap

    def start(self, wake: Callable[[], None]) -> None:
        """Watch every directory (O(directories)). Raises SourceError."""
        if self._watched is not None:
            raise ValueError("already started")
        try:
            self._watched = WatchedTree(self.root, self._identifier, self._appeared)
        except OSError as error:
            raise SourceError(f"inotify on {self.root!r}: {error.strerror or error}") from error
        self._reader = BatchedReader(self._watched.watches.get_fd(), self._batch, wake)

    def _appeared(self, directory: Directory, name: bytes) -> None:
        self._found[directory, name] = inotify.IN_CREATE | inotify.CONTENT

    def take(self) -> Dirty:
        """Drain and return; after `close` what was collected before (without idents of objects), then nothing."""
        watched = self._watched
        gap = None
        if watched is not None:
            self._drain(watched, inotify.readable(watched.watches.get_fd()))
            if watched.came_back():
                self._lost = self._lost or "a directory was moved out of sight and came back"
            gap = watched.gap
            if gap is not None:
                watched.rescan()
        dirty = Dirty(lost=self._lost or gap, events=self._events)
        found, self._found, self._lost, self._events = self._found, {}, None, 0
        by_directory: dict[Directory, list[tuple[bytes, int]]] = {}
        for (directory, name), mask in found.items():
            by_directory.setdefault(directory, []).append((name, mask))
        for directory, entries in by_directory.items():
            _add_names(dirty, directory, entries)
            if watched is not None:
                with contextlib.suppress(OSError):  # gone: then the names say all there is to say
                    _add_objects(dirty, watched, directory, entries)
        return dirty

    def _batch(self) -> bool:
        return self._watched is not None and self._drain(self._watched, BATCH) > 0

    def _drain(self, watched: WatchedTree, wanted: int) -> int:
        """Read until the queue is empty, but no more than `wanted` bytes (and what a read brings besides). How many events."""
        done = count = 0
        overflow = False
        while done < wanted:
            try:
                buffer = os.read(watched.watches.get_fd(), READ_SIZE)
            except BlockingIOError:
                break
            done += len(buffer)
            try:
                for wd, mask, _cookie, name in inotify.parse_events(buffer):
                    count += 1
                    overflow |= bool(mask & inotify.IN_Q_OVERFLOW)
                    self._event(watched, wd, mask, name)
            except DamageError as error:
                self._lost = str(error)
        self._events += count
        if overflow:
            self._lost = OVERFLOW
            watched.rescan()
        if len(self._found) > self._limit:
            self._lost = f"more than {self._limit} different things were touched"
        if self._lost is not None:
            self._found.clear()
        self._settle(watched)
        return count

    def _event(self, watched: WatchedTree, wd: int, mask: int, name: bytes) -> None:
        if wd == self._canary and self._expected is not None:
            self._expected.set()
            return
        directory = watched.tree.by_wd.get(wd)
        if directory is None:
            return
        if mask & inotify.IN_IGNORED:
            watched.watches.forget(wd)
            watched.drop(directory)
        elif mask & inotify.IN_UNMOUNT:
            self._lost = UNMOUNTED
        elif directory is not watched.tree.root or name != SYSTEM_DIRECTORY:
            if name and mask & inotify.IN_ISDIR:
                self._subdirectory(watched, directory, mask, name)
            self._found[directory, name] = self._found.get((directory, name), 0) | mask

    def _subdirectory(self, watched: WatchedTree, parent: Directory, mask: int, name: bytes) -> None:
        """Look at what is there now, whatever the event said: what changes after that look gives another event.

        So cookies are not needed, and events read late do no harm.
        """
        known = parent.children.get(name)
        if mask & inotify.GONE:
            if known is not None:
                watched.tree.detach(known)
                self._detached.add(known)
        elif mask & inotify.IN_MOVED_TO or known is None:  # else a look since the event has found it
            self._look(watched, parent, name)

    def _look(self, watched: WatchedTree, parent: Directory, name: bytes) -> None:
        if not watched.look(parent, name):
            self._deferred.add((parent, name))

    def _settle(self, watched: WatchedTree) -> None:
        """After a drain: places that could not be looked at (their directory was moved itself), and what did not return."""
        deferred, self._deferred = self._deferred, set()
        for parent, name in deferred:
            if watched.tree.by_wd.get(parent.wd) is parent:
                self._look(watched, parent, name)
        for directory in self._detached_before:
            if directory.parent is None:  # it has not arrived anywhere: it is outside now, or deleted
                watched.drop(directory)
        self._detached_before, self._detached = self._detached, set()

    @contextlib.contextmanager
    def expect_own(self) -> Iterator[asyncio.Event]:
        """For `canary.self_test`: the system directory is watched meanwhile. Raises OSError if it cannot be."""
        if self._watched is None:
            raise ValueError("not started")
        fd = self._watched.open_system_directory()
        try:
            self._canary = self._watched.watches.watch(fd)
        finally:
            os.close(fd)
        self._expected = asyncio.Event()
        try:
            yield self._expected
        finally:
            if self._watched is not None:
                self._watched.watches.unwatch(self._canary)
            self._expected, self._canary = None, -1

    def close(self) -> None:
        """Stop watching; any number of times."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._watched is not None:
            self._watched.close()
            self._watched = None


def _add_names(dirty: Dirty, directory: Directory, entries: list[tuple[bytes, int]]) -> None:
    for name, mask in entries:
        if not name or mask & (inotify.GONE | inotify.CAME):  # no name: an event on the directory itself
            dirty.objects.add(directory.ident)
        if name:
            dirty.names.add(Name(directory.ident, name))


def _add_objects(dirty: Dirty, watched: WatchedTree, directory: Directory, entries: list[tuple[bytes, int]]) -> None:
    """Who is behind the names now. Raises OSError if the directory is gone."""
    fd = watched.open(directory)
    try:
        for name, mask in entries:
            if name:
                with contextlib.suppress(OSError):
                    child = watched.identifier.ident(fd, name)
                    dirty.objects.add(child)
                    if mask & inotify.CONTENT:
                        dirty.written.add(child)
    finally:
        os.close(fd)
