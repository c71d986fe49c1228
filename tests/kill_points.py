"""Killed before every durable step, started again, judged: the parts that all scenarios share. See tracer.py for what a step is.

SNAPFEED_POINTS: how many steps of each scenario it is killed at, spread over it; `all`: at every one, until it completes.
SNAPFEED_REPORT: a file that gets one JSON line for each scenario.
"""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from broker_processes import Collector, collector, mosquitto
from consumer import Consumer
from daemon_process import ROOT, Daemon, daemon, environment
from partitions import require, run, wait_until
from tracer import CALLS

from snapshotter.adopt import adopt
from snapshotter.linux.inode_flags import set_immutable
from snapshotter.partition import partition_at

READY = 5.0  # seconds
TRACER = [sys.executable, "-I", "-S", str(Path(__file__).parent / "tracer.py")]
RUNTIME = {"control.sock", "daemon.log", "snapfeed.toml", "commands.db", "commands.db-wal", "commands.db-shm"}
TRACES = {"tracer", "tracer.out"}
CONSUMER = "audit"


@dataclass(frozen=True)
class Outcome:
    """`killed`: the step that was about to be taken, None if it went to its end. `count`: the steps up to then."""

    code: int
    killed: str | None
    count: int
    steps: dict[str, int]


@dataclass
class Tally:
    """What is told of a scenario. Seconds."""

    scenario: str
    points: int = 0
    steps: int = 0
    before: Counter[str] = field(default_factory=Counter)
    ready: list[float] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.steps = max(self.steps, outcome.count)
        if outcome.killed is not None:
            self.points += 1
            self.before[outcome.killed] += 1

    def report(self, seconds: float) -> None:
        line = {
            "scenario": self.scenario,
            "points": self.points,
            "steps": self.steps,
            "killed_before": dict(self.before.most_common()),
            "starts": len(self.ready),
            "worst_ready_s": round(max(self.ready, default=0.0), 3),
            "seconds": round(seconds, 1),
        }
        report(line)


def report(line: dict) -> None:
    if path := os.environ.get("SNAPFEED_REPORT"):
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


