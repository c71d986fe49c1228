"""The daemon works under exactly the restrictions of etc/snapfeed.service, applied by a real systemd."""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
from broker_processes import ROOT, collector, mosquitto
from consumer import Consumer
from daemon_process import HOST, Daemon, daemon, snapfeed
from partitions import alone_on_this_machine, partition, run, wait_until
from systemd_process import systemd
from workload import Worker

pytestmark = pytest.mark.kernel
SYSTEMS = ("xfs", "btrfs", "ext4")
STRANGER = 1000
PYTHON = os.path.join("/mnt/python", os.path.relpath(sys.executable, sys.prefix))
CONFIG = f"""[broker]
host = "{HOST}"
[defaults]
keep = 2
"""
# The program is in another place; nothing else of the unit is changed.
DROP_IN = """[Service]
ExecStart=
ExecStart={python} -m watcher.cli run --config /mnt/config/snapfeed.toml --broker {url} {mounts}
Environment=PYTHONPATH=/mnt/source PYTHONDONTWRITEBYTECODE=1
WorkingDirectory=/mnt/source
StandardOutput=file:/run/daemon.log
StandardError=file:/run/daemon.log
"""
# A call that the filter refuses ends the daemon, where the unit has an error that might go unnoticed.
STRICT = "SystemCallErrorNumber=\n"


def strangers(top):
    """What is another user's, and nobody else may enter."""
    (top / "private").mkdir(mode=0o700)
    (top / "private" / "file").write_bytes(b"x" * 8192)
    (top / "private" / "file").chmod(0o600)
    for path in (top / "private" / "file", top / "private", top):
        os.chown(path, STRANGER, STRANGER)
    top.chmod(0o700)


def capabilities(feed):
    return {Path(p["mount"]).name: p["capabilities"] for p in feed.status()["partitions"]}


