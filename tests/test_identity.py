"""Who is who: one rule for a file system, and identity and metadata of the same object while others rename."""

import os

import pytest
from partitions import run, tmpfs
from strangers import stranger

from snapshotter.linux import mount_api
from snapshotter.linux.identity import Identifier, by_birth
from snapshotter.linux.statx import statx


@pytest.mark.kernel
def test_handles_are_the_rule_on_disk_file_systems(part):
    (part.path / "file").touch()
    fd = os.open(part.path, os.O_PATH)
    try:
        rule = Identifier(fd)
        assert rule.by_handle
        ident, found = rule.identify(fd, b"file")
        assert ident == rule.ident(fd, b"file")
        assert ident.ino == found.ino == os.stat(part.path / "file").st_ino
        assert rule.identify(fd)[0] == rule.ident(fd)
    finally:
        os.close(fd)


def test_without_handles_the_birth_time_tells_one_object_from_the_next():
    fd = os.open("/proc/self", os.O_PATH)  # procfs encodes no handles
    try:
        rule = Identifier(fd)
        assert not rule.by_handle
        assert rule.identify(fd, b"status")[0] == rule.ident(fd, b"status")
        found = statx(fd, b"status")._replace(btime_ns=5)
        assert by_birth(found) == by_birth(found)
        assert by_birth(found) != by_birth(found._replace(btime_ns=6))
        assert by_birth(found._replace(btime_ns=None)).gen == 0
        assert 0 <= by_birth(found._replace(btime_ns=-1)).gen < 2**32
    finally:
        os.close(fd)


def test_identity_and_metadata_are_of_one_object_while_it_is_replaced(tmp_path):
    with tmpfs(tmp_path) as root, stranger(root) as other:
        fd = os.open(root, os.O_PATH)
        other.do("open('f', 'w').close()")
        try:
            rule = Identifier(fd)
            assert rule.by_handle
            other.begin("for i in range(20_000): os.mknod('n'); os.rename('n', 'f')")
            for _ in range(2000):
                ident, found = rule.identify(fd, b"f")
                assert ident.ino == found.ino
            other.wait()
        finally:
            os.close(fd)


@pytest.mark.kernel
def test_a_detached_mount_sees_below_other_mounts_and_does_not_keep_the_users_mount_busy(part, tmp_path):
    (part.path / "d").mkdir()
    (part.path / "d" / "below").touch()
    with tmpfs(tmp_path) as over:
        run("mount", "--bind", over, part.path / "d")
        fd = mount_api.open_tree_clone(part.path)
        try:
            seen = os.open(b"d", os.O_RDONLY, dir_fd=fd)
            assert os.listdir(seen) == ["below"]
            os.close(seen)
            run("umount", part.path / "d")
            run("umount", part.path)  # at once, not lazily
            inside = os.open(b"d", os.O_RDONLY, dir_fd=fd)  # the file system lives on behind it
            os.close(inside)
        finally:
            os.close(fd)


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_the_top_level_of_a_btrfs_is_reached_and_its_superblock_left_as_it_is(btrfs, mode):
    run("btrfs", "subvolume", "create", btrfs.path / "sub")
    run("umount", btrfs.path)
    btrfs.mount("subvol=sub", mode)
    fd = os.open(btrfs.path, os.O_RDONLY)
    source = mount_api.mount_of(fd).source
    os.close(fd)
    assert os.fsdecode(source) == btrfs.device
    top = mount_api.btrfs_top_level(source)
    try:
        listing = os.open(b".", os.O_RDONLY, dir_fd=top)
        assert os.listdir(listing) == ["sub"]
        os.close(listing)
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            (line,) = (line for line in mounts if f" {btrfs.path} " in line)
        assert line.split(" - ")[1].split()[2].split(",")[0] == mode
        run("umount", btrfs.path)
    finally:
        os.close(top)
