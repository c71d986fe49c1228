"""Which objects may differ between two btrfs snapshots: as the kernel's send stream says, or as the trees say where it cannot."""

from collections.abc import Iterator

from comparer.model import FileType, Ident, Range
from comparer.sendreplay import Replay
from comparer.sendstream import Parser
from snapshotter.linux import btrfs

from .btrfs_view import SubvolumeView


def sent(old: SubvolumeView, new: SubvolumeView) -> tuple[set[Ident], dict[Ident, list[Range]]]:
    """The objects touched and, per file, the ranges written or turned into holes. Costs what changed.

    Raises OSError if the kernel cannot make the stream (a path of more than 4,095 bytes, a balance, ...), DamageError if the
    stream does not fit the snapshots: `searched` still can answer then.
    """
    replay = Replay(old.root, old.child, new.ident)
    parser = Parser()
    for data in btrfs.send_stream(new.fd, old.info.treeid):
        for command in parser.feed(data):
            replay.apply(command)
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
