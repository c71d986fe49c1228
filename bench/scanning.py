"""P1, P3, P6, P7, P10, P11, F1, F2, F4: many files on XFS, made once, and all that is measured of them.

In the order in which it must be: watchman on the tree as it is, since it would crawl our clones as well; the baseline; a new
daemon, which publishes what the first one could not; reconciles; snapshots of few changes; `cp` last.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from broker_processes import Broker, mosquitto
from partitions import partition, wait_until

from snapshotter.linux.xfs import bulkstat_batches
from snapshotter.systemfile import SystemFile

from . import peers
from .delivering import published
from .process import Clock, Cost, Memory, memory, reset_peak, wait_quiet
from .row import Figure, Goal, Row, Series, middle, slope
from .snapshot import Snapshots, changed_among_many, find_rounds, flat, one_round, watchman_rounds
from .stage import LONG, Measured, Stage, Step, following
from .trees import fill

TEN_MILLION = 10_000_000
SLOPE_FROM = 50_000  # files; by then what is bounded (SQLite's cache) is full, and growth is what each file costs
LEAST = 2_000  # files, of which 100 can be edited like those of a larger tree
ROWS = ("P6", "F4", "P10", "F1", "F2", "P7", "P1", "P3", "P11")


@dataclass
class Size:
    """What was measured at one size. Seconds, and Memory."""

    files: int
    baseline: dict[str, Any] = field(default_factory=dict)
    after_baseline: Memory | None = None
    idle: Memory | None = None
    start_peak: float = 0.0
    peak: float = 0.0
    reconcile: list[Cost] = field(default_factory=list)
    bulkstat: list[Cost] = field(default_factory=list)
    find_stat: list[Cost] = field(default_factory=list)
    snapshots: Snapshots = field(default_factory=lambda: Snapshots(0))


@dataclass
class Watchman:
    """What was measured of watchman on the largest tree, before it was adopted; `missing` says why not."""

    crawl: Cost | None = None
    since: list[Cost] = field(default_factory=list)
    idle: Memory | None = None
    missing: str = ""

    def lacking(self) -> dict[str, str]:
        return {"watchman": self.missing} if self.missing else {}


def steps(stage: Stage) -> Iterator[Step]:
    if not stage.wants(*ROWS):
        return
    sizes: list[Size] = []
    if stage.wants("P3", "F2"):
        least = min(stage.files, LEAST)
        smaller_ones = {max(least, stage.files // part) for part in (100, 10)} - {stage.files}
        sizes += [smaller(stage, files) for files in sorted(smaller_ones)]
    with contextlib.ExitStack() as stack:
        yield from _largest(stage, sizes, stack)


def _largest(stage: Stage, sizes: list[Size], stack: contextlib.ExitStack) -> Iterator[Step]:
    size = Size(stage.files)
    sizes.append(size)
    part = stack.enter_context(partition("xfs", stage.place(), "32G"))
    broker = stack.enter_context(mosquitto(stage.place(), config=("log_type none",), started=False))
    stage.say(f"making {stage.files:,} files on XFS")
    fill(part.path, stage.files)
    watchman = ask_watchman(stage, part.path)
    find_before = peers.find_stat(part.path)

    stage.say("the first baseline")
    with following(stage.place(), part.path, broker=broker.url, phases=True) as feed:
        baseline(feed, size)
    yield "P6", lambda: first_metadata(sizes, watchman, find_before)
    yield "F4", lambda: system_file(part.path, size)

    with following(stage.place(), part.path, broker=broker.url, phases=True) as feed:
        start(feed, size)
        yield "P10", lambda: publishing(feed, broker, size)
        if broker.process is None:  # P10 was left out
            broker.start()
        feed.settled()
        yield "F1", lambda: resident(size, watchman)
        if stage.wants("P7", "F2"):
            stage.say("reconciles")
            reconciles(stage, feed, part.path, size)
            yield "F2", lambda: reconcile_memory(sizes)
            yield "P7", lambda: reconcile_time(size)
        if stage.wants("P1", "P3"):
            theirs: dict[str, list[Cost]] = {}
            stage.say("snapshots of 100 changed files")
            snapshots(stage, feed, part.path, size)
            theirs["find -newer"] = size.snapshots.find
            missing = watchman.lacking()
            try:
                theirs["rsync -an"] = [peers.rsync_dry(part.path, stage.place()) for _ in range(stage.rounds(3, 2))]
            except peers.MissingError as why:
                missing["rsync -an"] = str(why)
            if watchman.since:
                theirs["watchman since"] = watchman.since
            yield "P1", lambda: changed_among_many(size.snapshots, theirs, missing)
            if stage.wants("P3"):
                yield "P3", lambda: flat([one.snapshots for one in sizes])
    if stage.wants("P11"):
        yield "P11", lambda: clones(stage, part.path, size)


# ---- measuring


def smaller(stage: Stage, files: int) -> Size:
    """What is needed of the smaller sizes."""
    size = Size(files)
    stage.say(f"the same with {files:,} files")
    with partition("xfs", stage.place(), "8G") as part:
        fill(part.path, files)
        with following(stage.place(), part.path, phases=True) as feed:
            baseline(feed, size)
        with following(stage.place(), part.path) as feed:
            start(feed, size)
            feed.settled()
            if stage.wants("F2"):
                reconciles(stage, feed, part.path, size, others=False)
            if stage.wants("P3"):
                snapshots(stage, feed, part.path, size)
    return size


def ask_watchman(stage: Stage, top: Path) -> Watchman:
    found = Watchman()
    if not stage.wants("P1", "P6", "F1"):
        return found
    stage.say("watchman")
    try:
        with peers.watchman(stage.place() / "watchman") as server:
            cost = Clock(server.process.pid)
            clock = server.watch(top)
            found.crawl = cost.read()
            wait_quiet(server.process.pid)
            found.idle = memory(server.process.pid)
            if stage.wants("P1"):
                random = Random(3)
                found.since = watchman_rounds(server, top, clock, stage.files, random, stage.rounds(20, 40))
    except peers.MissingError as why:
        found.missing = str(why)
    return found


def baseline(feed: Measured, size: Size) -> None:
    size.baseline = feed.took_for(wait_until(lambda: feed.partition()["head"], "the first baseline", LONG))
    wait_quiet(feed.pid, 4)  # after the commit the log is copied to the file, and waiting for the disk is quiet as well
    size.after_baseline = memory(feed.pid)


def start(feed: Measured, size: Size) -> None:
    """A daemon that has just started has compared everything."""
    wait_until(lambda: feed.partition()["last"] is not None, "it has compared everything", 300)
    wait_quiet(feed.pid)
    size.idle = memory(feed.pid)
    size.start_peak = size.idle.peak


def reconciles(stage: Stage, feed: Measured, top: Path, size: Size, *, others: bool = True) -> None:
    """Reconciles of an unchanged tree in turns with bare bulkstat loops and, less often, `find`."""
    name = feed.partition()["partition"]
    rounds = stage.rounds(7, 7)
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for number in range(rounds):
            wait_quiet(feed.pid, 0.2)
            reset_peak(feed.pid)
            clock = Clock(feed.pid)
            (answer,) = feed.ask("reconcile", partition=name)
            size.reconcile.append(clock.read())
            assert answer["changes"] == 0, answer
            size.peak = max(size.peak, memory(feed.pid).peak)
            if others:
                size.bulkstat.append(bulkstat_loop(fd))
                if number % 2 == 0:
                    size.find_stat.append(peers.find_stat(top))
    finally:
        os.close(fd)


def bulkstat_loop(fd: int) -> Cost:
    """Asking for all inodes, clones included, with the buffer the reconcile uses, and looking at none."""
    clock = Clock()
    seen = sum(records.count for records in bulkstat_batches(fd))
    assert seen, "no inodes"
    return clock.read()


def snapshots(stage: Stage, feed: Measured, top: Path, size: Size) -> None:
    random = Random(1)
    size.snapshots = Snapshots(size.files)
    one_round(feed, top, size.files, random, Snapshots(size.files))  # the first pays for what later ones find in memory
    for _ in range(stage.rounds(20, 40)):
        one_round(feed, top, size.files, random, size.snapshots)
    feed.snapshot()
    mark = stage.place() / "mark"
    size.snapshots.find = find_rounds(top, mark, size.files, random, stage.rounds(5, 5))
    feed.snapshot()


# ---- the rows


def first_metadata(sizes: list[Size], watchman: Watchman, find_before: Cost) -> Row:
    size = sizes[-1]
    phases = size.baseline
    theirs = {"find with stat": find_before}
    if watchman.crawl is not None:
        theirs["watchman crawl"] = watchman.crawl
    walls, used = {name: cost.wall for name, cost in theirs.items()}, {name: cost.cpu for name, cost in theirs.items()}
    xs = [float(one.files) for one in sizes]
    filled, without = phases["fill"], phases["seconds"] - phases["clones"]
    return Row(
        "P6",
        f"first baseline of the metadata of {size.files:,} files, XFS",
        (
            Figure("metadata in the table", "s", filled, (Goal(5, full=True),), walls),
            Figure("and the diff in the journal, committed", "s", without, (), walls),
            Figure("CPU time of metadata in the table", "s", phases["fill_cpu"], (), used),
        ),
        tuple(
            Series(f"snapfeed: {name}", "s", [one.baseline[phase] for one in sizes], xs, "files")
            for name, phase in (
                ("metadata", "fill"),
                ("clones", "clones"),
                ("journal", "journal"),
                ("in all", "seconds"),
            )
        ),
        watchman.lacking(),
        f"One round. The daemon goes on to make clones (P11: {phases['clones']:.1f} s) and the baseline's "
        f"diff ({phases['journal']:.1f} s) before it "
        f"commits: {phases['seconds']:.1f} s in all. watchman and find hold or print the metadata and record nothing.",
    )


def system_file(top: Path, size: Size) -> Row:
    place = top / ".snapfeed"
    whole = sum((place / name).stat().st_size for name in ("system.db", "system.db-wal") if (place / name).exists())
    journal = journal_bytes(place / "system.db")
    return Row(
        "F4",
        f"system file after the baseline of {size.files:,} files",
        (
            Figure("for each file", "bytes", whole / size.files, (Goal(150, full=True),)),
            Figure("without the baseline's diff in the journal", "bytes", (whole - journal) / size.files),
        ),
        note=f"{whole / 1e6:.1f} MB, of which the journal is {journal / 1e6:.1f} MB, which goes with age. System "
        "file and its write-ahead log.",
    )


def journal_bytes(path: Path) -> int:
    with SystemFile.open(os.fsencode(path)) as file:
        return file.journal_bytes()


def publishing(feed: Measured, broker: Broker, size: Size) -> Row:
    return published(feed, broker, size.baseline["seq"], size.baseline["changes"])


def resident(size: Size, watchman: Watchman) -> Row:
    first, idle = size.after_baseline, size.idle
    theirs = {"watchman": watchman.idle.rss} if watchman.idle else {}
    return Row(
        "F1",
        f"resident memory, idle, {size.files:,} files watched",
        (
            Figure("after a start", "MB", idle.rss, (Goal(40, full=True),), theirs),
            Figure("after the first baseline", "MB", first.rss, (Goal(40, full=True),), theirs),
            Figure("after a start, not shared with others (anonymous)", "MB", idle.anonymous,
                   (), {"watchman": watchman.idle.anonymous} if watchman.idle else {}),
        ),
        (
            Series("snapfeed: after a start", "MB", [idle.rss]),
            Series("snapfeed: after the first baseline", "MB", [first.rss]),
            *(Series(name, "MB", [value]) for name, value in theirs.items()),
        ),
        watchman.lacking(),
        f"VmRSS once it is quiet; Pss {idle.pss:.1f} MB after a start, {first.pss:.1f} MB after the baseline. "
        "A start compares everything.",
    )  # fmt: skip


def reconcile_memory(sizes: list[Size]) -> Row:
    points = [(float(one.files), one.peak) for one in sizes]
    starts = [(float(one.files), one.start_peak) for one in sizes]
    rise, at_zero = slope(points[-2:])
    size = sizes[-1]
    xs = [x for x, _ in points]
    extrapolated, line = [], ""
    if len(points) > 1 and xs[-2] >= SLOPE_FROM:
        ten = at_zero + rise * TEN_MILLION
        extrapolated = [Figure("of 10,000,000, extrapolated", "MB", ten, (Goal(128, full=True),))]
        line = (
            f" {rise * 1e6:.1f} MB for each million files on top of {at_zero:.1f} MB, by the line through {xs[-2]:,.0f} and "
            f"{xs[-1]:,.0f} files."
        )
    return Row(
        "F2",
        f"peak of resident memory in a reconcile of {size.files:,} unchanged files",
        (
            Figure("highest of all rounds", "MB", size.peak, (Goal(96, full=True),)),
            *extrapolated,
            Figure("since the daemon started (a reconcile as well)", "MB", size.start_peak, (Goal(96, full=True),)),
        ),
        (
            Series("snapfeed: in a reconcile", "MB", [y for _, y in points], xs, "files"),
            Series("snapfeed: since the start", "MB", [y for _, y in starts], xs, "files"),
        ),
        note=f"VmHWM, begun anew before each reconcile.{line}",
    )


def reconcile_time(size: Size) -> Row:
    costs = {"snapfeed": size.reconcile, "bulkstat loop": size.bulkstat, "find with stat": size.find_stat}
    walls = {name: [cost.wall for cost in measured] for name, measured in costs.items()}
    theirs = {name: middle(values) for name, values in walls.items() if name != "snapfeed"}
    used = {name: middle([cost.cpu for cost in measured]) for name, measured in costs.items()}
    return Row(
        "P7",
        f"reconcile of {size.files:,} unchanged files, XFS",
        (
            Figure("median, at the socket", "s", middle(walls["snapfeed"]),
                   (Goal(1.2, "bulkstat loop", full=True), Goal(1.0, "find with stat", full=True)), theirs),
            Figure("CPU time, median", "s", used.pop("snapfeed"), (), used),
        ),
        tuple(Series(name, "s", values) for name, values in walls.items()),
        note=f"{len(size.reconcile)} rounds in turns. The loop asks for the same inodes (a clone is one as well, "
        "so there are about "
        f"{2 * size.files:,}) with the same buffer from Python and looks at none of them. find sees the tree only.",
    )  # fmt: skip


def clones(stage: Stage, top: Path, size: Size) -> Row:
    stage.say("cp -a --reflink=always")
    copy = top / "copy"
    copy.mkdir()
    trees = sorted(path for path in top.iterdir() if path.name not in (".snapfeed", "copy"))
    taken = peers.timed("cp", "-a", "--reflink=always", *trees, copy)
    name = "cp -a --reflink=always"
    ours, used = size.baseline["clones"], size.baseline["clones_cpu"]
    return Row(
        "P11",
        f"reflink baseline of {size.files:,} small files, XFS",
        (
            Figure("making the clones", "s", ours, (Goal(0.8, name),), {name: taken.wall}),
            Figure("CPU time of that", "s", used, (), {name: taken.cpu}),
            Figure("whole first baseline", "s", size.baseline["seconds"], (), {name: taken.wall}),
        ),
        (Series("snapfeed: clones", "s", [ours]), Series(name, "s", [taken.wall])),
        note="One round each. Every file is a clone of one extent and cannot be changed afterwards; cp copies names, times and "
        "owners as well, on files that have a clone each by then.",
    )
