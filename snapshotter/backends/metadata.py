"""Snapshots of metadata alone: for file systems without reflink (ext4, tmpfs, ...). The state is the table in the system file."""

import time
from collections.abc import Callable, Collection, Iterable

from comparer.dirty import Dirty
from comparer.model import UNKNOWN_RANGES, Attr, ByteRanges, FileType, Ident, Name
from snapshotter.live import LiveTree
from snapshotter.look import Look, Outcome
from snapshotter.scan import GUARD_NS, WALK, Progress, Scan
from snapshotter.table import Overlay, Table

from .base import Capture


def no_progress(_entries: int) -> None:
    """Nobody watches."""


def _guard_time() -> int:
    """What changes from then on may, when it is looked at from now on, have changed too recently."""
    return time.clock_gettime_ns(time.CLOCK_REALTIME) - GUARD_NS


class MetadataBackend:
    kind = "metadata"
    consistency = "metadata"
    needs_events = True

    def __init__(self, tree: LiveTree, table: Table, progress: Progress = no_progress, *, scan: Scan = WALK) -> None:
        self.tree = tree
        self.table = table
        self.progress = progress
        self.scan = scan

    def sweep(self, root_fd: int, kept: Collection[int]) -> int:  # noqa: ARG002 - nothing lies outside the system file
        return 0

    def capture(self, root_fd: int, seq: int, head: int | None, dirty: Dirty, more: Callable[[], Dirty]) -> Capture:  # noqa: ARG002
        """As the contract says; inside the transaction that makes the snapshot, since a baseline fills the table."""
        if head is None:
            return self._baseline(seq, more)
        for ident, name in self.table.again():
            if name is None:
                dirty.objects.add(ident)
            else:
                dirty.names.add(Name(ident, name))
        if dirty.lost:
            dirty.merge(self.scan.differences(self.tree, self.table, self.progress))
        since = _guard_time()
        self.table.remember()
        outcome = Look(self.tree, self.table).run(dirty, more)
        self._take_content(seq, outcome, dirty)
        self._guard(outcome, since)
        return Capture(
            seq,
            self.table,
            outcome.view,
            outcome.touched,
            ranges=lambda ident: self._ranges(ident, outcome.view, dirty),
            content=self._content_of(outcome.view),
            again=outcome.again,
        )

    def _baseline(self, seq: int, more: Callable[[], Dirty]) -> Capture:
        dirty = self.scan.fill(self.tree, self.table, self.progress)
        dirty.merge(more())
        since = _guard_time()
        outcome = Look(self.tree, self.table).run(dirty, more)
        self._apply(outcome.view)
        self._take_everything(seq, outcome)
        self._guard(outcome, since)
        return Capture(seq, None, self.table, content=self._content_of(self.table), again=outcome.again)

    def commit(self, capture: Capture) -> None:
        if isinstance(capture.new, Overlay):
            self._apply(capture.new)
        self.note(capture.again)

    def _apply(self, view: Overlay) -> None:
        """Make the overlay part of the table: what goes first, so that a reused inode number finds its place free."""
        for name, ident in view.entries.items():
            if ident is None:
                self.table.unpoint(name)
        for ident, attr in view.attrs.items():
            if attr is None:
                self.table.drop(ident)
        for ident, attr in view.attrs.items():
            if attr is not None:
                self.table.put(ident, attr, self._clone_of(ident))
        for name, ident in view.entries.items():
            if ident is not None:
                self.table.point(name, ident)

    def _guard(self, outcome: Outcome, since: int) -> None:
        """Coarse time stamps: look again at what had changed a moment before it was looked at."""
        recent = [i for i, attr in outcome.view.attrs.items() if attr is not None and attr.ctime_ns >= since]
        outcome.again.objects.update(recent)

    def note(self, again: Dirty) -> None:
        self.table.set_again(again.objects, again.names)

    def release(self, capture: Capture) -> None:
        pass

    def discard(self, root_fd: int, capture: Capture) -> None:
        pass

    def expire(self, root_fd: int, seqs: Iterable[int]) -> None:
        pass

    # ---- content: none here

    def _clone_of(self, ident: Ident) -> int | None:  # noqa: ARG002
        return None

    def _take_content(self, seq: int, outcome: Outcome, dirty: Dirty) -> None:
        pass

    def _take_everything(self, seq: int, outcome: Outcome) -> None:
        pass

    def _content_of(self, view: Overlay | Table) -> Callable[[Ident, bytes], bytes | None]:  # noqa: ARG002
        return lambda _ident, _path: None

    def _ranges(self, ident: Ident, view: Overlay, dirty: Dirty) -> ByteRanges | None:
        before, after = self.table.attr(ident), view.attr(ident)
        if before is None or after is None or not content_may_differ(ident, before, after, dirty):
            return None
        return UNKNOWN_RANGES


def content_may_differ(ident: Ident, before: Attr, after: Attr, dirty: Dirty) -> bool:
    """Whether a file's bytes can have changed: a write was seen, or its size or modification time moved."""
    if after.type is not FileType.FILE:
        return False
    return ident in dirty.written or (before.size, before.mtime_ns) != (after.size, after.mtime_ns)
