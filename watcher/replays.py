"""Pages asked for by one consumer: the journal since its position, or the whole state. Beside the feed, never in its way."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from comparer.errors import SnapfeedError, TransientError
from feed.broker import NAME, Topics
from feed.commands import CommandError
from feed.lane import LaneStats
from feed.outbox import Outbox, OutPage, Position
from feed.pages import Envelope, chunk_limit, page_payload
from snapshotter.retention import MOST_CONSUMERS
from snapshotter.systemfile import ConsumerRow, DiffRow, SystemFile
from snapshotter.visit import Visit

from .baselines import Spool
from .outbox import FETCHED, InFile, JournalOutbox
from .pipeline import Pipeline
from .said import describe

log = logging.getLogger(__name__)
AT_ONCE = 4  # baselines under way on one partition
SILENT_NS = 7 * 86400 * 10**9  # one that was not heard of for so long makes room for another
_LOOK = 30.0  # seconds
_PATIENCE = 900.0  # seconds without an acknowledgement
_PAUSE = 0.05  # seconds between two visits for a spool: an unmount wants its turn, too
_WHOLE = 1 << 40  # a page number after every page
T = TypeVar("T")


class GapError(CommandError):
    """The journal does not reach back that far."""


class Lanes(Protocol):
    """The publisher, as replays see it."""

    @property
    def topics(self) -> Topics: ...

    @property
    def packet(self) -> int: ...

    def add(self, outbox: Outbox, consumer: str | None = None) -> LaneStats: ...

    def remove(self, outbox: Outbox) -> None: ...


class ReplayOutbox(JournalOutbox):
    """The journal's pages after `since` up to diff `last`; `ended` is called after the last one was acknowledged, or at a gap."""

    def __init__(
        self,
        partition: str,
        topic: str,
        envelope: Envelope,
        in_file: InFile[object],
        since: int,
        last: int,
        ended: Callable[[str | None], None],
    ) -> None:
        super().__init__(partition, topic, envelope, in_file)
        self.acknowledged = Position(since, _WHOLE)
        self._last = last
        self._ended = ended
        self._final: Position | None = None

    async def fetch(self, after: Position | None, limit: int, count: int) -> list[OutPage]:
        found = await super().fetch(after, limit, count)
        if found and found[-1].last and found[-1].position.seq >= self._last:
            self._final = found[-1].position
        if not found and self._final is None:
            self._ended("the journal was cut off before it was sent; ask again")
        return found

    def _wants(self, diff: DiffRow) -> bool:
        return diff.seq <= self._last

    async def acknowledge(self, position: Position) -> None:
        self.acknowledged = position
        if position == self._final:
            self._ended(None)

    async def flush(self) -> None:
        """The consumer says itself what it has."""


class BaselineOutbox:
    """The pages of a spool."""

    def __init__(
        self,
        partition: str,
        envelope: Envelope,
        spool: Spool,
        in_visit: Callable[[Callable[[Visit], list[OutPage]]], Any],
        ended: Callable[[str | None], None],
    ) -> None:
        self.partition = partition
        self.ready = asyncio.Event()
        self.ready.set()
        self.acknowledged = Position(envelope.seq, 0)
        self._envelope = envelope
        self._spool = spool
        self._in_visit = in_visit
        self._ended = ended

    async def fetch(self, after: Position | None, limit: int, count: int) -> list[OutPage]:
        start = (after or self.acknowledged).page
        spool = self._spool

        def read(visit: Visit) -> list[OutPage]:
            found: list[OutPage] = []
            size = 0
            for number in range(start + 1, min(start + count, spool.pages) + 1):
                payload = page_payload(self._envelope, number, spool.pages, spool.page(visit, number))
                found.append(OutPage(Position(self._envelope.seq, number), number == spool.pages, payload))
                size += len(payload)
                if size >= FETCHED:
                    break
            return found

        try:
            found: list[OutPage] = await self._in_visit(read)
        except OSError as error:
            raise TransientError(describe(error)) from error
        if any(len(page.payload) > limit for page in found):
            self._ended("the broker takes less than it did; ask again")
            return []
        return found

    async def acknowledge(self, position: Position) -> None:
        self.acknowledged = position
        if position.page >= self._spool.pages:
            self._ended(None)


@dataclass(slots=True)
class _Running:
    """What one consumer is being sent."""

    task: asyncio.Task[None]
    what: str