def explore(scenario: str, usual: int, once: Callable[[int, Tally], Outcome], few: int = 2) -> None:
    """`once(n, tally)` goes through the scenario, killed before its step `n`, and judges what is left.

    `usual`: about how many steps it has, over which a sample of `few` is spread.
    """
    require(bool(CALLS), "system call numbers of this machine in tests/tracer.py")
    wanted = os.environ.get("SNAPFEED_POINTS", str(few))
    if wanted == "all":
        numbers: Iterator[int] = iter(range(1, 1_000_000))
    else:
        many = int(wanted)
        numbers = iter(sorted({1 + (2 * i + 1) * usual // (2 * many) for i in range(many)}))
    tally, started, completed = Tally(scenario), time.monotonic(), 0
    for number in numbers:
        try:
            outcome = once(number, tally)
        except BaseException:
            print(f"---- {scenario}, killed before step {number}")
            raise
        tally.add(outcome)
        completed = 0 if outcome.killed else completed + 1
        if completed == 2:  # the number of steps varies a little
            break
    tally.report(time.monotonic() - started)
    assert tally.points
    assert max(tally.ready, default=0.0) < READY, tally.ready


# ---- processes under the tracer


class TracedDaemon(Daemon):
    """A daemon that `arm`, or its start, kills before one of its durable steps."""

    @property
    def control(self) -> Path:
        return self.socket.parent / "tracer"

    def start(self, *, ready: bool = True, at: int = 0) -> None:
        prepare(self.control, at)
        super().start(ready=ready)

    def command_line(self) -> list[str | Path]:
        return [*TRACER, self.control, *super().command_line()]

    def arm(self, at: int) -> None:
        """Count from now on, and kill it before step `at`; 0: never."""
        self.control.write_text(str(at))
        self.send(signal.SIGUSR1)
        wait_until(lambda: not self.control.exists(), "the tracer has seen it")

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.send(signal.SIGUSR2)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        super().kill()

    def outcome(self) -> Outcome:
        """How it ended."""
        return outcome_of(self.control)


def prepare(control: Path, at: int) -> None:
    """For a tracer that is about to start."""
    Path(f"{control}.out").unlink(missing_ok=True)
    control.write_text(str(at))


def outcome_of(control: Path) -> Outcome:
    return Outcome(**json.loads(Path(f"{control}.out").read_text()))


def traced(directory: Path, *command: str | Path, at: int) -> tuple[Outcome, str]:
    """A command, killed before its durable step `at`: (how it ended, what it said)."""
    control = directory / "tracer"
    prepare(control, at)
    done = subprocess.run(
        [*TRACER, control, *command], capture_output=True, check=False, timeout=60, cwd=ROOT,
        stdin=subprocess.DEVNULL, env=environment(TMPDIR=str(directory), SNAPFEED_SOCKET=str(directory / "none")),
    )  # fmt: skip
    outcome, said = outcome_of(control), (done.stdout + done.stderr).decode()
    assert outcome.killed or done.returncode == 0, (outcome, said)
    return outcome, said


# ---- a daemon and those who read what it says


class Scene:
    """A partition, its daemon under the tracer, and a consumer that outlives it."""

    def __init__(self, top: Path, snapfeed: Daemon, seen: Collector) -> None:
        self.top, self.snapfeed, self.seen = top, snapfeed, seen
        self.consumer = Consumer()
        self.replayed: list[dict] = []
        self.rounds = 0
        self._envelopes: dict[tuple[str, int], tuple] = {}

    @property
    def directory(self) -> Path:
        return self.snapfeed.socket.parent

    @property
    def label(self) -> str:
        return self.snapfeed.partition()["partition"]

    # ---- what arrives

    def take(self) -> Consumer:
        for message in self.seen.new():
            kind = message.topic.split("/")[3:]
            if kind not in (["changes"], ["replay", CONSUMER]):
                continue
            page = json.loads(message.payload)
            key = (page["epoch"], page["seq"])
            told = (page["time_ns"], page["trigger"], page["volume"])
            assert self._envelopes.setdefault(key, told) == told, f"{key} was used again"
            if kind == ["changes"]:
                self.heard(page)
            else:
                self.replayed.append(page)
        return self.consumer

    def heard(self, page: dict) -> None:
        self.consumer.take(page)

    def until(self, answer: dict) -> None:
        wanted = (answer["epoch"], answer["seq"])
        wait_until(lambda: self.take().head == wanted, f"{wanted} arrives, {self.consumer.head} is there")

    def settled(self) -> bool:
        """Everything is published, the cursor is written, and a consumer has it."""
        (mine,) = self.snapfeed.status()["partitions"]
        return (
            mine["state"] in ("watching", "scanning")
            and mine["head"] is not None
            and mine["last"] is not None
            and mine["backlog"] == 0
            and self.take().head == (mine["epoch"], mine["head"])
        )

    # ---- killed

    def through(self, at: int, tally: Tally, act: Callable[[], object], *, start: bool = False) -> Outcome:
        """From here, or from its start on, until it is killed before step `at`, or has done `act`, settled, and was stopped.

        Then it is started again.
        """
        snapfeed = self.snapfeed
        try:
            if start:
                snapfeed.start(at=at)
            else:
                snapfeed.arm(at)
            act()
            wait_until(self.settled, "it settles")
            code = snapfeed.stop()
        except (AssertionError, OSError, ValueError, KeyError):  # whatever it is that one gets from who is killed
            with contextlib.suppress(subprocess.TimeoutExpired):
                snapfeed.process.wait(5)
            if snapfeed.alive() or not snapfeed.outcome().killed:
                raise
            code = 0
        outcome = snapfeed.outcome()
        assert outcome.killed or code == 0, outcome
        snapfeed.start()
        tally.ready.append(snapfeed.ready)
        return outcome

    def judge(self) -> None:
        """Nothing lost, nothing invented, no number used again, no litter."""
        self.until(self.snapfeed.snapshot())
        self.consumer.compare(self.top)
        self.clean()
        assert "Traceback" not in self.snapfeed.output()

    def clean(self) -> None:
        """Nothing lies about, and what is recorded is there. The daemon is at rest between visits, which are waited for."""
        end = time.monotonic() + 10
        while found := self._wrong():
            assert time.monotonic() < end, found
            time.sleep(0.01)

    def _wrong(self) -> list[str]:
        other = set(os.listdir(self.directory)) - RUNTIME - TRACES
        with contextlib.suppress(OSError, sqlite3.Error):  # a visit
            return [*map(str, sorted(other)), *litter(self.top)]
        return ["the system file is in use"]


def litter(top: Path) -> list[str]:
    """What should not be in the system directory, and what should be and is not. The daemon must be at rest."""
    system = top / ".snapfeed"
    assert system.stat().st_mode & 0o777 == 0o700
    wrong, names = [], set(os.listdir(system))
    if "system.db-wal" in names or "system.db" not in names:
        return ["the system file is in use"]
    with contextlib.closing(sqlite3.connect(f"file:{system}/system.db?immutable=1", uri=True)) as db:
        rows = db.execute("SELECT clone, ino, gen FROM inode WHERE clone IS NOT NULL").fetchall()
        used = {f"{seq}/{ino}.{gen}" for seq, ino, gen in rows}
        spent = {f"{s}/{ino}.{gen}" for s, ino, gen in db.execute("SELECT seq, ino, gen FROM spent_clone")}
        snapshots = {str(seq) for (seq,) in db.execute("SELECT seq FROM snapshot WHERE path IS NOT NULL")}
    clones, empty = set(), []
    for directory in (system / "clones").glob("*"):
        found = {f"{directory.name}/{name}" for name in os.listdir(directory)}
        clones |= found
        empty += [] if found else [f"clones/{directory.name} is empty"]
    there = set(os.listdir(system / "snapshots")) if "snapshots" in names else set()
    wrong += [f"clone {one}" for one in clones - used - spent] + [f"no clone {one}" for one in used - clones] + empty
    wrong += [f"snapshot {one}" for one in there - snapshots] + [f"no snapshot {one}" for one in snapshots - there]
    for name in names - {"system.db", "clones", "snapshots"}:
        if not (name.startswith("damaged-") and "system.db" in os.listdir(system / name)):
            wrong.append(name)
    return wrong


@contextlib.contextmanager
def scene(top: Path, directory: Path, kind: type[Daemon] = TracedDaemon, **options) -> Iterator[Scene]:
    """A Scene whose daemon has not been started yet."""
    with (
        mosquitto(directory) as broker,
        collector(broker, "snapfeed/#") as seen,
        daemon(directory, top, broker=broker.url, started=False, kind=kind, **options) as snapfeed,
    ):
        yield Scene(top, snapfeed, seen)


# ---- work


def change(top: Path, number: int) -> None:
    """Every kind of change, on a tree that does not grow; `number` counts up from 0."""
    here, before, gone = (top / f"d{number - back}" for back in (0, 1, 3))
    here.mkdir()
    for index in range(6):
        (here / f"f{index}").write_bytes(b"%d" % number * 3000)
    os.setxattr(here / "f0", "user.round", b"%d" % number)
    os.link(here / "f0", top / f"link{number}")
    (here / "symlink").symlink_to("f1")
    os.mkfifo(here / "fifo")
    if before.exists():
        os.rename(before / "f1", here / "moved")
        os.rename(before / "f2", before / "f1")
        (before / "f3").write_bytes(b"%d" % number * 2000)
        (before / "f4").unlink()
        (before / "f5").chmod(0o600)
    if gone.exists():
        shutil.rmtree(gone)
        (top / f"link{number - 3}").unlink()


def wipe(top: Path) -> None:
    """Take everything away that adopting and snapshots have made."""
    system = top / ".snapfeed"
    if not system.exists():
        return
    for directory in (system / "snapshots").glob("*"):
        run("btrfs", "subvolume", "delete", directory)
    for clone in (system / "clones").glob("*/*"):
        with clone.open("rb") as file:
            set_immutable(file.fileno(), on=False)
    if system.stat().st_ino == 256:
        run("btrfs", "subvolume", "delete", system)
    else:
        shutil.rmtree(system)


def adopted(top: Path) -> None:
    """`snapfeed init`, without its process, with thresholds that nothing reaches."""
    adopt(partition_at(os.fsencode(top)), time.time_ns(), 1 << 40, 3600.0)
