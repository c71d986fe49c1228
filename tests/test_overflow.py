"""A queue that overflows loses events, never a change: one comparison of everything, and only of the partition concerned."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from broker_processes import collector, mosquitto
from consumer import Consumer
from daemon_process import HOST, daemon, snapfeed
from partitions import alone_on_this_machine, partition, tmpfs, wait_until
from workload import Worker

LIMITED = f'[broker]\nhost = "{HOST}"\n[watch]\nunlimited_queue = false\n'


@contextlib.contextmanager
def sysctl(name: str, value: int):
    path = Path("/proc/sys") / name.replace(".", "/")
    with alone_on_this_machine():
        before = path.read_text()
        path.write_text(str(value))
        try:
            yield
        finally:
            path.write_text(before)


@pytest.mark.kernel
@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4", "inotify"])
def test_an_overflow_costs_a_reconcile_and_no_change(fs, tmp_path):
    with contextlib.ExitStack() as stack:
        if fs == "inotify":
            top = stack.enter_context(tmpfs(tmp_path)) / "watched"
            top.mkdir()
            snapfeed("init", "--directory", top, "--io-threshold", "1GiB", "--time-threshold", "1s")
            stack.enter_context(sysctl("fs.inotify.max_queued_events", 16))
        else:
            top = stack.enter_context(partition(fs, tmp_path)).path
            stack.enter_context(sysctl("fs.fanotify.max_queued_events", 16))
        broker = stack.enter_context(mosquitto(tmp_path))
        pages = stack.enter_context(collector(broker, f"snapfeed/{HOST}/+/changes"))
        feed = stack.enter_context(daemon(tmp_path, top, broker=broker.url, config=LIMITED, time="1s"))
        wait_until(lambda: feed.partition()["head"], "the baseline")
        consumer = Consumer()
        work = Worker(os.fsencode(top), 5)
        feed.send(signal.SIGSTOP)
        for number in range(40):
            (top / f"file{number}").write_text("x")
        for _ in range(60):
            work.step()
        feed.send(signal.SIGCONT)

        def told():
            consumer.feed(m.payload for m in pages.new())
            return any(d["trigger"] == "reconcile" for d in consumer.diffs)

        wait_until(told, "a diff of what was lost")
        answer = feed.snapshot()
        wait_until(lambda: told() and consumer.head == (answer["epoch"], answer["seq"]), "the head")
        consumer.compare(top)
        assert feed.partition()["state"] == "watching", json.dumps(feed.partition())