class Replays:
    """Everything that is being sent to single consumers. One thing at a time for each consumer of a partition: the newest."""

    def __init__(self, lanes: Callable[[], Lanes]) -> None:
        self._lanes = lanes
        self._running: dict[tuple[str, str], _Running] = {}
        self._turns: dict[tuple[str, str], asyncio.Lock] = {}
        self._making: Counter[str] = Counter()  # baselines under way, by partition
        self._dropping: set[asyncio.Task[None]] = set()
        self.served = 0

    def running(self, partition: str) -> list[tuple[str, str]]:
        """(consumer, `replay` or `baseline`) of what is under way."""
        return [(consumer, found.what) for (name, consumer), found in self._running.items() if name == partition]

    async def replay(self, pipeline: Pipeline, consumer: str, epoch: str, since: int, now_ns: int) -> dict[str, Any]:
        """Send the journal since a position. Raises GapError, OperatorError, TransientError; returns the answer's `data`."""
        topic = self._lanes().topics.replay(pipeline.name, consumer)
        async with self._turn(pipeline, consumer):
            envelope = pipeline.envelope()

            def look(file: SystemFile) -> tuple[int, int]:
                head = file.head() or 0
                current = file.settings().epoch
                after = file.next_diff(since + 1)
                reaches = since == head or (after is not None and after.parent is not None and after.parent == since)
                if epoch != current or current != envelope.epoch or since > head or not reaches:
                    raise _gap(file, pipeline.name, current, head)
                count = len(file.journal(since))
                if file.offered() < head:
                    file.offer(head)
                register(file, ConsumerRow(consumer, since, has=True, time_ns=now_ns))
                return head, count

            head, count = await pipeline.in_file(look)
            await pipeline.refresh()
            if count:
                ending: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
                outbox = ReplayOutbox(pipeline.name, topic, envelope, pipeline.in_file, since, head, _once(ending))
                self._start(pipeline, consumer, "replay", self._serve(outbox, consumer, ending))
        data = {"partition": pipeline.name, "epoch": epoch, "from": since, "seq": head, "diffs": count, "topic": topic}
        log.info("%s: %s gets the %d diffs since %d again", pipeline.name, consumer, count, since)
        return data

    async def baseline(self, pipeline: Pipeline, consumer: str, now_ns: int) -> dict[str, Any]:
        """Send the whole state. Raises OperatorError, TransientError; returns the answer's `data` once the state is fixed."""
        topic = self._lanes().topics.replay(pipeline.name, consumer)
        async with self._turn(pipeline, consumer):
            if self._making[pipeline.name] >= AT_ONCE:
                raise TransientError(f"{pipeline.name}: {AT_ONCE} baselines are being made; ask again later")
            spool = Spool(consumer, chunk_limit(self._lanes().packet))

            def begin(visit: Visit) -> int:
                row = spool.begin(visit)
                pipeline.pins[spool.name] = row.seq
                register(visit.file, ConsumerRow(consumer, row.seq, has=False, time_ns=now_ns))
                return row.seq

            self._making[pipeline.name] += 1
            try:
                envelope = pipeline.envelope()
                seq = await pipeline.in_visit(begin)
                await pipeline.refresh()
            except BaseException as error:
                self._making[pipeline.name] -= 1
                await asyncio.shield(_drop(pipeline, spool))
                if isinstance(error, OSError):
                    raise TransientError(f"{pipeline.name}: {describe(error)}") from error
                raise
            begun: list[bool] = []

            def never_began() -> None:
                """A task that is cancelled before its first step runs no `finally`."""
                if not begun:
                    self._making[pipeline.name] -= 1
                    self._dropping.add(task := asyncio.create_task(_drop(pipeline, spool)))
                    task.add_done_callback(self._dropping.discard)

            work = self._send_baseline(pipeline, consumer, spool, envelope, begun)
            self._start(pipeline, consumer, "baseline", work, never_began)
        log.info("%s: %s gets the state of snapshot %d", pipeline.name, consumer, seq)
        return {"partition": pipeline.name, "epoch": envelope.epoch, "seq": seq, "topic": topic}

    async def _send_baseline(
        self, pipeline: Pipeline, consumer: str, spool: Spool, envelope: Envelope, begun: list[bool]
    ) -> None:
        begun.append(True)
        try:
            more = True
            while more:
                more = await pipeline.in_visit(spool.step)
                await asyncio.sleep(_PAUSE)
            row = spool.row
            assert row is not None  # noqa: S101 - it has begun
            pipeline.pins.pop(spool.name, None)
            envelope = replace(
                envelope, seq=row.seq, parent=None, time_ns=row.time_ns, trigger=row.trigger, volume=row.volume,
                consistency=row.consistency, snapshot=row.path.decode() if row.path is not None else None, baseline=True,
            )  # fmt: skip
            ending: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
            outbox = BaselineOutbox(pipeline.name, envelope, spool, pipeline.in_visit, _once(ending))
            await self._serve(outbox, consumer, ending)
        finally:
            self._making[pipeline.name] -= 1
            await asyncio.shield(_drop(pipeline, spool))

    async def _serve(self, outbox: Outbox, consumer: str, ending: "asyncio.Future[str | None]") -> None:
        """Until all of it is acknowledged, or nothing is for too long: who still wants it asks again."""
        lanes = self._lanes()
        stats = lanes.add(outbox, consumer)
        loop = asyncio.get_running_loop()
        seen, since = 0, loop.time()
        try:
            while not ending.done():
                await asyncio.wait({ending}, timeout=_LOOK)
                if stats.acknowledged != seen:
                    seen, since = stats.acknowledged, loop.time()
                waited = loop.time() - since
                if waited > _PATIENCE or (stats.refused and waited > _LOOK):
                    why = stats.last_error or "no page was acknowledged"
                    _once(ending)(f"given up after {waited:.0f} s: {why}")
            trouble = ending.result()
        finally:
            lanes.remove(outbox)
        if trouble is None:
            self.served += 1
        else:
            log.warning("%s: what %s asked for: %s", outbox.partition, consumer, trouble)

    @contextlib.asynccontextmanager
    async def _turn(self, pipeline: Pipeline, consumer: str) -> AsyncIterator[None]:
        """One request of a consumer at a time; what is being sent to it ends first. Raises TransientError if it cannot be."""
        _ready(pipeline)
        lock = self._turns.setdefault((pipeline.name, consumer), asyncio.Lock())
        async with lock:
            running = self._running.get((pipeline.name, consumer))
            if running is not None:
                running.task.cancel()
                await asyncio.wait({running.task})
            yield
        if not lock.locked():
            self._turns.pop((pipeline.name, consumer), None)

    def _start(
        self, pipeline: Pipeline, consumer: str, what: str, work: Any, after: Callable[[], None] = lambda: None
    ) -> None:
        key = (pipeline.name, consumer)
        task = asyncio.create_task(work, name=f"{what} of {pipeline.name} for {consumer}")
        running = self._running[key] = _Running(task, what)
        pipeline.told()

        def ended(done: "asyncio.Task[None]") -> None:
            if self._running.get(key) is running:
                del self._running[key]
            if not done.cancelled() and (error := done.exception()) is not None:
                log.warning("%s: %s for %s ended: %s", pipeline.name, what, consumer, describe(error))
            after()
            pipeline.told()

        task.add_done_callback(ended)

    async def end_all(self, partition: str | None = None) -> None:
        """End what is being sent: of one partition, which goes, or of all."""
        tasks = {found.task for (name, _), found in self._running.items() if partition in (None, name)}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._dropping:
            await asyncio.wait(set(self._dropping))


