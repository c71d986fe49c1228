"""P1, P2, P3, P8: a durable snapshot with its diff, where few of many files changed, or little of a large file."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from partitions import partition, run, wait_until

from snapshotter.linux import btrfs

from . import peers
from .process import Clock, Cost, wait_quiet
from .row import Figure, Goal, Row, Series, middle, percentile
from .stage import Measured, Stage, Step, following
from .trees import edit, fill

MS = 1000.0
CALM = 0.1  # seconds between two rounds: a snapshot's publishing must not run into the next one
EDITS = 100
BLOCK = 4096


@dataclass
class Snapshots:
    """Rounds of 100 edits and a snapshot among `files` files, milliseconds.

    At the socket, by the daemon's own clock, and the daemon's time on a processor until the answer.
    """

    files: int
    wall: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    find: list[Cost] = field(default_factory=list)


def steps(stage: Stage) -> Iterator[Step]:
    if stage.wants("P2"):
        yield "P2", lambda: on_btrfs(stage)
    if stage.wants("P8"):
        yield "P8", lambda: large_file(stage)


def one_round(feed: Measured, top: Path, files: int, random: Random, into: Snapshots) -> None:
    """100 edits, a snapshot asked for by a client that runs already, and a look whether the diff has it all, ranges included.

    Raises AssertionError if it does not.
    """
    wait_quiet(feed.pid, CALM)
    edited = edit(top, files, random)
    clock = Clock(feed.pid)
    answer = feed.snapshot()
    cost = clock.read()
    into.wall.append(MS * cost.wall)
    into.cpu.append(MS * cost.cpu)
    into.own.append(MS * feed.partition()["last"]["seconds"])
    found = diff_before(feed, answer)
    without = {path for path in edited if not found.get(path, {}).get("ranges")}
    assert not without, f"{len(without)} edited files are not in the diff with their ranges: {sorted(without)[:3]}"
    unsure = {path for path in edited if found[path]["ranges_quality"] == "unknown"}
    assert not unsure, f"the ranges of {len(unsure)} files are unknown"


def diff_before(feed: Measured, answer: dict) -> dict[str, dict]:
    """The modified files of a snapshot's own diff, by path."""
    pages = feed.ask("diff", partition=answer["partition"], **{"from": answer["seq"] - 1, "to": answer["seq"]})
    return {change["path"]: change for page in pages for change in page if change["op"] == "modify"}


def find_rounds(top: Path, mark: Path, files: int, random: Random, rounds: int) -> list[Cost]:
    """`find -newer` after 100 edits."""
    times = []
    for _ in range(rounds):
        mark.touch()
        edit(top, files, random)
        times.append(peers.find_newer(top, mark))
    return times


def watchman_rounds(
    server: peers.Watchman, top: Path, clock: str, files: int, random: Random, rounds: int
) -> list[Cost]:
    """watchman's `since` after 100 edits, asked by a client that runs already."""
    times = []
    for _ in range(rounds):
        wait_quiet(server.process.pid, CALM)
        edited = edit(top, files, random)
        watch = Clock(server.process.pid)
        clock, names = server.since(top, clock)
        times.append(watch.read())
        assert edited <= names, f"watchman has not seen {len(edited - names)} files"
    return times


def changed_among_many(seen: Snapshots, theirs: dict[str, list[Cost]], missing: dict[str, str]) -> Row:
    """P1 from what was measured."""
    walls = {name: [MS * one.wall for one in costs] for name, costs in theirs.items()}
    medians = {name: middle(values) for name, values in walls.items()}
    tails = {name: percentile(values, 0.95) for name, values in walls.items() if len(values) >= 20}
    used = {name: middle([MS * one.cpu for one in costs]) for name, costs in theirs.items()}
    return Row(
        "P1",
        f"snapshot, diff and journal of {EDITS} changed among {seen.files:,} files, XFS",
        (
            Figure("median, at the socket", "ms", middle(seen.wall), (Goal(15, full=True),), medians),
            Figure("95th percentile", "ms", percentile(seen.wall, 0.95), (), tails),
            Figure("median, by the daemon's clock", "ms", middle(seen.own)),
            Figure("median of the daemon's CPU time", "ms", middle(seen.cpu), (), used),
        ),
        (
            Series("snapfeed: at the socket", "ms", seen.wall),
            Series("snapfeed: by its clock", "ms", seen.own),
            *(Series(name, "ms", values) for name, values in walls.items()),
        ),
        missing,
        f"{len(seen.wall)} rounds, each with other files (70 appended to, 30 with a block of 4 KiB written "
        "within); caches are hot. Ours has "
        "clones, exact byte ranges (checked in every round), fsync; watchman's answer is a list of names. rsync compares with an "
        "empty directory, which is less work than with a copy.",
    )


