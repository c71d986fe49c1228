"""`make demo`: it shows the main job, ends by itself, and leaves nothing behind, also when it is stopped in the middle."""

import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
from partitions import require, wait_until

ROOT = Path(__file__).parent.parent
NOBODY = ["--reuid=65534", "--regid=65534", "--clear-groups"]


def left_behind(directory: Path) -> list[str]:
    """Mounts, loop devices, processes and files of a demo that ran with this TMPDIR."""
    found = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(directory) in line]
    backing = [b for b in Path("/sys/block").glob("loop*/loop/backing_file") if str(directory) in b.read_text()]
    found += map(str, backing)
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(directory).encode() in process.read_bytes():
                found.append(process.read_bytes().decode(errors="replace"))
        except OSError:
            continue  # it ended meanwhile
    return found + [str(entry) for entry in directory.iterdir() if entry.name.startswith("snapfeed-demo-")]


def start(directory: Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "TMPDIR": str(directory), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "watcher.demo"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


@pytest.mark.kernel
def test_the_demo(tmp_path):
    require(os.geteuid() == 0, "root")
    demo = start(tmp_path)
    output = demo.communicate(timeout=120)[0].decode()
    assert demo.returncode == 0, output
    for wanted in ("trigger volume", "trigger time", "trigger command", "12 KiB in 3 ranges", "read by the daemon"):
        assert wanted in output, wanted
    assert output.count("exactly equal to a walk") == 2
    assert "\x1b[31m" not in output
    assert left_behind(tmp_path) == []


@pytest.mark.kernel
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_stopped_cleans_up(tmp_path, number):
    require(os.geteuid() == 0, "root")
    demo = start(tmp_path, start_new_session=True)
    seen = b""
    while b"Unpack" not in seen:
        line = demo.stdout.readline()
        assert line, seen
        seen += line
    assert left_behind(tmp_path)
    os.killpg(demo.pid, number)  # as a terminal does: to all of them
    demo.communicate(timeout=40)
    assert demo.returncode not in (0, None)
    wait_until(lambda: left_behind(tmp_path) == [], "nothing is left behind", 10)


def others_python() -> tuple[str, str]:
    """An interpreter that another user may run, and the PYTHONPATH with which it has all that is needed."""
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    for python in (sys.executable, "/usr/bin/python3"):
        command = ["setpriv", *NOBODY, "env", f"PYTHONPATH={path}", python, "-c", "import amqtt, watcher.demo"]
        if subprocess.run(command, cwd="/", check=False, capture_output=True).returncode == 0:
            return python, path
    pytest.skip("no Python that another user may run with the packages of this one")


def test_the_demo_without_root(tmp_path):
    require(os.geteuid() == 0, "root, to become somebody else")
    python, path = others_python()
    with tempfile.TemporaryDirectory(prefix="snapfeed-nobody-") as directory:
        os.chown(directory, 65534, 65534)
        environment = [
            "env",
            f"PYTHONPATH={path}",
            f"TMPDIR={directory}",
            "PYTHONDONTWRITEBYTECODE=1",
            f"HOME={directory}",
        ]
        done = subprocess.run(
            ["setpriv", *NOBODY, *environment, python, "-m", "watcher.demo"],
            cwd="/",
            check=False,
            timeout=120,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output = done.stdout.decode()
        assert done.returncode == 0, output
        assert "Without root" in output
        assert "exactly equal to a walk" in output
        assert left_behind(Path(directory)) == []
