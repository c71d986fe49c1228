"""`snapfeed verify`: the last snapshot against everything that is there now."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from comparer.errors import OperatorError, TransientError
from snapshotter.visit import Visit

from .command_ask import find_partition
from .control import NoDaemonError, ask
from .render import json_line
from .said import describe
from .verification import directly

_PATIENCE = 2.0  # seconds before progress is shown
Item = dict[str, Any]


class _Printer:
    def __init__(self, *, json: bool) -> None:
        self._json = json
        self._meanwhile: list[Item] = []
        self._progress = _Progress()
        self.summary: Item | None = None

    def take(self, item: Item) -> None:
        if "progress" in item:
            self._progress.show(item["progress"])
            return
        self._progress.clear()
        if self._json:
            print(json_line(item), flush=True)
        elif "what" not in item:
            self._conclude(item)
        elif item["meanwhile"]:
            self._meanwhile.append(item)
        else:
            _print(item)
        if "what" not in item:
            self.summary = item

    def _conclude(self, summary: Item) -> None:
        if self._meanwhile:
            print("changed after the snapshot, so no disagreement:")
        for item in self._meanwhile:
            _print(item)
        found = summary["disagreements"]
        what = "no disagreement" if not found else f"{found} disagreement{'s' if found > 1 else ''}"
        print(f"snapshot {summary['seq']}: {summary['entries']} entries compared, {what}", flush=True)


def _print(item: Item) -> None:
    print(f"{item['what']:<10}  {item['path']}  {item['detail']}")


class _Progress:
    """One line on a terminal's stderr that is written over; nothing elsewhere, and nothing for what is quick."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._shown = False

    def show(self, entries: int) -> None:
        if sys.stderr.isatty() and time.monotonic() - self._since >= _PATIENCE:
            print(f"\r{entries} entries compared", end="\x1b[K", file=sys.stderr, flush=True)
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False


def verify(options: argparse.Namespace) -> int:
    """Exit code 0 if there is no disagreement but what was changed meanwhile, 1 if there is one."""
    printer = _Printer(json=options.json)
    try:
        for item in _asked(options):
            printer.take(item)
    except NoDaemonError:
        _directly(options.partition, printer.take)
    if printer.summary is None:
        raise OperatorError("the daemon gave no result; look at its log")
    return 1 if printer.summary["disagreements"] else 0


def _asked(options: argparse.Namespace) -> Iterator[Item]:
    yield from ask(options.socket, "verify", partition=options.partition)


def _directly(name: str, take: Callable[[Item], None]) -> None:
    try:
        with Visit(find_partition(name), check=True) as visit:
            directly(visit, take)
    except OSError as error:
        raise TransientError(describe(error)) from error
