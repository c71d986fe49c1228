"""Volume meters against real writes, and what a volume makes of several meters."""

import mmap
import os

import pytest
from partitions import partition, run, tmpfs, wait_until

from watcher.meters import BlockMeter, Ext4Meter, GrowthMeter, Volume, XfsMeter, meters_for

MIB = 1 << 20
SIZE = 64 * MIB


def buffered(path):
    with open(path, "wb") as file:
        file.writelines(b"\xa5" * MIB for _ in range(64))


def direct(path):
    buffer = mmap.mmap(-1, MIB)  # aligned
    buffer.write(b"\xa5" * MIB)
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
    try:
        for _ in range(64):
            os.write(fd, buffer)
    finally:
        os.close(fd)


def mapped(path):
    with open(path, "w+b") as file:
        file.truncate(SIZE)
        with mmap.mmap(file.fileno(), SIZE) as memory:
            for offset in range(0, SIZE, MIB):
                memory[offset : offset + MIB] = b"\xa5" * MIB


@pytest.mark.kernel
@pytest.mark.parametrize("write", [buffered, direct, mapped])
def test_every_way_of_writing_is_counted(part, write):
    meters = meters_for(part.fs, part.device, os.fsencode(part.path))
    assert [meter.kind for meter in meters] == {"xfs": ["xfs", "blockdev"], "btrfs": ["btrfs"], "ext4": ["ext4"]}[
        part.fs
    ]
    volume = Volume(meters)
    assert volume.advance() < MIB
    write(part.path / "file")
    at_once = [m.kind for m in meters if m.immediate and m.read() >= SIZE]
    assert at_once == (["xfs"] if part.fs == "xfs" and write is not mapped else [])
    run("sync", "-f", part.path)
    assert SIZE <= volume.advance() < SIZE * 1.5
    assert volume.notes == []


@pytest.mark.kernel
def test_xfs_statistics_are_exact(xfs):
    meter = XfsMeter(os.path.basename(xfs.device))
    before = meter.read()
    buffered(xfs.path / "file")
    assert meter.read() - before == SIZE


@pytest.mark.kernel
def test_a_btrfs_is_measured_through_a_mounted_subvolume_and_on_all_its_devices(btrfs, tmp_path):
    second = tmp_path / "two"
    second.mkdir()
    with partition("ext4", second, "512M") as other:  # only for its loop device
        run("umount", other.path)
        run("wipefs", "-a", other.device)
        run("btrfs", "device", "add", "-f", other.device, btrfs.path)
        run("btrfs", "subvolume", "create", btrfs.path / "sub")
        point = tmp_path / "sub"
        point.mkdir()
        run("mount", "-o", "subvol=sub", btrfs.device, point)
        volume = Volume(meters_for("btrfs", btrfs.device, os.fsencode(point)))
        buffered(point / "file")
        run("sync", "-f", point)
        assert SIZE <= volume.advance() < SIZE * 1.5
        run("btrfs", "device", "remove", other.device, btrfs.path)
        assert volume.advance() >= SIZE
        assert volume.kinds == ("btrfs",)
        run("umount", point)


def test_tmpfs_is_measured_by_growth(tmp_path):
    with tmpfs(tmp_path) as point:
        meters = meters_for("tmpfs", "tmpfs", os.fsencode(point))
        assert [meter.kind for meter in meters] == ["growth"]
        volume = Volume(meters)
        buffered(point / "file")
        assert volume.advance() == SIZE
        os.unlink(point / "file")
        assert volume.advance() == SIZE
        with open(point / "other", "wb") as file:
            file.write(bytes(MIB))
        assert volume.advance() == SIZE + MIB


@pytest.mark.kernel
def test_a_meter_whose_source_is_gone_is_dropped_with_a_note(part):
    volume = Volume(meters_for(part.fs, part.device, os.fsencode(part.path)))
    buffered(part.path / "file")
    run("sync", "-f", part.path)
    counted = volume.advance()
    part.umount_everywhere()
    wait_until(lambda: volume.advance() >= counted, "the volume stays")
    if part.fs != "xfs":  # its block device is still there
        assert volume.kinds == ()
    assert len(volume.notes) == 1
    assert "dropped" in volume.notes[0]


