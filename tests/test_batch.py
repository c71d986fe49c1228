"""Loops over many objects in C: the layouts, and that they say what Python says of each; what is unusual is left to Python."""

import contextlib
import ctypes
import hashlib
import os
import resource
import shutil
import sys
import threading
from array import array
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partitions import partition, require, run, tmpfs
from test_invariants import feeding
from test_kernel_numbers import compiled
from workload import Worker

from comparer.model import Ident
from snapshotter.backends.clones import Clones, Seen, Wanted
from snapshotter.beside import Beside
from snapshotter.linux import batch, xfs
from snapshotter.linux.handles import Codec, name_to_handle_at
from snapshotter.linux.identity import Identifier
from snapshotter.live import LiveTree
from watcher.command_run import DESCRIPTORS

SOURCE = Path(batch.__file__).with_name("batch.c")
needs_library = pytest.mark.skipif(not batch.available(), reason="no library")


def test_the_library_is_built_where_there_is_a_compiler():
    require(shutil.which("gcc") is not None, "gcc")
    assert batch.available(), "snapshotter/linux/batch.c was not compiled by the installation"


def test_it_compiles_without_a_warning(tmp_path):
    require(shutil.which("gcc") is not None, "gcc")
    flags = (
        "-O2",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Wshadow",
        "-Wconversion",
        "-Werror",
        "-pthread",
        "-shared",
        "-fPIC",
    )
    run("gcc", *flags, "-o", tmp_path / "batch.so", SOURCE)


def test_the_layouts_are_those_of_the_source(tmp_path):
    shutil.copy(SOURCE, tmp_path / "batch.h")
    expected = {
        "sizeof(struct looked)": batch._LOOKED.size,
        "offsetof(struct looked, error)": 12,
        "offsetof(struct looked, now)": batch._LOOKED.size - 256,
        "sizeof(struct cloned)": batch._CLONED_SIZE,
        "offsetof(struct cloned, error)": 12,
        "offsetof(struct cloned, ctime_s)": 16,
        "offsetof(struct cloned, size)": 32,
        "offsetof(struct cloned, old)": 40,
        "offsetof(struct cloned, new_count)": batch._CLONED.size,
        "offsetof(struct cloned, new_map)": batch._NEW_MAP,
        "offsetof(struct cloned, old_map)": batch._OLD_MAP,
        "sizeof(struct extent)": batch._EXTENT.size,
        "EXTENTS": batch._EXTENTS,
        "RECORD_WORDS * 8": xfs._BULKSTAT.size,
        "ROW_WORDS * 8": xfs.ROW.size,
        "snapfeed_batch_version + 0": batch._VERSION,
    }
    assert compiled(tmp_path, (f"{tmp_path}/batch.h",), list(expected)) == expected


def test_what_it_takes_from_bulkstat_is_where_the_kernel_puts_it(tmp_path):
    require(Path("/usr/include/xfs/xfs.h").exists(), "xfs/xfs.h")
    shutil.copy(SOURCE, tmp_path / "batch.h")
    names = "ino size blocks mtime ctime btime gen uid gid mtime_nsec ctime_nsec btime_nsec blksize nlink mode".split()
    unit = {name: f"sizeof(((struct xfs_bulkstat *)0)->bs_{name})" for name in names}
    pairs = [(f"AT_{n.upper()} * {unit[n]}", f"offsetof(struct xfs_bulkstat, bs_{n})") for n in names]
    found = compiled(tmp_path, (f"{tmp_path}/batch.h", "xfs/xfs.h"), [one for pair in pairs for one in pair])
    assert all(found[ours] == found[theirs] for ours, theirs in pairs), found


# ---- which library is taken


def loaded(monkeypatch, directory, content):
    """What is loaded where a library has this content."""
    (directory / f"_batch{EXTENSION_SUFFIXES[0]}").write_bytes(content)
    monkeypatch.setattr(batch, "__file__", str(directory / "batch.py"))
    return batch._load()


def test_a_library_of_another_version_or_of_nobody_is_not_taken(monkeypatch, tmp_path):
    require(shutil.which("gcc") is not None, "gcc")

    def built(text):
        (tmp_path / "other.c").write_text(text)
        run("gcc", "-pthread", "-shared", "-fPIC", "-o", tmp_path / "other.so", tmp_path / "other.c")
        return (tmp_path / "other.so").read_bytes()

    ours = SOURCE.read_text()
    assert loaded(monkeypatch, tmp_path, built(ours)) is not None
    os.unlink(tmp_path / f"_batch{EXTENSION_SUFFIXES[0]}")
    older = built(ours.replace(f"version = {batch._VERSION};", "version = 0;"))
    for number, content in enumerate((older, built("int nothing;"), b"\x7fELF garbage", b"")):
        (tmp_path / str(number)).mkdir()
        assert loaded(monkeypatch, tmp_path / str(number), content) is None


