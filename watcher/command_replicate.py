"""`snapfeed replicate`: keeps a directory an exact copy of a partition, and checks that it is one."""

import argparse
import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

import orjson

from comparer.errors import DamageError, OperatorError, TransientError
from feed.broker import NAME, BrokerConfig, check, slug
from feed.connection import LinkError
from feed.dialer import Dialer
from feed.escape import printable
from feed.replica import Applied, Replica, ReplicaPositions
from feed.replica_content import Kernel
from feed.replica_verify import ContentCheck
from feed.subscriber import Damage, Diff, Gap, Subscriber
from snapshotter.linux.fallocate import punch_hole, syncfs
from snapshotter.linux.fiemap import ficlone

from .config import load
from .render import json_line
from .signer import signer
from .units import format_size

_PATIENCE = 15.0  # seconds for the broker to give a partition's retained state
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Diffs(Protocol):
    """What of `Subscriber` is needed."""

    def __aiter__(self) -> AsyncIterator[Diff | Gap | Damage]: ...
    async def commit(self, diff: Diff) -> None: ...


def replicate(options: argparse.Namespace) -> int:
    """Exit code 0: all that was asked for is exact; 1: something is stale or could not be had, or (--verify) disagrees."""
    broker = None if options.verify else _broker(options)
    name = printable(os.fsencode(options.destination))
    if options.verify and not os.path.isdir(os.path.join(options.destination, ".snapfeed-replica")):
        raise OperatorError(f"{name} is no replica; give the DEST of a `snapfeed replicate`")
    try:
        os.mkdir(options.destination, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise OperatorError(f"{name}: cannot be made: {error.strerror}; give a directory that can be") from error
    with open(_BOOT_ID, encoding="ascii") as file:
        boot_id = file.read().strip()
    source = None if options.source is None else os.fsencode(options.source)
    kernel = Kernel(ficlone, punch_hole, syncfs)
    with Replica(os.fsencode(options.destination), kernel=kernel, boot_id=boot_id, source=source) as replica:
        return _with(replica, broker, options)


def _with(replica: Replica, broker: BrokerConfig | None, options: argparse.Namespace) -> int:
    if replica.repaired is not None:
        _say(f"the machine had stopped without warning: verified, {replica.repaired} disagreements put right")
    if replica.source is None:
        _say("without --source no content is copied: files get names, attributes and sizes, and read as zeros")
    if replica.tree.root is False:
        _say("without root, owners and devices cannot be set, and directories keep their owner's access")
    resumed = replica.resume()
    if resumed is not None:
        _show(resumed, replica, options)
    if broker is None:
        return _verify(replica, options)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(replica, broker, options))
    return _verdict(replica)


def _broker(options: argparse.Namespace) -> BrokerConfig:
    if options.partition is None:
        raise OperatorError("--partition: give the partition's name in topics (`snapfeed status` shows it)")
    if not NAME.match(options.partition):
        raise OperatorError(f"--partition: {options.partition!r} is not allowed; write 1 to 64 of A-Z a-z 0-9 _ -")
    if options.host is not None and not NAME.match(options.host):
        raise OperatorError(f"--host: {options.host!r} is not allowed; write 1 to 64 of A-Z a-z 0-9 _ -")
    draft = BrokerConfig() if options.config is None else load(options.config).draft
    return check(replace(draft, url=options.broker) if options.broker else draft)


def consumer_name(given: str | None, destination: str, host: str) -> str:
    """The name that the daemon keeps snapshots for: given, or made of this host's name and the directory's."""
    if given is None:
        return slug(f"{host}-{re.sub('[^A-Za-z0-9]+', '-', os.path.realpath(destination)).strip('-')}"[-64:])
    if not NAME.match(given):
        raise OperatorError(f"--consumer: {given!r} is not allowed; write 1 to 64 of A-Z a-z 0-9 _ -")
    return given


async def _run(replica: Replica, broker: BrokerConfig, options: argparse.Namespace) -> None:
    host = options.host or broker.host
    consumer = consumer_name(options.consumer, options.destination, BrokerConfig().host)
    target = await _head(broker, host, options.partition) if options.once else None
    subscriber = Subscriber(
        broker,
        topic_filter=f"{broker.base}/{host}/{options.partition}/changes",
        consumer=consumer,
        positions=ReplicaPositions(replica),
        sign=signer(load(options.config).secret if options.config else None),
    )
    await follow(replica, subscriber, options, target)


async def follow(replica: Replica, diffs: Diffs, options: argparse.Namespace, target: tuple[str, int] | None) -> None:
    """Apply diffs as they come, for ever or until (epoch, seq) is reached. Raises SnapfeedError for what cannot be applied."""
    if target is not None and _reached(replica, target):
        return
    async with contextlib.aclosing(diffs.__aiter__()) as items:  # type: ignore[type-var]
        async for item in items:
            if isinstance(item, Diff):
                if await _take(replica, item, options):
                    await diffs.commit(item)
                if target is not None and _reached(replica, target):
                    return
            elif isinstance(item, Gap):
                raise DamageError(
                    f"diffs are missing before {item.next_epoch}/{item.next_seq}, and were not asked for: a bug"
                )
            else:
                _say(f"unreadable message on {printable(item.topic.encode())}, left out: {item.error}")


