"""A queue that overflows loses events, never a change: one comparison of everything, and only of the partition concerned."""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from broker_processes import collector, mosquitto
from consumer import Consumer
from daemon_process import HOST, daemon, snapfeed
from partitions import alone_on_this_machine, partition, tmpfs, wait_until
from reporting import report
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


def watched(fs, tmp_path, stack):
    """A partition (or a directory under inotify) with a queue of 16 events: (its top, its daemon, its pages)."""
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
    return top, feed, pages


@pytest.mark.kernel
@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4", "inotify"])
def test_an_overflow_costs_a_reconcile_and_no_change(fs, tmp_path):
    with contextlib.ExitStack() as stack:
        top, feed, pages = watched(fs, tmp_path, stack)
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


class Burst:
    """Operations as fast as they go, on a few hundred names in a few directories."""

    def __init__(self, top, seed):
        self.random = random.Random(seed)
        self.directories = [os.path.join(os.fsencode(top), b"d%d" % number) for number in range(12)]
        self.done = 0

    def path(self):
        return b"%b/n%d" % (self.random.choice(self.directories), self.random.randrange(40))

    def run(self, operations):
        """So many operations that succeeded."""
        while self.done < operations:
            with contextlib.suppress(OSError):
                self.one(self.random.randrange(12))
                self.done += 1

    def one(self, kind):
        match kind:
            case 0 | 1 | 2 | 3:
                fd = os.open(self.path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
                try:
                    if kind:
                        os.write(fd, b"x" * kind)
                finally:
                    os.close(fd)
            case 4 | 5:
                os.unlink(self.path())
            case 6:
                os.rename(self.path(), self.path())
            case 7:
                os.link(self.path(), self.path(), follow_symlinks=False)
            case 8:
                os.symlink(self.path(), self.path())
            case 9:
                os.chmod(self.path(), self.random.choice([0o600, 0o644]))
            case 10:
                os.rename(self.random.choice(self.directories), self.random.choice(self.directories))
            case 11:
                directory = self.random.choice(self.directories)
                os.mkdir(directory)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "fs", ["xfs", "inotify", "ext4", "btrfs"] if "SNAPFEED_OPERATIONS" in os.environ else ["xfs", "inotify"]
)
def test_many_operations_are_exact_after_one_reconcile(fs, tmp_path):
    """A queue of 16 events, and SNAPFEED_OPERATIONS while nobody reads it."""
    operations = int(os.environ.get("SNAPFEED_OPERATIONS", "5000"))
    with contextlib.ExitStack() as stack:
        top, feed, pages = watched(fs, tmp_path, stack)
        wait_until(lambda: feed.partition()["head"], "the baseline")
        burst = Burst(top, int(os.environ.get("SNAPFEED_SEED", "3")))
        burst.run(200)
        consumer = Consumer()

        def until(answer):
            def reached():
                consumer.feed(m.payload for m in pages.new())
                return consumer.head == (answer["epoch"], answer["seq"])

            wait_until(reached, "the head")

        while (answer := feed.snapshot())["changes"]:  # until nothing is young
            until(answer)
        until(answer)
        feed.send(signal.SIGSTOP)
        wait_until(lambda: ") T " in Path(f"/proc/{feed.pid}/stat").read_text(), "it is stopped")
        consumer.feed(m.payload for m in pages.new())
        before = len(consumer.diffs)
        started = time.monotonic()
        burst.run(operations)
        took = time.monotonic() - started
        feed.send(signal.SIGCONT)

        def reconciled():
            consumer.feed(m.payload for m in pages.new())
            return len(consumer.diffs) > before

        started = time.monotonic()
        wait_until(reconciled, "a diff of what was lost", 120)
        first = consumer.diffs[before]
        seconds = time.monotonic() - started
        consumer.compare(top)  # exact after that one
        until(feed.snapshot())
        consumer.compare(top)
        triggers = [d["trigger"] for d in consumer.diffs[before:]]
        # it is called `time` where that was due before the first event was read; it compares everything then as well
        assert triggers[0] in ("reconcile", "time")
        assert len(triggers) == 1 or "reconcile" not in triggers[1:], triggers
        assert feed.partition()["state"] == "watching"
        report(
            "overflow", burst.done, fs=fs, queue=16, exact_after_diffs=1, changes=len(first["changes"]),
            seconds_of_work=round(took, 1), seconds_until_exact=round(seconds, 2), diffs=triggers,
        )  # fmt: skip
