"""The journal as the publisher sees it: pages from the system file, the cursor written back, in the partition's thread."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from comparer.errors import SnapfeedError
from feed.outbox import OutPage, Position
from feed.pages import Chunk, Envelope, page_payload, payload_limit, resplit
from snapshotter.systemfile import DiffRow, SystemFile

log = logging.getLogger(__name__)
FLUSH_AFTER = 0.25  # seconds; a lost cursor costs duplicates, never a page
_HEAD_ROOM = 64  # bytes for page numbers
_OFFERED = 15  # diffs beyond the one handed out that may not be squashed any more
_OFFERED_AT_ONCE = 255  # as above, while a backlog is being sent
_FETCHED = 1 << 20  # bytes handed out at a time
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
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None

    async def fetch(self, after: Position | None, limit: int, count: int) -> list[OutPage]:
        start = after or self.acknowledged

        def read(file: SystemFile) -> list[OutPage]:
            return list(
                self._pages(file, start or Position(*file.acknowledged()), payload_limit(limit, self._topic), count)
            )

        found = await self._in_file(read)
        assert isinstance(found, list)  # noqa: S101 - what `read` returns
        return found

    def _pages(self, file: SystemFile, after: Position, room: int, count: int) -> list[OutPage]:
        found: list[OutPage] = []
        diff = file.next_diff(after.seq)
        page = after.page
        if diff is not None and diff.seq != after.seq:
            page = 0
        offered = file.offered()
        size = 0
        while diff is not None and len(found) < count and size < _FETCHED and self._wants(diff):
            if diff.seq > offered:  # some at a time: it is a write to the disk
                offered = diff.seq + (
                    _OFFERED_AT_ONCE if (file.head() or 0) - diff.seq > _OFFERED_AT_ONCE else _OFFERED
                )
                file.offer(offered)
            envelope = self.envelope(diff)
            fixed = len(page_payload(envelope, 1, 1, b"")) + _HEAD_ROOM
            if fixed + diff.page_limit > room:
                diff, page = self._cut(file, diff, room - fixed), 0 if page < diff.pages else diff.pages
            while page < diff.pages and len(found) < count and size < _FETCHED:
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

    @staticmethod
    def _cut(file: SystemFile, diff: DiffRow, limit: int) -> DiffRow:
        """Cut a diff's pages again, for a broker that takes less than the journal was made for."""

        def pieces() -> list[tuple[int, bytes]]:
            cut = []
            for number in range(1, diff.pages + 1):
                cut += [(p.count, p.data) for p in resplit(Chunk(*file.page(diff.seq, number)), limit)]
            return cut

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
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_AFTER, self._flush_soon)

    def _flush_soon(self) -> None:
        self._timer = None
        self._flushing = asyncio.create_task(self.flush())

    async def flush(self) -> None:
        """Write the cursor. Trouble is only logged: it is written again with the next page, and duplicates are no loss."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        position = self.acknowledged
        if position is None or position == self._flushed:
            return

        def write(file: SystemFile) -> int:
            file.acknowledge(*position)
            return file.backlog()

        with contextlib.suppress(SnapfeedError, OSError):
            left = await self._in_file(write)
            assert isinstance(left, int)  # noqa: S101 - what `write` returns
            self._flushed = position
            self._backlog(left)
            return
        log.debug("%s: cursor not written now", self.partition)
