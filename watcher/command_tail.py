"""`snapfeed tail`: the small subscriber, printing what arrives."""

import argparse
import asyncio
import sys
import time

import orjson

from comparer.errors import OperatorError
from feed.broker import BrokerConfig, check
from feed.escape import printable
from feed.subscriber import Damage, Diff, Gap, Subscriber

from .config import SOCKET
from .control import NoDaemonError, ask
from .render import change_line
from .units import format_size


def _broker(options: argparse.Namespace) -> BrokerConfig:
    """The broker of the command line; else the one the daemon here uses; else the default."""
    if options.broker:
        return check(BrokerConfig(url=options.broker))
    try:
        (found,) = ask(options.socket or SOCKET, "status", timeout=5)
    except NoDaemonError:
        return BrokerConfig()
    return BrokerConfig(url=found["broker"]["url"], base=found["broker"]["base"])


def tail(options: argparse.Namespace) -> int:
    if options.filter is not None and not valid_filter(options.filter):
        raise OperatorError(f"FILTER: {options.filter!r} is no topic filter; write one such as 'snapfeed/+/+/changes'")
    try:
        asyncio.run(_tail(_broker(options), options))
    except KeyboardInterrupt:
        return 0
    return 0


def valid_filter(text: str) -> bool:
    """MQTT 5.0, 4.7.1: `+` and `#` stand alone in their level, `#` in the last one."""
    levels = text.split("/")
    good = all(level in ("+", "#") or not set(level) & {"+", "#"} for level in levels)
    return good and "#" not in levels[:-1] and 0 < len(text.encode()) < 65536 and "\0" not in text


async def _tail(broker: BrokerConfig, options: argparse.Namespace) -> None:
    left = options.count
    subscriber = Subscriber(broker, options.filter)
    print(f"listening at {broker.url}", file=sys.stderr, flush=True)
    async for item in subscriber:
        if isinstance(item, Diff):
            _show(item, as_json=options.json)
            if left is not None:
                left -= 1
                if left <= 0:
                    return
        elif isinstance(item, Gap):
            print(f"gap: {item}", file=sys.stderr, flush=True)
        elif isinstance(item, Damage):
            print(f"unreadable message: {item}", file=sys.stderr, flush=True)


def _show(diff: Diff, *, as_json: bool) -> None:
    envelope = diff.envelope
    if as_json:
        head = orjson.loads(envelope.head() + b"}")
        print(orjson.dumps({**head, "changes": diff.documents}).decode(), flush=True)
        return
    when = time.strftime("%H:%M:%S", time.localtime(envelope.time_ns / 1e9))
    kind = "baseline" if envelope.baseline else f"diff from {envelope.parent}"
    print(
        f"{when} {printable(envelope.partition.encode())} snapshot {envelope.seq} ({envelope.trigger}, {kind}):"
        f" {len(diff.documents)} changes, {format_size(envelope.volume)} written"
    )
    for change in diff.changes():
        print(f"  {change_line(change)}")
    sys.stdout.flush()
