"""The inotify event source: a watch on every directory. Needs no privilege. Source: inotify(7).

What inotify cannot see (a reconcile finds it): writes through mmap; files opened by handle (NFS); what was done to a file
through a hard link that came and went before anybody looked (at least its change time is another), since an event tells a
name and not who had it. And it does not tell who did it, so the system directory is left unwatched.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator

from comparer.dirty import Dirty
from comparer.errors import DamageError
from comparer.model import Ident, Name
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
        self._entered: set[Directory] = set()
        self._came: set[tuple[Directory, bytes]] = set()
        self._met: set[Ident] = set()
        self._kept: set[Directory] = set()  # for one more `take`
        self._places: set[tuple[Directory, bytes]] = set()
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
            self._watched = WatchedTree(self.root, self._identifier, self._entered.add, self._appeared)
        except OSError as error:
            raise SourceError(f"inotify on {self.root!r}: {error.strerror or error}") from error
        self._reader = BatchedReader(self._watched.watches.get_fd(), self._batch, wake)

    def _appeared(self, directory: Directory, name: bytes) -> None:
        self._found[directory, name] = inotify.IN_CREATE | inotify.CONTENT

    def leave_out(self, directory: int) -> None:
        """The system directory is not watched anyway."""

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
        dirty.written.update(directory.ident for directory in self._entered)
        dirty.objects.update(dirty.written, self._met)
        self._entered.clear()
        self._met.clear()
        by_directory: dict[Directory, list[tuple[bytes, int]]] = {}
        for (directory, name), mask in found.items():
            by_directory.setdefault(directory, []).append((name, mask))
        kept: set[Directory] = set()
        for directory, entries in by_directory.items():
            _add_names(dirty, directory, entries)
            if watched is not None:
                try:
                    _add_objects(dirty, watched, directory, entries)
                except OSError:  # gone: then the names say all there is to say; or moved, as the next events will tell
                    if watched.has(directory) and directory not in self._kept:
                        kept.add(directory)
                        self._found.update(
                            {(directory, name): m for name, m in entries if name and m & inotify.CONTENT}
                        )
        self._kept = kept
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
                overflow = True
        self._events += count
        if overflow:
            self._lost = self._lost or OVERFLOW
            watched.rescan()
        if len(self._found) > self._limit:
            self._lost = f"more than {self._limit} different things were touched"
        if self._lost is not None:
            self._found.clear()
            self._entered.clear()
            self._met.clear()
        self._settle(watched)
        return count

    def _event(self, watched: WatchedTree, wd: int, mask: int, name: bytes) -> None:
        if wd == self._canary and self._expected is not None:
            self._expected.set()
            return
        if mask & inotify.IN_IGNORED:
            watched.watches.forget(wd)
        directory = watched.tree.by_wd.get(wd)
        if directory is None:
            return
        if mask & inotify.IN_IGNORED:
            watched.gone(directory)
        elif mask & inotify.IN_UNMOUNT:
            self._lost = UNMOUNTED
        elif directory is not watched.tree.root or name != SYSTEM_DIRECTORY:
            if name and mask & inotify.IN_ISDIR and self._moves(directory, mask, name):
                self._places.add((directory, name))
            self._found[directory, name] = self._found.get((directory, name), 0) | mask
            if mask & inotify.CONTENT:
                self._came.discard((directory, name))  # made by open(2), so it is nobody's hard link
            elif mask & inotify.CAME and not mask & inotify.IN_ISDIR:
                self._came.add((directory, name))

    @staticmethod
    def _moves(parent: Directory, mask: int, name: bytes) -> bool:
        """Whether another directory may be in a place now; an attribute may have been the one that kept us out."""
        return bool(mask & (inotify.GONE | inotify.CAME)) or (
            bool(mask & inotify.IN_ATTRIB) and name not in parent.children
        )

    def _settle(self, watched: WatchedTree) -> None:
        """After a drain: look at every place that events named, as it is now, whatever they said was there.

        What changes after a look gives another event. So cookies are not needed, events read late do no harm, and a directory
        without a place when all was looked at is outside, or deleted, or its arrival is not told yet: it has until the next time.
        """
        places: set[tuple[Directory, bytes]] = set()
        while self._places and self._places != places:  # again where a directory on the way had been moved itself
            places, self._places = self._places, set()
            for parent, name in places:
                if watched.has(parent) and not watched.look(parent, name):
                    self._places.add((parent, name))
            watched.list_again()
        self._meet(watched)
        homeless = watched.tree.homeless
        for directory in self._detached_before:
            if directory in homeless:
                watched.drop(directory)
        self._detached_before = set(homeless)

    def _meet(self, watched: WatchedTree) -> None:
        """Who was given a further name: when that is removed before the next `take`, nothing tells any more."""
        came, self._came = self._came, set()
        by_directory: dict[Directory, list[bytes]] = {}
        for directory, name in came:
            by_directory.setdefault(directory, []).append(name)
        for directory, names in by_directory.items():
            with contextlib.suppress(OSError):
                fd = watched.open(directory)
                try:
                    self._met |= _linked(watched, fd, names)
                finally:
                    os.close(fd)

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


def _linked(watched: WatchedTree, fd: int, names: list[bytes]) -> set[Ident]:
    linked = set()
    for name in names:
        with contextlib.suppress(OSError):
            if os.stat(name, dir_fd=fd, follow_symlinks=False).st_nlink > 1:
                linked.add(watched.identifier.ident(fd, name))
    return linked


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
