"""Looking at everything: the first baseline, and the reconcile that tells what differs from the metadata table.

Neither reads a byte of file data. What cannot be read raises OSError: it is never taken for absent.
"""

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from comparer.dirty import Dirty
from comparer.model import Attr, FileType, Ident, Name

from .linux.statx import Stat, statx
from .live import Found, LiveTree
from .table import Table

Progress = Callable[[int], None]
REPORT_EVERY = 1024  # entries
# Two ticks of the slowest kernel (100 Hz): what changed this shortly before it was looked at may change again unseen.
GUARD_NS = 20_000_000
_TRIES = 5


class Scan(NamedTuple):
    """How a partition is looked at as a whole: for its first baseline, and for a reconcile."""

    fill: Callable[[LiveTree, Table, Progress], Dirty]
    differences: Callable[[LiveTree, Table, Progress], Dirty]


class Places:
    """Where the directories of a walk are, for those who must open them by path."""

    def __init__(self, root: Ident) -> None:
        self._root = root
        self._places: dict[Ident, Name] = {}

    def put(self, directory: Ident, name: Name) -> None:
        self._places[directory] = name

    def name(self, directory: Ident) -> Name | None:
        return self._places.get(directory)

    def path(self, directory: Ident) -> list[bytes] | None:
        components: list[bytes] = []
        while directory != self._root:
            name = self._places.get(directory)
            if name is None or len(components) > len(self._places):
                return None
            components.append(name.name)
            directory = name.parent
        return components[::-1]


def reached(tree: LiveTree, directory: Ident, places: Places) -> int | None:
    """A directory that was seen, as `tree.directory`; None if it is no longer where it was seen.

    Raises OSError, ESTALE, if it is there and does not open: open_by_handle_at(2) answers ESTALE for every error, also where the
    disk cannot be read; a name tells which. One that is moved away and back may be missed and then found there: tried again.
    """
    for _ in range(_TRIES):
        dirfd = tree.directory(directory, places.path)
        if dirfd is not None:
            return dirfd
        place = places.name(directory)
        if place is None:
            return None
        parent = tree.directory(place.parent, places.path)
        found = tree.look(parent, place.name) if parent is not None else None
        if parent is None or found is None or found.ident != directory:
            return None
        if tree.codec is None and (dirfd := tree.enter(parent, place.name, directory)) is not None:
            return (
                dirfd  # one of those above it is on the move, so that a path from the root leads there by chance only
            )
    path = b"/".join(places.path(directory) or [])
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)


def walk(tree: LiveTree, progress: Progress) -> Iterator[tuple[Name, Found]]:
    """Every entry of the partition, directories before what they hold. What moves meanwhile may be missed or seen twice."""
    places = Places(tree.root)
    stack = [tree.root]
    seen = 0
    while stack:
        directory = stack.pop()
        dirfd = reached(tree, directory, places)
        if dirfd is None:
            continue  # removed or moved since it was seen: an event tells
        for name, _ in list(tree.list(dirfd)):
            found = tree.look(dirfd, name)
            if found is None:
                continue
            entry = Name(directory, name)
            yield entry, found
            seen += 1
            if seen % REPORT_EVERY == 0:
                progress(seen)
            if found.attr.type is FileType.DIR:
                places.put(found.ident, entry)
                stack.append(found.ident)
    progress(seen)


def fill(tree: LiveTree, table: Table, progress: Progress) -> Dirty:
    """Make the table from a walk. A directory seen twice is where it was seen last.

    Returns what changed so shortly before it was looked at that it has to be looked at again. Raises OSError.
    """
    again = Dirty()
    table.clear()
    table.put(tree.root, tree.look_at_root(), None)
    for name, found in walk(tree, progress):
        if found.attr.ctime_ns >= time.clock_gettime_ns(time.CLOCK_REALTIME) - GUARD_NS:
            again.objects.add(found.ident)
        if found.attr.type is FileType.DIR:
            for other in table.names(found.ident):
                table.unpoint(other)
        old = table.current(found.ident.ino)
        if old is not None and old != found.ident:
            for other in table.names(old):
                table.unpoint(other)
        before = table.child(*name)
        if before is not None and before != found.ident:
            table.unpoint(name)
        table.put(found.ident, found.attr, None)
        table.point(name, found.ident)
    return again


def same(known: Attr, now: Stat) -> bool:
    """Whether nothing can have changed: the change time covers names, attributes and content."""
    return (
        known.ctime_ns == now.ctime_ns
        and known.mtime_ns == now.mtime_ns
        and known.size == now.size
        and known.mode == stat.S_IMODE(now.mode)
        and known.nlink == now.nlink
        and known.uid == now.uid
        and known.gid == now.gid
        and known.btime_ns == now.btime_ns
    )


def differences(tree: LiveTree, table: Table, progress: Progress) -> Dirty:
    """Where the partition differs from the table: names to look at (and the root, if it does)."""
    dirty = Dirty()
    root = table.attr(tree.root)
    if root is None or not same(root, statx(tree.root_fd)):
        dirty.objects.add(tree.root)
    places = Places(tree.root)
    stack = [tree.root]
    seen = 0
    while stack:
        directory = stack.pop()
        dirfd = reached(tree, directory, places)
        if dirfd is None:
            continue
        known = dict(table.children(directory))
        for name, _ in list(tree.list(dirfd)):
            entry = Name(directory, name)
            ident = known.pop(name, None)
            below = _compare(tree, table, dirfd, entry, ident, dirty)
            if below is not None:
                places.put(below, entry)
                stack.append(below)
            seen += 1
            if seen % REPORT_EVERY == 0:
                progress(seen)
        dirty.names.update(Name(directory, name) for name in known)
    progress(seen)
    return dirty


def _compare(tree: LiveTree, table: Table, dirfd: int, entry: Name, ident: Ident | None, dirty: Dirty) -> Ident | None:
    """Compare one entry; returns the directory to go on with, also a new one: known ones may have been moved into it."""
    try:
        now = statx(dirfd, entry.name)
    except FileNotFoundError:
        dirty.names.add(entry)
        return None
    attr = table.attr(ident) if ident is not None else None
    if attr is not None and ident is not None and ident.ino == now.ino and same(attr, now):
        return ident if attr.type is FileType.DIR else None
    dirty.names.add(entry)
    if not stat.S_ISDIR(now.mode) or now.dev != tree.dev or now.mount_root:
        return None
    try:
        below, now = tree.identify(dirfd, entry.name)
    except FileNotFoundError:
        return None
    return below if stat.S_ISDIR(now.mode) else None  # something else has taken its name meanwhile


WALK = Scan(fill, differences)
