"""Where a run takes place: a directory for its images, the size, and who hears how far it is."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import daemon_process
from broker_processes import mosquitto
from daemon_process import Daemon
from partitions import wait_until

from .row import Row

ROOT = Path(__file__).parent.parent
LONG = 1200.0  # seconds: a baseline of a million files on a busy machine
Step = tuple[str, Callable[[], Row]]  # a row's id, and what measures it


@dataclass
class Stage:
    """`files`: how large; `full`: that is the size the goals are said of. `wanted`: the ids of the rows to be measured."""

    directory: Path
    files: int
    full: bool
    wanted: frozenset[str]
    started: float = field(default_factory=time.monotonic)
    places: int = 0

    def say(self, text: str) -> None:
        print(f"bench: {time.monotonic() - self.started:5.0f} s  {text}", file=sys.stderr, flush=True)

    def place(self) -> Path:
        """A fresh directory."""
        self.places += 1
        made = self.directory / f"{self.places}"
        made.mkdir()
        return made

    def wants(self, *rows: str) -> bool:
        return not self.wanted.isdisjoint(rows)

    def rounds(self, quick: int, full: int) -> int:
        return full if self.full else quick


class Measured(Daemon):
    """The real daemon, with the times of its phases written to a file (bench.phases) if `phases`."""

    phases: Path | None = None
    patience = LONG

    def command_line(self) -> list[str | Path]:
        if self.phases is None:
            return super().command_line()
        return [sys.executable, "-m", "bench.phases", self.phases, "run", *self.arguments]

    def took(self) -> list[dict[str, Any]]:
        """What bench.phases has written."""
        assert self.phases is not None
        return [json.loads(line) for line in self.phases.read_text().splitlines()] if self.phases.exists() else []

    def took_for(self, seq: int) -> dict[str, Any]:
        """What was written of snapshot `seq`, of which its answer is told before it is all over."""
        (found,) = wait_until(
            lambda: [one for one in self.took() if one.get("seq") == seq], f"snapshot {seq} is over", LONG
        )
        return found

    def settled(self) -> None:
        """Wait until a first snapshot is there and everything up to now is published."""
        wait_until(self._heads, "the first snapshots", LONG)
        wait_until(lambda: not self.backlog(), "all is published", LONG)

    def _heads(self) -> bool:
        assert self.alive(), f"the daemon exited: {self.output()}"
        return all(one["head"] and one["state"] == "watching" for one in self.status()["partitions"])

    def backlog(self) -> int:
        return sum(one["backlog"] for one in self.status()["partitions"])


@contextlib.contextmanager
def following(
    directory: Path,
    *mounts: Path,
    broker: str | None = None,
    phases: bool = False,
    io: str = "1TiB",
    time: str = "30d",
    started: bool = True,
) -> Iterator[Measured]:
    """The daemon on some mount points, publishing to `broker` or else to a mosquitto of its own, as it would in earnest.

    The thresholds are such that it takes no snapshot but those that are asked for. Not the embedded broker: that one would be
    measured as well.
    """
    with contextlib.ExitStack() as stack:
        if broker is None:
            broker = stack.enter_context(mosquitto(directory, config=("log_type none",))).url
        made = stack.enter_context(
            daemon_process.daemon(directory, *mounts, broker=broker, io=io, time=time, started=False, kind=Measured)
        )
        assert isinstance(made, Measured)
        made.phases = directory / "daemon/phases" if phases else None
        if started:
            made.start()
        yield made
