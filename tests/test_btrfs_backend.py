"""The btrfs engine on a real btrfs: what it says changed, replayed by a consumer that knows nothing else, is what a walk finds."""

import contextlib
import ctypes
import errno
import os
import shutil
import socket
import stat
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model import Model, apply
from oracle import walk
from partitions import partition, require, run
from workload import Worker

from comparer.compare import baseline, compare
from comparer.dirty import Dirty
from comparer.errors import DamageError, OperatorError
from comparer.model import FileType, Ident, Quality, Range
from comparer.sendstream import Parser
from snapshotter.backends import btrfs as engine
from snapshotter.backends.btrfs import BtrfsBackend
from snapshotter.backends.btrfs_ranges import FileRanges
from snapshotter.backends.btrfs_touched import searched, sent
from snapshotter.backends.btrfs_view import SubvolumeView
from snapshotter.linux import btrfs as ioctls
from snapshotter.linux.handles import decode, name_to_handle_at

libc = ctypes.CDLL(None, use_errno=True)
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
BLOCK = 4096

pytestmark = pytest.mark.kernel


@contextlib.contextmanager
def opened(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def fallocate(path, mode, offset, length):
    with open(path, "r+b") as file:
        if libc.fallocate(file.fileno(), mode, ctypes.c_long(offset), ctypes.c_long(length)):
            raise OSError(ctypes.get_errno(), "fallocate")


def write_at(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def inside(position, ranges):
    return any(r.offset <= position < r.offset + r.length for r in ranges)


class Engine:
    """One partition and one consumer; every snapshot is checked in every way there is."""

    def __init__(self, top):
        self.top = os.fsencode(top)
        self.backend = BtrfsBackend()
        self.model = Model()
        self.seq = 0
        self.head = None
        with opened(self.top) as fd:
            self.backend.prepare(fd)

    def capture(self, **options):
        self.seq += 1
        with opened(self.top) as fd:
            return self.backend.capture(fd, self.seq, self.head, Dirty(), Dirty, **options)

    def snapshot(self, *, search=False, contents=True, live=True):
        """Take a snapshot, apply its changes, look whether the model is what a walk finds; the changes."""
        capture = self.capture()
        assert search or self.backend.last_search is None
        if capture.old is None:
            changes = list(baseline(capture.new))
        else:
            changes = list(compare(capture.old, capture.new, capture.touched, capture.ranges))
            self.search(capture, changes)
        before = {node.ident: path for path, node in self.model.walk()} if self.model.root else {}
        apply(self.model, changes)
        entries = self.model.entries()
        tree = os.path.join(self.top, capture.snapshot)
        assert entries == walk(tree)
        if live:
            assert entries == walk(self.top)
        if contents and capture.old is not None:
            self.contents(capture, before, tree)
        with opened(self.top) as fd:
            if self.head is not None:
                self.backend.expire(fd, [self.head])
        self.head = self.seq
        return changes

    def search(self, capture, changes):
        """The trees alone give the same as the stream."""
        every = FileRanges(capture.old, capture.new)
        other = list(compare(capture.old, capture.new, searched(capture.old, capture.new), every))
        model = self.model.copy()
        apply(model, other)
        second = self.model.copy()
        apply(second, changes)
        assert model.entries() == second.entries()
        assert {c.ident: c.ranges for c in changes if c.ranges} == {c.ident: c.ranges for c in other if c.ranges}

    def contents(self, capture, before, tree):
        """Every byte that differs lies in the ranges; no file without ranges differs."""
        old = os.path.join(os.path.dirname(tree), b"%d" % self.head)
        for path, node in self.model.walk():
            if node.attr.type is not FileType.FILE or node.ident not in before:
                continue
            with open(os.path.join(old, before[node.ident]), "rb") as file:
                was = file.read()
            with open(os.path.join(tree, path), "rb") as file:
                now = file.read()
            found = capture.ranges(node.ident)
            if found is None:
                assert was == now, path
                continue
            assert found.quality is not Quality.UNKNOWN
            assert all(r.offset + r.length <= len(now) for r in found.written)
            gone = len(now) < len(was)
            assert not gone or inside(len(now), found.cleared)
            grown = range(len(was), len(now), 512)
            assert all(inside(at, found.written) or inside(at, found.cleared) for at in grown)
            common = min(len(was), len(now))
            for at in range(0, common, 512):
                some = next((i for i in range(at, min(at + 512, common)) if was[i] != now[i]), None)
                if some is not None:
                    assert inside(some, found.written) or (inside(some, found.cleared) and not now[some]), (path, at, found)


@pytest.fixture
def made(btrfs):
    return Engine(btrfs.path)


def ops(changes):
    return [(str(c.op), c.path, c.from_path) for c in changes]


# ---- the kernel's interface


def test_ioctl_numbers_and_layouts_are_the_kernels(tmp_path):
    require(shutil.which("gcc") is not None, "gcc")
    names = [n for n in vars(ioctls) if n.startswith("BTRFS_")]
    lines = "".join(f'printf("{n} %llu\\n", (unsigned long long){n});\n' for n in names)
    layouts = {
        "_VOL_ARGS": "btrfs_ioctl_vol_args",
        "_VOL_ARGS_V2": "btrfs_ioctl_vol_args_v2",
        "_SEARCH_ARGS_V2": "btrfs_ioctl_search_args_v2",
        "_SEARCH_HEADER": "btrfs_ioctl_search_header",
        "_FS_INFO_ARGS": "btrfs_ioctl_fs_info_args",
        "_DEV_INFO_ARGS": "btrfs_ioctl_dev_info_args",
        "_SEND_ARGS": "btrfs_ioctl_send_args",
        "_SUBVOL_INFO_ARGS": "btrfs_ioctl_get_subvol_info_args",
    }
    lines += "".join(f'printf("{n} %zu\\n", sizeof(struct {s}));\n' for n, s in layouts.items())
    lines += 'printf("_NR_ITEMS %zu\\n", offsetof(struct btrfs_ioctl_search_key, nr_items));\n'
    head = "#include <stdio.h>\n#include <stddef.h>\n#include <linux/btrfs.h>\n#include <linux/btrfs_tree.h>\nint main(void) {\n"
    (tmp_path / "numbers.c").write_text(head + lines + "return 0;\n}\n")
    run("gcc", "-o", tmp_path / "numbers", tmp_path / "numbers.c")
    output = run(tmp_path / "numbers").stdout.decode().split()
    theirs = dict(zip(output[::2], map(int, output[1::2]), strict=True))
    ours = {n: getattr(ioctls, n) for n in [*names, "_NR_ITEMS"]} | {n: getattr(ioctls, n).size for n in layouts}
    assert theirs == ours


def test_devices_and_sizes(btrfs):
    with opened(btrfs.path) as fd:
        info = ioctls.fs_info(fd)
        assert (info.num_devices, info.sectorsize) == (1, BLOCK)
        assert list(ioctls.dev_info(fd)) == [(1, btrfs.device.encode())]


def test_a_snapshot_is_on_the_disk_when_it_is_taken(btrfs, tmp_path):
    made = Engine(btrfs.path)
    (btrfs.path / "f").write_bytes(b"unsynced")
    made.capture()
    run("cp", "--sparse=always", btrfs.image, tmp_path / "copy.img")
    dump = run("btrfs", "inspect-internal", "dump-tree", "-t", "root", tmp_path / "copy.img").stdout
    assert b" name 1\n" in dump, "the snapshot's entry in the root tree"


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


# ---- identity


def test_identities_are_those_of_file_handles_on_the_live_tree(made, btrfs):
    top = btrfs.path
    (top / "d").mkdir()
    (top / "d/f").write_bytes(b"x")
    os.symlink("target", top / "s")
    os.mkfifo(top / "p")
    live = {}
    with opened(top) as fd:
        for name in (b"", b"d", b"d/f", b"s", b"p"):
            live[name] = decode(*name_to_handle_at(fd, name))
    view = made.capture().new
    assert view.root == live[b""]
    assert dict(view.children(view.root)) == {b"d": live[b"d"], b"s": live[b"s"], b"p": live[b"p"]}
    assert view.child(live[b"d"], b"f") == live[b"d/f"]
    assert list(view.names(live[b"d/f"])) == [(live[b"d"], b"f")]
    ino, gen = live[b"d/f"]
    other = Ident(ino, gen + 1)
    assert (view.attr(other), list(view.names(other)), view.child(Ident(live[b"d"].ino, 99), b"f")) == (None, [], None)
    (top / "later").mkdir()
    assert made.capture().new.root == live[b""]


def test_attributes_are_those_that_stat_shows(made, btrfs):
    """Oracle entries lack birth time and blocks, so those are compared here."""
    top = btrfs.path
    (top / "inline").write_bytes(b"x" * 100)
    (top / "large").write_bytes(b"x" * 300_000)
    (top / "holey").write_bytes(b"")
    os.truncate(top / "holey", 1 << 30)
    write_at(top / "holey", 1 << 20, b"y")
    fallocate(top / "holey", KEEP_SIZE, 1 << 31, 1 << 20)
    os.symlink("t" * 3000, top / "s")
    os.mknod(top / "dev", stat.S_IFCHR | 0o600, os.makedev(300, 70000))
    view = made.capture().new
    for name, ident in [*view.children(view.root), (b"", view.root)]:
        path = os.path.join(os.fsencode(top), name)
        attr, real = view.attr(ident), os.lstat(path)
        assert (attr.size, attr.blocks) == (real.st_size, real.st_blocks * 512), name
        born = run("stat", "-c", "%w", path).stdout.decode().split()
        if born[1:]:
            assert f"{attr.btime_ns % 10**9:09d}" == born[1].partition(".")[2]
        assert attr.rdev == (os.makedev(300, 70000) if name == b"dev" else None)
        assert attr.target == (b"t" * 3000 if name == b"s" else None)


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
    worker = Worker(os.fsencode(btrfs.path), seed, reflink=True)
    made.snapshot()
    for _ in range(12):
        for _ in range(worker.random.choice([1, 5, 30, 60])):
            worker.step()
        made.snapshot()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with partition("btrfs", tmp_path_factory.mktemp("shared"), "2G") as made:
        yield made


RUNS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=6)
NUMBERS = iter(range(1 << 30))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
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
            if what == 0:
                write_at(file, start, os.urandom(8) * (size // 8))
            elif what == 1:
                fallocate(file, KEEP_SIZE | PUNCH_HOLE, start, size)
            elif what == 2:
                fallocate(file, [ZERO_RANGE, KEEP_SIZE, 0][at % 3], start, size)
            else:
                os.truncate(file, start)
            if length % 4 == 0:
                os.sync()
        made.snapshot()


def test_three_blocks_of_a_large_file_are_exactly_those(made, btrfs):
    file = btrfs.path / "large"
    with open(file, "wb") as out:
        for _ in range(256):
            out.write(b"\xa5" * (1 << 20))
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


def test_a_deep_path(made, btrfs):
    made.snapshot()
    here = os.open(btrfs.path, os.O_RDONLY)
    for i in range(1000):
        os.mkdir("d", dir_fd=here)
        here, above = os.open("d", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(os.open("f", os.O_CREAT, dir_fd=here))
    os.close(here)
    made.snapshot()
    os.rename(btrfs.path / "d/d", btrfs.path / "e")
    changes = made.snapshot()
    assert ops(c for c in changes if c.op == "rename") == [("rename", b"e", b"d/d")]


def test_a_path_longer_than_the_kernel_can_send(made, btrfs):
    """More than 4,096 bytes: the kernel cannot make a stream, the trees still hold the truth."""
    name = "n" * 200
    made.snapshot()
    here = os.open(btrfs.path, os.O_RDONLY)
    for i in range(30):
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
    assert open(os.path.join(bytes(btrfs.path), path), "rb").read() == b"new"
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


def test_an_unusable_stream_is_answered_by_a_search(made, btrfs, monkeypatch, caplog):
    made.snapshot()
    grow(btrfs.path)
    made.snapshot()
    for failure in (DamageError("garbage"), OSError(errno.EAGAIN, "balance")):
        def failing(_old, _new, failure=failure):
            raise failure

        monkeypatch.setattr(engine, "sent", failing)
        Worker(bytes(btrfs.path), 1).step()
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
    early = ioctls.send_stream(views[1].fd, views[0].info.treeid)
    next(early)
    early.close()
    touched, _ = sent(*views)
    assert touched <= searched(*views) | {views[1].root}


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
        assert ops(compare(capture.old, capture.new, capture.touched)) == [("create", b"f", None), ("modify", b"", None)]
        backend.discard(root, capture)
        backend.discard(root, first)
        os.close(root)
    finally:
        os.close(fd)
    assert subprocess.run(["findmnt", point], capture_output=True, check=False).returncode == 1
