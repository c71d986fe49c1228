"""What people do: a virtual environment with pip in it, git checkouts between distant commits, a database that is written to."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading

import pytest
from broker_processes import collector, mosquitto
from consumer import Consumer
from daemon_process import HOST, daemon
from partitions import partition, require, run, wait_until


@pytest.fixture(params=["xfs", "btrfs", "ext4"])
def scene(request, tmp_path):
    with contextlib.ExitStack() as stack:
        top = stack.enter_context(partition(request.param, tmp_path, "1G")).path
        broker = stack.enter_context(mosquitto(tmp_path))
        pages = stack.enter_context(collector(broker, f"snapfeed/{HOST}/+/changes"))
        snapfeed = stack.enter_context(daemon(tmp_path, top, broker=broker.url))
        consumer = Consumer()

        def exact():
            answer = snapfeed.snapshot()

            def caught_up():
                consumer.feed(m.payload for m in pages.new())
                return consumer.head == (answer["epoch"], answer["seq"])

            wait_until(caught_up, "the diff")
            consumer.compare(top)
            return answer

        exact()
        yield top, snapfeed, exact


@pytest.mark.kernel
def test_pip_git_and_a_database(scene):
    top, snapfeed, exact = scene
    before = snapfeed.io()["rchar"]

    run(sys.executable, "-m", "venv", top / "venv")  # unpacks and installs pip
    exact()

    require(shutil.which("git") is not None, "git")
    repo = top / "repo"
    git = ["git", "-C", repo, "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.hooksPath=/dev/null"]
    run("git", "init", "-q", repo)
    for commit in range(3):
        for number in range(commit * 40, 300):
            path = repo / f"dir{(number + commit) % 17}" / f"file{number}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{number} {commit}\n" * (number + 1))
        run(*git, "add", "-A")
        run(*git, "commit", "-q", "-m", f"commit {commit}")
        if commit == 0:
            shutil.rmtree(repo / "dir3")
    exact()
    for revision in ("HEAD~2", "master", "HEAD~1"):
        run(*git, "checkout", "-q", revision, check=False)
        exact()

    stop = threading.Event()

    def writer():
        with contextlib.closing(sqlite3.connect(top / "data.db", isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b)")
            while not stop.is_set():
                db.execute("BEGIN")
                db.executemany("INSERT INTO t (b) VALUES (?)", [(os.urandom(300),) for _ in range(50)])
                db.execute("DELETE FROM t WHERE a % 7 = 0")
                db.execute("COMMIT")

    thread = threading.Thread(target=writer)
    thread.start()
    try:
        for _ in range(8):
            snapfeed.snapshot()
    finally:
        stop.set()
        thread.join()
    exact()
    shutil.rmtree(top / "venv")
    exact()
    # what the daemon read is its own files, /proc and sockets: far less than what there was to read
    held = int(subprocess.check_output(["du", "-sb", top]).split()[0]) + 20_000_000
    assert snapfeed.io()["rchar"] - before < held / 2
