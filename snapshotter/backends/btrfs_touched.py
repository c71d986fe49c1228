"""Which objects may differ between two btrfs snapshots: as the kernel's send stream says, or as the trees say where it cannot."""

import time
from collections.abc import Callable, Iterator

from comparer.errors import SnapfeedError
from comparer.model import FileType, Ident, Range
from comparer.sendreplay import Replay
from comparer.sendstream import Parser
from snapshotter.linux import btrfs

from .btrfs_view import SubvolumeView

# The kernel builds each path of a stream by climbing the tree, so a chain of new directories costs the square of its depth or
# more (1,000 levels: 10 s), where a search costs nothing extraordinary. A stream slower than this is given up.
PATIENCE = 2.0  # seconds
SLOWEST = 2000  # commands a second; 100,000 are usual


class SlowStreamError(SnapfeedError):
    """The kernel makes the stream so slowly that searching the trees is cheaper."""


def sent(
    old: SubvolumeView, new: SubvolumeView, clock: Callable[[], float] = time.monotonic
) -> tuple[set[Ident], dict[Ident, list[Range]]]:
    """The objects touched and, per file, the ranges written or turned into holes. Costs what changed.

    Raises OSError if the kernel cannot make the stream (a path of more than 4,095 bytes, a balance, ...), DamageError if the
    stream does not fit the snapshots, SlowStreamError: `searched` still can answer then.
    """
    replay = Replay(old.root, old.child, new.ident)
    parser = Parser()
    start = clock()
    for data in btrfs.send_stream(new.fd, old.info.treeid):
        for command in parser.feed(data):
            replay.apply(command)
        took = clock() - start
        if took > PATIENCE and replay.commands < took * SLOWEST:
            raise SlowStreamError(f"{replay.commands} commands of the send stream in {took:.1f} s")
    parser.close()
    return replay.touched, replay.changed


def searched(old: SubvolumeView, new: SubvolumeView) -> set[Ident]:
    """The objects touched, from the trees alone: complete, and in need of nothing but tree searches.

    Whatever lies in a tree block written since the old snapshot is touched (a superset). What is gone can only be missing from a
    directory that changed, so of every such directory both lists of entries are compared, and of every directory gone all it held
    is taken. Costs the changed tree blocks and the changed directories' size.
    """
    touched: set[Ident] = set()
    gone: list[Ident] = []
    for ino in new.changed_since(old.info.otransid):
        was, now = old.ident(ino), new.ident(ino)
        touched.update(ident for ident in (was, now) if ident is not None)
        if was is None or not _is_directory(old, was):
            continue
        if was != now:
            gone.append(was)
        elif old.transid(was) != new.transid(was):
            for _, child in set(old.children(was)) ^ set(new.children(was)):
                touched.add(child)
                gone += _gone(old, new, child)
    seen = set(gone)
    while gone:
        directory = gone.pop()
        for _, ident in old.children(directory):
            touched.add(ident)
            below = [d for d in _gone(old, new, ident) if d not in seen]
            seen.update(below)
            gone += below
    return touched


def _gone(old: SubvolumeView, new: SubvolumeView, ident: Ident) -> Iterator[Ident]:
    """`ident` if it was a directory and is no more."""
    if _is_directory(old, ident) and new.attr(ident) is None:
        yield ident


def _is_directory(view: SubvolumeView, ident: Ident) -> bool:
    attr = view.attr(ident)
    return attr is not None and attr.type is FileType.DIR
