"""A publisher that runs in the test's own loop, and outboxes over lists of pages."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import orjson

from comparer.errors import TransientError
from feed.backoff import Backoff
from feed.broker import BrokerConfig
from feed.outbox import OutPage, Position
from feed.pages import Chunk, Envelope, payloads
from feed.publisher import Publisher


@dataclass
class ListOutbox:
    """Diffs of one change a page; every third diff has two pages. `released` says how many pages may be fetched."""

    partition: str
    pages: list[OutPage]
    released: int = 10**9
    acknowledged: list[Position] = field(default_factory=list)
    failing: bool = False

    def __post_init__(self):
        self.ready = asyncio.Event()

    async def fetch(self, after, limit, count):
        if self.failing:
            raise TransientError("unmounted")
        after = after or (self.acknowledged[-1] if self.acknowledged else None)
        return [page for page in self.pages[: self.released] if after is None or page.position > after][:count]

    async def acknowledge(self, position):
        assert not self.acknowledged or position > self.acknowledged[-1]
        self.acknowledged.append(position)

    def release(self, pages: int = 10**9):
        self.released = pages
        self.ready.set()

    @property
    def done(self) -> bool:
        return bool(self.acknowledged) and self.acknowledged[-1] == self.pages[-1].position


def outbox(partition: str, diffs: int, size: int = 100, **more) -> ListOutbox:
    pages = []
    for seq in range(1, diffs + 1):
        envelope = Envelope("edge7", partition, "u", "e", seq, seq - 1, 10**18, "time", 0, "metadata", None)
        chunk = Chunk(1, orjson.dumps({"path": f"{seq}" + "x" * size}))
        cut = payloads(envelope, [chunk] * (2 if seq % 3 == 0 else 1), 10**6)
        if len(cut) != (2 if seq % 3 == 0 else 1):
            raise AssertionError(cut)
        pages += [OutPage(Position(seq, n), n == len(cut), payload) for n, payload in enumerate(cut, 1)]
    return ListOutbox(partition, pages, **more)


def publisher(url: str, **more) -> Publisher:
    config = BrokerConfig(**{"url": url, "host": "edge7"} | more.pop("config", {}))
    more.setdefault("backoff", lambda: Backoff(0.05, 0.2))
    return Publisher(config, version="1", **more)


@contextlib.asynccontextmanager
async def running(made: Publisher):
    """A publisher that runs; stopped well afterwards, and whatever ended it early is raised."""
    task = asyncio.create_task(made.run())
    try:
        yield made
        await made.stop()
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
