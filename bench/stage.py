"""Where a run takes place: a directory for its images, the size, and who hears how far it is."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import daemon_process
from broker_processes import mosquitto
from daemon_process import Daemon, adopt
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

    def start(self, *, ready: bool = True) -> None:
        command = [sys.executable, "-m", "watcher.cli"]
        if self.phases is not None:
            command = [sys.executable, "-m", "bench.phases", str(self.phases)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "run", *self.arguments],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, env=self.env,
            )  # fmt: skip
        if ready:
            self.wait_ready()

    def took(self) -> list[dict[str, Any]]:
        """What bench.phases has written."""
        assert self.phases is not None
        return [json.loads(line) for line in self.phases.read_text().splitlines()] if self.phases.exists() else []

    def took_last(self, phase: str) -> float:
        """Seconds of a phase in the last snapshot; 0 if it had none."""
        return float([one for one in self.took() if "seq" in one][-1].get(phase, 0.0))

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
        place = directory / "daemon"
        place.mkdir()
        for mount in mounts:
            if not (mount / ".snapfeed").exists():
                adopt(mount, io, time)
        (place / "snapfeed.toml").write_text(f'[broker]\nhost = "{daemon_process.HOST}"\n')
        made = Measured(place, ["--config", place / "snapfeed.toml", "--broker", broker, *mounts], {})
        made.phases = place / "phases" if phases else None
        try:
            if started:
                made.start()
            yield made
        except BaseException:
            if made.log.exists():
                print(f"---- the daemon's log\n{made.output()[-4000:]}----", file=sys.stderr)
            raise
        finally:
            made.kill()
