"""Pages to whole diffs. Pure; one for any number of hosts and partitions."""

from dataclasses import dataclass, field
from typing import Any

from comparer.model import Change
from feed.encode import decode_change
from feed.pages import Envelope, Page

_EPOCHS = 16
_LARGEST_DIFF = 1_000_000  # pages: more is no diff but an attack on our memory
_Key = tuple[str, int, int | None, bool, int]


@dataclass(frozen=True, slots=True)
class Diff:
    """A whole diff: its envelope and its changes as JSON objects, in order."""

    envelope: Envelope
    documents: list[dict[str, Any]]

    def changes(self) -> list[Change]:
        """The changes as values. Raises DamageError if one of them is none."""
        return [decode_change(document) for document in self.documents]


@dataclass(frozen=True, slots=True)
class Gap:
    """Diffs are missing before the one that comes next: it goes from `parent`, and the last one had was (`epoch`, `seq`)."""

    host: str
    partition: str
    epoch: str
    seq: int
    parent: int | None
    next_epoch: str
    next_seq: int


class Collector:
    """The pages of one diff at a time, of one topic of one partition, until they are all there. `size`: their bytes so far.

    A page of another diff drops an unfinished one (the publisher sends that again from its unacknowledged page on, or it shows
    as a gap); the same diff cut into another number of pages, or squashed with others meanwhile, starts over. So does a
    baseline whose first page comes again: it may be another one of the same snapshot, cut elsewhere.
    """

    def __init__(self) -> None:
        self._key: _Key | None = None
        self._pages: dict[int, Page] = {}
        self.size = 0

    def add(self, page: Page, size: int = 0) -> bool:
        """Take a page of `size` bytes; False if it was there already, or belongs to no diff that could be."""
        envelope = page.envelope
        key = (envelope.epoch, envelope.seq, envelope.parent, envelope.baseline, page.pages)
        if page.pages > _LARGEST_DIFF:
            return False
        if key != self._key or (envelope.baseline and page.page == 1):
            self._key, self._pages, self.size = key, {}, 0
        if page.page in self._pages:
            return False
        self._pages[page.page] = page
        self.size += size
        return True

    def take(self) -> Diff | None:
        """The diff, if its last missing page was added; then the next one can begin."""
        if self._key is None or len(self._pages) < self._key[-1]:
            return None
        pages = [self._pages[number] for number in range(1, len(self._pages) + 1)]
        self.clear()
        return Diff(pages[0].envelope, [change for one in pages for change in one.changes])

    def clear(self) -> None:
        """Forget an unfinished diff."""
        self._key, self._pages, self.size = None, {}, 0


@dataclass(slots=True)
class _Stream:
    """What is known of one partition: the last whole diff, epochs that are over, and the diff under way."""

    epoch: str | None = None
    seq: int = -1
    over: list[str] = field(default_factory=list)
    collector: Collector = field(default_factory=Collector)


class Assembler:
    """Pages in, diffs and gaps out, for who cannot ask for what is missing. The key of a page is (epoch, seq, page)."""

    def __init__(self) -> None:
        self._streams: dict[tuple[str, str], _Stream] = {}
        self.duplicates = 0

    def add(self, page: Page) -> list[Diff | Gap]:
        """Take a page; return what it completes: nothing, a diff, or a gap and the diff after it."""
        envelope = page.envelope
        stream = self._streams.setdefault((envelope.host, envelope.partition), _Stream())
        seen = envelope.epoch in stream.over or (envelope.epoch == stream.epoch and envelope.seq <= stream.seq)
        if seen or not stream.collector.add(page):
            self.duplicates += 1
            return []
        diff = stream.collector.take()
        return [] if diff is None else self._completed(stream, diff)

    def _completed(self, stream: _Stream, diff: Diff) -> list[Diff | Gap]:
        envelope = diff.envelope
        found: list[Diff | Gap] = [diff]
        follows = envelope.baseline or (envelope.epoch == stream.epoch and envelope.parent == stream.seq)
        if stream.epoch is not None and not follows:
            known = (stream.epoch, stream.seq, envelope.parent)
            found.insert(0, Gap(envelope.host, envelope.partition, *known, envelope.epoch, envelope.seq))
        if stream.epoch is not None and envelope.epoch != stream.epoch:
            stream.over = [*stream.over, stream.epoch][-_EPOCHS:]
        stream.epoch, stream.seq = envelope.epoch, envelope.seq
        return found
