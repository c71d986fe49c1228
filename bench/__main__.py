"""`make bench`: what snapfeed costs, side by side with named peers, in one run on one machine, as ratios.

python -m bench [--files N] [ROW ...]: makes an XFS and a btrfs partition in loop images (needs root), prints a table, and writes
it to bench/results/local/ as Markdown and JSON. FULL=1 means a million files. Times are seconds, the best of some rounds.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

from daemon_process import daemon
from partitions import partition, run, wait_until

RESULTS = Path(__file__).parent / "results" / "local"
ROUNDS = 5
CHANGED = 100


def timed(function: Callable[[], object], rounds: int = ROUNDS, before: Callable[[], object] = lambda: None) -> float:
    best = float("inf")
    for _ in range(rounds):
        before()
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return best


def fill(top: Path, files: int) -> None:
    for number in range(files):
        directory = top / f"{number // 1000}"
        if number % 1000 == 0:
            directory.mkdir()
        os.close(os.open(directory / f"{number}", os.O_WRONLY | os.O_CREAT))


def edit(top: Path, files: int) -> None:
    for number in range(CHANGED):
        with open(top / f"{number % (files // 1000)}" / f"{number % (files // 1000) * 1000 + number}", "ab") as file:
            file.write(b"x" * 100)


class Bench:
    def __init__(self, directory: Path, files: int) -> None:
        self.directory, self.files = directory, files
        self.rows: list[dict[str, object]] = []

    def row(self, name: str, ours: float, peers: dict[str, float], unit: str = "s") -> None:
        ratios = {peer: ours / value for peer, value in peers.items() if value}
        self.rows.append({"row": name, "unit": unit, "snapfeed": ours, "peers": peers, "ratios": ratios})
        shown = ", ".join(f"{peer} {value:.4g} {unit} (x {ratios.get(peer, 0):.3f})" for peer, value in peers.items())
        print(f"{name}: snapfeed {ours:.4g} {unit}; {shown}", flush=True)

    def changed_among_many(self, fs: str) -> None:
        """A durable snapshot, its diff and the journal entry for 100 changed files, against tools that look at everything."""
        place = self.directory / f"many-{fs}"
        place.mkdir()
        with partition(fs, place, "8G") as part, daemon(place, part.path) as feed:
            wait_until(lambda: feed.partition()["head"], "the baseline")
            fill(part.path, self.files)
            feed.snapshot()
            mark = place / "mark"
            mark.touch()
            copy = place / "copy"
            seconds = []
            for _ in range(ROUNDS):
                edit(part.path, self.files)
                feed.snapshot()
                seconds.append(feed.partition()["last"]["seconds"])
            peers = {
                "find -newer": timed(
                    lambda: run("find", part.path, "-path", "*/.snapfeed", "-prune", "-o", "-newer", mark)
                )
            }
            if shutil.which("rsync"):
                copy.mkdir()
                peers["rsync -an"] = timed(lambda: run("rsync", "-an", "--exclude=.snapfeed", f"{part.path}/", copy), 1)
            self.row(f"{CHANGED} changed of {self.files} files, {fs}", min(seconds), peers)

    def following(self) -> None:
        """CPU of following files being created and written."""
        place = self.directory / "follow"
        place.mkdir()
        count = self.files // 2
        with partition("xfs", place, "8G") as part, daemon(place, part.path) as feed:
            wait_until(lambda: feed.partition()["head"], "the baseline")
            before = cpu(feed.pid)
            write_files(part.path / "a", count)
            wait_until(lambda: quiet(feed.pid), "the events are read")
            ours = cpu(feed.pid) - before
            peers = {}
            if shutil.which("inotifywait"):
                watcher = subprocess.Popen(["inotifywait", "-mrq", part.path], stdout=subprocess.DEVNULL)
                try:
                    wait_until(lambda: quiet(watcher.pid), "it watches")
                    before = cpu(watcher.pid)
                    write_files(part.path / "b", count)
                    wait_until(lambda: quiet(watcher.pid), "the events are read")
                    peers["inotifywait -mr"] = cpu(watcher.pid) - before
                finally:
                    watcher.kill()
                    watcher.wait()
            self.row(f"following {count} files created and written, CPU", ours, peers)


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def quiet(pid: int) -> bool:
    before = cpu(pid)
    time.sleep(0.5)
    return cpu(pid) - before < 0.02


def write_files(top: Path, count: int) -> None:
    top.mkdir()
    for number in range(count):
        with open(top / str(number), "wb") as file:
            file.write(b"x" * 100)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000 if os.environ.get("FULL") == "1" else 20_000)
    parser.add_argument("row", nargs="*", metavar="ROW", help="xfs, btrfs, follow (default: all)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("bench: needs root for loop partitions", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="snapfeed-bench-") as directory:
        bench = Bench(Path(directory), options.files)
        rows = {
            "xfs": lambda: bench.changed_among_many("xfs"),
            "btrfs": lambda: bench.changed_among_many("btrfs"),
            "follow": bench.following,
        }
        for name in options.row or rows:
            if name not in rows:
                print(f"bench: no row {name!r}; there are {', '.join(rows)}", file=sys.stderr)
                return 2
            rows[name]()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "table.json").write_text(json.dumps(bench.rows, indent=1) + "\n")
    lines = ["| work | snapfeed | peers (ratio of ours to theirs) |", "|---|---|---|"]
    for row in bench.rows:
        peers = ", ".join(f"{p} {v:.4g} ({row['ratios'].get(p, 0):.3f})" for p, v in row["peers"].items())
        lines.append(f"| {row['row']} | {row['snapfeed']:.4g} {row['unit']} | {peers or '-'} |")
    (RESULTS / "table.md").write_text("\n".join(lines) + "\n")
    print(f"written to {RESULTS}/table.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
