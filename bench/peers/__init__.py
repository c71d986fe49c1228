"""The others: what each is asked to do, as its manual says it is done, and how to tell that it did."""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from partitions import run, wait_until

from bench.process import Cost

LONG = 1200.0
DEBIAN = {  # the command and its package
    "rsync": "rsync",
    "watchman": "watchman",
    "inotifywait": "inotify-tools",
    "fatrace": "fatrace",
    "btrfs": "btrfs-progs",
    "find": "findutils",
    "cp": "coreutils",
    "mosquitto": "mosquitto",
    "mosquitto_pub": "mosquitto-clients",
    "strace": "strace",
    "restic": "restic",
    "borg": "borgbackup",
}
PYPI = ("watchfiles", "watchdog", "pyinotify")


class MissingError(Exception):
    """A peer is not on this machine (says what to install), or gave up."""


def need(*commands: str) -> None:
    for command in commands:
        if shutil.which(command) is None:
            raise MissingError(f"Debian package {DEBIAN[command]} is not installed")


def need_module(name: str) -> None:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        raise MissingError(f"Python package {name} is not installed") from None


def versions() -> dict[str, str]:
    """What is installed of all the peers."""
    found = {}
    for package in sorted(set(DEBIAN.values())):
        shown = run("dpkg-query", "-W", "-f", "${Version}", package, check=False)
        if shown.returncode == 0 and shown.stdout:
            found[package] = shown.stdout.decode()
    for name in PYPI:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def timed(*command: str | bytes | Path) -> Cost:
    """What a command costs, its output to nowhere. Raises CalledProcessError."""
    with open(os.devnull, "wb") as nowhere:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        subprocess.run(command, stdout=nowhere, check=True, timeout=LONG)
        wall = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


# ---- tools that look at everything

PRUNE = ("-path", "*/.snapfeed", "-prune", "-o")
STAT = "%i %y %m %n %U %G %s %b %T@ %C@ %p\\n"


def find_newer(top: Path, mark: Path) -> Cost:
    need("find")
    return timed("find", top, *PRUNE, "-newer", mark, "-print")


def find_stat(top: Path) -> Cost:
    """All entries with the fields of stat."""
    need("find")
    return timed("find", top, *PRUNE, "-printf", STAT)


def rsync_dry(top: Path, copy: Path) -> Cost:
    """`rsync -an` against a copy: nothing is sent, everything is looked at on both sides."""
    need("rsync")
    return timed("rsync", "-an", "--exclude=/.snapfeed", f"{top}/", f"{copy}/")


# ---- watchman


class Watchman:
    """A watchman server of our own, and a connection to it that stays."""

    def __init__(self, place: Path, process: subprocess.Popen) -> None:
        self.place = place
        self.process = process
        self.lines = None

    def up(self) -> bool:
        assert self.process.poll() is None, f"watchman ended: {(self.place / 'log').read_text()[-2000:]}"
        with contextlib.suppress(OSError):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(LONG)
            connection.connect(str(self.place / "socket"))
            self.lines = connection.makefile("rwb")
            return True
        return False

    def ask(self, *command: Any) -> dict[str, Any]:
        self.lines.write(json.dumps(command).encode() + b"\n")
        self.lines.flush()
        answer = json.loads(self.lines.readline())
        assert "error" not in answer, answer
        return answer

    def watch(self, top: Path) -> str:
        """Watch a directory; the clock once it has been crawled."""
        watched = self.ask("watch-project", str(top))
        assert "relative_path" not in watched, watched
        return self.ask("clock", watched["watch"], {"sync_timeout": int(LONG * 1000)})["clock"]

    def since(self, top: Path, clock: str) -> tuple[str, set[str]]:
        """(the clock, names of the files changed) once it has caught up, as its `since` does by itself."""
        query = {"since": clock, "fields": ["name"], "expression": ["type", "f"]}
        answer = self.ask("query", str(top), query)
        assert not answer.get("is_fresh_instance"), "watchman has lost track"
        return answer["clock"], set(answer["files"])


@contextlib.contextmanager
def watchman(place: Path) -> Iterator[Watchman]:
    need("watchman")
    place.mkdir(mode=0o700)
    command = ["watchman", "--foreground", f"--sockname={place}/socket", f"--statefile={place}/state"]
    command += [f"--logfile={place}/log", f"--pidfile={place}/pid", "--log-level=1"]
    environment = {**os.environ, "WATCHMAN_CONFIG_FILE": str(place / "no-config")}
    (place / "no-config").write_text("{}")
    with (place / "output").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
    made = Watchman(place, process)
    try:
        wait_until(made.up, "watchman answers")
        yield made
    finally:
        process.kill()
        process.wait()


# ---- watchers that print what happens


@dataclass
class Watcher:
    """A process that watches. `seen()`: how many different files it has told of; call it once, at the end.

    Raises MissingError if it has given up.
    """

    name: str
    process: subprocess.Popen
    output: Path
    log: Path
    counts: bool  # it counts itself, and says so when it is ended

    def seen(self) -> int:
        if self.process.poll() is not None:
            raise MissingError(f"{self.name} ended by itself: {self.log.read_text()[-200:].strip()}")
        if self.counts:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(LONG)
            return int(self.output.read_text().split()[-1])
        names = set()
        with self.output.open("rb") as lines:
            for line in lines:
                word = line.rstrip(b"\n").rsplit(b"/", 1)
                if len(word) == 2 and word[1].startswith(b"f"):
                    names.add(word[1])
        return len(names)


def _inotifywait(top: Path) -> list[str]:
    need("inotifywait")
    return ["inotifywait", "-mr", "--format", "%w%f", str(top)]


def _fatrace(_top: Path) -> list[str]:
    """Only closes: fatrace 0.17 gives up under load if it is to tell of new names as well (an event without a handle)."""
    need("fatrace")
    return ["fatrace", "-c", "-f", "C"]


def _python(library: str):
    def command(top: Path) -> list[str]:
        need_module(library)
        return [sys.executable, str(Path(__file__).parent / "watch.py"), library, str(top)]

    return command


WATCHERS = {
    "inotifywait": _inotifywait,
    "fatrace": _fatrace,
    **{library: _python(library) for library in PYPI},
}


@contextlib.contextmanager
def watching(name: str, top: Path, place: Path) -> Iterator[Watcher]:
    """One of WATCHERS on a directory with all below it, ready. Raises MissingError."""
    command = WATCHERS[name](top)
    output, log = place / f"{name}.out", place / f"{name}.log"
    with output.open("wb") as out, log.open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, cwd=top)
    made = Watcher(name, process, output, log, name in PYPI)
    try:
        wait_until(lambda: _watches(made, top, log), f"{name} watches: {log.read_text()[-500:]}", 120)
        yield made
    finally:
        process.kill()
        process.wait()


def _watches(watcher: Watcher, top: Path, log: Path) -> bool:
    assert watcher.process.poll() is None, f"{watcher.name} ended: {log.read_text()[-500:]}"
    if watcher.name == "inotifywait":
        return b"Watches established" in log.read_bytes()
    if watcher.counts:
        return watcher.output.read_bytes().startswith(b"ready")
    (top / "probe").write_bytes(b"x")  # says nothing of itself: it watches when it has told of something
    return watcher.output.stat().st_size > 0
