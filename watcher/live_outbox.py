"""The feed's outbox while everything before has been handed out: a new diff goes to the publisher out of memory.

A snapshot's pages then need no visit to the system file of their own, which would have to wait until the one that made them is
over (clones that have expired are removed, the write-ahead log is checkpointed). And a publisher that asks whether there is more
gets its answer without one.
"""

from typing import NamedTuple

from feed.outbox import OutPage, Position
from feed.pages import page_payload
from snapshotter.systemfile import DiffRow

from .outbox import JournalOutbox

LARGEST = 256 << 10  # bytes of a diff that is kept in memory


class Fresh(NamedTuple):
    """A diff that was just committed, and its pages' bodies. It counts as offered already."""

    diff: DiffRow
    bodies: tuple[bytes, ...]


class LiveOutbox(JournalOutbox):
    """As JournalOutbox; `news` is to be called for every new diff, instead of setting `ready`."""

    _end: Position | None = (
        None  # nothing was left after it when the journal was last looked at, and there was no news since
    )
    _fresh: Fresh | None = None
    _news = 0

    @property
    def live(self) -> bool:
        """Whether a fresh diff would be taken as it is: all before it was handed out, and the one before was fetched."""
        return self._end is not None and self._fresh is None

    def news(self, fresh: Fresh | None) -> None:
        """There is another diff in the journal; `fresh` is it, unless it has to be read from there."""
        self._news += 1
        if fresh is None or self._end is None or fresh.diff.parent != self._end.seq or self._fresh is not None:
            fresh = self._end = None
        self._fresh = fresh
        self.ready.set()

    async def fetch(self, after: Position | None, limit: int, count: int) -> list[OutPage]:
        start = after or self.acknowledged
        fresh, self._fresh = self._fresh, None
        if start is not None and start == self._end:
            if fresh is None:
                return []
            pages = self._pages_of(fresh, limit, count)
            if pages:
                self._end = pages[-1].position
                return pages
        self._end = None
        news = self._news
        found = await super().fetch(after, limit, count)
        if not found and news == self._news:
            self._end = start
        return found

    def _pages_of(self, fresh: Fresh, limit: int, count: int) -> list[OutPage]:
        """Nothing if it has to be cut anew for this broker, or is more than is asked for."""
        diff, pages = fresh.diff, len(fresh.bodies)
        envelope = self.envelope(diff)
        if pages > count or not self.fits(diff, envelope, limit):
            return []
        self.note_cut(diff)
        return [
            OutPage(Position(diff.seq, page), page == pages, page_payload(envelope, page, pages, body))
            for page, body in enumerate(fresh.bodies, 1)
        ]
