"""Changed byte ranges on a real btrfs."""

import contextlib
import fcntl
import os
import struct

import pytest
from btrfs_engine import BLOCK, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, Engine, fallocate, write_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from partitions import partition, run

from comparer.model import Quality, Range

pytestmark = pytest.mark.kernel


@pytest.fixture
def made(btrfs):
    return Engine(btrfs.path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with partition("btrfs", tmp_path_factory.mktemp("shared"), "2G") as made:
        yield made


WRITE, PUNCH, ALLOCATE, TRUNCATE, CLONE = range(5)
RUNS = st.lists(st.tuples(st.integers(WRITE, CLONE), st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=6)
NUMBERS = iter(range(1 << 30))


def clone_range(file, source, destination, length):
    """FICLONERANGE inside one file; what does not fit into it is refused."""
    with open(file, "r+b") as fd, contextlib.suppress(OSError):
        fcntl.ioctl(fd, 0x4020940D, struct.pack("=qQQQ", fd.fileno(), source, length * 2, destination * 2))


@settings(
    max_examples=int(os.environ.get("SNAPFEED_EXAMPLES", "100")), deadline=None, suppress_health_check=list(HealthCheck)
)
@given(st.lists(RUNS, min_size=1, max_size=3), st.sampled_from(["plain", "compressed", "nodatacow"]))
def test_ranges_hold_every_byte_that_differs(shared, rounds, kind):
    """Writes, punches, preallocation, zeroing, truncation in half blocks, of one file, in any order."""
    top = shared.path / f"h{next(NUMBERS)}"
    run("btrfs", "subvolume", "create", top)
    made = Engine(top)
    file = top / "f"
    file.touch()
    if kind == "nodatacow":
        run("chattr", "+C", file)
    if kind == "compressed":
        run("btrfs", "property", "set", file, "compression", "zstd")
    file.write_bytes(b"abc\n" * 20_000)
    made.snapshot()
    for work in rounds:
        for what, at, length in work:
            start, size = at * 2048, length * 2048
            if what == WRITE:
                write_at(file, start, os.urandom(8) * (size // 8))
            elif what == PUNCH:
                fallocate(file, KEEP_SIZE | PUNCH_HOLE, start, size)
            elif what == ALLOCATE:
                fallocate(file, [ZERO_RANGE, KEEP_SIZE, 0][at % 3], start, size)
            elif what == TRUNCATE:
                os.truncate(file, start)
            else:
                clone_range(file, start * 2, start, size)
            if length % 4 == 0:
                os.sync()
        made.snapshot()


def test_three_blocks_of_a_large_file_are_exactly_those(made, btrfs):
    file = btrfs.path / "large"
    with open(file, "wb") as out:
        out.writelines(b"\xa5" * (1 << 20) for _ in range(256))
    made.snapshot(contents=False)
    places = [5 * BLOCK, 30_000 * BLOCK, 65_535 * BLOCK]
    for place in places:
        write_at(file, place, os.urandom(BLOCK))
    (change,) = made.snapshot(contents=False)
    assert change.ranges.written == tuple(Range(p, BLOCK) for p in places)
    assert (change.ranges.cleared, change.ranges.quality, change.changed) == ((), Quality.EXACT, ("data", "times"))
    fallocate(file, KEEP_SIZE | PUNCH_HOLE, places[1], 2 * BLOCK)
    os.truncate(file, 65_535 * BLOCK)
    with open(file, "ab") as out:
        out.write(b"z" * (2 * BLOCK))
    (change,) = made.snapshot(contents=False)
    assert change.ranges.written == (Range(65_535 * BLOCK, 2 * BLOCK),)
    assert change.ranges.cleared == (Range(places[1], 2 * BLOCK),)
    assert change.ranges.quality is Quality.EXACT


def test_many_ranges_in_one_file(made, btrfs):
    file = btrfs.path / "f"
    file.write_bytes(os.urandom(1200 * BLOCK))
    made.snapshot()
    for i in range(0, 1200, 2):
        write_at(file, i * BLOCK, b"x" * BLOCK)
    (change,) = made.snapshot()
    assert change.ranges.written == tuple(Range(i * BLOCK, BLOCK) for i in range(0, 1200, 2))
    assert change.ranges.quality is Quality.EXACT
