"""One partition's pipeline: watch, decide, work, publish; independent of every other partition's."""

import asyncio
import concurrent.futures
import contextlib
import gc
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from comparer.dirty import Dirty
from comparer.errors import DamageError, OperatorError, SnapfeedError, TransientError
from feed.commands import CommandError
from feed.pages import Envelope
from snapshotter.adopt import quarantine
from snapshotter.linux.libc import trim_heap
from snapshotter.partition import Partition, still_mounted
from snapshotter.retention import MOST_CONSUMERS, Limits
from snapshotter.systemfile import ConsumerRow, Settings, SystemFile
from snapshotter.visit import Abilities, Visit, is_damaged

from .baselines import sweep_spools
from .live_outbox import Fresh, LiveOutbox
from .meters import Volume, meters_for
from .progress import reporter
from .said import describe, printable_path
from .sources.base import EventSource, SourceError
from .sources.canary import self_test
from .sources.choose import make_source
from .state import Consumer, Last, State
from .triggers import Due, Facts, Trigger, decide, next_look
from .work import Done, Order, journal_of, sweep, take, thread_io, touch_canary

log = logging.getLogger(__name__)
ACKS_AFTER = 1.0  # seconds
POLL = (1.0, 8.0)  # seconds between two readings of the meters: while something happens, and at most when nothing does
SILENT = 8 << 20  # bytes written without any event that are a reason to look
RETRY = (1.0, 2.0, 5.0, 10.0, 30.0)  # seconds
_CLOCK_SET_NS = 3600 * 10**9
_MANY = 10_000  # changes, the memory for which is given back
_IMPATIENCE = 1.0  # seconds between two looks whether the loop is ending
_PATIENCE = 10.0  # seconds for a snapshot under way when the daemon stops
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rules:
    """What the configuration says; None: what the system file says."""

    io_threshold: int | None
    time_threshold: float | None
    keep: int
    reconcile: float
    chunk_limit: int
    max_extents: int = 50_000
    unlimited_queue: bool = True
    limits: Limits = field(default_factory=Limits)


class Unmounted(Exception):  # noqa: N818 - not an error: the partition went
    pass


def _give_back() -> None:
    """What a large piece of work took: garbage that refers to itself first."""
    gc.collect()
    trim_heap()


