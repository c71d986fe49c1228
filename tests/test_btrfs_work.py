"""Work on a real btrfs: what the engine says changed, replayed by a consumer that knows nothing else, is what a walk finds."""

import contextlib
import errno
import os
import shutil
import socket
import stat
from random import Random

import pytest
from btrfs_engine import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, Engine, SafeWorker, fallocate, libc, ops, write_at
from model import apply
from partitions import run

from comparer.compare import compare
from comparer.errors import DamageError
from comparer.model import Range
from comparer.sendreplay import Replay
from comparer.sendstream import Parser
from snapshotter.backends import btrfs as engine
from snapshotter.backends.btrfs_touched import searched, sent
from snapshotter.backends.btrfs_view import SubvolumeView
from snapshotter.linux import btrfs as ioctls

pytestmark = pytest.mark.kernel


@pytest.fixture
def made(btrfs):
    return Engine(btrfs.path)


# ---- scripted work


def grow(top):
    for name in ("a", "b", "d", "d/e", "d/e/f", "gone", "gone/x"):
        (top / name).mkdir()
    for name in ("1", "2", "a/3", "d/e/4", "d/e/f/5", "gone/6", "gone/x/7"):
        (top / name).write_bytes(os.urandom(10_000))
    os.link(top / "1", top / "a/one")


def files_and_names(top):
    (top / "new").write_bytes(b"n")
    (top / "1").rename(top / "d/first")
    with open(top / "d/first", "ab") as file:
        file.write(b"more")
    os.link(top / "2", top / "b/two")
    (top / "2").unlink()
    (top / "a/3").unlink()


def swaps(top):
    for one, other in (("a", "d"), ("2", "d")):
        fd = -100
        assert libc.renameat2(fd, bytes(top / one), fd, bytes(top / other), 2) == 0
    (top / "b").rename(top / "t")
    (top / "gone").rename(top / "b")
    (top / "t").rename(top / "gone")


def turned_over(top):
    """The child becomes the parent."""
    (top / "d/e").rename(top / "e")
    (top / "d").rename(top / "e/d")
    (top / "e").rename(top / "d2")
    (top / "d2/d").rename(top / "d2/e")


def removals(top):
    (top / "gone/x/7").rename(top / "saved")
    shutil.rmtree(top / "gone")
    (top / "gone").write_bytes(b"a file now")
    shutil.rmtree(top / "d")
    (top / "d").mkdir()


def attributes(top):
    os.chmod(top / "1", 0o4711)
    os.chown(top / "a", 5, 6)
    os.setxattr(top / "2", "user.k", b"v" * 3000)
    os.setxattr(top / "2", "trusted.empty", b"")
    os.setxattr(top / "a/3", "user.gone", b"v")
    os.utime(top / "b", ns=(5, 7))
    os.symlink(b"\xff\n", top / "s")
    os.lchown(top / "s", 1, 1)
    run("setfacl", "-m", "u:1000:rw", top / "2", check=False)
    run("setfacl", "-d", "-m", "u:1000:rw", top / "a", check=False)
    run("btrfs", "property", "set", top / "a", "compression", "zstd")


def attributes_again(top):
    os.unlink(top / "s")
    attributes(top)
    os.removexattr(top / "2", "user.k")
    os.unlink(top / "s")
    os.symlink(b"other", top / "s")


def specials(top):
    os.mkfifo(top / "p")
    os.mknod(top / "c", stat.S_IFCHR | 0o600, os.makedev(300, 70000))
    os.mknod(top / "b/b", stat.S_IFBLK | 0o600, os.makedev(7, 9))
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(top / "sock"))
    os.unlink(top / "1")
    os.mkfifo(top / "1")


def many_links(top):
    """More names in one directory than fit into one INODE_REF: extended references; and orphan-like names."""
    for i in range(150):
        os.link(top / "2", top / "b" / (f"{i:03d}" + "x" * 200))
    for i in range(0, 150, 3):
        os.unlink(top / "a" / "one") if i == 3 else None
    (top / "o259-7-0").mkdir()
    (top / "o257-7-0").write_bytes(b"looks like an orphan")


def hostile(top):
    for name in (b"new\nline", b"\xff\xfe", b"x" * 255, b"\x1b[31m", b".snapfeed"):
        with open(os.path.join(bytes(top / "a"), name), "wb") as file:
            file.write(name)


def contents(top):
    write_at(top / "1", 4096, os.urandom(10))
    os.truncate(top / "2", 500)
    os.truncate(top / "a/3", 50_000)
    fallocate(top / "d/e/4", KEEP_SIZE | PUNCH_HOLE, 0, 8192)
    fallocate(top / "d/e/f/5", ZERO_RANGE, 4096, 100_000)
    fallocate(top / "gone/6", KEEP_SIZE, 0, 1 << 20)
    with open(top / "b/copy", "wb") as to, open(top / "1", "rb") as source:
        to.write(source.read())
    (top / "b/small").write_bytes(b"inline")


WORK = [
    files_and_names, swaps, turned_over, removals, attributes, specials, many_links, hostile, contents,
]  # fmt: skip


