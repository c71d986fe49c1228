"""A systemd of its own, as process 1 of a pid namespace: what a unit file says is applied by who reads it.

    with systemd(tmp_path, unit, drop_in, binds) as manager:
        manager.show("ActiveState")

It has /run, /var/lib and /mnt for itself, /etc and /proc/sys read-only, a cgroup of its own, and the host's network. Limits of
memory and tasks are not applied where the host's cgroup controllers are not in cgroup2.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from partitions import require, run, wait_until

SYSTEMD = "/lib/systemd/systemd"
UNSHARE = "unshare --mount --pid --fork --kill-child --cgroup --uts --ipc"


@dataclass
class Manager:
    """`pid`: its process 1, as the host counts. `name`: the unit it was told to start."""

    pid: int
    name: str
    cgroup: Path

    def path(self, inside: str) -> Path:
        """Where a path of its namespace is to be found from here."""
        return Path(f"/proc/{self.pid}/root") / inside.lstrip("/")

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        command = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "systemctl", *arguments]
        return run(*command, check=check).stdout.decode().strip()

    def show(self, setting: str) -> str:
        return self.systemctl("show", self.name, f"--property={setting}", "--value")

    def pids(self) -> list[int]:
        """The unit's processes, as the host counts."""
        with contextlib.suppress(OSError):
            return [
                int(line) for line in (self.cgroup / "system.slice" / self.name / "cgroup.procs").read_text().split()
            ]
        return []


def _cgroup2() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind = line.split()[:3]
        if kind == "cgroup2":
            return Path(place)
    return None


def _setup(units: Path, name: str, binds: dict[str, Path]) -> str:
    """The script that makes the namespace and becomes systemd."""
    lines = [
        "set -eu",
        "mount --make-rslave /",
        *(f"mount -t tmpfs tmpfs {place}" for place in ("/run", "/var/lib", "/mnt")),
        "mkdir /run/units",
        f"cp -r {shlex.quote(str(units))}/. /run/units",
    ]
    for place, source in binds.items():
        lines += [f"mkdir -p {place}", f"mount --bind {shlex.quote(str(source))} {place}"]
    lines += [
        "mount -t proc proc /proc",
        *(f"mount --bind {place} {place}; mount -o remount,bind,ro {place}" for place in ("/etc", "/proc/sys")),
        "mount -t tmpfs tmpfs /sys/fs/cgroup; umount /sys/fs/cgroup",  # not to be mounted over, unless it is there
        "mount -t cgroup2 none /sys/fs/cgroup",
        "export container=snapfeed-test SYSTEMD_UNIT_PATH=/run/units",  # a container: it leaves the host's kernel alone
        f"exec {SYSTEMD} --system --unit={name} --show-status=no",
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def systemd(directory: Path, unit: Path, drop_in: str, binds: dict[str, Path]) -> Iterator[Manager]:
    """Start the unit in the file `unit`, changed by `drop_in`. `binds`: the host's directories by their places below /mnt."""
    require(os.geteuid() == 0, "root")
    require(os.access(SYSTEMD, os.X_OK), "systemd")
    top = _cgroup2()
    require(top is not None, "cgroup2")
    units = directory / "units"
    (units / f"{unit.name}.d").mkdir(parents=True)
    (units / unit.name).write_text(unit.read_text(encoding="utf-8"), encoding="utf-8")
    (units / f"{unit.name}.d" / "test.conf").write_text(drop_in, encoding="utf-8")
    for target in ("sysinit", "basic", "shutdown"):  # what every service needs, here without anything in them
        (units / f"{target}.target").write_text("[Unit]\n")
    cgroup = top / f"snapfeed-test-{uuid.uuid4().hex[:8]}"
    cgroup.mkdir()
    script = directory / "setup.sh"
    script.write_text(_setup(units, unit.name, binds), encoding="utf-8")
    log = directory / "systemd.log"
    # --pdeathsig: it ends with the test's process, however that ends
    enter = f"echo $$ > {cgroup}/cgroup.procs; exec setpriv --pdeathsig KILL {UNSHARE} sh {script}"
    try:
        with log.open("wb") as output:
            outer = subprocess.Popen(["sh", "-c", enter], stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            yield Manager(wait_until(lambda: _child(outer, log), "systemd runs"), unit.name, cgroup)
        finally:
            outer.send_signal(signal.SIGKILL)  # process 1 goes with it, and all of its namespace
            outer.wait()
    finally:
        wait_until(lambda: _removed(cgroup), f"{cgroup} is empty")


def _child(outer: subprocess.Popen, log: Path) -> int | None:
    """The process 1, once it is systemd."""
    assert outer.poll() is None, f"systemd did not start: {log.read_text()}"
    found = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
    if found and Path(f"/proc/{found[0]}/comm").read_text().strip() == "systemd":
        return int(found[0])
    return None


def _removed(cgroup: Path) -> bool:
    for inner, _, _ in os.walk(cgroup, topdown=False):
        with contextlib.suppress(OSError):  # a process that is still dying
            os.rmdir(inner)
    return not cgroup.exists()
