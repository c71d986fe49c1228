"""The btrfs backend's contract on a real btrfs: system directory, exclusions, retention, the idle partition."""

import os
import stat
import subprocess

import pytest
from btrfs_engine import Engine, libc, opened, ops
from model import apply
from oracle import walk
from partitions import require, run

from comparer.compare import compare
from comparer.dirty import Dirty
from comparer.errors import DamageError, OperatorError
from snapshotter.backends.btrfs import BtrfsBackend

pytestmark = pytest.mark.kernel


@pytest.fixture
def made(btrfs):
    return Engine(btrfs.path)


# ---- the system directory


def test_prepare(btrfs):
    with opened(btrfs.path) as fd:
        BtrfsBackend().prepare(fd)
        BtrfsBackend().prepare(fd)
    system = os.stat(btrfs.path / ".snapfeed")
    assert (system.st_ino, stat.S_IMODE(system.st_mode), system.st_uid) == (256, 0o700, 0)
    assert os.listdir(btrfs.path / ".snapfeed") == ["snapshots"]
    (btrfs.path / "d").mkdir()
    with opened(btrfs.path / "d") as fd, pytest.raises(OperatorError, match="subvolume"):
        BtrfsBackend().prepare(fd)


def test_prepare_refuses_an_ordinary_directory_and_mends_a_stub(btrfs):
    (btrfs.path / ".snapfeed").mkdir()
    with opened(btrfs.path) as fd, pytest.raises(OperatorError, match="move it away"):
        BtrfsBackend().prepare(fd)
    (btrfs.path / ".snapfeed").rmdir()
    with opened(btrfs.path) as fd:
        BtrfsBackend().prepare(fd)
    run("btrfs", "subvolume", "snapshot", btrfs.path, btrfs.path / "restored")
    with opened(btrfs.path / "restored") as fd:
        assert os.stat(".snapfeed", dir_fd=fd).st_ino == 2
        BtrfsBackend().prepare(fd)
        assert os.stat(".snapfeed", dir_fd=fd).st_ino == 256


# ---- what is not in a snapshot


def test_nested_subvolumes_are_left_out_and_named(made, btrfs):
    made.snapshot()
    (btrfs.path / "d").mkdir()
    run("btrfs", "subvolume", "create", btrfs.path / "d/nested")
    run("btrfs", "subvolume", "create", btrfs.path / "d/nested/deeper")
    run("btrfs", "subvolume", "create", btrfs.path / "at root")
    (btrfs.path / "d/nested/f").write_bytes(b"not ours")
    capture = made.capture()
    assert capture.excluded == (b"at root", b"d/nested")
    apply(made.model, compare(capture.old, capture.new, capture.touched, capture.ranges))
    assert made.model.entries() == walk(btrfs.path)
    assert [name for name, _ in capture.new.children(capture.new.root)] == [b"d"]
    assert capture.new.child(capture.new.root, b".snapfeed") is None


def test_a_file_deleted_while_open_is_gone(made, btrfs):
    made.snapshot()
    with open(btrfs.path / "f", "w+b") as file:
        file.write(b"x" * 10_000)
        made.snapshot()
        os.unlink(btrfs.path / "f")
        assert ops(made.snapshot())[0] == ("delete", b"f", None)
        file.write(b"y" * 10_000)
        assert made.snapshot() == []
    assert made.snapshot() == []


def test_a_file_made_without_a_name_and_linked_later(made, btrfs):
    made.snapshot()
    fd = os.open(btrfs.path, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"x" * 10_000)
    assert made.snapshot() == []
    os.link(f"/proc/self/fd/{fd}", btrfs.path / "named", src_dir_fd=fd, follow_symlinks=True)
    assert ops(made.snapshot())[0] == ("create", b"named", None)
    os.close(fd)


def test_a_reused_inode_number_is_a_delete_and_a_create(made, btrfs):
    made.snapshot()
    (btrfs.path / "f").write_bytes(b"x")
    ino = os.stat(btrfs.path / "f").st_ino
    made.snapshot()
    (btrfs.path / "f").unlink()
    os.sync()
    btrfs.umount()
    btrfs.mount()
    (btrfs.path / "g").write_bytes(b"y")
    assert os.stat(btrfs.path / "g").st_ino == ino, "after a mount btrfs gives the highest number again"
    changes = made.snapshot()
    assert ops(changes)[:2] == [("delete", b"f", None), ("create", b"g", None)]


# ---- keeping and removing


