"""`snapfeed tail`: the small subscriber, printing what arrives."""

import argparse
import asyncio
import contextlib
import logging
import os
import sys
import time
from dataclasses import replace

import orjson

from comparer.errors import DamageError, OperatorError
from feed.broker import BrokerConfig, check
from feed.escape import printable
from feed.positions import FilePositions
from feed.subscriber import Damage, Diff, Gap, Subscriber

from .config import SOCKET, load
from .control import NoDaemonError, ask
from .render import change_line, json_line
from .signer import signer
from .units import counted, format_size


def _broker(options: argparse.Namespace) -> BrokerConfig:
    """The broker of the command line, with the login of the configuration; else the configuration's; else the one that the
    daemon here uses; else the default.
    """
    config = load(options.config) if options.config else None
    draft = BrokerConfig() if config is None else config.draft
    if options.broker:
        return check(replace(draft, url=options.broker))
    if config is not None and config.broker is not None:
        return config.broker
    path = config.socket if config is not None and options.socket in (None, SOCKET) else options.socket or SOCKET
    try:
        (found,) = ask(path, "status", timeout=5)
    except NoDaemonError:
        return draft
    return replace(draft, url=found["broker"]["url"], base=found["broker"]["base"])


def tail(options: argparse.Namespace) -> int:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(configured=options.config is not None))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        asyncio.run(_tail(_broker(options), options))
    except KeyboardInterrupt:
        return 0
    return 0


class Formatter(logging.Formatter):
    """Who has given no configuration is told how to, where a message names what stands in one."""

    def __init__(self, *, configured: bool) -> None:
        super().__init__("snapfeed tail: %(message)s")
        self._configured = configured

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._configured and "[broker]" in text:
            text += " (without --config FILE there is no login and no certificate of one's own)"
        return text


def _position_file(consumer: str) -> str:
    """Where a consumer's position is kept if no file is given: ~/.local/state/snapfeed/tail-<consumer>.json."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    directory = os.path.join(state, "snapfeed")
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
    except OSError as error:
        raise OperatorError(f"{directory!r}: {error.strerror}; give --position FILE") from error
    return os.path.join(directory, f"tail-{consumer}.json")


def _subscriber(broker: BrokerConfig, options: argparse.Namespace) -> Subscriber:
    sign = signer(load(options.config).secret if options.config else None)
    if not options.consumer:
        return Subscriber(broker, topic_filter=options.filter)
    positions = FilePositions(options.position or _position_file(options.consumer))
    return Subscriber(broker, topic_filter=options.filter, consumer=options.consumer, positions=positions, sign=sign)


async def _tail(broker: BrokerConfig, options: argparse.Namespace) -> None:
    left = options.count
    subscriber = _subscriber(broker, options)
    _say(f"listening at {printable(broker.url.encode(errors='replace'))}")
    async with contextlib.aclosing(aiter(subscriber)) as items:  # type: ignore[type-var]
        async for item in items:
            if isinstance(item, Diff):
                _show(item, as_json=options.json)
                if options.consumer:
                    await subscriber.commit(item)
                if left is not None:
                    left -= 1
                    if left <= 0:
                        return
            elif isinstance(item, Gap):
                _say(_gap(item))
            elif isinstance(item, Damage):
                _say(f"unreadable message on {_safe(item.topic)}: {_safe(item.error)}")


def _safe(text: str) -> str:
    return printable(text.encode(errors="replace"))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _gap(gap: Gap) -> str:
    where = _safe(f"{gap.host}/{gap.partition}")
    if gap.epoch != gap.next_epoch:
        return (
            f"gap: {where}: snapshot {gap.next_seq} is of another epoch, {_safe(gap.next_epoch)}, than snapshot {gap.seq},"
            f" {_safe(gap.epoch)}; with --consumer NAME it would be closed"
        )
    return (
        f"gap: {where}: what changed from snapshot {gap.seq} to {gap.parent} did not arrive; with --consumer NAME it would"
        " be closed"
    )


def _show(diff: Diff, *, as_json: bool) -> None:
    envelope = diff.envelope
    if as_json:
        head = orjson.loads(envelope.head() + b"}")
        print(json_line({**head, "changes": diff.documents}), flush=True)
        return
    when = time.strftime("%H:%M:%S", time.localtime(envelope.time_ns / 1e9))
    kind = "baseline" if envelope.baseline else f"diff from {envelope.parent}"
    print(
        f"{when} {_safe(envelope.partition)} snapshot {envelope.seq} ({_safe(envelope.trigger)}, {kind}):"
        f" {counted(len(diff.documents), 'change')}, {format_size(envelope.volume)} written"
    )
    try:
        changes = diff.changes()
    except DamageError as error:
        print(f"  unreadable: {_safe(str(error))}", flush=True)
        return
    for change in changes:
        print(f"  {change_line(change)}")
    sys.stdout.flush()