@pytest.mark.kernel
def test_a_growth_meter_is_not_fooled_by_what_lies_below_the_mount_point(ext4):
    meter = GrowthMeter(os.fsencode(ext4.path))
    ext4.umount()
    with pytest.raises(OSError, match="another file system"):
        meter.read()


def test_a_missing_source_is_an_error():
    for make in (lambda: XfsMeter("nosuch"), lambda: Ext4Meter("nosuch"), lambda: BlockMeter("/sys/dev/block/0:0")):
        with pytest.raises(OSError, match=r"nosuch|0:0"):
            make()


class Counter:
    """A meter that shows what a test says."""

    def __init__(self, *, immediate):
        self.kind = "xfs" if immediate else "blockdev"
        self.immediate = immediate
        self.settles = "begun" if immediate else "done"
        self.waiting = 0
        self.value = 1000
        self.gone = False

    def read(self):
        if self.gone:
            raise OSError("gone")
        return self.value


def test_the_larger_counts_and_never_the_sum():
    fast, slow = Counter(immediate=True), Counter(immediate=False)
    volume = Volume([fast, slow])
    fast.value += 10
    slow.value += 30
    assert volume.advance() == 30
    fast.value += 90
    assert volume.advance() == 100


def test_own_bytes_do_not_count_and_others_written_meanwhile_do():
    fast, slow = Counter(immediate=True), Counter(immediate=False)
    volume = Volume([fast, slow])
    fast.value += 500
    volume.begin()
    fast.value += 70 + 5  # ours and somebody's
    slow.value += 600
    volume.settle(own=70)
    assert volume.advance() == 5


def test_more_own_bytes_than_counted_are_no_debt():
    fast = Counter(immediate=True)
    volume = Volume([fast])
    volume.begin()
    volume.settle(own=1000)
    fast.value += 1
    assert volume.advance() == 1


def test_what_was_written_before_nothing_new_asks_for_nothing_and_is_in_the_next_volume():
    fast, slow = Counter(immediate=True), Counter(immediate=False)
    volume = Volume([fast, slow])
    fast.value += 500 + 30  # somebody's and ours
    assert volume.begin() == 530
    fast.value += 70 + 5  # ours and somebody's
    volume.settle(own=70, made=False, before=30)
    assert volume.advance() == 5
    slow.value += 500  # what the other has counted already reaches the disk: the larger of the two, never the sum
    assert volume.begin() == 505
    volume.settle(own=0)
    fast.value += 1
    slow.value += 1
    assert (volume.advance(), volume.begin()) == (1, 1)


def test_a_dropped_meter_keeps_what_it_counted_before_nothing_new():
    fast, slow = Counter(immediate=True), Counter(immediate=False)
    volume = Volume([fast, slow])
    fast.value += 500
    volume.begin()
    volume.settle(own=0, made=False)
    fast.gone = True
    slow.value += 7
    assert (volume.advance(), volume.begin()) == (7, 500)


def test_an_abandoned_snapshot_leaves_the_volume_as_it_was():
    fast = Counter(immediate=True)
    volume = Volume([fast])
    fast.value += 500
    volume.begin()
    volume.abandon()
    assert volume.advance() == 500
    with pytest.raises(ValueError, match="begin"):
        volume.settle(0)


def test_a_dropped_meter_leaves_what_it_counted():
    fast, slow = Counter(immediate=True), Counter(immediate=False)
    volume = Volume([fast, slow])
    fast.value += 500
    assert volume.advance() == 500
    fast.gone = True
    assert volume.advance() == 500
    volume.begin()
    volume.settle(0)
    slow.value += 7
    assert volume.advance() == 7
    slow.gone = True
    volume.advance()
    assert volume.kinds == ()
    assert volume.advance() == 7


def test_what_a_snapshot_flushed_belongs_to_it_and_what_came_then_to_the_next():
    meter = Counter(immediate=False)
    meter.settles = "captured"
    volume = Volume([meter])
    volume.begin()
    meter.value += 100  # flushed by the snapshot
    meter.waiting = 30  # written after it, still in memory
    meter.value += 30
    volume.captured()
    meter.value += 20 + 7  # others', and ours
    volume.settle(own=7)
    assert volume.advance() == 50
