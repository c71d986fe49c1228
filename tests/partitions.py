"""Real partitions in loop images, for tests: made, mounted, and always taken down again.

A test asks for one with the fixtures of conftest.py. What the machine lacks is a skip that names it; with
SNAPFEED_REQUIRE_KERNEL=1 that skip is a failure.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

MKFS = {
    "xfs": ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
    "ext4": ["mkfs.ext4", "-q", "-F"],
}
DEADLINE = 30.0


def require(condition: bool, lacking: str) -> None:
    """Skip the test, or fail it where the machine is said to have everything, naming what is lacking."""
    if condition:
        return
    if os.environ.get("SNAPFEED_REQUIRE_KERNEL") == "1":
        pytest.fail(f"SNAPFEED_REQUIRE_KERNEL=1, but this machine lacks: {lacking}", pytrace=False)
    pytest.skip(f"this machine lacks: {lacking}")


def run(*command: str | bytes | Path, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run a command to its end; its output is in the error if it fails."""
    options.setdefault("timeout", 120)
    done = subprocess.run(command, capture_output=True, check=False, **options)
    if check and done.returncode:
        raise AssertionError(f"{command} exited {done.returncode}: {done.stdout!r} {done.stderr!r}")
    return done


def wait_until(condition, what: str, deadline: float = DEADLINE):
    """Wait for `condition()` to be true, and return its value; fail after `deadline` seconds."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        time.sleep(0.01)


_TURNS = Path(tempfile.gettempdir()) / f"snapfeed-tests-{os.geteuid()}"
_TURN: list[int] = []  # the lock of the test that runs here


@contextlib.contextmanager
def _locked(name: str, how: int) -> Iterator[int]:
    _TURNS.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(_TURNS / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def beside_others() -> Iterator[None]:
    """Around every test: many at a time, but none while one is alone."""
    with contextlib.ExitStack() as stack:
        with _locked("gate", fcntl.LOCK_EX):
            _TURN.append(stack.enter_context(_locked("tests", fcntl.LOCK_SH)))
        try:
            yield
        finally:
            _TURN.clear()


@contextlib.contextmanager
def alone_on_this_machine() -> Iterator[None]:
    """Around what changes the machine for everybody (sysctl): waits for the tests that run beside this one."""
    (turn,) = _TURN
    fcntl.flock(turn, fcntl.LOCK_UN)
    with _locked("gate", fcntl.LOCK_EX):
        fcntl.flock(turn, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(turn, fcntl.LOCK_SH)


@dataclass
class Partition:
    """One file system in a loop image, mounted at `path`."""

    fs: str
    image: Path
    device: str
    path: Path

    def mount(self, *options: str) -> None:
        run("mount", "-t", self.fs, *(["-o", ",".join(options)] if options else []), self.device, self.path)

    def umount(self) -> None:
        """Unmount as a user would; somebody's short visit (EBUSY) is waited for."""
        wait_until(lambda: run("umount", self.path, check=False).returncode == 0, f"umount {self.path}", 10)

    def umount_everywhere(self) -> None:
        """As `umount`, and wait until what the file system has in memory is gone: mount name spaces may have copies."""
        self.umount()
        wait_until(lambda: nobodys(self.device), f"{self.device} is nobody's")


def nobodys(device: str) -> bool:
    """Whether no file system is on a block device any more: open(2), O_EXCL."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno != errno.EBUSY
    return True


def mounted_below(directory: Path) -> list[str]:
    prefix = str(directory)
    with open("/proc/self/mounts") as mounts:
        points = [line.split()[1] for line in mounts]
    return [p for p in points if p == prefix or p.startswith(prefix + "/")]


@contextlib.contextmanager
def loop_device(image: Path, size: str) -> Iterator[str]:
    require(os.geteuid() == 0, "root")
    require(shutil.which("losetup") is not None and os.path.exists("/dev/loop-control"), "loop devices")
    run("truncate", "-s", size, image)
    device = run("losetup", "--find", "--show", image).stdout.decode().strip()
    try:
        yield device
    finally:
        run("losetup", "-d", device, check=False)


@contextlib.contextmanager
def partition(fs: str, directory: Path, size: str = "512M", mkfs: tuple[str, ...] = ()) -> Iterator[Partition]:
    """A fresh file system of kind `fs` ("xfs", "btrfs", "ext4"), mounted below `directory`."""
    require(shutil.which(MKFS[fs][0]) is not None, MKFS[fs][0])
    image, point = directory / f"{fs}.img", directory / fs
    point.mkdir()
    with loop_device(image, size) as device:
        run(*MKFS[fs], *mkfs, device)
        made = Partition(fs, image, device, point)
        try:
            made.mount()
            yield made
        finally:
            for mount in reversed(mounted_below(directory)):
                if run("umount", mount, check=False).returncode:
                    run("umount", "-l", mount, check=False)


@contextlib.contextmanager
def tmpfs(directory: Path) -> Iterator[Path]:
    require(os.geteuid() == 0, "root")
    point = directory / "tmpfs"
    point.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=256M", "tmpfs", point)
    try:
        yield point
    finally:
        run("umount", "-l", point, check=False)
