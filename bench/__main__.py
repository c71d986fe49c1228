"""`make bench`: what snapfeed costs, side by side with named peers, in one run on one machine, as ratios.

python -m bench [ROW ...] [--files N] [--list] [--fresh] [--results DIR]: makes partitions in loop images (needs root) below
TMPDIR. The table (Markdown and JSON) and a picture for each row are written to DIR after each row; FULL=1 means the sizes that
the goals are said of. Rows that an earlier run of the same size has left there stay, with their date. Exit code 1 if a row failed
or lacks a peer.
"""

import argparse
import contextlib
import datetime as dt
import os
import platform
import signal
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

import pytest
from partitions import run

from . import delivering, following, install, peers, scanning, snapshot
from .plots import plot
from .report import Report
from .row import Row
from .stage import Stage, Step

FULL, QUICK = 1_000_000, 20_000
GROUPS: tuple[tuple[tuple[str, ...], Callable[[Stage], Iterator[Step]]], ...] = (
    (("P9",), delivering.steps),
    (("P4", "P5"), following.steps),
    (("F5",), install.steps),
    (scanning.ROWS, scanning.steps),
    (("P2", "P8"), snapshot.steps),
    (("F3",), following.idle_steps),
)
# Of whatever kind: the other rows go on. A test's helper says with a skip what the machine lacks.
TROUBLE = (Exception, pytest.skip.Exception, pytest.fail.Exception)
WORKS = {
    "P1": "snapshot, diff and journal of 100 changed among many files, XFS",
    "P2": "the same on btrfs",
    "P3": "P1 at several sizes",
    "P4": "CPU of following create and write",
    "P5": "slowdown of that writer",
    "P6": "first metadata baseline, XFS",
    "P7": "reconcile of unchanged files, XFS",
    "P8": "changed ranges of a large file",
    "P9": "from a write to its page at a subscriber",
    "P10": "publishing a large diff",
    "P11": "reflink baseline",
    "F1": "resident memory, idle",
    "F2": "peak of memory in a reconcile",
    "F3": "CPU, idle",
    "F4": "size of the system file",
    "F5": "dependencies, and time to start",
}


def machine(directory: Path) -> dict[str, str]:
    """What the figures depend on."""
    model = next(
        (
            line.partition(": ")[2]
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) // 1024
    host = run("findmnt", "-n", "-o", "FSTYPE", "-T", directory, check=False).stdout.decode().strip() or "?"
    tools = {name: run(name, "-V", check=False).stdout.decode().split()[-1:] for name in ("mkfs.xfs",)}
    return {
        "machine": f"Linux {platform.release()}, {os.cpu_count()} cores ({model}), {memory:,} MiB of memory",
        "disks": f"loop images on {host}; " + ", ".join(f"{name} {' '.join(v)}" for name, v in tools.items()),
        "software": f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}",
        "peers": ", ".join(f"{name} {version}" for name, version in peers.versions().items()),
    }


def measure(stage: Stage, finished: Callable[[Row], None]) -> None:
    """All rows wanted, group by group; a row that fails is a row that says so."""
    for rows, steps in GROUPS:
        left = [row for row in rows if row in stage.wanted]
        if not left:
            continue
        try:
            with contextlib.closing(steps(stage)) as generator:
                for name, measured in generator:
                    if name not in left:
                        continue
                    stage.say(f"{name}: {WORKS[name]}")
                    left.remove(name)
                    try:
                        row = measured()
                    except TROUBLE as error:
                        row = failure(name, error)
                    finished(row)
        except TROUBLE as error:
            for name in left:
                finished(failure(name, error))
            left = []
        for name in left:
            finished(Row(name, WORKS[name], error="it was not measured: what it stands on failed"))


def failure(name: str, error: BaseException) -> Row:
    traceback.print_exception(error, file=sys.stderr)
    text = str(error).splitlines()
    return Row(name, WORKS[name], error=f"{type(error).__name__}: {text[0][:300] if text else ''}")


def main() -> int:
    full = os.environ.get("FULL") == "1"
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("row", nargs="*", metavar="ROW", help=f"{', '.join(WORKS)} (default: all)")
    parser.add_argument("--files", type=int, default=FULL if full else QUICK, metavar="N", help="default %(default)s")
    parser.add_argument("--list", action="store_true", help="say what rows there are")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="default bench/results/local, or local-full with FULL=1"
    )
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name:4} {work}" for name, work in WORKS.items()))
        return 0
    rows = [row.upper() for row in options.row] or list(WORKS)
    for row in rows:
        if row not in WORKS:
            print(f"bench: no row {row!r}; there are {', '.join(WORKS)}", file=sys.stderr)
            return 2
    if options.files < 100:
        print("bench: --files: at least 100", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("bench: needs root for loop partitions; run it as root", file=sys.stderr)
        return 2
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # what was mounted is unmounted; a script's background ignores the first
        signal.signal(number, signal.default_int_handler)
    full = options.files >= FULL
    where = options.results or Path(__file__).parent / "results" / ("local-full" if full else "local")
    with tempfile.TemporaryDirectory(prefix="snapfeed-bench-", ignore_cleanup_errors=True) as directory:
        stage = Stage(Path(directory), options.files, full, frozenset(rows))
        now = dt.datetime.now(dt.UTC)
        load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
        head = {
            "size": f"{options.files:,} files" + ("" if full else f" (the goals are said of {FULL:,}: FULL=1)"),
            "begun": f"{now:%Y-%m-%d %H:%M} UTC, load before it {load}",
            **machine(stage.directory),
        }
        report = Report(where, head, list(WORKS), options.files, keep=not options.fresh)

        def finished(row: Row) -> None:
            when = f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%SZ}"
            row = replace(row, files=options.files, full=full, measured=when, load=os.getloadavg()[0])
            report.put(row)
            why = plot(row, where)
            if row.series and why:
                stage.say(f"{row.id}: no picture: {why}")
            told = [f"{f.name} {f.ours:.4g} {f.unit}" for f in row.figures]
            stage.say(f"{row.id}: {'; '.join(told) or 'FAILED: ' + row.error}")

        measure(stage, finished)
    print((where / "table.md").read_text())
    failed = report.failed()
    for row in failed:
        print(f"bench: {row.id}: {row.error or dict(row.missing)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
