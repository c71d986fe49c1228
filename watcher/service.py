"""Commands carried out: one implementation for MQTT and for the control socket."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

import orjson

from comparer.errors import SnapfeedError
from feed.commands import Command, CommandError, Executed, RateLimit, answer, parse_command
from feed.pages import chunk_limit
from feed.requests import Request
from snapshotter.systemfile import SystemFile

from .pipeline import Pipeline, describe
from .spans import Span
from .verification import watched
from .work import Done

log = logging.getLogger(__name__)
RATE, BURST = 20.0, 50  # commands a second, from whoever sends them over MQTT
LATER = frozenset({"replay", "baseline", "ack"})


class Partitions(Protocol):
    """The daemon, as commands see it."""

    def pipelines(self) -> Mapping[str, Pipeline]: ...

    def overview(self) -> dict[str, Any]: ...

    def rescan(self) -> None: ...


class Service:
    def __init__(self, daemon: Partitions, now: Callable[[], float] = time.monotonic) -> None:
        self._daemon = daemon
        self._now = now
        self._executed = Executed()
        self._limit = RateLimit(RATE, BURST)
        self.refused = 0
        self.executed = 0

    # ---- MQTT

    async def handle(self, request: Request) -> bytes:
        """Answer a command that came over MQTT. Never raises for what a command can be."""
        try:
            if not self._limit.allow(self._now()):
                raise CommandError("too many commands; slow down")
            command = parse_command(request.verb, request.payload)
        except CommandError as error:
            return self._refuse(request.verb, error.id, error)
        earlier = self._executed.reply(command)
        if earlier is not None:
            return earlier
        if not self._executed.begin(command):
            return self._refuse(command.verb, command.id, CommandError("a command with this id is being carried out"))
        try:
            reply = answer(command.id, await self.execute(command))
        except SnapfeedError as error:
            reply = self._refuse(command.verb, command.id, error)
        except BaseException:
            self._executed.forget(command)
            raise
        self._executed.finish(command, reply)
        return reply

    def _refuse(self, verb: str, identifier: str | None, error: SnapfeedError) -> bytes:
        self.refused += 1
        log.warning("command %s refused: %s", ascii(verb)[:80], describe(error))
        return answer(identifier, error=describe(error))

    # ---- both

    async def execute(self, command: Command) -> Any:
        """Carry out a command that was checked; raises SnapfeedError."""
        if command.verb in LATER:
            raise CommandError(f"{command.verb}: not in this version")
        targets = self.find([command.partition] if command.partition is not None else [])
        self.executed += 1
        if command.verb == "snapshot":
            found = await self.snapshots(targets)
            return found[0] if command.partition is not None else found
        if command.verb == "thresholds":
            return await self._thresholds(targets, command.fields)
        documents = [p.state.document() for p in targets]
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

    async def snapshots(self, targets: list[Pipeline]) -> list[dict[str, Any]]:
        done = await asyncio.gather(*(p.snapshot() for p in targets), return_exceptions=True)
        for result in done:
            if isinstance(result, BaseException):
                raise result
        return [snapshot_data(p, d) for p, d in zip(targets, done, strict=True) if isinstance(d, Done)]

    async def _thresholds(self, targets: list[Pipeline], fields: Mapping[str, Any]) -> list[dict[str, Any]]:
        from .units import parse_duration, parse_size  # noqa: PLC0415

        io = parse_size(fields["io_threshold"], "io_threshold") if fields.get("io_threshold") is not None else None
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

    async def local(self, verb: str, document: dict[str, Any]) -> AsyncIterator[Any]:
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


def _text(document: dict[str, Any], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise CommandError(f"`{key}` must be a text")
    return value


def _seq(document: dict[str, Any], key: str) -> int:
    value = document.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CommandError(f"`{key}` must be a snapshot number")
    return value


def snapshot_data(pipeline: Pipeline, done: Done) -> dict[str, Any]:
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
