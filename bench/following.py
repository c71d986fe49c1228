"""P4, P5, F3: what it costs to follow what others write, and to wait while nobody does."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from partitions import partition, wait_until

from . import peers
from .process import cpu, memory, wait_quiet
from .row import Figure, Goal, Row, Series, middle
from .stage import Measured, Stage, Step, following
from .trees import PER_DIRECTORY

WORK = "snapfeed (daemon)"
NOBODY = "nobody"
SETTLING = 30  # seconds


def steps(stage: Stage) -> Iterator[Step]:
    if stage.wants("P4"):
        yield "P4", lambda: cpu_of_following(stage)
    if stage.wants("P5"):
        yield "P5", lambda: slowdown(stage)


def idle_steps(stage: Stage) -> Iterator[Step]:
    yield "F3", lambda: idle(stage)


def prepare(top: Path, count: int) -> None:
    """Directories to write into: made beforehand, since watchers that must set a watch on each would else
    race with the writer.
    """
    top.mkdir()
    for number in range(-(-count // PER_DIRECTORY)):
        (top / f"d{number:04}").mkdir()


def write(top: Path, count: int) -> tuple[float, float]:
    """The writer's seconds, and how many of them on a processor."""
    script = str(Path(__file__).parent / "writer.py")
    command = [sys.executable, script, str(top), str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=600)  # what it complains of is seen
    wall, used = done.stdout.split()
    return float(wall), float(used)