async def _drop(pipeline: Pipeline, spool: Spool) -> None:
    pipeline.pins.pop(spool.name, None)
    with contextlib.suppress(SnapfeedError, OSError, RuntimeError):
        await pipeline.in_visit(spool.remove)


def register(file: SystemFile, row: ConsumerRow) -> None:
    """Note a consumer. Raises CommandError for one too many: they are told of in the state, which is one message."""
    rows = file.consumers()
    if len(rows) >= MOST_CONSUMERS and all(known.name != row.name for known in rows):
        silent = [known for known in rows if known.time_ns < row.time_ns - SILENT_NS]
        if not silent:
            raise CommandError(
                f"{MOST_CONSUMERS} consumers are known already; forget one: snapfeed consumers PARTITION --forget NAME"
            )
        file.drop_consumer(min(silent, key=lambda known: known.time_ns).name)
    file.set_consumers([row])


def _once(ending: "asyncio.Future[str | None]") -> Callable[[str | None], None]:
    def ended(trouble: str | None) -> None:
        if not ending.done():
            ending.set_result(trouble)

    return ended


def _ready(pipeline: Pipeline) -> None:
    if pipeline.state.state in ("unmounted", "failed", "starting"):
        reason = pipeline.state.reason or "not ready yet; ask again later"
        raise TransientError(f"{pipeline.name}: {pipeline.state.state}: {reason}")


def _gap(file: SystemFile, partition: str, epoch: str, head: int) -> GapError:
    oldest, expected = head, head
    for row in reversed(file.journal()):  # the unbroken end of the journal
        if row.seq != expected or row.parent is None:
            break
        oldest = expected = row.parent
    data = {"gap": True, "partition": partition, "epoch": epoch, "oldest": oldest, "seq": head}
    text = f"gap: the journal of {partition} reaches back to {oldest} of epoch {epoch}; ask for a baseline"
    return GapError(text, data=data)


def check_consumer(name: object) -> None:
    """Raises CommandError for a name that cannot stand in a topic."""
    if not isinstance(name, str) or not NAME.match(name):
        raise CommandError("`consumer` must be 1 to 64 of A-Z a-z 0-9 _ -")
