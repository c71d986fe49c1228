"""What cannot be read is not gone: real errors in a reconcile or a look raise, publish nothing, and pass with their cause."""

import contextlib
import os
import shutil
import tempfile

import pytest
from daemon_process import adopt, daemon
from oracle import walk
from partitions import require, run, wait_until
from test_table_backends import Engine

from comparer.dirty import Dirty
from comparer.errors import SnapfeedError, TransientError
from comparer.model import Name
from snapshotter import fill_xfs, scan
from snapshotter.linux.identity import Identifier
from snapshotter.partition import partition_at
from snapshotter.visit import Visit
from watcher.work import Order, take

pytestmark = pytest.mark.kernel
TROUBLE = (OSError, SnapfeedError)


def ident(top, path):
    fd = os.open(top, os.O_RDONLY)
    try:
        return Identifier(fd).ident(fd, os.fsencode(path))
    finally:
        os.close(fd)


def populate(top):
    for number in range(64):  # so that what is broken later does not share a disk block with the root directory
        os.close(os.open(f"{top}/first{number}", os.O_CREAT | os.O_WRONLY))
    for directory in ("d", "d/e", "other"):
        os.mkdir(f"{top}/{directory}")
    for number in range(40):
        with open(f"{top}/d/f{number}", "w") as file:
            file.write("x" * number)
        with open(f"{top}/d/e/g{number}", "w") as file:
            file.write("y")


@contextlib.contextmanager
def broken_inode(part, path):
    """The partition mounted with an inode on its disk that cannot be read; mended when left."""
    tool = {"xfs": "xfs_db", "ext4": "debugfs"}[part.fs]
    require(shutil.which(tool) is not None, tool)
    ino = os.lstat(f"{part.path}/{path}").st_ino
    links = os.lstat(f"{part.path}/{path}").st_nlink

    def write(good):
        if part.fs == "xfs":
            magic = "0x494e" if good else "0x1234"
            run("xfs_db", "-x", "-c", f"inode {ino}", "-c", f"write -d core.magic {magic}", part.device)
        else:
            run("debugfs", "-w", "-R", f"set_inode_field <{ino}> links_count {links if good else 0}", part.device)

    part.umount_everywhere()
    write(good=False)
    part.mount()
    try:
        with pytest.raises(OSError):  # noqa: PT011 - whatever the file system says
            os.lstat(f"{part.path}/{path}")
        yield
    finally:
        part.umount_everywhere()
        write(good=True)
        part.mount()


WAYS = [("xfs", "ficlone", scan.WALK), ("xfs", "ficlone", fill_xfs.BULKSTAT), ("ext4", "metadata", scan.WALK)]


@pytest.mark.parametrize(("fs", "kind", "how"), WAYS, ids=["xfs", "xfs-bulkstat", "ext4"])
@pytest.mark.parametrize("bad", ["d/f39", "d/e", "d"])
def test_an_inode_that_cannot_be_read_is_not_gone(request, fs, kind, how, bad):
    part = request.getfixturevalue(fs)
    populate(part.path)
    engine = Engine(part.path, kind, scan=how)
    engine.snapshot(Dirty())
    engine.check()
    d, e, root = (ident(part.path, p) for p in ("d", "d/e", ""))
    objects = {ident(part.path, p) for p in ("d", "d/e", "d/f39", "d/e/g39")}
    names = {Name(root, b"d"), Name(d, b"e"), Name(d, b"f39"), Name(e, b"g39")}
    with broken_inode(part, bad):
        with pytest.raises(TROUBLE):
            engine.snapshot(Dirty(lost="test"))
        below = {"d/f39": d, "d/e": e, "d": d}[bad]
        hints = [
            Dirty(objects=set(objects)),
            Dirty(names=names),
            Dirty(names={n for n in names if n.parent == below}),
            Dirty(
                objects={below if bad != "d/f39" else next(iter(objects))},
                names={Name(below, b"f39"), Name(below, b"g39")},
            ),
        ]
        for dirty in hints:
            with pytest.raises(TROUBLE):
                engine.snapshot(dirty)
    assert engine.snapshot(Dirty(lost="test")) == []
    engine.check()


def test_a_baseline_does_not_leave_out_what_cannot_be_read(ext4):
    populate(ext4.path)
    engine = Engine(ext4.path, "metadata")
    with broken_inode(ext4, "d/e"), pytest.raises(TROUBLE):
        engine.snapshot(Dirty())
    engine.snapshot(Dirty())
    engine.check()