def flat(sizes: list[Snapshots]) -> Row:
    """P3: the same at several sizes, smallest first."""
    medians = [middle(one.wall) for one in sizes]
    xs = [float(one.files) for one in sizes]
    finds = [middle([cost.wall for cost in one.find]) for one in sizes]
    growth = {"find -newer": finds[-1] / finds[0]}
    listed = ", ".join(f"{one.files:,}: {value:.1f} ms" for one, value in zip(sizes, medians, strict=True))
    return Row(
        "P3",
        f"P1 from {sizes[0].files:,} to {sizes[-1].files:,} files: how many times as long",
        (Figure("last to first", "x", medians[-1] / medians[0], (Goal(1.5, full=True),), growth),),
        (
            Series("snapfeed: at the socket, median", "ms", medians, xs, "files"),
            Series("snapfeed: 95th percentile", "ms", [percentile(one.wall, 0.95) for one in sizes], xs, "files"),
        ),
        note=f"Medians: {listed}.",
    )


# ---- btrfs


def on_btrfs(stage: Stage) -> Row:
    rounds = stage.rounds(20, 30)
    random = Random(2)
    seen = Snapshots(stage.files)
    bare: list[float] = []
    send: list[float] = []
    with partition("btrfs", stage.place(), "24G") as part:
        stage.say(f"P2: making {stage.files:,} files")
        fill(part.path, stage.files)
        with following(stage.place(), part.path) as feed:
            feed.settled()
            for _ in range(rounds):
                feed.snapshot()
                one_round(feed, part.path, stage.files, random, seen)
                wait_quiet(feed.pid, CALM)
                made, sent = bare_round(part.path, stage.files, random)
                bare.append(made)
                send.append(sent)
    name = "snapshot and send ioctls"
    return Row(
        "P2",
        f"the same on btrfs, {stage.files:,} files",
        (
            Figure("median, at the socket", "ms", middle(seen.wall), (Goal(1.3, name),), {name: middle(bare)}),
            Figure("95th percentile", "ms", percentile(seen.wall, 0.95), (), {name: percentile(bare, 0.95)}),
            Figure("median, by the daemon's clock", "ms", middle(seen.own), (), {"send ioctl alone": middle(send)}),
        ),
        (
            Series("snapfeed: at the socket", "ms", seen.wall),
            Series("snapfeed: by its clock", "ms", seen.own),
            Series(name, "ms", bare),
            Series("send ioctl alone", "ms", send),
        ),
        note=f"{rounds} rounds in turns, each with 100 other edits since a snapshot. The peer is called from "
        "Python with the stream (no file "
        "data) read and thrown away: no diff, no ranges, nothing recorded.",
    )


def bare_round(top: Path, files: int, random: Random) -> tuple[float, float]:
    """Milliseconds of (snapshot and send ioctl, the send alone) after 100 edits since a snapshot."""
    place = top / ".snapfeed" / "bench"  # in the system directory: it is in no snapshot of the partition
    place.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        root, directory = (_opened(stack, path) for path in (top, place))
        btrfs.snap_create_v2(directory, b"before", root)
        stack.callback(btrfs.snap_destroy, directory, b"before")
        parent = btrfs.get_subvol_info(_opened(stack, place / "before")).treeid
        edit(top, files, random)
        started = time.perf_counter()
        btrfs.snap_create_v2(directory, b"after", root)
        stack.callback(btrfs.snap_destroy, directory, b"after")
        after = _opened(stack, place / "after")
        sending = time.perf_counter()
        size = sum(len(data) for data in btrfs.send_stream(after, parent))
        ended = time.perf_counter()
    assert size, "an empty stream"
    return MS * (ended - started), MS * (ended - sending)


def _opened(stack: contextlib.ExitStack, path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, fd)
    return fd


# ---- a large file


