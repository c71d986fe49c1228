"""F5: what an installation brings along, and how long it takes until an empty partition is watched."""

import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from partitions import partition, wait_until

from . import peers
from .row import Figure, Goal, Row, Series, middle
from .stage import ROOT, Stage, Step, following


def steps(stage: Stage) -> Iterator[Step]:
    yield "F5", lambda: start(stage)


def dependencies(pyproject: Path) -> set[str]:
    """All distributions that the core needs on this Python, without extras, directly or not. Raises PackageNotFoundError."""
    found: set[str] = set()
    left = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    while left:
        wanted = Requirement(left.pop())
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name in found or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        left += metadata.requires(name) or []
    return found


def start(stage: Stage) -> Row:
    rounds = stage.rounds(7, 15)
    missing: dict[str, str] = {}
    times: dict[str, list[float]] = {"snapfeed": []}
    with partition("xfs", stage.place()) as part:
        with following(stage.place(), part.path, started=False) as feed:
            for _ in range(rounds):
                began = time.perf_counter()
                feed.start(ready=False)
                wait_until(lambda: watching(feed), "it watches")
                times["snapfeed"].append(time.perf_counter() - began)
                feed.stop()
        imports = [timed_import() for _ in range(rounds)]
        top = part.path / "watched"
        top.mkdir()
        try:
            peers.need("watchman")
            for _ in range(rounds):
                began = time.perf_counter()
                with peers.watchman(stage.place() / "watchman") as server:
                    server.watch(top)
                    times.setdefault("watchman", []).append(time.perf_counter() - began)
        except peers.MissingError as why:
            missing["watchman"] = str(why)
        try:
            for _ in range(rounds):
                began = time.perf_counter()
                with peers.watching("inotifywait", top, stage.place()):
                    times.setdefault("inotifywait", []).append(time.perf_counter() - began)
        except peers.MissingError as why:
            missing["inotifywait"] = str(why)
    medians = {name: middle(values) for name, values in times.items()}
    needed = sorted(dependencies(ROOT / "pyproject.toml"))
    return Row(
        "F5",
        "install and start",
        (
            Figure("process start to watching", "s", medians.pop("snapfeed"), (Goal(1.0),), medians),
            Figure("of that, Python and the imports", "s", middle(imports)),
            Figure("runtime dependencies", "packages", len(needed), (Goal(6),)),
        ),
        (*(Series(name, "s", values) for name, values in times.items()), Series("snapfeed: imports", "s", imports)),
        missing,
        f"An adopted empty XFS partition, {rounds} starts, medians, files in the page cache. Dependencies: {', '.join(needed)}.",
    )


def watching(feed) -> bool:
    assert feed.alive(), feed.output()
    try:
        return all(one["state"] == "watching" and one["head"] for one in feed.status()["partitions"])
    except OSError:
        return False


def timed_import() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import watcher.cli, watcher.daemon"], cwd=ROOT, check=True)
    return time.perf_counter() - began