def test_content_discard_expire_sweep(made, btrfs):
    (btrfs.path / "f").write_bytes(b"old")
    made.snapshot()
    (btrfs.path / "f").write_bytes(b"new")
    snapshots = btrfs.path / ".snapfeed/snapshots"
    capture = made.capture()
    ident = capture.new.child(capture.new.root, b"f")
    path = capture.content(ident, b"f")
    assert path == b".snapfeed/snapshots/2/f"
    assert (btrfs.path / os.fsdecode(path)).read_bytes() == b"new"
    assert capture.content(capture.new.root, b"") is None
    with opened(btrfs.path) as fd:
        made.backend.discard(fd, capture)
        assert os.listdir(snapshots) == ["1"]
        made.backend.discard(fd, capture)
        made.seq = 6
        made.capture()
        made.backend.expire(fd, [5, 1])
        assert os.listdir(snapshots) == ["7"]
        (snapshots / "notes").mkdir()
        assert made.backend.sweep(fd, []) == 1
        assert made.backend.sweep(fd, []) == 0
        assert os.listdir(snapshots) == ["notes"]


def test_a_snapshot_in_use_stays_for_the_next_sweep(made, btrfs, tmp_path):
    made.snapshot()
    point = tmp_path / "in-use"
    point.mkdir()
    run("mount", "-o", "subvol=.snapfeed/snapshots/1", btrfs.device, point)
    try:
        with opened(btrfs.path) as fd:
            held = os.open(btrfs.path / ".snapfeed/snapshots/1", os.O_RDONLY)
            made.backend.expire(fd, [1])
            os.close(held)
    finally:
        run("umount", point)
    with opened(btrfs.path) as fd:
        made.backend.sweep(fd, [])
    assert os.listdir(btrfs.path / ".snapfeed/snapshots") == []


def test_a_capture_not_committed_before_is_taken_again(made, btrfs):
    made.snapshot()
    made.capture()
    (btrfs.path / "f").write_bytes(b"x")
    made.seq = 1
    assert ops(made.snapshot())[0] == ("create", b"f", None)


def test_a_head_that_is_gone_is_damage_and_leaves_nothing(made, btrfs):
    made.snapshot()
    with opened(btrfs.path) as fd:
        made.backend.expire(fd, [1])
    with pytest.raises(DamageError, match="snapshot 1 is gone"):
        made.capture()
    assert os.listdir(btrfs.path / ".snapfeed/snapshots") == []


# ---- the idle partition


def test_generation_tells_an_idle_partition(made, btrfs):
    made.snapshot(live=False)  # a walk of the live tree moves access times
    with opened(btrfs.path) as fd:
        generation = made.backend.generation
        assert generation(fd) == made.backend.last_generation
        (btrfs.path / ".snapfeed/system.db").write_bytes(b"own writes are in a subvolume of their own")
        assert generation(fd) == made.backend.last_generation
        (btrfs.path / "f").write_bytes(b"x")
        assert generation(fd) > made.backend.last_generation
        made.backend.discard(fd, made.capture())
        assert generation(fd) == made.backend.last_generation
        made.backend.expire(fd, [1])
        assert generation(fd) == made.backend.last_generation
        with open(btrfs.path / "f", "r+b") as file:
            file.write(b"y")
        assert generation(fd) > made.backend.last_generation


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_PATH])
def test_a_mounted_subvolume_through_a_detached_mount(btrfs, tmp_path, flags):
    run("btrfs", "subvolume", "create", btrfs.path / "sub")
    point = tmp_path / "mounted"
    point.mkdir()
    run("mount", "-o", "subvol=sub", btrfs.device, point)
    fd = libc.syscall(428, -100, bytes(point), 1 | os.O_CLOEXEC)  # open_tree(OPEN_TREE_CLONE): an O_PATH descriptor
    run("umount", point)
    try:
        if fd < 0:
            require(False, "open_tree")
        root = os.open(".", flags | os.O_DIRECTORY, dir_fd=fd)
        backend = BtrfsBackend()
        backend.prepare(root)
        first = backend.capture(root, 1, None, Dirty(), Dirty)
        os.close(os.open("f", os.O_CREAT, dir_fd=root if flags == os.O_RDONLY else fd))
        capture = backend.capture(root, 2, 1, Dirty(), Dirty)
        assert ops(compare(capture.old, capture.new, capture.touched)) == [
            ("create", b"f", None),
            ("modify", b"", None),
        ]
        backend.discard(root, capture)
        backend.discard(root, first)
        os.close(root)
    finally:
        os.close(fd)
    assert subprocess.run(["findmnt", point], capture_output=True, check=False).returncode == 1
