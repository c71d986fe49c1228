"""`snapfeed replicate` with a real daemon and broker: catches up, follows, verifies."""

import json
import os
import signal
import subprocess

import pytest
from broker_processes import mosquitto
from daemon_process import CLI, HOST, ROOT, daemon, environment, facts, snapfeed
from partitions import partition, wait_until
from test_replica import Gardener, assert_same, work

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4"])
def test_a_replica_catches_up_follows_and_is_exact(fs, tmp_path):
    copy = tmp_path / "copy"
    with (
        partition(fs, tmp_path) as part,
        mosquitto(tmp_path) as broker,
        daemon(tmp_path, part.path, broker=broker.url) as running,
    ):
        worker = Gardener(os.fsencode(part.path), 3, reflink=fs != "ext4")
        work(part, worker, 150)
        taken = running.snapshot()
        wait_until(lambda: running.published(taken["seq"]), "the first diffs are published: only a baseline can help")
        where = ["--broker", broker.url, "--host", HOST, "--partition", taken["partition"], "--source", part.path]
        done = facts("replicate", *where, "--once", copy)
        assert [(one["seq"], one["baseline"]) for one in done] == [(taken["seq"], True)]
        assert_same(part.path, copy)

        for _ in range(2):
            work(part, worker, 80)
            taken = running.snapshot()
        wait_until(lambda: running.published(taken["seq"]), "more diffs are published: replayed")
        done = facts("replicate", *where, "--once", copy)
        assert done[-1]["seq"] == taken["seq"]
        assert not any(one["baseline"] for one in done)
        assert_same(part.path, copy)
        assert facts("replicate", *where, "--once", copy) == []
        assert ", 0 disagreements; content of " in snapfeed("replicate", "--verify", "--source", part.path, copy).stdout

        command = [*CLI, "replicate", *where, "--json", copy]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment()) as following:
            try:
                work(part, worker, 60)
                taken = running.snapshot()
                assert json.loads(following.stdout.readline())["seq"] == taken["seq"]
                assert_same(part.path, copy)
                following.send_signal(signal.SIGINT)
                assert following.wait(20) == 0
            finally:
                following.kill()
