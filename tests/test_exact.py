"""The heart: whatever is done to a partition and to the daemon, a consumer that applies the pages holds what a walk finds.

A Hypothesis state machine drives real work on a real partition, the real daemon as a process (stopped, killed, started, told to
reconcile), and a real broker; a foreign subscriber's pages go into a model and onto a real directory.
SNAPFEED_SEQUENCES says how many sequences each file system gets (`make soak` asks for thousands).
"""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from broker_processes import collector, mosquitto
from consumer import Consumer, name
from daemon_process import HOST, daemon
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from oracle import walk
from partitions import partition, tmpfs, wait_until
from real_directory import RealDirectory, comparable
from workload import Worker

SEQUENCES = int(os.environ.get("SNAPFEED_SEQUENCES", "26"))


class Scene:
    """A partition, a daemon, a broker, a subscriber: made once for a file system, used by all its sequences."""

    def __init__(self, fs: str, directory: Path, stack: contextlib.ExitStack) -> None:
        self.fs = fs
        self.part = None
        if fs == "inotify":
            self.top = stack.enter_context(tmpfs(directory)) / "watched"
            self.top.mkdir()
            from daemon_process import snapfeed

            snapfeed("init", "--directory", self.top, "--io-threshold", "1GiB", "--time-threshold", "1h")
        else:
            self.part = stack.enter_context(partition(fs, directory))
            self.top = self.part.path
        broker = stack.enter_context(mosquitto(directory / "broker"))
        self.collector = stack.enter_context(collector(broker, f"snapfeed/{HOST}/+/changes"))
        wait_until(self.collector.subscribed, "the foreign subscriber is there")
        real = directory / "real"
        real.mkdir()
        self.real = RealDirectory(stack.enter_context(tmpfs(real)))
        self.daemon = stack.enter_context(daemon(directory, self.top, broker=broker.url))
        self.consumer = Consumer()
        self.broken: BaseException | None = None  # what went wrong first: all that follows is its consequence

    def exact(self, answer: dict) -> None:
        """The consumer catches up with a snapshot, and holds what a walk finds."""
        if self.broken is not None:
            raise self.broken
        try:
            self.catch_up(answer["epoch"], answer["seq"])
            self.consumer.compare(self.top)
            for change in self.consumer.diffs[-1]["changes"]:
                if change["content"] is not None:
                    assert change["type"] == "file"
                    kept = os.stat(os.path.join(os.fsencode(self.top), name(change, "content")))
                    assert kept.st_size == int(change["after"]["size"]), change
            assert comparable(walk(self.real.top)) == comparable(walk(self.top))
        except BaseException as error:
            self.broken = error
            raise

    def catch_up(self, epoch: str, seq: int) -> None:
        """Take what has arrived until the head is there."""

        def arrived() -> bool:
            for message in self.collector.new():
                known = len(self.consumer.diffs)
                self.consumer.feed([message.payload])
                for diff in self.consumer.diffs[known:]:
                    self.real.apply(diff)
            return self.consumer.head == (epoch, seq)

        wait_until(arrived, f"diff {seq} arrives")


class Exact(RuleBasedStateMachine):
    scene: Scene

    @initialize(number=st.integers(0, 1 << 30))
    def begin(self, number):
        scene = self.scene
        if not scene.daemon.alive():
            scene.daemon.start()
        for entry in os.scandir(os.fsencode(scene.top)):
            if entry.name == b".snapfeed":
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        self.worker = Worker(os.fsencode(scene.top), number, reflink=scene.fs in ("xfs", "btrfs"))

    @rule(steps=st.integers(1, 25))
    def work(self, steps):
        for _ in range(steps):
            self.worker.step()

    @rule()
    def snapshot(self):
        self.ensure()
        self.scene.exact(self.scene.daemon.snapshot())

    @rule(steps=st.integers(0, 15))
    def reconcile(self, steps):
        self.ensure()
        self.work(steps)
        (answer,) = self.scene.daemon.ask("reconcile", partition=str(self.scene.top))
        self.scene.exact(answer)

    @rule(steps=st.integers(0, 15))
    def stop_and_start(self, steps):
        self.ensure()
        assert self.scene.daemon.stop() == 0
        self.work(steps)
        self.scene.daemon.start()

    @rule(steps=st.integers(0, 15), during=st.integers(0, 15))
    def kill_and_start(self, steps, during):
        self.ensure()
        self.work(during)
        self.scene.daemon.kill()
        self.work(steps)
        self.scene.daemon.start()

    @rule(steps=st.integers(0, 15))
    def remount(self, steps):
        if self.scene.part is None:
            return
        self.ensure()
        self.work(steps)
        self.scene.part.umount()
        self.scene.part.mount()
        wait_until(lambda: self.scene.daemon.partition()["state"] == "watching", "it is watched again")

    @invariant()
    def nothing_failed(self):
        if self.scene.daemon.alive():
            found = self.scene.daemon.partition()
            assert found["state"] != "failed", found["reason"]

    def ensure(self):
        if not self.scene.daemon.alive():
            self.scene.daemon.start()

    def teardown(self):
        if hasattr(self, "worker"):
            try:
                self.snapshot()
            except BaseException:
                print("the last operations were:", *self.worker.log[-40:], sep="\n  ")
                raise


@pytest.mark.kernel
@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4", "inotify"])
def test_any_sequence_is_exact(fs, tmp_path):
    (tmp_path / "broker").mkdir()
    with contextlib.ExitStack() as stack:
        scene = Scene(fs, tmp_path, stack)

        machine = type("Machine", (Exact,), {"scene": scene})
        if "SNAPFEED_SEED" in os.environ:
            machine = seed(int(os.environ["SNAPFEED_SEED"]))(machine)
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=SEQUENCES,
                stateful_step_count=8,
                deadline=None,
                database=None,
                derandomize="SNAPFEED_SEED" not in os.environ,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
