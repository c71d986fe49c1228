"""Writers that do not wait for us: snapshots under fire are applied without a contradiction, and exact once the writers pause."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from broker_processes import collector, mosquitto
from consumer import Consumer
from daemon_process import HOST, daemon
from partitions import partition, tmpfs, wait_until

WRITERS, SNAPSHOTS = 4, 50


@contextlib.contextmanager
def hammers(top: Path, *words: str):
    command = [sys.executable, str(Path(__file__).parent / "hammer.py"), str(top)]
    writers = [
        subprocess.Popen([*command, str(number), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for number in range(WRITERS)
    ]
    try:
        yield writers
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def pause(writers) -> int:
    """Let them finish; how many steps they did."""
    return sum(int(writer.communicate(b"stop\n", timeout=60)[0]) for writer in writers)


@pytest.mark.kernel
@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4", "inotify"])
def test_snapshots_under_fire(fs, tmp_path):
    with contextlib.ExitStack() as stack:
        if fs == "inotify":
            from daemon_process import snapfeed

            top = stack.enter_context(tmpfs(tmp_path)) / "watched"
            top.mkdir()
            snapfeed("init", "--directory", top, "--io-threshold", "1GiB", "--time-threshold", "1h")
        else:
            top = stack.enter_context(partition(fs, tmp_path)).path
        broker = stack.enter_context(mosquitto(tmp_path))
        pages = stack.enter_context(collector(broker, f"snapfeed/{HOST}/+/changes"))
        feed = stack.enter_context(daemon(tmp_path, top, broker=broker.url))
        consumer = Consumer()

        def caught_up(answer) -> bool:
            consumer.feed(message.payload for message in pages.new())
            return consumer.head == (answer["epoch"], answer["seq"])

        with hammers(top, *{"inotify": ["nolink"], "ext4": []}.get(fs, ["reflink"])) as writers:
            for _ in range(SNAPSHOTS):
                answer = feed.snapshot()
            steps = pause(writers)
        assert steps > 100
        answer = feed.snapshot()
        wait_until(lambda: caught_up(answer), "the last diff")
        consumer.compare(top)
        assert feed.partition()["state"] in ("watching", "scanning")