def restrictions(pid):
    """/proc/PID/status of a process, as far as it is about what it may do."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, value in (line.split(":", 1) for line in lines)}


@pytest.fixture
def parts(tmp_path):
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(partition(fs, tmp_path)) for fs in SYSTEMS]
        for part in made:
            strangers(part.path)
        yield made


@pytest.fixture(autouse=True)
def alone():
    """A name space with copies of all mounts keeps the disks of tests beside this one busy when those unmount them."""
    with alone_on_this_machine():
        yield


@pytest.mark.parametrize("more", ["", STRICT], ids=["as shipped", "a refused call kills"])
def test_the_daemon_works_under_the_units_restrictions(parts, more, tmp_path):
    config = tmp_path / "config"
    config.mkdir()
    (config / "snapfeed.toml").write_text(CONFIG)
    binds = {"/mnt/source": ROOT, "/mnt/python": Path(sys.prefix), "/mnt/config": config}
    binds |= {f"/mnt/{part.fs}": part.path for part in parts}
    with mosquitto(tmp_path) as broker, collector(broker, f"snapfeed/{HOST}/+/changes") as pages:
        with daemon(tmp_path, *[part.path for part in parts], config=CONFIG, broker=broker.url) as free:
            unrestricted = capabilities(free)
            assert free.stop() == 0
        mounts = " ".join(f"/mnt/{fs}" for fs in SYSTEMS)
        drop_in = DROP_IN.format(python=PYTHON, url=broker.url, mounts=mounts) + more
        with systemd(tmp_path, ROOT / "etc/snapfeed.service", drop_in, binds) as manager:
            try:
                work(manager, parts, pages, unrestricted)
            finally:
                log = manager.path("/run/daemon.log")
                print(log.read_text() if log.exists() else "the daemon was not started")


def test_a_refused_call_would_show(xfs, tmp_path):
    """What the test above relies on: systemd reads the filter, and with it as it is strict the daemon does not live."""
    binds = {"/mnt/source": ROOT, "/mnt/python": Path(sys.prefix)}
    less = "SystemCallFilter=~fanotify_init\nRestart=no\n"
    snapfeed("init", xfs.path, "--io-threshold", "1GiB", "--time-threshold", "1h")
    config = tmp_path / "config"
    config.mkdir()
    (config / "snapfeed.toml").write_text(CONFIG)
    binds |= {"/mnt/config": config, "/mnt/xfs": xfs.path}
    drop_in = DROP_IN.format(python=PYTHON, url="mqtt://127.0.0.1:9", mounts="/mnt/xfs") + STRICT + less
    with systemd(tmp_path, ROOT / "etc/snapfeed.service", drop_in, binds) as manager:
        wait_until(lambda: manager.systemctl("is-active", manager.name, check=False) == "failed", "it is refused")
        assert "signal=SYS" in manager.systemctl("status", manager.name, check=False)


def work(manager, parts, pages, unrestricted):
    def active():
        state = manager.systemctl("is-active", manager.name, check=False)
        assert state != "failed", manager.systemctl("status", manager.name, check=False)
        return state == "active"

    wait_until(active, "the unit is active")
    (pid,) = manager.pids()
    status = restrictions(pid)
    assert int(status["CapEff"], 16).bit_count() == 4
    assert (status["CapEff"], status["NoNewPrivs"], status["Seccomp"]) == (status["CapBnd"], "1", "2")
    there = Path(f"/proc/{pid}/root")
    assert not any(os.access(there / name, os.W_OK) for name in ("usr", "etc", "boot") if (there / name).is_dir())
    assert os.listdir(there / "tmp") == []
    assert {name for name in os.listdir(there / "proc") if not name.isdigit()} == {"self", "thread-self"}

    feed = Daemon(manager.path("/run/snapfeed"), [], {})
    wait_until(
        lambda: all(p["state"] == "watching" and p["head"] for p in feed.status()["partitions"]),
        "all have their baseline",
    )
    assert capabilities(feed) == unrestricted

    consumers = {}

    def told():
        for message in pages.new():
            page = json.loads(message.payload)
            consumers.setdefault(page["uuid"], Consumer()).take(page)
        return {uuid: consumer.head for uuid, consumer in consumers.items()}

    for part in parts:
        (part.path / "work").mkdir()
    workers = [Worker(os.fsencode(part.path / "work"), 7, reflink=part.fs != "ext4") for part in parts]
    for verb in ("snapshot", "snapshot", "snapshot", "reconcile", "snapshot"):  # more than are kept
        for worker in workers:
            for _ in range(40):
                worker.step()
        for part in parts:
            with open(part.path / "private" / "file", "r+b") as file:
                file.write(os.urandom(4096))
            feed.ask(verb, partition=f"/mnt/{part.fs}")
    served = feed.status()["partitions"]
    heads = {p["uuid"]: (p["epoch"], p["head"]) for p in served}
    uuids = {Path(p["mount"]).name: p["uuid"] for p in served}
    wait_until(lambda: told() == heads, f"the diffs arrive: {heads}")
    for part in parts:
        consumer = consumers[uuids[part.fs]]
        consumer.compare(part.path)
        told_of = [c for d in consumer.diffs for c in d["changes"] if c.get("path") == "private/file"]
        quality = "unknown" if part.fs == "ext4" else "exact"
        assert [c.get("ranges_quality") for c in told_of] == [None, *[quality] * 5]
        assert len(feed.ask("snapshots", partition=f"/mnt/{part.fs}")) <= 3
    clones = [one for one in (parts[0].path / ".snapfeed/clones").glob("*/*") if one.is_file()]
    assert clones
    assert all("i" in run("lsattr", "-d", one).stdout.split()[0].decode() for one in clones)
    manager.systemctl("reload", manager.name)
    assert active()
    assert manager.pids() == [pid]
    for part in parts:
        part.umount()  # the bind in its namespace is left
    manager.systemctl("stop", manager.name)
    assert manager.show("Result") == "success"
    assert "Traceback" not in manager.path("/run/daemon.log").read_text()
