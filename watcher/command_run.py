"""`snapfeed run` and `snapfeed check-config`."""

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import sys
import threading
import time
from dataclasses import replace

from comparer.errors import OperatorError
from feed.broker import check
from feed.embedded import MISSING, REMEDY, installed
from snapshotter.linux.libc import single_heap

from .config import SOCKET, Config, doubts, load
from .daemon import Daemon, Reload
from .render import json_line
from .said import describe

DESCRIPTORS = 65_536


def _adjusted(options: argparse.Namespace, config: Config) -> Config:
    """What the command line says goes before the configuration."""
    if options.broker:
        broker = check(replace(config.draft, url=options.broker))
        config = replace(config, broker=broker)
    path = options.socket or os.environ.get("SNAPFEED_SOCKET")
    return replace(config, socket=path) if path else config


def run(options: argparse.Namespace) -> int:
    start_logging(options.log_level)
    single_heap()
    _more_descriptors()
    reload = Reload(options.config, lambda config: _adjusted(options, config))
    daemon = Daemon(reload(), options.mountpoints, reload)
    asyncio.run(daemon.run())
    _leave_stuck_threads()
    return 0


def _more_descriptors() -> None:
    """A first baseline has some two hundred open for each partition; a shell's limit is often 1,024, and need not be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # the unit forbids it, and has a limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _leave_stuck_threads() -> None:
    """Python waits for its threads when it ends; one that hangs in a frozen file system must not keep a stopped daemon alive."""
    end = time.monotonic() + 2.0
    for thread in threading.enumerate():
        if thread.name.startswith("snapfeed-"):
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                logging.getLogger(__name__).warning("leaving %s, which waits for its partition", thread.name)
                logging.shutdown()
                os._exit(0)


def start_logging(level: str) -> None:
    """To stderr: with time stamps for people, with the journal's priorities where it listens (sd-daemon(3))."""
    if "JOURNAL_STREAM" in os.environ:
        handler: logging.Handler = _JournalHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("amqtt", "transitions", "mqtt", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _JournalHandler(logging.StreamHandler):  # type: ignore[type-arg]
    _PRIORITY = {10: 7, 20: 6, 30: 4, 40: 3, 50: 2}  # noqa: RUF012 - a table

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return "\n".join(f"<{self._PRIORITY.get(record.levelno, 5)}>{line}" for line in text.splitlines())


def check_config(options: argparse.Namespace) -> int:
    """What is wrong is an error; what is odd is said on stderr, and the exit code is 0."""
    try:
        config = load(options.file)
        odd = doubts(options.file)
    except OperatorError as error:
        if options.json:
            print(json_line({"ok": False, "error": describe(error)}))
        raise
    if config.broker is None and not installed():
        odd.append(f"broker: no url, and {MISSING}, which is not installed; {REMEDY}")
    for text in odd:
        print(f"snapfeed check-config: {options.file}: {text}", file=sys.stderr)
    if options.json:
        facts = {
            "ok": True,
            "broker": config.broker.url if config.broker else None,
            "socket": config.socket,
            "partitions": [p.mount for p in config.partitions],
            "warnings": odd,
        }
        print(json_line(facts))
        return 0
    broker = config.broker.url if config.broker else "the embedded one"
    socket = config.socket if config.socket != SOCKET else f"{SOCKET} (default)"
    print(
        f"{options.file}: good. Broker: {broker}. Control socket: {socket}. Partitions named: {len(config.partitions)}."
    )
    return 0