def test_none_is_taken_if_it_is_to_be_left_out(monkeypatch):
    monkeypatch.setenv(batch.LEAVE_OUT, "1")
    assert batch._load() is None


# ---- what it says


@dataclass
class Place:
    top: bytes
    fd: int
    tree: LiveTree

    def ident(self, name):
        return Identifier(self.fd).ident(self.fd, name)


@pytest.fixture
def place(part):
    fd = os.open(part.path, os.O_RDONLY | os.O_DIRECTORY)
    tree = LiveTree(fd, Identifier(fd).identify, Codec(name_to_handle_at(fd)))
    (part.path / ".snapfeed").mkdir(mode=0o700)
    yield Place(os.fsencode(part.path), fd, tree)
    tree.close()
    os.close(fd)


@pytest.mark.kernel
@needs_library
def test_a_look_at_many_is_a_look_at_each(place):
    def path(name):
        return place.top + b"/" + name

    for name in (b"file", b"gone", b"with", b"\x1b[31m\n"):
        Path(os.fsdecode(path(name))).write_bytes(name * 100)
    os.mkdir(path(b"directory"))
    os.symlink(b"/etc/passwd", path(b"link"))
    os.mkfifo(path(b"fifo"))
    os.link(path(b"file"), path(b"second"))
    os.setxattr(path(b"with"), b"user.some", b"thing")
    os.truncate(path(b"file"), 1 << 33)
    idents = {name: place.ident(name) for name in os.listdir(place.top) if name != b".snapfeed"}
    os.unlink(path(b"gone"))
    found = place.tree.look_at_many([*idents.values(), Ident(1 << 40, 7), Ident(idents[b"file"].ino, 1 << 31)])
    btrfs = place.tree.codec.sample.type == 0x4D  # whose handles are not made here: it needs no looks
    usual = set() if btrfs else {b"file", b"second", b"directory", b"\x1b[31m\n"}
    assert set(found) == {idents[name] for name in usual}
    assert found == {idents[name]: place.tree.look_at(idents[name]) for name in usual}


def test_the_version_changes_with_the_source():
    """An installation that is edited in place has the library of before until it is built again."""
    known = {2: "d1f1e613e09d1f97"}
    assert known[batch._VERSION] == hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16], (
        "raise it in batch.c and batch.py"
    )


class CloningPlace(Place):
    def __init__(self, top):
        fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
        super().__init__(os.fsencode(top), fd, LiveTree(fd, Identifier(fd).identify, Codec(name_to_handle_at(fd))))
        os.mkdir(self.top + b"/.snapfeed", 0o700)
        self.clones = Clones(self.tree, 50)

    def write(self, name, content):
        with open(self.top + b"/" + name, "wb") as file:
            file.write(content)
        return self.ident(name)

    def wanted(self, ident, old=None):
        attr = self.tree.look_at(ident)
        return Wanted(ident, Seen(attr.nlink, attr.ctime_ns, attr.size), old)

    def kept(self, seq):
        directory = self.top + b"/.snapfeed/clones/%d" % seq
        return {name: Path(os.fsdecode(directory + b"/" + name)).read_bytes() for name in os.listdir(directory)}


@pytest.fixture
def cloning(xfs):
    made = CloningPlace(xfs.path)
    yield made
    made.tree.close()
    os.close(made.fd)


