"""One piece of work on one partition: a snapshot, its comparison, its diff in the journal, in one transaction. Plain functions.

They run in the partition's own thread, which is also the only one that has its system file open.
"""

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from comparer.compare import baseline, compare
from comparer.dirty import Dirty
from comparer.errors import SnapfeedError
from comparer.model import Change, FileType
from feed.encode import encode_bytes
from feed.pages import chunks
from snapshotter.backends.base import Backend, Capture
from snapshotter.retention import Limits, needed, prune, to_squash
from snapshotter.systemfile import DiffRow, SnapshotRow, SystemFile
from snapshotter.table import Table
from snapshotter.visit import Visit

from .live_outbox import LARGEST, Fresh
from .outbox import OFFERED
from .spans import squashed_pages

log = logging.getLogger(__name__)
_SQUASHES = 4  # after one snapshot


@dataclass(frozen=True, slots=True)
class Order:
    """What the pipeline asks for. `now_ns` is the wall clock, for people; `chunk_limit` bytes a page's changes may take.

    `pinned`: a snapshot that is being read, and is kept with all after it. `live`: the publisher waits for this diff.
    """

    trigger: str
    dirty: Dirty
    volume: int
    now_ns: int
    keep: int
    chunk_limit: int
    limits: Limits = field(default_factory=Limits)
    pinned: int | None = None
    live: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """`seq` is the head's. `recorded`: a snapshot was made (something had changed). `again`: to be looked at next time.

    `own` is the bytes this thread wrote meanwhile, `read` those it read, `seconds` how long it took. `backlog`: diffs to publish.
    `journal`: see `journal_of`.
    """

    seq: int
    recorded: bool
    changes: int
    volume: int
    trigger: str
    again: int
    own: int
    read: int
    seconds: float
    excluded: tuple[bytes, ...] = ()
    backlog: int = 0
    journal: tuple[int, int, int] = (0, 0, 0)


def journal_of(file: SystemFile) -> tuple[int, int, int]:
    """(oldest diff, newest, bytes) of the journal."""
    oldest = file.journal(most=1)
    return (oldest[0].seq if oldest else 0, file.head() or 0, file.journal_bytes())


def thread_io() -> tuple[int, int]:
    """(bytes read, bytes written) by this thread so far: /proc/thread-self/io; (0, 0) where there is none."""
    try:
        with open("/proc/thread-self/io", encoding="ascii") as file:
            fields = dict(line.split(": ") for line in file.read().splitlines())
    except OSError:
        return 0, 0
    return int(fields["rchar"]), int(fields["wchar"])


def take(
    visit: Visit,
    order: Order,
    more: Callable[[], Dirty],
    progress: Callable[[int], None],
    captured: Callable[[], None] = lambda: None,
    committed: Callable[[Done, Fresh | None], None] = lambda _done, _fresh: None,
) -> Done:
    """Take a snapshot, or find that nothing changed. `captured` is called, in this thread, when the snapshot has its data.

    `committed` is called, in this thread as well, when a snapshot and its diff are on the disk and may be published: what comes
    after that is tidying. It is given the diff itself if the order says that the publisher waits for it, and it is small.

    Raises OSError, TransientError, DamageError; the partition is then as it was, but for what `sweep` removes.
    """
    started = time.perf_counter()
    read_before, written_before = thread_io()
    file, backend = visit.file, visit.backend(progress)
    capture: Capture | None = None
    recorded = committing = False
    forgotten: list[int] = []
    fresh: Fresh | None = None
    try:
        with file.transaction():
            seq, head = file.next_seq(), file.head()
            capture = backend.capture(visit.root_fd, seq, head, order.dirty, more)
            captured()
            bodies = _Bodies(LARGEST if order.live else 0)
            changes = _journal(file, capture, order, bodies)
            if changes or head is None:
                diff = _record(file, backend, capture, order, changes, head)
                if bodies.all is not None:
                    fresh = Fresh(diff, tuple(bodies.all))
                    if file.offered() < seq:
                        file.offer(seq + OFFERED)
                held = [n for n in (needed(file, order.limits, order.now_ns), order.pinned) if n is not None]
                forgotten = file.forget(order.keep, min(held, default=None))
                prune(file, order.limits, order.now_ns)
                recorded = True
            else:
                backend.note(capture.again)
            committing = True
    except BaseException:
        if capture is not None and not committing:
            backend.discard(visit.root_fd, capture)
        elif capture is not None:  # a commit that failed may be found to be one: `sweep` knows then
            backend.release(capture)
        raise
    backend.release(capture)

    def done() -> Done:
        read_after, written_after = thread_io()
        return Done(
            seq if recorded or head is None else head,
            recorded,
            changes,
            order.volume,
            order.trigger,
            len(capture.again.objects) + len(capture.again.names),
            written_after - written_before,
            read_after - read_before,
            time.perf_counter() - started,
            capture.excluded,
            file.backlog(),
            journal_of(file),
        )

    if recorded:
        visit.bear_witness()
        committed(done(), fresh)
    else:
        backend.discard(visit.root_fd, capture)
    if forgotten:
        with file.transaction():
            backend.expire(visit.root_fd, forgotten)
    if recorded:
        _bound_journal(file, order)
    return done()