def large_file(stage: Stage) -> Row:
    size = (10 << 30) if stage.full else min(1 << 30, stage.files * 50_000)
    rounds = stage.rounds(10, 20)
    random = Random(8)
    walls, parts, owns = [], [], []
    with partition("xfs", stage.place(), "24G") as part:
        path = part.path / "large"
        stage.say(f"P8: writing {size >> 20:,} MiB")
        write_large(path, size)
        with following(stage.place(), part.path, phases=True) as feed:
            feed.settled()
            for _ in range(rounds):
                wait_quiet(feed.pid, CALM)
                offsets = edit_blocks(path, size, random)
                started = time.perf_counter()
                answer = feed.snapshot()
                walls.append(MS * (time.perf_counter() - started))
                owns.append(MS * feed.partition()["last"]["seconds"])
                check_ranges(feed, answer, offsets)
                parts.append(MS * feed.took_for(answer["seq"]).get("ranges", 0.0))
            offsets = edit_blocks(path, size, random)
            bytes_read = data_read(feed, part.path, stage.place())
        reading, missing = tools_that_read(stage, path)
    return Row(
        "P8",
        f"{EDITS} random blocks of a file of {size / (1 << 30):.3g} GiB changed, XFS",
        (
            Figure("snapshot with ranges, median", "ms", middle(walls), (Goal(50, full=True),), reading),
            Figure("comparing the extent maps", "ms", middle(parts)),
            Figure("file data read", "bytes", bytes_read, (Goal(0),), dict.fromkeys(reading, size)),
        ),
        (
            Series("snapfeed: at the socket", "ms", walls),
            Series("snapfeed: by its clock", "ms", owns),
            Series("snapfeed: extent maps", "ms", parts),
            *(Series(name, "ms", [value]) for name, value in reading.items()),
        ),
        missing,
        f"{rounds} rounds on the same file, which has more extents each time; all ranges checked to be the "
        "edited blocks and no others. What "
        "is read was seen by strace in one more round. cat: reading the file once, from the page cache, "
        "which whoever has only its "
        "time stamp must do. restic: a second backup of it.",
    )


def write_large(path: Path, size: int) -> None:
    piece = os.urandom(1 << 20)
    with path.open("wb") as file:
        for number in range(size >> 20):
            file.write(number.to_bytes(8, "big") + piece[8:])
        file.flush()
        os.fsync(file.fileno())


def edit_blocks(path: Path, size: int, random: Random) -> set[int]:
    """Write 100 random blocks; their numbers."""
    blocks = set(random.sample(range(size // BLOCK), min(EDITS, size // BLOCK // 4)))
    fd = os.open(path, os.O_WRONLY)
    try:
        for block in blocks:
            os.pwrite(fd, random.randbytes(BLOCK), block * BLOCK)
    finally:
        os.close(fd)
    return blocks


def check_ranges(feed: Measured, answer: dict, blocks: set[int]) -> None:
    change = diff_before(feed, answer)["large"]
    found = {
        block
        for start, length in change["ranges"]
        for block in range(start // BLOCK, (start + length - 1) // BLOCK + 1)
    }
    assert change["ranges_quality"] == "exact", change["ranges_quality"]
    assert found == blocks, f"{len(found - blocks)} blocks too many, {len(blocks - found)} missing"


def data_read(feed: Measured, top: Path, place: Path) -> float:
    """Bytes of files on the partition, its system file aside, that the daemon reads for a snapshot, as strace sees it."""
    peers.need("strace")
    trace = place / "trace"
    calls = "read,pread64,readv,preadv,preadv2,mmap,copy_file_range,sendfile,splice"
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-e", f"trace={calls}", "-o", trace, "-p", str(feed.pid)], stderr=subprocess.PIPE
    )
    try:
        wait_until(lambda: b"attached" in os.read(tracer.stderr.fileno(), 4096), "strace is attached")
        feed.snapshot()
    finally:
        tracer.terminate()
        tracer.wait(30)
        tracer.stderr.close()
    return read_of_files(trace.read_text(errors="replace"), str(top))


def read_of_files(trace: str, top: str) -> int:
    """What the calls in a trace of strace -y read from files below `top` but for the system file; a mapping counts as a page."""
    total = seen = 0
    for line in trace.splitlines():
        seen += "read" in line
        if f"<{top}/" not in line or ".snapfeed/system.db" in line:
            continue
        result = line.rpartition(" = ")[2].split()[0] if " = " in line else "0"
        total += BLOCK if result.startswith("0x") else max(0, int(result)) if result.lstrip("-").isdigit() else 0
    assert seen, "strace has seen nothing"
    return total


def tools_that_read(stage: Stage, path: Path) -> tuple[dict[str, float], dict[str, str]]:
    times = {"cat": MS * reading(path)}
    missing: dict[str, str] = {}
    try:
        peers.need("restic")
        repository = stage.place() / "restic"
        environment = {**os.environ, "RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": str(stage.place())}
        restic = ["restic", "--quiet", "-r", str(repository)]
        size = path.stat().st_size
        run(*restic, "init", env=environment)
        if size <= 2 << 30:  # a copy of more would take longer than all the rest
            run(*restic, "backup", path, env=environment, timeout=peers.LONG)
            edit_blocks(path, size, Random(9))
            started = time.perf_counter()
            run(*restic, "backup", path, env=environment, timeout=peers.LONG)
            times["restic"] = MS * (time.perf_counter() - started)
    except peers.MissingError as why:
        missing["restic"] = str(why)
    return times, missing


def reading(path: Path) -> float:
    with open(os.devnull, "wb") as nowhere:
        started = time.perf_counter()
        # not to /dev/null itself: cat would not read at all
        with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as process:
            while data := os.read(process.stdout.fileno(), 1 << 20):
                nowhere.write(data)
    return time.perf_counter() - started