@pytest.mark.kernel
@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("count", [1, 64, 65, 300, 1100])
def test_clones_of_many_files(cloning, count, monkeypatch):
    """More than are open together, and more than one call takes; then what changed in them, by the extents of both clones."""
    idents = [cloning.write(b"%d" % number, b"%d" % number * (1 + number % 3 * 3000)) for number in range(count)]
    first = cloning.clones.take(1, [cloning.wanted(ident) for ident in idents])
    assert sorted(first.made) == sorted(idents)
    assert (first.without, first.moved, first.restless, first.maps) == ([], {}, [], {})
    assert cloning.kept(1) == {b"%d.%d" % i: b"%d" % n * (1 + n % 3 * 3000) for n, i in enumerate(idents)}
    clone = cloning.top + b"/.snapfeed/clones/1/%d.%d" % idents[0]
    assert os.stat(clone).st_mode & 0o7777 == 0o400
    with pytest.raises(PermissionError):
        os.unlink(clone)  # immutable
    for number in range(count):
        with open(cloning.top + b"/%d" % number, "r+b") as file:
            file.write(b"!")
    second = cloning.clones.take(2, [cloning.wanted(ident, 1) for ident in idents])
    assert sorted(second.made) == sorted(idents)
    assert set(second.maps) == (set(idents) if batch.available() else set())
    for ident in list(second.maps)[:: max(1, count // 20)]:
        assert second.maps[ident] == cloning.clones.maps(ident, 1, 2)
    pages = [[cloning.wanted(ident) for ident in idents[at : at + 500]] for at in range(0, count, 500)]
    monkeypatch.setattr("snapshotter.backends.clones._MAPS", 0)
    assert cloning.clones.take(4, [cloning.wanted(ident, 1) for ident in idents]).maps == {}, (
        "no more than so many in memory"
    )
    given_out = list(cloning.clones.take_pages(3, pages))
    assert [page for page, _ in given_out] == pages
    assert [ident for _, taken in given_out for ident in taken.made] == idents
    assert len(cloning.kept(3)) == count
    assert cloning.clones.remove_all(3) == count


@pytest.mark.kernel
@pytest.mark.usefixtures("both_ways")
def test_what_does_not_go_the_usual_way(cloning):
    """Gone, changed since it was looked at, no file, with a clone of an earlier try, in too many pieces; and one is well."""
    names = (b"well", b"gone", b"changed", b"again", b"pieces", b"unnamed")
    idents = {name: cloning.write(name, name * 1000) for name in names}
    os.mkdir(cloning.top + b"/directory")
    idents[b"directory"] = cloning.ident(b"directory")
    with open(cloning.top + b"/pieces", "wb") as file:
        for number in range(60):
            file.seek(8192 * number)
            file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
    wanted = {name: cloning.wanted(ident, 7 if name == b"well" else None) for name, ident in idents.items()}
    held = os.open(cloning.top + b"/unnamed", os.O_RDONLY)
    for name in (b"gone", b"unnamed"):
        os.unlink(cloning.top + b"/" + name)
    os.truncate(cloning.top + b"/changed", 3)
    earlier = cloning.clones.take(1, [wanted[b"again"]])
    assert earlier.made == [idents[b"again"]]
    before = len(os.listdir("/proc/self/fd"))
    taken = cloning.clones.take(1, list(wanted.values()))
    os.close(held)
    assert len(os.listdir("/proc/self/fd")) == before - 1
    there = {name: idents[name] for name in (b"well", b"changed", b"again")}
    if idents[b"unnamed"] in taken.made:  # it was there when it was cloned: the next snapshot says that it has gone
        assert taken.restless == [idents[b"unnamed"]]
        there[b"unnamed"] = idents[b"unnamed"]
    assert sorted(taken.made) == sorted(there.values())
    assert taken.moved == {idents[b"changed"]: cloning.tree.look_at(idents[b"changed"])}
    assert cloning.kept(1)[b"%d.%d" % idents[b"changed"]] == b"cha"
    assert taken.maps == {}  # there is no clone of snapshot 7
    assert len(cloning.kept(1)) == len(there)


@pytest.mark.kernel
@pytest.mark.usefixtures("both_ways")
def test_pages_that_could_not_be_written_are_told_of(tmp_path):
    """The kernel says so once, to the first FICLONE: whoever asked again would get a clone of something else."""
    with tmpfs(tmp_path) as below:
        run("mount", "-o", "remount,size=96m", below)
        with partition("xfs", below, "320M") as part:
            made = CloningPlace(part.path)
            try:
                ident = made.write(b"file", b"x")
                os.fsync(made.fd)
                os.sync()
                with contextlib.suppress(OSError), open(below / "fill", "wb", buffering=0) as fill:
                    while True:
                        fill.write(os.urandom(1 << 20))
                with open(made.top + b"/file", "wb") as file:
                    file.write(os.urandom(4 << 20))
                with pytest.raises(OSError, match=r"Input/output error|No space left on device"):
                    made.clones.take(1, [made.wanted(ident)])
            finally:
                made.tree.close()
                os.close(made.fd)


CROWDED = """
import os, resource, sys
sys.path.insert(0, "tests")
from test_batch import CloningPlace
from pathlib import Path
made = CloningPlace(sys.argv[1])
idents = [made.write(b"%d" % number, b"x") for number in range(2000)]
wanted = [made.wanted(ident) for ident in idents]
for number in range(0, 2000, 10):
    os.truncate(made.top + b"/%d" % number, 7)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
taken = [t for _, t in made.clones.take_pages(1, [wanted[at : at + 400] for at in range(0, 2000, 400)])]
assert sum(len(t.made) for t in taken) == 2000
assert sum(len(t.moved) for t in taken) == 200
"""


@pytest.mark.kernel
@pytest.mark.parametrize("without", ["", "1"])
def test_few_descriptors_are_enough(xfs, without):
    """A shell's limit is 1,024, and there are several partitions and the broker."""
    environment = {**os.environ, batch.LEAVE_OUT: without}
    run(sys.executable, "-c", CROWDED, xfs.path, cwd=SOURCE.parents[2], env=environment)


@pytest.mark.kernel
@pytest.mark.parametrize("fs", ["xfs", "ext4"])
def test_a_daemon_without_it_is_exact_and_says_so(fs, tmp_path):
    with partition(fs, tmp_path) as part:
        worker = Worker(os.fsencode(part.path), 5, reflink=fs == "xfs")
        with feeding(part.path, tmp_path, env={batch.LEAVE_OUT: "1"}) as feed:
            assert "without its compiled library" in feed.snapfeed.output()
            for _ in range(5):
                for _ in range(60):
                    worker.step()
                feed.exact()


@pytest.mark.kernel
def test_the_daemon_leaves_the_clones_out_and_takes_the_descriptors_it_may(xfs, tmp_path):
    """The kernel shows an ignore mark on an inode; a shell's limit of open files is no limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    try:
        with feeding(xfs.path, tmp_path) as feed:
            (xfs.path / "file").write_bytes(b"x")
            seq = feed.snapfeed.snapshot()["seq"]
            ours = (xfs.path / f".snapfeed/clones/{seq}").stat().st_ino
            pid = feed.snapfeed.pid
            marks = ""
            for path in Path(f"/proc/{pid}/fdinfo").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    marks += path.read_text()
            limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert f"fanotify ino:{ours:x} " in marks, marks
    assert limits[0] == (DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS))


def test_without_another_thread_all_is_done_in_this_one(monkeypatch):
    def refuses(_thread):
        raise RuntimeError("can't start new thread")

    def fails():
        raise OSError("told to whoever asks for it")

    with Beside(wanted=True) as beside:
        assert beside.submit(threading.get_ident).result() != threading.get_ident()
    for wanted in (True, False):
        with monkeypatch.context() as patch, Beside(wanted=wanted) as beside:
            patch.setattr(threading.Thread, "start", refuses)
            assert beside.submit(threading.get_ident).result() == threading.get_ident()
            with pytest.raises(OSError, match="told"):
                beside.submit(fails).result()


@pytest.mark.kernel
@needs_library
def test_who_has_extended_attributes(xfs):
    names = [b"%d" % number for number in range(50)] + [b"\xff\n", b"gone", b"link"]
    for name in names[:-2]:
        (xfs.path / os.fsdecode(name)).touch()
    (xfs.path / "link").symlink_to("3")
    for name in (b"3", b"\xff\n"):
        os.setxattr(os.fsencode(xfs.path) + b"/" + name, b"user.x", b"")
    before = os.open(".", os.O_RDONLY)
    try:
        os.chdir(xfs.path)
        answers = batch.have_xattrs(names)
        assert set(batch.have_xattrs([b"x" * 300])) == {2}, "asked in vain is not none"
    finally:
        os.fchdir(before)
        os.close(before)
    assert [name for name, answer in zip(names, answers, strict=True) if answer] == [b"3", b"\xff\n"]
    assert batch.have_xattrs([]) == b""


records = st.lists(st.binary(min_size=xfs._BULKSTAT.size, max_size=xfs._BULKSTAT.size), max_size=40)


@needs_library
@given(records, st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=200)
def test_rows_and_columns_are_what_python_makes_of_the_records(found, first, left):
    """Of any bytes: no time is too late, no number too large."""
    words = array("Q", b"".join(found))
    size = xfs._BULKSTAT.size // 8
    stop = max(first, len(found) - left)
    part = xfs.Records(words, min(first, len(found)) * size, min(stop, len(found)) * size)
    told = part.rows(), part.fingerprint()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "_library", None)
        expected = part.rows(), part.fingerprint()
    if part.count:
        assert told == expected
    else:
        assert (told[0].data, told[1]) == (expected[0].data, expected[1])


@needs_library
def test_other_threads_go_on_meanwhile():
    """Else the daemon would stand still while a million files are cloned."""
    assert isinstance(batch._library, ctypes.CDLL)
    assert not isinstance(batch._library, ctypes.PyDLL), "that keeps the interpreter's lock"
    assert sys.getswitchinterval() > 0
