"""A consumer of the feed: whole diffs from pages, duplicates dropped, gaps told.

Its position lives as long as it does; keeping one, and closing gaps by replay or baseline, is built on top.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from comparer.errors import DamageError
from comparer.model import Change
from feed.backoff import Backoff
from feed.broker import BrokerConfig
from feed.connection import Dialer, LinkError
from feed.encode import decode_change
from feed.pages import Envelope, Page, parse_page

_LOG = logging.getLogger("snapfeed.feed")
_EPOCHS = 16
_LARGEST_DIFF = 1_000_000  # pages: more is no diff but an attack on our memory


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


@dataclass(frozen=True, slots=True)
class Damage:
    """A message that is no page; the text says why. It was left out."""

    topic: str
    error: str


Item = Diff | Gap | Damage


@dataclass(slots=True)
class _Stream:
    """What is known of one partition: the last whole diff, epochs that are over, and the pages of the diff under way."""

    epoch: str | None = None
    seq: int = -1
    over: list[str] = field(default_factory=list)
    key: tuple[str, int, int] | None = None
    pages: dict[int, Page] = field(default_factory=dict)


class Assembler:
    """Pages in, diffs and gaps out. Pure; one for any number of hosts and partitions.

    The key of a page is (epoch, seq, page). A page of another diff drops an unfinished one (the publisher sends that again
    from its unacknowledged page on, or it shows as a gap); the same diff cut into another number of pages starts over.
    """

    def __init__(self) -> None:
        self._streams: dict[tuple[str, str], _Stream] = {}
        self.duplicates = 0

    def add(self, page: Page) -> list[Diff | Gap]:
        """Take a page; return what it completes: nothing, a diff, or a gap and the diff after it."""
        envelope = page.envelope
        stream = self._streams.setdefault((envelope.host, envelope.partition), _Stream())
        seen = envelope.epoch in stream.over or (envelope.epoch == stream.epoch and envelope.seq <= stream.seq)
        key = (envelope.epoch, envelope.seq, page.pages)
        if seen or (key == stream.key and page.page in stream.pages) or page.pages > _LARGEST_DIFF:
            self.duplicates += 1
            return []
        if key != stream.key:
            stream.key, stream.pages = key, {}
        stream.pages[page.page] = page
        if len(stream.pages) < page.pages:
            return []
        pages = [stream.pages[number] for number in range(1, page.pages + 1)]
        stream.key, stream.pages = None, {}
        return self._completed(stream, Diff(envelope, [change for one in pages for change in one.changes]))

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


class Subscriber:
    """Iterate over it: `Diff`, `Gap` and `Damage` as they arrive, for ever, through reconnects.

    `topic_filter` defaults to the changes of every host and partition. `subscribed` is set while the broker sends us what
    is published: what went out before that is not seen. Who leaves the loop early closes the iterator (contextlib.aclosing),
    which closes the connection. Raises OperatorError for TLS files that cannot be used.
    """

    def __init__(self, config: BrokerConfig, topic_filter: str | None = None, identifier: str = "") -> None:
        self._dialer = Dialer(config, identifier)
        self._filter = topic_filter or f"{config.base}/+/+/changes"
        self._assembler = Assembler()
        self.subscribed = asyncio.Event()
        self.last_error: str | None = None

    @property
    def duplicates(self) -> int:
        return self._assembler.duplicates

    async def __aiter__(self) -> AsyncIterator[Item]:
        backoff = Backoff()
        while True:
            try:
                async with self._dialer.open_client() as connection:
                    await connection.subscribe_live(self._filter)
                    self.subscribed.set()
                    self.last_error = None
                    backoff.reset()
                    while True:
                        message = await connection.receive()
                        if not message.retain and isinstance(message.payload, bytes):
                            for item in self._read(message.topic.value, message.payload):
                                yield item
            except LinkError as error:
                if str(error) != self.last_error:
                    self.last_error = str(error)
                    _LOG.warning("%s; trying again", error)
            finally:
                self.subscribed.clear()
            await asyncio.sleep(backoff.delay())

    def _read(self, topic: str, payload: bytes) -> list[Item]:
        try:
            return list(self._assembler.add(parse_page(payload)))
        except DamageError as error:
            return [Damage(topic, str(error))]