def cpu_of_following(stage: Stage) -> Row:
    count = max(100, stage.files // 10 if stage.full else stage.files)
    rounds = stage.rounds(3, 5)
    used: dict[str, list[float]] = {}
    found: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    with partition("xfs", stage.place(), "16G") as part, following(stage.place(), part.path) as feed:
        feed.settled()
        for number in range(rounds):
            prepare(part.path / f"{number}", count)
            feed.snapshot()
            wait_quiet(feed.pid)
            before = cpu(feed.pid)
            write(part.path / f"{number}", count)
            wait_quiet(feed.pid)
            used.setdefault(WORK, []).append(cpu(feed.pid) - before)
            answer = feed.snapshot()
            found.setdefault(WORK, []).append(created(feed, answer))
            stage.say(f"P4: snapfeed {used[WORK][-1]:.3f} s of CPU for {count:,} files, {found[WORK][-1]:.0f} found")
    for name in peers.WATCHERS:
        try:
            with partition("xfs", stage.place(), "16G") as part:
                for number in range(rounds if name == "inotifywait" else min(rounds, 2)):
                    top = part.path / f"{number}"
                    prepare(top, count)
                    with peers.watching(name, part.path, stage.place()) as watcher:
                        wait_quiet(watcher.process.pid)
                        before = cpu(watcher.process.pid)
                        write(top, count)
                        wait_quiet(watcher.process.pid)
                        used.setdefault(name, []).append(cpu(watcher.process.pid) - before)
                        found.setdefault(name, []).append(watcher.seen())
            stage.say(f"P4: {name} {used[name][-1]:.3f} s, {found[name][-1]:.0f} found")
        except peers.MissingError as why:
            missing[name] = str(why)
    medians = {name: middle(values) for name, values in used.items()}
    lost = {name: count - min(values) for name, values in found.items()}
    goals = (Goal(0.3, full=True), Goal(1.0, "inotifywait"))
    return Row(
        "P4",
        f"following {count:,} files created and written",
        (
            Figure("CPU", "s", medians.pop(WORK), goals, medians),
            Figure("files lost", "files", lost.pop(WORK), (Goal(0),), lost),
        ),
        tuple(Series(name, "s", values) for name, values in used.items()),
        missing,
        f"Median of {rounds} rounds (peers but inotifywait: 2); user and system time of all "
        "a watcher's threads until it has been quiet for half a second; what the snapshot afterwards costs "
        "is not in it. inotify's queue is as "
        "the system has it. Lost: files created that were not told of (snapfeed: not in the diff), in the worst round.",
    )


def created(feed: Measured, answer: dict) -> int:
    """How many files (named f...) a snapshot's diff creates, read over the control socket."""
    first = answer["seq"] - 1
    pages = feed.ask("diff", partition=answer["partition"], **{"from": first, "to": answer["seq"]})
    return sum(
        change["op"] == "create" and change["path"].rpartition("/")[2].startswith("f")
        for page in pages
        for change in page
    )


def written_back(*tops: Path) -> None:
    """What is written back must not run into the next round."""
    syncs = [subprocess.Popen(["sync", "-f", top]) for top in tops]
    assert not [sync for sync in syncs if sync.wait(600)], "sync failed"


def slowdown(stage: Stage) -> Row:
    """A writer on a partition that is watched and on its twin that is not, in turns."""
    count = max(100, stage.files // 10 if stage.full else stage.files)
    rounds = stage.rounds(7, 11)
    pairs: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {}  # beside a watcher, and alone
    missing: dict[str, str] = {}

    def measure(name: str, beside: Callable[[Path], contextlib.AbstractContextManager[int | None]]) -> None:
        """On a fresh pair of partitions: eleven rounds of a hundred thousand files are all that one holds."""
        with contextlib.ExitStack() as stack:
            one, other = (stack.enter_context(partition("xfs", stage.place(), "16G")).path for _ in range(2))
            for top in (one, other):
                for number in range(rounds):
                    prepare(top / f"{number}", count)
            written_back(one, other)
            pid = stack.enter_context(beside(one))
            for number in range(rounds):
                if pid is not None:
                    wait_quiet(pid, 0.2)
                tops = [one / f"{number}", other / f"{number}"]
                times = {top: write(top, count) for top in (tops if number % 2 else tops[::-1])}
                pairs.setdefault(name, []).append((times[tops[0]], times[tops[1]]))
                written_back(one, other)
        stage.say(f"P5: the writer is {slower(pairs[name], 0):.0f} % slower with {name}")

    @contextlib.contextmanager
    def ours(top: Path) -> Iterator[int]:
        with following(stage.place(), top) as feed:
            feed.settled()
            yield feed.pid

    @contextlib.contextmanager
    def theirs(name: str, top: Path) -> Iterator[int]:
        with peers.watching(name, top, stage.place()) as watcher:
            yield watcher.process.pid
            watcher.seen()

    measure(WORK, ours)
    measure(NOBODY, lambda _: contextlib.nullcontext())
    for name in ("inotifywait", "fatrace"):
        try:
            measure(name, lambda top, name=name: theirs(name, top))
        except peers.MissingError as why:
            missing[name] = str(why)
            pairs.pop(name, None)
    figures = [{name: slower(times, at) for name, times in pairs.items()} for at in (0, 1)]
    series = [Series("alone", "s", [b[0] for times in pairs.values() for _, b in times])]
    series += [
        Series(f"beside {name}", "s", [a[0] for a, _ in times]) for name, times in pairs.items() if name != NOBODY
    ]
    return Row(
        "P5",
        f"slowdown of a writer of {count:,} files",
        (
            Figure("wall time", "%", figures[0].pop(WORK), (Goal(20),), figures[0]),
            Figure("the writer's own CPU time", "%", figures[1].pop(WORK), (), figures[1]),
        ),
        tuple(series),
        missing,
        f"A writer on a watched partition and on its unwatched twin, in turns, {rounds} pairs; the median of "
        f"the pairs' ratios. What {NOBODY} "
        "watching comes to is how exact it is.",
    )


def slower(pairs: list[tuple[tuple[float, float], tuple[float, float]]], at: int) -> float:
    """By how many percent the first of each pair takes longer than the second, in the middle."""
    return 100 * (middle([beside[at] / alone[at] for beside, alone in pairs]) - 1)


def idle(stage: Stage) -> Row:
    """Four partitions nothing happens on, the time threshold 60 s, which is when a heartbeat is due."""
    seconds = 130 if stage.full else 65
    with contextlib.ExitStack() as stack:
        mounts = [
            stack.enter_context(partition(fs, stage.place(), "512M")).path for fs in ("xfs", "btrfs", "ext4", "xfs")
        ]
        feed = stack.enter_context(following(stage.place(), *mounts, io="64MiB", time="60s"))
        feed.settled()
        wait_until(lambda: all(p["last"] for p in feed.status()["partitions"]), "they are watched")
        time.sleep(SETTLING)  # the meters are read less and less often, every 8 s at last
        readings = [(time.monotonic(), cpu(feed.pid))]
        end = readings[0][0] + seconds
        while time.monotonic() < end:
            time.sleep(min(5, max(0, end - time.monotonic())))
            readings.append((time.monotonic(), cpu(feed.pid)))
        resident = memory(feed.pid).rss
    (began, first), (ended, last) = readings[0], readings[-1]
    share = 100 * (last - first) / (ended - began)
    xs = [at - began for at, _ in readings]
    return Row(
        "F3",
        f"idle with 4 partitions for {ended - began:.0f} s, time threshold 60 s",
        (Figure("CPU", "% of a core", share, (Goal(0.1),)), Figure("resident", "MB", resident)),
        (Series("snapfeed: CPU used since the start", "ms", [1000 * (u - first) for _, u in readings], xs, "seconds"),),
        note=f"XFS, btrfs, ext4, XFS; connected to a mosquitto. Begins {SETTLING} s after the first snapshots. "
        "A mount or umount by anybody on the machine wakes the daemon.",
    )