def test_a_file_system_that_shut_down(xfs):
    require(shutil.which("xfs_io") is not None, "xfs_io")
    populate(xfs.path)
    engine = Engine(xfs.path, "ficlone", scan=fill_xfs.BULKSTAT)
    engine.snapshot(Dirty())
    root = ident(xfs.path, "")
    os.sync()
    run("xfs_io", "-x", "-c", "shutdown", xfs.path)
    for dirty in (Dirty(lost="test"), Dirty(objects={root})):
        with pytest.raises(TROUBLE):
            engine.snapshot(dirty)
    xfs.umount()
    xfs.mount()
    engine.snapshot(Dirty(lost="test"))
    engine.check()


@contextlib.contextmanager
def unprivileged():
    """A directory of a user's own, and that user's privileges."""
    require(os.geteuid() == 0, "root")
    top = tempfile.mkdtemp()
    os.chown(top, 65534, 65534)
    os.seteuid(65534)
    try:
        yield top
    finally:
        os.seteuid(0)
        run("rm", "-rf", top)


def test_a_directory_that_may_not_be_read():
    with unprivileged() as top:
        populate(top)
        engine = Engine(top, "metadata", by_handle=False)
        engine.snapshot(Dirty())
        d = ident(top, "d")
        for directory, mode in (("d", 0), ("d", 0o111), ("d", 0o444), ("d/e", 0), (".", 0o300)):
            before = os.stat(f"{top}/{directory}").st_mode & 0o777
            os.chmod(f"{top}/{directory}", mode)
            with pytest.raises(PermissionError):
                engine.snapshot(Dirty(lost="test"))
            os.chmod(f"{top}/{directory}", before)
        os.chmod(f"{top}/d", 0)
        with pytest.raises(PermissionError):
            engine.snapshot(Dirty(names={Name(d, b"f1"), Name(d, b"f2")}))
        os.chmod(f"{top}/d", 0o755)
        changes = engine.snapshot(Dirty(lost="test"))
        assert {c.op for c in changes} <= {"modify"}
        engine.check()


@pytest.mark.parametrize("by_handle", [True, False])
def test_what_is_mounted_on_top_hides_and_removes_nothing(ext4, by_handle):
    populate(ext4.path)
    engine = Engine(ext4.path, "metadata", by_handle=by_handle)
    engine.snapshot(Dirty())
    root, d = ident(ext4.path, ""), ident(ext4.path, "d")
    run("mount", "-t", "tmpfs", "tmpfs", f"{ext4.path}/d")
    try:
        assert engine.snapshot(Dirty(lost="test")) == []
        assert engine.snapshot(Dirty(names={Name(root, b"d")})) == []
        assert engine.snapshot(Dirty(objects={d})) == []
    finally:
        run("umount", f"{ext4.path}/d")
    assert engine.snapshot(Dirty(lost="test")) == []
    engine.check()


def order():
    return Order("command", Dirty(lost="test"), 0, 0, 4, 1 << 17)


@pytest.mark.parametrize("fs", ["xfs", "ext4", "btrfs"])
def test_an_unmount_in_the_middle(request, fs):
    part = request.getfixturevalue(fs)
    adopt(part.path)
    populate(part.path)
    found = partition_at(os.fsencode(part.path))
    with Visit(found) as visit:
        assert take(visit, order(), Dirty, lambda _: None).changes > 80
    with Visit(found) as visit:
        run("umount", "-l", part.path)
        assert take(visit, order(), Dirty, lambda _: None).changes == 0
    with pytest.raises(TransientError, match="not mounted"), Visit(found):
        pass
    run("mount", "-t", "tmpfs", "tmpfs", part.path)
    try:
        with pytest.raises(TransientError, match="another file system"), Visit(found):
            pass
    finally:
        run("umount", part.path)
    part.mount()
    with Visit(found) as visit:
        assert take(visit, order(), Dirty, lambda _: None).changes == 0


def test_the_daemon_says_so_and_recovers(xfs, tmp_path):
    populate(xfs.path)
    with daemon(tmp_path, xfs.path) as snapfeed:
        first = wait_until(lambda: snapfeed.partition()["head"], "the baseline")
        snapfeed.stop()
        expected = walk(xfs.path)
        with broken_inode(xfs, "d/f39"):
            snapfeed.start(ready=False)
            failed = wait_until(
                lambda: snapfeed._ready() and (p := snapfeed.partition())["state"] == "failed" and p, "it has failed"
            )
            assert "leaning" in failed["reason"]
        wait_until(lambda: snapfeed.partition()["state"] == "watching", "it is well again")
        assert snapfeed.snapshot()["changes"] == 0
        assert walk(xfs.path) == expected
        assert snapfeed.partition()["head"] == first
