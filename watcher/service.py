"""Commands carried out: one implementation for MQTT and for the control socket."""

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, Protocol

import orjson

from comparer.errors import SnapfeedError, TransientError
from feed.around import Around
from feed.commands import Command, CommandError, Executed, RateLimit, answer, parse_command, readable_id
from feed.documents import SnapshotData, ThresholdsData
from feed.pages import chunk_limit
from feed.requests import Request
from feed.signing import why_not
from snapshotter.systemfile import ConsumerRow, SystemFile
from snapshotter.visit import Visit

from .baselines import Spool
from .ledger import Ledger
from .pipeline import Pipeline
from .replays import Replays, check_consumer, register
from .said import describe
from .spans import Span
from .surroundings import step
from .verification import watched
from .work import Done

log = logging.getLogger(__name__)
RATE, BURST = 20.0, 50  # commands a second, from whoever sends them over MQTT
ACKS, ACKS_AT_ONCE = 500.0, 2000  # `ack` is small, and told by every consumer for every diff
LOCAL, LOCAL_AT_ONCE = 500.0, 2000  # at the control socket
PLACES = 32  # commands that may wait for one partition: the others' are not to wait behind them
_READING = frozenset({"state", "ack"})  # may be repeated: nothing comes of it


Check = Callable[[Mapping[str, Any]], str | None]


class Partitions(Protocol):
    """The daemon, as commands see it."""

    def pipelines(self) -> Mapping[str, Pipeline]: ...

    def overview(self) -> dict[str, Any]: ...

    def rescan(self) -> None: ...


