"""The journal as the publisher sees it: pages from the system file, the cursor written back, in the partition's thread."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from comparer.errors import SnapfeedError, TransientError
from feed.outbox import OutPage, Position
from feed.pages import Chunk, Envelope, page_payload, resplit
from snapshotter.systemfile import DiffRow, SystemFile

log = logging.getLogger(__name__)
FLUSH_AFTER = 0.25  # seconds; a lost cursor costs duplicates, never a page
_HEAD_ROOM = 64  # bytes for page numbers
_TOPIC = 512  # bytes of the longest topic: how a diff is cut must not depend on whose topic it is sent on, ours or a consumer's
OFFERED = 15  # diffs beyond the one handed out that may not be squashed any more
_OFFERED_AT_ONCE = 255  # as above, of those that exist already
FETCHED = 1 << 20  # bytes handed out at a time
T = TypeVar("T")
InFile = Callable[[Callable[[SystemFile], T]], Awaitable[T]]


class JournalOutbox:
    """Implements feed.outbox.Outbox. `in_file` runs a function over the open system file in the partition's thread.

    `envelope` has what is the same for all diffs of the partition: host, partition, uuid, epoch. `backlog` is told how many diffs
    are left to publish.
    """

    def __init__(
        self,
        partition: str,
        topic: str,
        envelope: Envelope,
        in_file: InFile[object],
        backlog: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.partition = partition
        self.ready = asyncio.Event()
        self.ready.set()
        self.acknowledged: Position | None = None
        self._topic = topic
        self._envelope = envelope
        self._in_file = in_file
        self._backlog = backlog
        self._flushed: Position | None = None
        self._cuts: dict[int, tuple[int, int]] = {}  # pages and page_limit of the diffs handed out and not acknowledged
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None

    async def fetch(self, after: Position | None, limit: int, count: int) -> list[OutPage]:
        def read(file: SystemFile) -> list[OutPage]:
            start = after or self.acknowledged or Position(*file.acknowledged())
            return self._pages(file, start, limit, count)

        found = await self._in_file(self._of_our_epoch(read))
        assert isinstance(found, list)  # noqa: S101 - what `read` returns
        return found

    def _of_our_epoch(self, function: Callable[[SystemFile], T]) -> Callable[[SystemFile], T]:
        """A file that was set aside has a successor in its place, with numbers of its own: ours mean nothing there."""

        def checked(file: SystemFile) -> T:
            if file.settings().epoch != self._envelope.epoch:
                raise TransientError(f"{self.partition}: another epoch has begun")
            return function(file)

        return checked

    def close(self) -> None:
        """Write nothing more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _room(self, envelope: Envelope, limit: int) -> int:
        """Bytes that a page's changes may have, if its payload may have `limit` on our topic."""
        fixed = len(page_payload(envelope, 1, 1, b"")) + _HEAD_ROOM
        return limit + len(self._topic.encode()) - _TOPIC - fixed

    def fits(self, diff: DiffRow, envelope: Envelope, limit: int) -> bool:
        """Whether a diff's pages, as they were cut, are small enough for payloads of `limit` bytes."""
        return diff.page_limit <= self._room(envelope, limit)

    def note_cut(self, diff: DiffRow) -> None:
        """Remember how a diff is cut of which pages are handed out."""
        self._cuts[diff.seq] = (diff.pages, diff.page_limit)

    def _pages(self, file: SystemFile, after: Position, limit: int, count: int) -> list[OutPage]:
        found: list[OutPage] = []
        diff, page = file.next_diff(after.seq), 0
        if diff is not None and diff.seq == after.seq:
            page = self._resumed(diff, after.page)
            if page >= diff.pages:
                diff, page = file.next_diff(diff.seq + 1), 0
        if self.acknowledged is not None:
            self._cuts = {seq: cut for seq, cut in self._cuts.items() if seq >= self.acknowledged.seq}
        offered = file.offered()
        size = 0
        while diff is not None and len(found) < count and size < FETCHED and self._wants(diff):
            if diff.seq > offered:  # some at a time: it is a write to the disk
                offered = max(diff.seq + OFFERED, min(diff.seq + _OFFERED_AT_ONCE, file.head() or 0))
                file.offer(offered)
            envelope = self.envelope(diff)
            if not self.fits(diff, envelope, limit):
                try:
                    diff, page = self._cut(file, diff, self._room(envelope, limit)), 0
                    if self.acknowledged is not None and self.acknowledged.seq == diff.seq:
                        self.acknowledged = Position(diff.seq, 0)
                except SnapfeedError:
                    if found:
                        break  # what comes before it is fine; the next fetch tells of the trouble
                    raise
            self.note_cut(diff)
            while page < diff.pages and len(found) < count and size < FETCHED:
                page += 1
                _, body = file.page(diff.seq, page)
                payload = page_payload(envelope, page, diff.pages, body)
                found.append(OutPage(Position(diff.seq, page), page == diff.pages, payload))
                size += len(payload)
            if page >= diff.pages:
                diff, page = file.next_diff(diff.seq + 1), 0
        return found

    def _wants(self, diff: DiffRow) -> bool:  # noqa: ARG002
        return True

    def _resumed(self, diff: DiffRow, page: int) -> int:
        """The page after which a diff goes on: 0 if it was cut anew since its pages were sent, by whomever."""
        if self.acknowledged is not None and self.acknowledged.seq == diff.seq:
            self.acknowledged = Position(diff.seq, self._now(diff, self.acknowledged.page))
        return self._now(diff, page)

    def _now(self, diff: DiffRow, page: int) -> int:
        """What has arrived of the present pages of a diff, when `page` of those that were handed out has."""
        pages, _ = known = self._cuts.get(diff.seq, (diff.pages, diff.page_limit))
        if known == (diff.pages, diff.page_limit):
            return page
        return diff.pages if page >= pages else 0

    @staticmethod
    def _cut(file: SystemFile, diff: DiffRow, limit: int) -> DiffRow:
        """Cut a diff's pages again, for a broker that takes less than the journal was made for; all of them are to be sent."""

        def pieces() -> Iterator[tuple[int, bytes]]:
            for number in range(1, diff.pages + 1):
                for piece in resplit(Chunk(*file.page(diff.seq, number)), limit):
                    yield piece.count, piece.data

        file.replace_pages(diff.seq, pieces(), limit)
        again = file.diff(diff.seq)
        assert again is not None  # noqa: S101 - it was there a line ago
        return again

    def envelope(self, diff: DiffRow) -> Envelope:
        path = diff.path.decode() if diff.path is not None else None
        return replace(
            self._envelope,
            seq=diff.seq,
            parent=diff.parent,
            time_ns=diff.time_ns,
            trigger=diff.trigger,
            volume=diff.volume,
            consistency=diff.consistency,
            snapshot=path,
            baseline=diff.parent is None,
        )

    async def acknowledge(self, position: Position) -> None:
        self.acknowledged = position
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_AFTER, self._flush_soon)

    def _flush_soon(self) -> None:
        self._timer = None
        self._flushing = asyncio.create_task(self.flush())

    async def flush(self) -> None:
        """Write the cursor. Trouble is only logged: it is written again with the next page, and duplicates are no loss."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.acknowledged is None or self.acknowledged == self._flushed:
            return

        def write(file: SystemFile) -> int:
            # Looked at here, in the partition's thread: the diff may have been cut anew since, and its pages numbered anew.
            if (position := self.acknowledged) is not None:
                diff = file.diff(position.seq)
                file.acknowledge(position.seq, position.page if diff is None else self._now(diff, position.page))
                self._flushed = position
            return file.backlog()

        with contextlib.suppress(SnapfeedError, OSError):
            left = await self._in_file(self._of_our_epoch(write))
            assert isinstance(left, int)  # noqa: S101 - what `write` returns
            self._backlog(left)
            return
        log.debug("%s: cursor not written now", self.partition)
