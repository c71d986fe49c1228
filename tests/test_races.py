"""A path that is swapped while we look: nothing outside the partition is opened or written, by strace and by the outside itself.

SNAPFEED_SECONDS: for how long on each file system (300 in `make soak`).
"""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
import time

import daemon_process
import pytest
import swapper
import traced
from broker_processes import ROOT, collector, mosquitto
from consumer import Consumer
from daemon_process import CLI, HOST, daemon, snapfeed
from partitions import partition, require, tmpfs, wait_until

pytestmark = pytest.mark.kernel
SECONDS = float(os.environ.get("SNAPFEED_SECONDS", "1"))
CONFIG = f'[broker]\nhost = "{HOST}"\n[defaults]\nkeep = 2\n'
# What a Python program reads of the machine wherever it works.
MACHINE = ("/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev", sys.prefix, sys.base_prefix, str(ROOT))
IN_EVERYTHING = 0xFFF  # IN_ACCESS to IN_MOVE_SELF: opening, reading, writing, creating, removing, attributes
libc = ctypes.CDLL(None, use_errno=True)


def below(path, tops):
    return any(path == top or path.startswith(f"{top}/") for top in tops)


class Outside:
    """A directory tree that nobody may touch: inotify says whether somebody did."""

    def __init__(self, directory):
        self.path = directory / "outside"
        self.path.mkdir()
        self.events = -1

    def watch(self):
        self.events = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self.events >= 0
        for directory, _, _ in os.walk(self.path):
            assert libc.inotify_add_watch(self.events, os.fsencode(directory), ctypes.c_uint32(IN_EVERYTHING)) >= 0
        self.touched()  # our own walk

    def touched(self):
        """How many bytes of events there are since the last call."""
        with contextlib.suppress(BlockingIOError):
            return len(os.read(self.events, 1 << 20))
        return 0


def judged(log, top, own, outside):
    """What was opened or written where it must not be; how many calls succeeded, and how many met a link or what was gone."""
    found = traced.calls(log)
    bad = []
    for call in found:
        if call.error:
            continue
        for path in call.paths:
            # in a detached mount paths begin at the partition's root
            inside = path.removeprefix(str(top)) if below(path, [str(top)]) else path
            name = inside.split("/")[1] if "/" in inside else ""
            system = name == ".snapfeed" or (
                path.startswith("/proc/self/fd/") and path.split("/")[5:6] == [".snapfeed"]
            )
            ours = system or below(path, own)
            seen = (
                ours
                or inside in ("", "/")
                or name.startswith(("swapped", "lost+found"))
                or below(path, MACHINE)
                or not path.startswith("/")
            )
            if str(outside) in path or not (ours if call.writes and path != "/dev/null" else seen):
                bad.append(call.line)
    refused = sum(call.error in ("ELOOP", "ENOTDIR") for call in found)
    return bad, sum(not call.error for call in found), refused


@contextlib.contextmanager
def swapping(top):
    command = [sys.executable, str(ROOT / "tests/swapper.py"), str(top)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    done = []
    try:
        yield done
        done.append(int(process.communicate(b"stop\n", timeout=60)[0]))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4", "inotify"])
def test_nothing_outside_is_opened_or_written(fs, tmp_path, monkeypatch):
    require(shutil.which("strace") is not None, "strace")
    log, outside = tmp_path / "trace", Outside(tmp_path)
    with contextlib.ExitStack() as stack:
        if fs == "inotify":
            top = stack.enter_context(tmpfs(tmp_path)) / "watched"
            top.mkdir()
            snapfeed("init", "--directory", top, "--io-threshold", "1GiB", "--time-threshold", "1h")
        else:
            top = stack.enter_context(partition(fs, tmp_path)).path
        swapper.prepare(str(top), str(outside.path))
        outside.watch()
        broker = stack.enter_context(mosquitto(tmp_path))
        pages = stack.enter_context(collector(broker, f"snapfeed/{HOST}/+/changes"))
        monkeypatch.setattr(daemon_process, "CLI", [*traced.COMMAND, "-o", str(log), *CLI])
        env = {"PYTHONDONTWRITEBYTECODE": "1"}
        feed = stack.enter_context(daemon(tmp_path, top, broker=broker.url, config=CONFIG, env=env, started=False))
        with swapping(top) as swaps:
            feed.start()
            end, rounds = time.monotonic() + SECONDS, 0
            while time.monotonic() < end:
                feed.ask("reconcile" if rounds % 3 == 0 else "snapshot", partition=str(top))
                rounds += 1
        answer, consumer = feed.snapshot(), Consumer()

        def arrived():
            consumer.feed(message.payload for message in pages.new())
            return consumer.head == (answer["epoch"], answer["seq"])

        wait_until(arrived, "the last diff")
        assert outside.touched() == 0
        consumer.compare(top)
        assert feed.stop() == 0
        wait_until(
            lambda: re.search(rf"^{feed.pid} +\+\+\+ exited", log.read_text(), re.MULTILINE),
            "strace has written everything",
        )
        bad, good, refused = judged(log, top, [str(tmp_path / "daemon")], outside.path)
        print(f"{fs}: {swaps} exchanges, {rounds} snapshots, {good} calls, {refused} refused")
        assert bad == []
        assert good > 500


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}, sorted(directory.rglob("*"))


@pytest.mark.parametrize(("fs", "holds", "running"), [("xfs", "garbage", True), ("btrfs", "a copy", False)])
def test_a_link_in_place_of_the_system_directory_is_not_followed(fs, holds, running, tmp_path):
    """Whoever owns the root directory can exchange `.snapfeed` for a link to where he may not write."""
    outside = tmp_path / "outside"
    with partition(fs, tmp_path) as part, daemon(tmp_path, part.path, config=CONFIG) as feed:
        (part.path / "file").write_bytes(b"x" * 5000)
        before = feed.snapshot()
        if not running:
            assert feed.stop() == 0
        if holds == "garbage":
            (outside / "clones" / "1").mkdir(parents=True)
            (outside / "snapshots" / "1").mkdir(parents=True)
            (outside / "system.db").write_bytes(b"precious")
        else:
            shutil.copytree(part.path / ".snapfeed", outside, ignore=shutil.ignore_patterns("snapshots"))
            (outside / "clones" / "99").mkdir(parents=True)  # what a sweep would remove
        (part.path / ".snapfeed").rename(part.path / "aside")
        (part.path / ".snapfeed").symlink_to(outside)
        was = contents(outside)
        if running:
            (part.path / "file").write_bytes(b"y" * 5000)
            with pytest.raises(AssertionError, match="symbolic link"):
                feed.snapshot()
            assert feed.alive()
        else:
            feed.start()
            assert feed.partition()["state"] == "failed", feed.partition()
            assert "symbolic link" in feed.partition()["reason"]
        assert contents(outside) == was
        (part.path / ".snapfeed").unlink()
        (part.path / "aside").rename(part.path / ".snapfeed")
        after = wait_until(lambda: taken(feed), "it is served again")
        assert after["epoch"] == before["epoch"]


def taken(feed):
    with contextlib.suppress(AssertionError):
        return feed.snapshot()
    return None