async def _take(replica: Replica, diff: Diff, options: argparse.Namespace) -> bool:
    """Apply it, in a thread, so that the connection lives on; whether the replica is there now."""
    delay = 1.0
    while True:
        try:
            applied = await asyncio.to_thread(replica.apply, diff)
        except TransientError as error:
            if options.once:
                raise
            _say(f"{error}; trying again in {delay:g} s")
            await asyncio.sleep(delay)
            delay = min(2 * delay, 60.0)
        else:
            break
    if applied is not None:
        _show(applied, replica, options)
    return replica.position == (diff.envelope.epoch, diff.envelope.seq)


def _reached(replica: Replica, target: tuple[str, int]) -> bool:
    position = replica.position
    return position is not None and position[0] == target[0] and position[1] >= target[1]


async def _head(broker: BrokerConfig, host: str, partition: str) -> tuple[str, int]:
    """(epoch, seq) that the partition is at, from its retained state. Raises OperatorError if there is none."""
    topic = f"{broker.base}/{host}/{partition}/state"
    try:
        async with asyncio.timeout(_PATIENCE), Dialer(broker, "").open_client() as connection:
            await connection.subscribe(topic, qos=1)
            while True:
                message = await connection.receive()
                document = (
                    orjson.loads(message.payload) if isinstance(message.payload, bytes) and message.payload else {}
                )
                if document.get("head") is not None and document.get("epoch") is not None:
                    return document["epoch"], document["head"]
    except TimeoutError:
        raise OperatorError(
            f"{topic}: no state of this partition at {broker.url}; are --host and --partition right, has its daemon run?"
        ) from None
    except LinkError as error:
        raise TransientError(str(error)) from None


# ---- what people and programs see


def _say(text: str) -> None:
    print(f"snapfeed replicate: {text}", file=sys.stderr, flush=True)


def _show(applied: Applied, replica: Replica, options: argparse.Namespace) -> None:
    if options.json:
        document = {
            "partition": applied.partition,
            "epoch": applied.epoch,
            "seq": applied.seq,
            "baseline": applied.baseline,
            "changes": applied.changes,
            "copied_bytes": applied.copied,
            "cloned_bytes": applied.cloned,
            "stale": applied.stale,
            "flaws": applied.flaws,
        }
        print(json_line(document), flush=True)
    when, kind = time.strftime("%H:%M:%S"), "baseline, " if applied.baseline else ""
    moved = f"{format_size(applied.copied)} copied, {format_size(applied.cloned)} cloned"
    stale = f", {_stale(replica)}" if applied.stale and replica.source is not None else ""
    flaws = f", {applied.flaws} cannot be made as they are" if applied.flaws else ""
    text = f"{when} {applied.partition} at {applied.seq} ({kind}{applied.changes} changes, {moved}{stale}{flaws})"
    print(text, file=sys.stderr, flush=True)


def _stale(replica: Replica) -> str:
    trouble = replica.source.trouble if replica.source is not None else None
    return f"{replica.stale} stale" + (f": {trouble}" if trouble else "")


def _verdict(replica: Replica) -> int:
    stale = replica.stale if replica.source is not None else 0
    if stale:
        _say(f"{_stale(replica)}; the content of stale files is tried again with each diff (--verify names them)")
    if replica.flaws:
        _say(f"{replica.flaws} objects could not be made as they are (--verify names them)")
    return 1 if stale or replica.flaws else 0


def _verify(replica: Replica, options: argparse.Namespace) -> int:
    check, found = ContentCheck(), 0
    for item in replica.verify(check):
        if item.what == "stale" and replica.source is None:
            continue  # said once for all
        found += 1
        if options.json:
            path = printable(item.path)
            print(json_line({"what": item.what, "path": path, "detail": item.detail}), flush=True)
        else:
            print(f"{item.what:<10}  {printable(item.path)}  {item.detail}", flush=True)
    position = "nothing yet" if replica.position is None else f"snapshot {replica.position[1]}"
    summary = f"{position}: {replica.state.count()} objects, {found} disagreement{'' if found == 1 else 's'}"
    if replica.source is not None:
        summary += f"; content of {check.files} files compared ({format_size(check.bytes)})"
        summary += f", of {check.unknown} the source has none to compare with" if check.unknown else ""
    if options.json:
        document = {"objects": replica.state.count(), "disagreements": found, "files_compared": check.files}
        print(json_line({**document, "bytes_compared": check.bytes, "not_compared": check.unknown}), flush=True)
    else:
        print(summary, flush=True)
    return 1 if found else 0
