"""Volume and time triggers of the real daemon: writes of every kind fire, idleness does not."""

import contextlib
import itertools
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


def direct(path, flags=os.O_CREAT, total=TOTAL):
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT | flags, 0o600)
    with mmap.mmap(-1, MIB) as block:  # page aligned, as O_DIRECT wants it
        block.write(os.urandom(MIB))
        for _ in range(total // MIB):
            os.write(fd, block)
    os.close(fd)


def mapped(path):
    with path.open("w+b") as file:
        file.truncate(TOTAL)
        with mmap.mmap(file.fileno(), TOTAL) as memory:
            for offset in range(0, TOTAL, MIB):
                memory[offset : offset + MIB] = bytes([offset // MIB + 1]) * MIB
                memory.flush(offset, MIB)


def sectors_written(part) -> int:
    """What really reached the device, in bytes."""
    with open(f"/sys/block/{os.path.basename(part.device)}/stat") as file:
        return int(file.read().split()[6]) * 512


@pytest.mark.parametrize("write", [buffered, direct, mapped], ids=["buffered", "direct", "mapped"])
@pytest.mark.parametrize("fs", ["xfs", "btrfs"])
def test_written_volume_fires_and_not_with_every_write(fs, write, tmp_path):
    with partition(fs, tmp_path, "2G") as part, daemon(tmp_path, part.path, io="64MiB") as snapfeed:
        before = wait_until(lambda: snapfeed.partition()["head"], "the first snapshot")
        device = sectors_written(part)
        write(part.path / "file")
        os.sync()

        def fired():
            rows = snapfeed.ask("snapshots", partition=str(part.path))
            return [r for r in rows if r["seq"] > before and r["trigger"] == "volume"]

        wait_until(fired, "`volume` fires", 10)
        wait_until(lambda: snapfeed.partition()["volume"] < 64 * MIB, "the rest is below the threshold", 10)
        rest = snapfeed.snapshot()
        found = fired()
        assert 1 <= len(found) <= 4, found  # 200 / 64 = 3, and the rounding of what is counted at writeback
        assert all(r["volume"] >= 64 * MIB for r in found)
        rows = [r for r in snapfeed.ask("snapshots", partition=str(part.path)) if r["seq"] > before]
        total = sum(r["volume"] for r in rows)
        if not rest["changes"]:  # the last bytes were written while the snapshot that holds them was being taken
            total += rest["volume"]
        most = max(TOTAL, sectors_written(part) - device)
        # a meter that counts at writeback does not tell what is written while a snapshot is being taken
        least = 0.95 * TOTAL if fs == "xfs" else 64 * MIB
        assert least <= total <= 1.05 * most, (total / MIB, most / MIB, [r["volume"] / MIB for r in rows])


@pytest.mark.parametrize("fs", ["xfs", "ext4"])
def test_what_fired_and_was_nothing_new_is_in_the_next_diff(fs, tmp_path):
    """A diff's volume is what was written since the diff before it, also if a look in between found no change."""
    mkfs = ("-E", "lazy_itable_init=0,lazy_journal_init=0") if fs == "ext4" else ()  # else the kernel writes, too
    with partition(fs, tmp_path, "2G", mkfs) as part, daemon(tmp_path, part.path, io="64MiB") as snapfeed:
        head = wait_until(lambda: snapfeed.partition()["head"], "the first snapshot")
        snapfeed.ask("snapshots", partition=str(part.path))  # asked of its thread, so that its tidying is over, too
        direct(part.path, os.O_TMPFILE, 80 * MIB)  # it never has a name

        def looked():
            found = snapfeed.partition()
            return found["last"]["skipped"] and found["last"]["trigger"] == "volume" and found["volume"] < 64 * MIB

        wait_until(looked, "`volume` fires and finds nothing new", 15)
        assert snapfeed.partition()["head"] == head
        (part.path / "file").write_text("x")
        answer = snapfeed.snapshot()
        assert answer["changes"]
        assert 0.95 * 80 * MIB <= answer["volume"] <= 90 * MIB
        (part.path / "file").write_text("y")
        assert snapfeed.snapshot()["volume"] < MIB


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
        assert all(b - a >= 0.9e9 for a, b in itertools.pairwise(times)), times
        assert snapfeed.partition()["head"] == head
        assert {json.loads(m.payload)["seq"] for m in seen.messages(f"{topic}/changes")} == {head}

        (part.path / "file").write_bytes(b"y")  # and a change is told at the next beat
        wait_until(lambda: snapfeed.partition()["head"] == head + 1, "a snapshot with the next beat", 5)
        assert snapfeed.partition()["last"]["trigger"] == "time"


def test_what_the_daemon_writes_is_hardly_counted(xfs, tmp_path):
    """Not what it writes into files; what XFS logs for that on the device is a few sectors."""
    with mosquitto(tmp_path) as broker, daemon(tmp_path, xfs.path, broker=broker.url) as snapfeed:
        wait_until(lambda: snapfeed.partition()["head"], "the first snapshot")
        for number in range(4):
            (xfs.path / f"file{number}").write_bytes(b"x" * 100)
            volume = snapfeed.snapshot()["volume"]
            assert number == 0 or 100 <= volume < 30_000, volume
            wait_until(lambda: snapfeed.partition()["backlog"] == 0, "it is published, and the cursor written")
        assert snapfeed.partition()["volume"] < 30_000