class _Bodies:
    """The bodies of a diff's pages, unless they are more than `most` bytes: then `all` is None."""

    def __init__(self, most: int) -> None:
        self.all: list[bytes] | None = [] if most else None
        self._left = most

    def add(self, body: bytes) -> None:
        self._left -= len(body)
        if self._left < 0:
            self.all = None
        elif self.all is not None:
            self.all.append(body)


def _bound_journal(file: SystemFile, order: Order) -> None:
    """`bound_journal`; what goes wrong costs disk space, not the snapshot, which is committed."""
    try:
        bound_journal(file, order)
    except (SnapfeedError, OSError, sqlite3.Error, MemoryError) as error:
        log.warning("the journal cannot be made smaller now: %s", ascii(str(error))[:300])


def bound_journal(file: SystemFile, order: Order) -> None:
    """Squash what the broker's absence has made too old or too much."""
    for _ in range(_SQUASHES):
        span = to_squash(file, order.limits, order.now_ns, order.keep)
        if span is None:
            return
        first, last = file.diff(span[0]), file.diff(span[1])
        assert first is not None and last is not None  # noqa: S101, PT018 - just read
        volume = sum(row.volume for seq in range(first.seq, last.seq + 1) if (row := file.diff(seq)) is not None)
        pages = squashed_pages(file, first.parent or 0, last.seq, order.chunk_limit)
        merged = replace(last, parent=first.parent, volume=volume, page_limit=order.chunk_limit)
        file.merge_diffs(first.seq, merged, ((chunk.count, chunk.data) for chunk in pages))
        log.info("diffs %d to %d, not published yet, are one now: the journal is full", first.seq, last.seq)


def _changes(capture: Capture) -> Iterator[Change]:
    if capture.old is None:
        return baseline(capture.new, capture.new.several if isinstance(capture.new, Table) else tuple)
    return compare(capture.old, capture.new, capture.touched, capture.ranges)


def _journal(file: SystemFile, capture: Capture, order: Order, bodies: _Bodies) -> int:
    """Write the diff's pages; returns the number of changes."""
    encoded = (
        encode_bytes(c, capture.content(c.ident, c.path) if c.type is FileType.FILE and c.after is not None else None)
        for c in _changes(capture)
    )
    count = 0
    for number, chunk in enumerate(chunks(encoded, order.chunk_limit), 1):
        file.add_page(capture.seq, number, chunk.count, chunk.data)
        bodies.add(chunk.data)
        count += chunk.count
    return count


def _record(
    file: SystemFile, backend: Backend, capture: Capture, order: Order, changes: int, head: int | None
) -> DiffRow:
    backend.commit(capture)
    pages = file.page_count(capture.seq)
    common = (order.now_ns, order.trigger, order.volume)
    diff = DiffRow(capture.seq, head, *common, backend.consistency, capture.snapshot, changes, pages, order.chunk_limit)
    file.add(SnapshotRow(capture.seq, *common, changes, backend.consistency, capture.snapshot), diff)
    return diff


def sweep(visit: Visit) -> int:
    """Remove what an unfinished snapshot left; the number of things removed. What was committed and not witnessed is now."""
    visit.witness_late()
    kept = [row.seq for row in visit.file.snapshots()]
    backend = visit.backend()
    removed = backend.sweep(visit.root_fd, kept)
    if kept and min(kept) > 1:
        with visit.file.transaction():
            backend.expire(visit.root_fd, [min(kept) - 1])
    return removed


def touch_canary(visit: Visit) -> None:
    """Make and remove a file in the system directory, for the event source's self-test."""
    path = b".snapfeed/canary"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=visit.root_fd))
    os.unlink(path, dir_fd=visit.root_fd)
