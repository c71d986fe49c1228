"""Volume and time triggers of the real daemon: writes of every kind fire, idleness does not."""

import contextlib
import json
import mmap
import os

import pytest
from broker_processes import collector, mosquitto
from daemon_process import HOST, daemon
from partitions import partition, wait_until

pytestmark = pytest.mark.kernel
MIB = 1 << 20
TOTAL = 200 * MIB


def buffered(path):
    with path.open("wb", buffering=0) as file:
        for _ in range(TOTAL // MIB):
            file.write(os.urandom(4096) * 256)


def direct(path):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    with mmap.mmap(-1, MIB) as block:  # page aligned, as O_DIRECT wants it
        block.write(os.urandom(MIB))
        for _ in range(TOTAL // MIB):
            os.write(fd, block)
    os.close(fd)


def mapped(path):
    with path.open("w+b") as file:
        file.truncate(TOTAL)
        with mmap.mmap(file.fileno(), TOTAL) as memory:
            for offset in range(0, TOTAL, MIB):
                memory[offset : offset + MIB] = bytes([offset // MIB + 1]) * MIB
                memory.flush(offset, MIB)


@pytest.mark.parametrize("fs", ["xfs", "btrfs"])
def test_written_volume_fires_and_not_with_every_write(fs, tmp_path):
    with partition(fs, tmp_path, "3G") as part, daemon(tmp_path, part.path, io="64MiB") as snapfeed:
        for write in (buffered, direct, mapped):
            before = snapfeed.snapshot()["seq"]
            write(part.path / write.__name__)
            os.sync()

            def fired(before=before):
                rows = snapfeed.ask("snapshots", partition=str(part.path))
                return [r for r in rows if r["seq"] > before and r["trigger"] == "volume"]

            wait_until(fired, f"{write.__name__} writes fire `volume`", 10)
            wait_until(lambda: snapfeed.partition()["volume"] < 64 * MIB, "the rest is below the threshold", 10)
            found = fired()
            assert 1 <= len(found) <= 4, found  # 200 / 64 = 3, and the rounding of what is counted at writeback
            assert all(r["volume"] >= 64 * MIB for r in found)
            total = sum(r["volume"] for r in found) + snapfeed.snapshot()["volume"]
            assert 0.95 * TOTAL <= total <= 1.35 * TOTAL, (write.__name__, total / MIB)


@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4"])
def test_an_idle_partition_beats_and_publishes_nothing(fs, tmp_path):
    with contextlib.ExitStack() as stack:
        part = stack.enter_context(partition(fs, tmp_path))
        broker = stack.enter_context(mosquitto(tmp_path))
        seen = stack.enter_context(collector(broker, "snapfeed/#"))
        (part.path / "file").write_bytes(b"x")
        snapfeed = stack.enter_context(daemon(tmp_path, part.path, broker=broker.url, time="1s"))
        head = wait_until(lambda: snapfeed.partition()["head"], "the first snapshot")
        topic = f"snapfeed/{HOST}/{snapfeed.partition()['partition']}"

        def beats():
            states = [json.loads(m.payload) for m in seen.messages(f"{topic}/state") if m.payload]
            found = {s["last"]["time_ns"] for s in states if s["last"] and s["last"]["skipped"] == "no change"}
            assert all(s["last"]["trigger"] == "time" for s in states if s["last"] and s["last"]["skipped"])
            return sorted(map(int, found))

        times = wait_until(lambda: len(beats()) >= 3 and beats(), "three heartbeats", 8)
        assert all(b - a >= 0.9e9 for a, b in zip(times, times[1:], strict=False)), times
        assert snapfeed.partition()["head"] == head
        assert {json.loads(m.payload)["seq"] for m in seen.messages(f"{topic}/changes")} == {head}

        (part.path / "file").write_bytes(b"y")  # and a change is told at the next beat
        wait_until(lambda: snapfeed.partition()["head"] == head + 1, "a snapshot with the next beat", 5)
        assert snapfeed.partition()["last"]["trigger"] == "time"