class Pipeline:
    """Made for a partition, whether it is mounted now or not; `run` until cancelled.

    `changed` is called when the state changed; `opened` and `closed` with the outbox while there is a journal to publish from.
    """

    def __init__(
        self,
        partition: Partition,
        name: str,
        rules: Rules,
        envelope: Callable[[str, str, str], Envelope],
        topic: str,
        *,
        changed: Callable[["Pipeline"], None],
        opened: Callable[[LiveOutbox], None],
        closed: Callable[[LiveOutbox], None],
    ) -> None:
        self.partition = partition
        self.name = name
        self.rules = rules
        self.state = State(name, printable_path(partition.path), partition.fs_type, partition.uuid, kind=partition.kind)
        self.outbox: LiveOutbox | None = None
        self.pins: dict[str, int] = {}  # snapshots that are being read, by who reads them
        self.sending: Callable[[], list[tuple[str, str]]] = list  # (consumer, what) that is being sent
        self._known: list[ConsumerRow] = []
        self._acks: dict[str, ConsumerRow] = {}  # not written yet
        self._writing: asyncio.Task[None] | None = None
        self._envelope = envelope
        self._topic = topic
        self._changed = changed
        self._opened = opened
        self._closed = closed
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"snapfeed-{name}")
        self._wake = asyncio.Event()
        self._mounts = asyncio.Event()
        self._commands: list[asyncio.Future[Done]] = []
        self._reconcile: str | None = None
        self._abilities: Abilities | None = None
        self._source: EventSource | None = None
        self._owner: socket.socket | None = None
        self._given = (0, 0.0)  # the system file's thresholds
        self._volume = Volume([])
        self._dirty = Dirty()
        self._own = 0  # bytes we wrote since the last snapshot, beside its own
        self._large = False  # a large diff is being published
        self._fresh = True
        self._last = 0.0
        self._poll, self._seen_volume = POLL[0], 0
        self._checked = 0.0
        self._again = 0
        self._busy = False
        self._doubted = False
        self._closing = False
        self._clock = time.time_ns() - time.monotonic_ns()

    # ---- for others, in the loop's thread

    async def snapshot(self) -> Done:
        """The application's command: returns when committed. Raises SnapfeedError."""
        if self.state.state in ("unmounted", "failed"):
            raise TransientError(f"{self.name}: {self.state.state}: {self.state.reason}")
        future: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._commands.append(future)
        self._wake.set()
        return await future

    def moved(self, partition: Partition) -> None:
        """The same file system is mounted somewhere else now."""
        self.partition = partition
        self.state.mount = printable_path(partition.path)
        self.mounts_changed()

    def reconcile(self, reason: str) -> None:
        """Compare everything with the next snapshot, which is due at once."""
        self._reconcile = reason
        self._wake.set()

    def mounts_changed(self) -> None:
        """Mounts came or went: look whether this partition is one of them."""
        self._mounts.set()
        self._wake.set()

    def configure(self, rules: Rules) -> None:
        """New rules; a threshold that is None falls back to the system file's."""
        self.rules = rules
        self._limit()

    def set_thresholds(self, io_threshold: int | None, time_threshold: float | None) -> None:
        """What the system file says was changed; the configuration still overrides it."""
        io, seconds = self._given
        self._given = (io_threshold or io, time_threshold or seconds)
        self._limit()

    def _limit(self) -> None:
        """The thresholds and the retention that hold now."""
        io, seconds = self._given
        self.state.io_threshold = self.rules.io_threshold or io
        self.state.time_threshold = self.rules.time_threshold or seconds
        self.state.keep = self.rules.keep
        self.state.limits = self.rules.limits
        self._wake.set()
        self._changed(self)

    async def in_file(self, function: Callable[[SystemFile], T]) -> T:
        """Run a function over the open system file, in the partition's thread. Raises SnapfeedError."""
        return await self.in_visit(lambda visit: function(visit.file))

    async def in_visit(self, function: Callable[[Visit], T]) -> T:
        """Run a function over a visit to the partition, in the partition's thread. Raises SnapfeedError, OSError."""
        try:
            return await self._visit(function)
        except DamageError:  # met by whoever reads: whether it is the system file's, a check of all of it tells
            self._checked = -math.inf
            self.reconcile("damage was met")
            raise

    def envelope(self) -> Envelope:
        """What is the same for all pages of this partition. Raises TransientError while it is not there."""
        if self.state.epoch is None or self.state.uuid is None:
            raise TransientError(f"{self.name}: {self.state.state}")
        return self._envelope(self.name, self.state.uuid, self.state.epoch)

    async def refresh(self) -> None:
        """Read again who consumes, and what the journal holds: something was said about it."""
        self._known, self.state.journal = await self.in_file(lambda file: (file.consumers(), journal_of(file)))
        self.told()

    def told(self) -> None:
        """Say anew who consumes: what they have, or what is being sent to them, has changed."""
        sending = dict(self.sending())
        rows = {row.name: row for row in self._known} | self._acks
        self.state.consumers = tuple(
            Consumer(row.name, row.seq if row.has else None, row.time_ns, sending.get(row.name))
            for _, row in sorted(rows.items())
        )
        self._changed(self)

    def acknowledge(self, consumer: str, epoch: str, seq: int, now_ns: int) -> None:
        """A consumer has everything up to a diff. Written soon, many at a time: one that is lost is only a longer hold.

        Raises CommandError; for a position that is none, with where the partition is as its data: see feed.acks.
        """
        head = self.state.head or 0
        where = {"partition": self.name, "epoch": self.state.epoch, "seq": head}
        if epoch != self.state.epoch:
            why = f"epoch {ascii(epoch)[:80]} is not that of {self.name}, which is {self.state.epoch}"
            raise CommandError(why, data=where)
        if seq > head:
            raise CommandError(f"snapshot {seq} does not exist yet: the head of {self.name} is {head}", data=where)
        rows = {row.name: row for row in self._known} | self._acks
        if consumer not in rows and len(rows) >= MOST_CONSUMERS:
            raise CommandError(f"{len(rows)} consumers are known already; forget one: snapfeed consumers --forget")
        before = rows[consumer].seq if consumer in rows and rows[consumer].has else 0
        self._acks[consumer] = ConsumerRow(consumer, max(before, seq), has=True, time_ns=now_ns)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_acks())
        self.told()

    async def forget_consumer(self, consumer: str) -> bool:
        """Keep nothing for a consumer any more; whether it was known."""
        waiting = self._acks.pop(consumer, None) is not None
        found = await self.in_file(lambda file: file.drop_consumer(consumer)) or waiting
        await self.refresh()
        return found

    async def _write_acks(self) -> None:
        try:
            await asyncio.sleep(ACKS_AFTER)
            await self.flush_acks()
        finally:
            self._writing = None

    async def flush_acks(self) -> None:
        """Write what consumers have acknowledged. What cannot be written now stays to be written."""
        acks, epoch = dict(self._acks), self.state.epoch
        if not acks:
            return

        def write(file: SystemFile) -> list[ConsumerRow]:
            if file.settings().epoch == epoch:
                file.set_consumers(list(acks.values()))
            return file.consumers()

        with contextlib.suppress(SnapfeedError, OSError):
            self._known = await self.in_file(write)
            self._acks = {name: row for name, row in self._acks.items() if acks.get(name) != row}

    async def close(self) -> None:
        if self.outbox is not None:
            await self.outbox.flush()
        await self.flush_acks()
        # the thread may be in the middle of a snapshot, and that one ask the loop, which must not have ended
        with contextlib.suppress(TimeoutError):
            idle = asyncio.get_running_loop().run_in_executor(self._executor, bool)
            async with asyncio.timeout(_PATIENCE):
                await asyncio.shield(idle)
        self._closing = True
        self._detach()
        self._executor.shutdown(wait=False)

    # ---- the partition's thread

    def _leave_out(self, directory: int) -> None:
        """In the partition's thread."""
        if self._source is not None:
            self._source.leave_out(directory)

    async def _visit(self, function: Callable[[Visit], T], *, check: bool = False) -> T:
        def visit() -> tuple[T, int]:
            before = thread_io()[1]
            with Visit(
                self.partition,
                self._abilities,
                check=check,
                max_extents=self.rules.max_extents,
                leave_out=self._leave_out,
            ) as opened:
                result = function(opened)
            return result, thread_io()[1] - before

        result, own = await asyncio.get_running_loop().run_in_executor(self._executor, visit)
        self._own += own
        return result

    # ---- life

    async def run(self) -> None:
        failures = 0
        while True:
            try:
                await self._attach()
                failures = 0
                await self._follow()
            except Unmounted:
                self._stop_following("unmounted", "not mounted")
                await self._until_mounted()
                failures = 0
            except DamageError as error:
                try:
                    await self._damaged(error)
                except (SnapfeedError, OSError) as trouble:
                    await self._wait(failures, trouble)
                    failures += 1
            except (TransientError, OSError) as error:
                if not self._mounted():
                    self._stop_following("unmounted", "not mounted")
                    await self._until_mounted()
                else:
                    await self._wait(failures, error)
                    failures += 1
            except (OperatorError, SourceError) as error:
                await self._wait(failures, error)
                failures += 1
            except Exception as error:  # a bug of ours; it must not take the other partitions with it
                log.exception("%s: internal error", self.name)
                await self._wait(failures, error)
                failures += 1

    def _mounted(self) -> bool:
        if self.partition.kind == "directory":
            return os.path.isdir(self.partition.path)
        return still_mounted(self.partition)

    async def _until_mounted(self) -> None:
        while not self._mounted():
            self._mounts.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY[-1]):
                    await self._mounts.wait()
        log.info("%s: mounted again at %s", self.name, self.state.mount)

    async def _wait(self, failures: int, error: Exception) -> None:
        seconds = RETRY[min(failures, len(RETRY) - 1)]
        self._stop_following("failed", describe(error))
        log.error("%s: %s; trying again in %g s", self.name, describe(error), seconds)
        self._mounts.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._mounts.wait()

    def _stop_following(self, state: str, reason: str) -> None:
        self._detach()
        if (self.state.state, self.state.reason) != (state, reason):
            log.warning("%s: %s: %s", self.name, state, reason)
        self.state.state, self.state.reason, self.state.progress = state, reason, None
        waiting, self._commands = self._commands, []
        for future in waiting:
            if not future.done():
                future.set_exception(TransientError(f"{self.name}: {state}: {reason}"))
        self._changed(self)

    def _claim(self, uuid: str) -> None:
        """One daemon for a partition: a socket in the abstract name space, which ends with its process. Raises OperatorError."""
        if self._owner is not None:
            return
        owner = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            owner.bind(f"\0snapfeed-{uuid}")
        except OSError as error:
            owner.close()
            raise OperatorError("it is served by another snapfeed daemon already; stop one of them") from error
        self._owner = owner

    def _detach(self) -> None:
        if self._owner is not None:
            self._owner.close()
            self._owner = None
        if self._source is not None:
            self._source.close()
            self._source = None
        if self.outbox is not None:
            self.outbox.close()
            self._closed(self.outbox)
            self.outbox = None
        self._fresh = True

    async def _damaged(self, error: DamageError) -> None:
        """Damage is set aside; what a check does not find may have been the disk's: only if it is met again without a success."""
        damaged = await asyncio.get_running_loop().run_in_executor(self._executor, is_damaged, self.partition)
        if not damaged and not self._doubted:
            self._doubted = True
            raise TransientError(f"{error} (but a check of all of it found no damage)")
        await self._set_aside(error)
        self._doubted = False

    async def _set_aside(self, error: DamageError) -> None:
        """A damaged store is kept aside; a new one begins a new epoch."""
        self._detach()
        io = self.rules.io_threshold or self.state.io_threshold or 64 << 20
        seconds = self.rules.time_threshold or self.state.time_threshold or 60.0
        settings, aside = await asyncio.get_running_loop().run_in_executor(
            self._executor, quarantine, self.partition, time.time_ns(), io, seconds
        )
        note = f"{error}; kept aside in {aside}; new epoch {settings.epoch}"
        log.error("%s: %s", self.name, note)
        self.state.notes = [*self.state.notes[-3:], note]

    # ---- attaching

    async def _attach(self) -> None:
        if self.state.state != "failed":  # while it is tried again, it still is, for the reason that is known
            self.state.state, self.state.reason = "starting", None
        self._abilities = None

        # before anything of it is changed: another daemon may be at work on it
        uuid = await self._visit(lambda visit: visit.file.settings().uuid, check=True)
        self._claim(uuid)

        def look(visit: Visit) -> tuple[Abilities, Settings, int | None, int, str]:
            removed = sweep(visit) + sweep_spools(visit)
            self._known, self.state.journal = visit.file.consumers(), journal_of(visit.file)
            if removed:
                log.info("%s: removed %d leftovers of an unfinished snapshot", self.name, removed)
            backend = visit.backend()
            return visit.abilities, visit.file.settings(), visit.file.head(), visit.file.backlog(), backend.consistency

        abilities, settings, head, backlog, consistency = await self._visit(look)
        self._abilities, state = abilities, self.state
        state.epoch, state.head, state.backlog = settings.epoch, head, backlog
        self.set_thresholds(settings.io_threshold, settings.time_threshold)
        state.backend, state.consistency = abilities.backend, consistency
        state.uuid = uuid
        self._acks = {}
        self.told()
        self._dirty = Dirty(lost="not watched until now")
        self._source = await self._watch()
        self._volume = Volume(
            meters_for(self.partition.fs_type, os.fsdecode(self.partition.source), self.partition.path)
        )
        state.meters = self._volume.kinds
        self._own = 0
        self._fresh = True
        self._last = self._checked = time.monotonic()
        state.state = "watching" if self._source is not None else "scanning"
        self.outbox = LiveOutbox(
            self.name,
            self._topic,
            self._envelope(self.name, uuid, settings.epoch),
            self.in_file,
            self._backlog,
        )
        self._opened(self.outbox)
        log.info(
            "%s: %s %s (%s, %s snapshots, events: %s), head %s, thresholds %d bytes, %g s",
            self.name, state.state, state.mount, state.fs, state.backend, state.source or "none", head,
            state.io_threshold, state.time_threshold,
        )  # fmt: skip
        self._changed(self)

    async def _watch(self) -> EventSource | None:
        """A source that was seen to work; None if there is none: then every look is a look at everything."""
        source, why = make_source(self.partition, self._wake.set, unlimited=self.rules.unlimited_queue)
        if source is not None and not await self._hears(source):
            why = f"{source.kind}: no event of a canary"
            source.close()
            source = None
        self.state.source = source.kind if source is not None else None
        self.state.reason = why if source is None else None
        if why:
            self.state.notes = [*self.state.notes[-3:], why]
        return source

    async def _hears(self, source: EventSource) -> bool:
        loop = asyncio.get_running_loop()

        def touch() -> None:
            self._touching = loop.create_task(self._visit(touch_canary))

        heard = await self_test(source, touch)  # type: ignore[arg-type]
        await self._touching
        return heard

    # ---- following

    async def _follow(self) -> None:
        while True:
            if self._mounts.is_set():
                self._mounts.clear()
                if not self._mounted():
                    raise Unmounted
            self._wake.clear()
            facts = self._facts()
            due = decide(facts)
            if due is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._next_look(facts)):
                        await self._wake.wait()
            elif due.trigger is None:
                self._heartbeat(Trigger.TIME)
            else:
                await self._work(due)

    def _facts(self) -> Facts:
        now = time.monotonic()
        self.state.volume = max(0, self._volume.advance() - self._own)
        source = self._source
        return Facts(
            now=now,
            last=self._last,
            volume=self.state.volume,
            events=bool(self._dirty) or self._again > 0 or source is None or source.pending,
            io_threshold=self.state.io_threshold,
            time_threshold=self.state.time_threshold,
            silent_volume=SILENT,
            commands=len(self._commands),
            lost=self._reconcile is not None or (self._dirty.lost is not None and not self._fresh),
            fresh=self._fresh,
            check_due=now - self._checked >= self.rules.reconcile,
        )

    def _next_look(self, facts: Facts) -> float:
        """Seconds to wait if no event comes; longer and longer while the meters stand still."""
        quiet = not facts.events and facts.volume == self._seen_volume
        self._poll = min(self._poll * 1.5, POLL[1]) if quiet else POLL[0]
        self._seen_volume = facts.volume
        return next_look(facts, self._poll)

    def _heartbeat(self, trigger: str) -> None:
        self._last = time.monotonic()
        self.state.last = Last(trigger, self.state.head, time.time_ns(), skipped="no change")
        self._changed(self)

    def _take_events(self) -> Dirty:
        return self._source.take() if self._source is not None else Dirty()

    async def _work(self, due: Due) -> None:
        assert due.trigger is not None  # noqa: S101 - heartbeats do not come here
        loop = asyncio.get_running_loop()
        commands, self._commands = self._commands, []
        silent = not self._dirty and not (self._source is not None and self._source.pending)
        own = self._own
        volume = max(self.state.volume, self._volume.begin() - own)
        taken, self._dirty = self._dirty, Dirty()
        taken.merge(self._take_events())
        taken.lost = taken.lost or self._reconcile or self._why_everything(due.trigger, silent=silent)
        self._reconcile = None
        trigger = due.trigger
        if taken.lost and trigger in (Trigger.TIME, Trigger.VOLUME) and not silent and self._source is not None:
            trigger = Trigger.RECONCILE
        check = time.monotonic() - self._checked >= self.rules.reconcile
        everything = Dirty(set(taken.objects), set(taken.written), set(taken.names), taken.lost, taken.events)
        lost_meanwhile: list[str] = []

        def more() -> Dirty:
            async def now() -> Dirty:
                found = self._take_events()
                everything.merge(found)
                if found.lost:
                    lost_meanwhile.append(found.lost)
                return found

            return self._from_loop(now(), loop)

        order = Order(
            trigger, taken, volume, time.time_ns(), self.rules.keep, self.rules.chunk_limit, self._limits(),
            min(self.pins.values(), default=None), live=self.outbox is not None and self.outbox.live,
        )  # fmt: skip

        def committed(done: Done, fresh: Fresh | None) -> None:
            loop.call_soon_threadsafe(self._tell, done, fresh, commands)

        try:
            self._busy = True
            work = partial(
                self._take, order=order, more=more, progress=reporter(loop, self._show_progress), committed=committed
            )
            done = await self._visit(work, check=check)
        except BaseException as error:
            self._dirty.merge(everything)
            self._volume.abandon()
            for future in commands:
                if not future.done():
                    failure = error if isinstance(error, SnapfeedError) else TransientError(describe(error))
                    future.set_exception(failure)
            raise
        finally:
            self._busy = False
        if lost_meanwhile:
            self._dirty.lost = lost_meanwhile[0]
        # all that this thread wrote since `begin`: closing the system file writes, too
        self._finish(done, self._own - own, looked_at_everything=order.dirty.lost is not None)
        if not done.recorded:
            self._tell(done, None, commands)
        if order.dirty.lost is not None or done.changes >= _MANY:
            self._large = True
            await loop.run_in_executor(self._executor, _give_back)

    def _take(
        self,
        visit: Visit,
        order: Order,
        more: Callable[[], Dirty],
        progress: Callable[[int], None],
        committed: Callable[[Done, Fresh | None], None],
    ) -> Done:
        """In the partition's thread: what consumers have acknowledged first, since it says what is kept for them."""
        if self._acks:
            visit.file.set_consumers(list(self._acks.values()))
        return take(visit, order, more, progress, self._volume.captured, committed)

    def _from_loop(self, coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
        """In the partition's thread: have the loop run something. Raises TransientError once the loop is ending: it may not."""
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        while True:
            try:
                return future.result(timeout=_IMPATIENCE)
            except concurrent.futures.TimeoutError:
                if self._closing:
                    raise TransientError("the daemon is stopping") from None

    def _limits(self) -> Limits:
        """What bounds journal and holds. Once the clock was set, ages mean nothing: only numbers and bytes bound them."""
        if abs(time.time_ns() - time.monotonic_ns() - self._clock) > _CLOCK_SET_NS:
            return replace(self.rules.limits, age=math.inf, hold_age=math.inf)
        return self.rules.limits

    def _why_everything(self, trigger: Trigger, *, silent: bool) -> str | None:
        if self._source is None:
            return "no events here"
        if trigger is Trigger.RECONCILE:
            return "asked for, or the periodic check"
        if silent and trigger in (Trigger.VOLUME, Trigger.TIME):
            return "written without events"
        return None

    def _finish(self, done: Done, own: int, *, looked_at_everything: bool) -> None:
        self._volume.settle(own, made=done.recorded, before=self._own - own)
        self._own = 0
        self._fresh = self._doubted = False
        self._again = done.again
        self._last = time.monotonic()
        if looked_at_everything:
            self._checked = self._last
        self.state.backlog, self.state.journal = done.backlog, done.journal  # tidying may have made them smaller
        self._changed(self)

    def _tell(self, done: Done, fresh: Fresh | None, commands: list[asyncio.Future[Done]]) -> None:
        """A snapshot is committed, or there was none to make: say so to all who wait for it."""
        state = self.state
        state.head, state.progress, state.volume, state.backlog = done.seq, None, 0, done.backlog
        state.journal = done.journal
        state.excluded = tuple(printable_path(p) for p in done.excluded)
        skipped = None if done.recorded else "no change"
        state.last = Last(
            done.trigger, done.seq, time.time_ns(), done.changes, done.volume, done.seconds, done.read, skipped
        )
        if done.recorded:
            log.info(
                "%s: snapshot %d (%s): %d changes, %d bytes written, %.1f ms",
                self.name, done.seq, done.trigger, done.changes, done.volume, done.seconds * 1000,
            )  # fmt: skip
            if self.outbox is not None:
                self.outbox.news(fresh)
        for future in commands:
            if not future.done():
                future.set_result(done)
        self._changed(self)

    def _backlog(self, diffs: int) -> None:
        if self.state.backlog != diffs:
            self.state.backlog = diffs
            self._changed(self)
        if self._large and not diffs:  # what was published of it took memory as well
            self._large = False
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                asyncio.get_running_loop().run_in_executor(self._executor, _give_back)

    def _show_progress(self, entries: int) -> None:
        self.state.progress = entries
        self._changed(self)