class Service:
    """`secret`: what commands over MQTT must be signed with. `ledger`: those carried out, on the disk."""

    def __init__(
        self,
        daemon: Partitions,
        replays: Replays,
        ledger: Ledger,
        host: str,
        secret: bytes | None = None,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._daemon = daemon
        self._replays = replays
        self._ledger = ledger
        self._host = host
        self._secret = secret
        self._now = now
        self._wall = wall
        self._executed = Executed()
        self._limit = RateLimit(RATE, BURST)
        self._acks = RateLimit(ACKS, ACKS_AT_ONCE)
        self._local = RateLimit(LOCAL, LOCAL_AT_ONCE)
        self._busy: Counter[str] = Counter()  # commands under way, by partition
        self.refused = 0
        self.executed = 0

    # ---- from the broker, and from the control socket

    async def handle(self, request: Request) -> bytes:
        """Answer a command that came over MQTT. Never raises for what a command can be."""
        limit = self._acks if request.verb == "ack" else self._limit
        return await self._answered(request.verb, request.payload, limit, lambda doc: self._unsigned(request, doc))

    async def handle_local(self, verb: str, payload: bytes) -> bytes:
        """The same for the control socket, where the kernel says who calls."""
        return await self._answered(verb, payload, self._local, lambda _document: None)

    async def _answered(self, verb: str, payload: bytes, limit: RateLimit, check: Check) -> bytes:
        try:
            if not limit.allow(self._now()):
                raise CommandError("too many commands; slow down", readable_id(payload))
            command = parse_command(verb, payload, check)
        except CommandError as error:
            return self.refuse(verb, error.id, error)
        earlier = self._executed.reply(command)
        if earlier is not None:
            return earlier
        if not self._executed.begin(command):
            return self.refuse(command.verb, command.id, CommandError("a command with this id is being carried out"))
        try:
            reply = await self._once(command)
        except SnapfeedError as error:  # it was not begun, and may be tried again
            self._executed.forget(command)
            return self.refuse(command.verb, command.id, error)
        except BaseException:
            self._executed.forget(command)
            raise
        self._executed.finish(command, reply)
        return reply

    async def _once(self, command: Command) -> bytes:
        """Carry it out and remember it, or say what was said when it was. Raises TransientError if it cannot be remembered."""
        if command.verb in _READING:
            return await self._reply(command)
        known, told = await asyncio.to_thread(self._ledger.earlier, command)
        if known and told is not None:
            return told
        if known:
            why = "it was begun by a daemon that ended meanwhile, and is not done twice; look at `state`"
            return self.refuse(command.verb, command.id, CommandError(why))
        await asyncio.to_thread(self._ledger.begin, command)
        reply = await self._reply(command)
        await asyncio.to_thread(self._ledger.finish, command, reply)
        return reply

    async def _reply(self, command: Command) -> bytes:
        try:
            return answer(command.id, await self.execute(command))
        except SnapfeedError as error:
            return self.refuse(command.verb, command.id, error)

    def _unsigned(self, request: Request, document: Mapping[str, Any]) -> str | None:
        if self._secret is None:
            return None
        return why_not(self._secret, request.verb, self._host, document, self._wall())

    def refuse(self, verb: str, identifier: str | None, error: SnapfeedError) -> bytes:
        """One line in the log, one count, and the answer."""
        self.refused += 1
        log.warning("command %s refused: %s", ascii(verb)[:80], describe(error))
        return answer(identifier, data=getattr(error, "data", None), error=describe(error))

    # ---- both

    async def execute(self, command: Command) -> Any:
        """Carry out a command that was checked; raises SnapfeedError."""
        targets = self.find([command.partition] if command.partition is not None else [])
        full = next((p.name for p in targets if self._busy[p.name] >= PLACES), None)
        if full is not None and command.verb not in _READING:
            raise TransientError(f"{full}: {PLACES} commands wait for it already; try again later")
        self.executed += 1
        self._busy.update(p.name for p in targets)
        try:
            return await self._executed_on(command, targets)
        finally:
            self._busy.subtract(p.name for p in targets)

    async def _executed_on(self, command: Command, targets: list[Pipeline]) -> Any:
        if command.verb in ("replay", "baseline", "ack"):
            return await self._for_consumer(command)
        if command.verb == "snapshot":
            found = await self.snapshots(targets)
            return found[0] if command.partition is not None else found
        if command.verb == "thresholds":
            return await self._thresholds(targets, command.fields)
        documents = [p.state.document(time.time_ns()) for p in targets]
        return documents[0] if command.partition is not None else documents

    def find(self, names: list[str]) -> list[Pipeline]:
        """Pipelines by name, mount point or UUID; all of them for no names. Raises CommandError."""
        known = self._daemon.pipelines()
        if not names:
            return list(known.values())
        found = []
        for name in names:
            plain = os.path.normpath(name) if name.startswith("/") else name
            match = next((p for p in known.values() if plain in (p.name, p.state.mount, p.state.uuid)), None)
            if match is None:
                shown = ascii(name)[:200]
                raise CommandError(f"unknown partition {shown}; known are: {', '.join(sorted(known)) or 'none'}")
            found.append(match)
        return found

    async def snapshots(self, targets: list[Pipeline]) -> list[SnapshotData]:
        done = await asyncio.gather(*(p.snapshot() for p in targets), return_exceptions=True)
        for result in done:
            if isinstance(result, BaseException):
                raise result
        return [snapshot_data(p, d) for p, d in zip(targets, done, strict=True) if isinstance(d, Done)]

    async def _for_consumer(self, command: Command) -> dict[str, Any]:
        if command.partition is None:
            raise CommandError(f"`{command.verb}` needs the field `partition`")
        (pipeline,) = self.find([command.partition])
        consumer, fields = command.fields["consumer"], command.fields
        if command.verb == "baseline":
            return await self._replays.baseline(pipeline, consumer, time.time_ns())
        if command.verb == "replay":
            since = fields["since"]
            return await self._replays.replay(pipeline, consumer, since["epoch"], since["seq"], time.time_ns())
        pipeline.acknowledge(consumer, fields["epoch"], fields["seq"], time.time_ns())
        return {"partition": pipeline.name, "consumer": consumer, "epoch": fields["epoch"], "seq": fields["seq"]}

    async def _thresholds(self, targets: list[Pipeline], fields: Mapping[str, Any]) -> list[ThresholdsData]:
        from .units import parse_duration, parse_threshold  # noqa: PLC0415

        io = parse_threshold(fields["io_threshold"], "io_threshold") if fields.get("io_threshold") is not None else None
        seconds = (
            parse_duration(fields["time_threshold"], "time_threshold")
            if fields.get("time_threshold") is not None
            else None
        )
        for pipeline in targets:
            if io is not None or seconds is not None:
                await pipeline.in_file(lambda file: file.set_thresholds(io, seconds))
                pipeline.set_thresholds(io, seconds)
        return [
            {"partition": p.name, "io_threshold": p.state.io_threshold, "time_threshold": p.state.time_threshold}
            for p in targets
        ]

    # ---- the control socket's own verbs

    async def local(self, verb: str, document: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """Answers, one or many, to what only the control socket asks. Raises SnapfeedError."""
        if verb == "status":
            yield self._daemon.overview()
        elif verb == "rescan":
            self._daemon.rescan()
        elif verb == "snapshots":
            (pipeline,) = self.find([_text(document, "partition")])
            rows = await pipeline.in_file(SystemFile.snapshots)
            for row in rows:
                yield snapshot_row(row)
        elif verb == "diff":
            (pipeline,) = self.find([_text(document, "partition")])
            first, last = _seq(document, "from"), _seq(document, "to")
            await pipeline.in_file(lambda file: check_span(file, first, last))
            span = Span(first, last, chunk_limit())
            while (chunk := await pipeline.in_file(span.step)) is not None:
                if chunk.count:
                    yield orjson.Fragment(b"[" + chunk.data + b"]")
        elif verb == "export":
            (pipeline,) = self.find([_text(document, "partition")])
            async for item in export(pipeline, document):
                yield item
        elif verb == "forget":
            (pipeline,) = self.find([_text(document, "partition")])
            consumer = _text(document, "consumer")
            if not await pipeline.forget_consumer(consumer):
                raise CommandError(f"{pipeline.name} knows no consumer {ascii(consumer)[:80]}")
        elif verb == "reconcile":
            for pipeline in self.find([_text(document, "partition")]):
                pipeline.reconcile("asked for")
                yield snapshot_data(pipeline, await pipeline.snapshot())
        elif verb == "verify":
            (pipeline,) = self.find([_text(document, "partition")])
            async for item in watched(pipeline):
                yield item
        else:
            raise CommandError(f"unknown command {ascii(verb)[:80]}")


async def export(pipeline: Pipeline, document: Mapping[str, Any]) -> AsyncIterator[Any]:
    """The position first, then lists of changes: from where a consumer is (or `from`) to the head, or the whole state.

    With `around` true a diff is followed by {"around": entries}: what it does not name and a tool for paths must look at
    (feed.around); the last of these is empty. Raises CommandError, TransientError, OSError.
    """
    consumer = document.get("consumer")
    if consumer is not None:
        check_consumer(consumer)
    given = None if document.get("from") is None else _seq(document, "from")
    epoch = document.get("epoch")
    spool = Spool(f"export-{uuid.uuid4().hex}", chunk_limit())

    def begin(visit: Visit) -> tuple[dict[str, Any], Span | None]:
        file = visit.file
        rows = file.snapshots()
        if not rows:
            raise CommandError(f"{pipeline.name} has no snapshot yet; ask again when there is one")
        head, since = rows[-1], given
        known = next((row for row in file.consumers() if row.name == consumer), None)
        if since is None and known is not None and known.has:
            since = known.seq
        if epoch is not None and epoch != file.settings().epoch:
            raise CommandError(f"epoch {ascii(epoch)[:80]} is over; {pipeline.name} has {file.settings().epoch}")
        whole = since is None or not leads(file, since, head.seq)
        if whole and given is not None:
            raise CommandError(f"the journal of {pipeline.name} does not lead from {given} to {head.seq} any more")
        if consumer is not None and known is None:
            register(file, ConsumerRow(consumer, head.seq, has=False, time_ns=time.time_ns()))
        if whole:
            spool.begin(visit)
        path = None if head.path is None else head.path.decode()
        facts = {
            "partition": pipeline.name, "mount": pipeline.state.mount, "epoch": file.settings().epoch,
            "from": None if whole else since, "seq": head.seq, "snapshot": path, "consistency": head.consistency,
            "baseline": whole,
        }  # fmt: skip
        return facts, None if whole or since is None else Span(since, head.seq, chunk_limit())

    try:
        facts, span = await pipeline.in_visit(begin)
        pipeline.pins[spool.consumer] = facts["seq"]
        yield facts
        if span is not None:
            around = Around()
            while (found := await pipeline.in_file(lambda file: _seen(span, file, around))) is not None:
                if found:
                    yield orjson.Fragment(found)
            if document.get("around") is not True:
                return
            while (entries := await pipeline.in_visit(lambda visit: step(visit, facts["seq"], around))) is not None:
                yield {"around": entries}
            yield {"around": []}
            return
        while await pipeline.in_visit(spool.step):
            pass
        for number in range(1, spool.pages + 1):
            body = await pipeline.in_visit(lambda visit, number=number: spool.page(visit, number))  # type: ignore[misc]
            yield orjson.Fragment(b"[" + body + b"]")
    finally:
        pipeline.pins.pop(spool.consumer, None)
        with contextlib.suppress(SnapfeedError, OSError):
            await pipeline.in_visit(spool.remove)


def _seen(span: Span, file: SystemFile, around: Around) -> bytes | None:
    """The next changes of a diff as a JSON list, `around` told of them; empty while there are none yet, None at the end."""
    chunk = span.step(file)
    if chunk is None or not chunk.count:
        return None if chunk is None else b""
    found = b"[" + chunk.data + b"]"
    around.see(orjson.loads(found))
    return found


def leads(file: SystemFile, since: int, last: int) -> bool:
    """Whether the journal has every diff from one snapshot to another."""
    at = since
    for row in file.journal(since):
        if row.parent not in (at, None) or row.seq > last:
            break
        at = row.seq
    return at == last


def _text(document: dict[str, Any], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise CommandError(f"`{key}` must be a text")
    return value


def _seq(document: Mapping[str, Any], key: str) -> int:
    value = document.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CommandError(f"`{key}` must be a snapshot number")
    return value


def snapshot_data(pipeline: Pipeline, done: Done) -> SnapshotData:
    """The `data` of a snapshot's answer (docs/feed.md)."""
    return {
        "partition": pipeline.name,
        "epoch": pipeline.state.epoch,
        "seq": done.seq,
        "changes": done.changes,
        "volume": done.volume,
        "trigger": done.trigger,
    }


def snapshot_row(row: Any) -> dict[str, Any]:
    path = row.path.decode("utf-8", "backslashreplace") if row.path is not None else None
    return {
        "seq": row.seq, "time_ns": str(row.time_ns), "trigger": row.trigger, "volume": row.volume,
        "changes": row.changes, "consistency": row.consistency, "snapshot": path,
    }  # fmt: skip


def check_span(file: SystemFile, first: int, last: int) -> None:
    """Both ends must be kept snapshots. Raises CommandError."""
    kept = [row.seq for row in file.snapshots()]
    for seq in (first, last):
        if seq not in kept:
            known = f"{min(kept)} to {max(kept)}" if kept else "none"
            raise CommandError(f"snapshot {seq} is not kept; kept are: {known}")
    if first > last:
        raise CommandError(f"snapshot {first} is newer than {last}; give the older one first")