def test_scripted_work(btrfs):
    """Each piece of work in a subvolume of its own, then undone by growing another way, on one file system."""
    for work in WORK:
        run("btrfs", "subvolume", "create", btrfs.path / work.__name__)
        top = btrfs.path / work.__name__
        made = Engine(top)
        made.snapshot()
        grow(top)
        made.snapshot()
        work(top)
        assert made.snapshot(), work
        assert made.snapshot() == [], work
        if work is attributes:
            attributes_again(top)
            assert made.snapshot()
        for name in os.listdir(top):
            if name != ".snapfeed":
                run("rm", "-rf", top / name)
        made.snapshot()


@pytest.mark.parametrize("seed", range(6))
def test_random_work(btrfs, seed):
    made = Engine(btrfs.path)
    worker = SafeWorker(os.fsencode(btrfs.path), seed, reflink=True)
    made.snapshot()
    for _ in range(12):
        for _ in range(worker.random.choice([1, 5, 30, 60])):
            worker.step()
        made.snapshot()


def test_a_deep_path(made, btrfs):
    made.snapshot()
    here = os.open(btrfs.path, os.O_RDONLY)
    for _ in range(1000):
        os.mkdir("d", dir_fd=here)
        here, above = os.open("d", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(os.open("f", os.O_CREAT, dir_fd=here))
    os.close(here)
    made.snapshot(search=True, live=False)  # the kernel would take 10 s to make the stream
    assert "commands of the send stream" in made.backend.last_search
    os.rename(btrfs.path / "d/d", btrfs.path / "e")
    changes = made.snapshot()
    assert ops(c for c in changes if c.op == "rename") == [("rename", b"e", b"d/d")]


def test_a_path_longer_than_the_kernel_can_send(made, btrfs):
    """More than 4,096 bytes: the kernel cannot make a stream, the trees still hold the truth."""
    name = "n" * 200
    made.snapshot()
    here = os.open(btrfs.path, os.O_RDONLY)
    for _ in range(30):
        os.mkdir(name, dir_fd=here)
        here, above = os.open(name, os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(os.open("f", os.O_CREAT, dir_fd=here))

    def next_changes(search=True):
        capture = made.capture()
        assert bool(made.backend.last_search) == search
        changes = list(compare(capture.old, capture.new, capture.touched, capture.ranges))
        apply(made.model, changes)
        made.head = made.seq
        return changes

    assert len(next_changes()) == 32
    assert max(len(path) for path in made.model.entries()) == 30 * 201 + 1
    os.write(os.open("f", os.O_WRONLY, dir_fd=here), b"x" * 5000)
    os.rename("f", "g", src_dir_fd=here, dst_dir_fd=here)
    rename, _ = next_changes()
    assert (rename.op, rename.path[-2:], rename.ranges.written) == ("rename", b"/g", (Range(0, 5000),))
    os.close(here)
    shutil.rmtree(btrfs.path / name)
    assert len(next_changes(search=False)) == 32, "deletions go through short orphan names"


def test_an_unusable_stream_is_answered_by_a_search(made, btrfs, monkeypatch, caplog):
    made.snapshot()
    grow(btrfs.path)
    made.snapshot()
    for failure in (DamageError("garbage"), OSError(errno.EAGAIN, "balance")):

        def failing(_old, _new, failure=failure):
            raise failure

        monkeypatch.setattr(engine, "sent", failing)
        SafeWorker(bytes(btrfs.path), 1).step()
        removals(btrfs.path) if (btrfs.path / "gone/x").exists() else attributes(btrfs.path)
        assert made.snapshot(search=True)
        assert made.backend.last_search


def test_a_real_stream_survives_no_cut(made, btrfs):
    """The parser on a stream of this kernel: whole it ends, cut anywhere it is damage; its checksums are right."""
    made.snapshot()
    grow(btrfs.path)
    made.capture()
    views = [SubvolumeView(os.open(btrfs.path / f".snapfeed/snapshots/{n}", os.O_RDONLY)) for n in (1, 2)]
    data = b"".join(ioctls.send_stream(views[1].fd, views[0].info.treeid))
    parser = Parser(check_crc=True)
    assert len(list(parser.feed(data))) > 30
    parser.close()
    for cut in range(0, len(data), 11):
        parser = Parser()
        list(parser.feed(data[:cut]))
        with pytest.raises(DamageError):
            parser.close()
    random = Random(1)
    for _ in range(300):
        mutated = bytearray(data)
        for _ in range(random.randrange(1, 4)):
            at = random.randrange(17, len(mutated))
            mutated[at : at + random.randrange(4)] = random.randbytes(random.randrange(4))
        replay = Replay(views[0].root, views[0].child, views[1].ident)
        parser = Parser()
        with contextlib.suppress(DamageError):
            for command in parser.feed(bytes(mutated)):
                replay.apply(command)
            parser.close()
    early = ioctls.send_stream(views[1].fd, views[0].info.treeid)
    next(early)
    early.close()
    touched, _ = sent(*views)
    assert touched <= searched(*views) | {views[1].root}
