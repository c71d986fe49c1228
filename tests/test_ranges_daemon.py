"""Overwriting three blocks of a 1 GiB file: exactly those ranges are published, and no file data was read to find them."""

import os

import pytest
from daemon_process import daemon
from partitions import partition, wait_until

pytestmark = pytest.mark.kernel
GIB = 1 << 30
BLOCK = 4096
WHERE = [5 * BLOCK, 300 << 20, GIB - BLOCK]


@pytest.mark.parametrize("fs", ["xfs", "btrfs"])
def test_three_blocks_of_a_gibibyte(fs, tmp_path):
    with partition(fs, tmp_path, "3G") as part, daemon(tmp_path, part.path, started=False) as snapfeed:
        big = part.path / "big"
        piece = os.urandom(1 << 20)
        with big.open("wb", buffering=0) as file:
            for _ in range(GIB >> 20):
                file.write(piece)
            os.fsync(file.fileno())
        snapfeed.start()
        wait_until(lambda: snapfeed.partition()["head"], "the first snapshot")
        snapfeed.snapshot()
        before = snapfeed.io()

        fd = os.open(big, os.O_WRONLY)
        for offset in WHERE:
            os.pwrite(fd, b"\xa5" * BLOCK, offset)
        os.close(fd)
        answer = snapfeed.snapshot()
        after = snapfeed.io()

        seq = answer["seq"]
        changes = snapfeed.facts("diff", part.path, str(seq - 1), str(seq))
        (change,) = changes
        assert answer["changes"] == 1
        assert (change["op"], change["path"]) == ("modify", "big")
        assert "data" in change["changed"]
        assert change["ranges_quality"] == "exact"
        assert change["ranges"] == [[offset, BLOCK] for offset in WHERE]
        assert change["cleared"] == []

        kept = part.path / change["content"]
        assert kept.stat().st_size == GIB
        with kept.open("rb") as file:
            for offset in WHERE:
                file.seek(offset)
                assert file.read(BLOCK) == b"\xa5" * BLOCK

        # what it read, system file, /proc and sockets included, is a small part of the three blocks' file; nothing came from disk
        read = after["rchar"] - before["rchar"]
        from_disk = after["read_bytes"] - before["read_bytes"]
        assert read < 256 << 10, read
        assert from_disk < 256 << 10, from_disk
        assert after["rchar"] < GIB // 16, (
            "the first snapshot read the data, too"
        )  # the interpreter's own start included
