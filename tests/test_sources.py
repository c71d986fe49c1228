"""One contract, every event source on every file system; the changes are real and made by another process."""

import asyncio
import contextlib
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
from partitions import partition, require, run, tmpfs, wait_until
from strangers import stranger

from comparer.model import Ident, Name
from snapshotter.linux.identity import Identifier
from watcher.sources.base import SourceError
from watcher.sources.batched import INTERVAL, SHORTEST
from watcher.sources.canary import self_test
from watcher.sources.fanotify import FanotifySource
from watcher.sources.inotify import InotifySource

pytestmark = pytest.mark.kernel

DEADLINE = 10.0
KINDS = {"fanotify": FanotifySource, "inotify": InotifySource}
PLACES = [
    "fanotify-xfs",
    "fanotify-btrfs",
    "fanotify-subvolume",
    "fanotify-ext4",
    "fanotify-tmpfs",
    "inotify-xfs",
    "inotify-subvolume",
    "inotify-tmpfs",
]


@contextlib.contextmanager
def mounted(fs, directory):
    """A file system's root; "subvolume": one subvolume of a btrfs, mounted by itself."""
    directory.mkdir(exist_ok=True)
    if fs == "tmpfs":
        with tmpfs(directory) as point:
            yield point
    elif fs == "subvolume":
        with partition("btrfs", directory) as made:
            run("btrfs", "subvolume", "create", made.path / "sub")
            point = directory / "sub"
            point.mkdir()
            run("mount", "-o", "subvol=sub", made.device, point)
            yield point
    else:
        with partition(fs, directory) as made:
            yield made.path


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """File systems, made when first asked for, for all tests of this file."""
    with contextlib.ExitStack() as stack:
        made = {}

        def root(fs):
            if fs not in made:
                made[fs] = stack.enter_context(mounted(fs, tmp_path_factory.mktemp(fs)))
            return made[fs]

        yield root


class Watched:
    """A started source on a root directory, and a stranger who works there."""

    def __init__(self, source, root, other):
        self.source = source
        self.root = root
        self.do = other.do
        self.other = other
        self.wakes = 0
        self._runner = asyncio.Runner()
        self.run(self._start())

    async def _start(self):
        self.source.start(self._wake)

    def _wake(self):
        self.wakes += 1

    def run(self, coroutine):
        return self._runner.run(coroutine)

    def until(self, condition):
        """Let the loop run until something is so."""

        async def poll():
            end = time.monotonic() + DEADLINE
            while not condition():
                assert time.monotonic() < end, "not within the deadline"
                await asyncio.sleep(0.005)

        self.run(poll())

    def ident(self, path=b"") -> Ident:
        fd = os.open(self.root, os.O_PATH | os.O_DIRECTORY)
        try:
            return Identifier(fd).ident(fd, path)
        finally:
            os.close(fd)

    def name(self, path) -> Name:
        parent, _, name = path.rpartition(b"/")
        return Name(self.ident(parent), name)

    def take(self):
        dirty = self.source.take()
        assert dirty.lost is None
        assert not self.source.pending
        return dirty

    def close(self):
        self.source.close()
        self._runner.close()


@contextlib.contextmanager
def watched(root, source):
    with stranger(root) as other:
        made = Watched(source, root, other)
        try:
            yield made
        finally:
            made.close()


def cleared(root):
    for name in os.listdir(root):
        path = root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return root


@pytest.fixture(params=PLACES)
def place(request, roots):
    """Kind of source and root directory."""
    kind, _, fs = request.param.partition("-")
    return KINDS[kind], cleared(roots(fs))


@pytest.fixture
def watch(place):
    kind, root = place
    (root / "old").mkdir()
    (root / "old" / "file").write_bytes(b"before")
    (root / "old" / "sub").mkdir()
    with watched(root, kind(root)) as made:
        yield made


def test_nothing_happened(watch):
    assert not watch.source.pending
    assert not watch.take()


def test_creating(watch):
    watch.do("open('new', 'w').close(); os.mkfifo('fifo'); os.symlink('/etc', 'link'); os.mknod('old/node')")
    dirty = watch.take()
    paths = [b"new", b"fifo", b"link", b"old/node"]
    assert {watch.name(path) for path in paths} <= dirty.names
    assert {watch.ident(path) for path in paths} | {watch.ident(), watch.ident(b"old")} <= dirty.objects
    assert dirty.events >= 4


@pytest.mark.parametrize("code", ["f.write(b'x')", "f.truncate(2)", "os.pwrite(f.fileno(), b'y', 100_000)"])
def test_writing(watch, code):
    watch.do(f"f = open('old/file', 'r+b', buffering=0); {code}; f.close()")
    dirty = watch.take()
    assert watch.ident(b"old/file") in dirty.written & dirty.objects
    assert watch.ident(b"old") not in dirty.objects


def test_writing_is_seen_while_the_file_stays_open(watch):
    watch.do(
        "globals()['f'] = os.open('old/file', os.O_WRONLY | os.O_APPEND); os.write(f, b'x'); __builtins__['held'] = f"
    )
    assert watch.ident(b"old/file") in watch.take().written
    watch.do("os.write(held, b'x')")
    assert watch.ident(b"old/file") in watch.take().written


def test_mapped_writing_is_seen_when_the_file_is_closed(watch):
    watch.do(
        "import mmap; f = open('old/file', 'r+b'); m = mmap.mmap(f.fileno(), 0); f.close(); m[0:1] = b'z'; m.close()"
    )
    assert watch.ident(b"old/file") in watch.take().written


@pytest.mark.parametrize(
    "code",
    [
        "os.chmod('old/file', 0o600)",
        "os.chown('old/file', 5, 5)",
        "os.utime('old/file', (1, 1))",
        "os.setxattr('old/file', b'user.a', b'b')",
    ],
)
def test_attributes(watch, code):
    watch.do(code)
    dirty = watch.take()
    assert watch.ident(b"old/file") in dirty.objects
    assert not dirty.written
    watch.do(code.replace("/file", ""))
    assert watch.ident(b"old") in watch.take().objects


def test_renaming_a_file(watch):
    before = watch.name(b"old/file")
    watch.do("os.rename('old/file', 'moved')")
    dirty = watch.take()
    assert {before, watch.name(b"moved")} <= dirty.names
    assert {watch.ident(), watch.ident(b"old"), watch.ident(b"moved")} <= dirty.objects


def test_renaming_over_a_file(watch):
    watch.do("open('victim', 'w').close()")
    watch.take()
    before = watch.name(b"old/file")
    watch.do("os.rename('old/file', 'victim')")
    dirty = watch.take()
    assert {before, watch.name(b"victim")} <= dirty.names
    assert watch.ident(b"victim") in dirty.objects


def test_renaming_a_directory_and_working_in_it(watch):
    before = watch.name(b"old")
    watch.do("os.rename('old', 'renamed'); os.mkdir('renamed/sub/deep'); open('renamed/file', 'a').write('x')")
    dirty = watch.take()
    assert {before, watch.name(b"renamed"), watch.name(b"renamed/sub/deep")} <= dirty.names
    assert watch.ident(b"renamed") in dirty.objects
    assert watch.ident(b"renamed/file") in dirty.written
    watch.do("open('renamed/sub/deep/file', 'w').write('x'); os.rename('renamed/sub', 'sub')")
    watch.do("open('sub/deep/other', 'w').write('x')")
    dirty = watch.take()
    assert {watch.name(b"sub/deep/file"), watch.name(b"sub/deep/other"), watch.name(b"sub")} <= dirty.names
    assert watch.ident(b"sub/deep/other") in dirty.written


def test_swapping_two_directories(watch):
    watch.do("os.mkdir('a'); os.mkdir('b'); os.rename('a', 'c'); os.rename('b', 'a'); os.rename('c', 'b')")
    watch.take()
    watch.do("open('a/in_a', 'w').write('x'); open('b/in_b', 'w').write('x')")
    dirty = watch.take()
    assert {watch.name(b"a/in_a"), watch.name(b"b/in_b")} == dirty.names
    assert dirty.written == {watch.ident(b"a/in_a"), watch.ident(b"b/in_b")}


def test_hard_links(watch):
    watch.do("os.link('old/file', 'second')")
    dirty = watch.take()
    assert watch.name(b"second") in dirty.names
    assert watch.ident(b"second") in dirty.objects
    watch.do("open('second', 'a').write('x')")
    assert watch.ident(b"old/file") in watch.take().written
    gone = watch.name(b"old/file")
    watch.do("os.unlink('old/file')")
    dirty = watch.take()
    assert gone in dirty.names
    assert {watch.ident(b"second"), watch.ident(b"old")} & dirty.objects


def test_deleting(watch):
    gone = {watch.name(b"old/file"), watch.name(b"old/sub")}
    watch.do("os.unlink('old/file'); os.rmdir('old/sub')")
    dirty = watch.take()
    assert gone <= dirty.names
    assert watch.ident(b"old") in dirty.objects
    watch.do("os.mkdir('old/sub'); open('old/sub/file', 'w').close()")  # a new one in the same place
    assert watch.name(b"old/sub/file") in watch.take().names


def test_a_directory_deleted_while_held_and_made_anew(watch):
    watch.do("os.chdir('old/sub'); os.rmdir('../sub'); os.mkdir('../sub'); os.chdir('../..')")
    watch.take()
    watch.do("open('old/sub/file', 'w').close()")
    assert watch.name(b"old/sub/file") in watch.take().names


NAMES = [
    b"\xff\xfe",
    b"new\nline",
    b" ",
    b"-rf *",
    b"\x1b[31m",
    b"x" * 255,
    "ümläut".encode(),
    b".snapfeed.not",
    b"\x01",
    b".."[:1] * 3,
]


def test_names_are_bytes(watch):
    watch.do(f"for n in {NAMES!r}: os.mkdir(n); open(n + b'/' + n, 'w').write('x')")
    dirty = watch.take()
    assert {watch.name(name) for name in NAMES} | {watch.name(name + b"/" + name) for name in NAMES} <= dirty.names
    assert {watch.ident(name + b"/" + name) for name in NAMES} <= dirty.written
    watch.do(f"for n in {NAMES!r}: os.rename(n, n[:200] + b'2'); os.unlink(n[:200] + b'2/' + n)")
    dirty = watch.take()
    assert {watch.name(name[:200] + b"2") for name in NAMES} <= dirty.names


def test_trees_made_faster_than_anybody_watches(watch):
    watch.do(
        "for i in range(20):\n p = ''\n for j in range(15):\n  p += f'd{i}.{j}/'; os.mkdir(p); open(p + 'f', 'w').write('x')"
    )
    dirty = watch.take()
    paths = [b"/".join(b"d%d.%d" % (i, k) for k in range(j + 1)) for i in range(20) for j in range(15)]
    assert {watch.name(path) for path in paths} | {watch.name(path + b"/f") for path in paths} <= dirty.names
    assert {watch.ident(path + b"/f") for path in paths} <= dirty.written
    watch.do(f"for p in {paths!r}: open(p + b'/g', 'w').close()")
    assert {watch.name(path + b"/g") for path in paths} <= watch.take().names


def test_trees_made_and_moved_while_events_are_read(watch):
    watch.other.begin(
        "for i in range(60):\n"
        " os.makedirs(f't{i}/a/b'); open(f't{i}/a/b/f', 'w').close()\n"
        " os.rename(f't{i}/a', f't{i}/z'); os.rename(f't{i}', f'u{i}')"
    )
    watch.until(lambda: watch.source.pending)
    watch.other.wait()
    watch.take()
    watch.do("for i in range(60): open(f'u{i}/z/b/g', 'w').write('x')")
    dirty = watch.take()
    assert {watch.name(b"u%d/z/b/g" % i) for i in range(60)} <= dirty.names
    assert {watch.ident(b"u%d/z/b/g" % i) for i in range(60)} <= dirty.written


def test_take_drains_all_that_happened_before(watch):
    watch.do("for i in range(3000): os.mknod(f'old/{i}')")
    dirty = watch.take()
    assert {Name(watch.ident(b"old"), b"%d" % i) for i in range(3000)} <= dirty.names
    assert not watch.take()


def test_waking_at_once_then_in_batches(watch):
    started = time.monotonic()
    watch.other.begin("for i in range(2000): os.mknod(f'old/{i}')")
    watch.until(lambda: watch.wakes)
    assert watch.source.pending
    watch.other.wait()
    watch.do("os.mknod('last')")
    last = watch.name(b"last")
    watch.until(lambda: last in watch.source.take().names)
    ramp = math.ceil(
        math.log2(INTERVAL / SHORTEST)
    )  # the first waits are short, also after a quiet time, of which there may be one
    assert watch.wakes <= (time.monotonic() - started) / INTERVAL + 2 * (ramp + 1)


def test_closing(watch):
    watch.do("os.mknod('seen')")
    watch.until(lambda: watch.source.pending)
    watch.source.close()
    assert watch.name(b"seen") in watch.source.take().names
    assert not watch.source.take()
    watch.source.close()
    assert not watch.source.pending


def test_a_symbolic_link_is_not_followed(watch, tmp_path):
    watch.do(f"os.symlink({str(tmp_path)!r}, 'outside')")
    watch.take()
    (tmp_path / "elsewhere").write_text("x")
    assert not watch.take()


def test_what_is_mounted_below_is_not_ours(watch, tmp_path):
    with tmpfs(tmp_path) as point:
        run("mount", "--bind", point, watch.root / "old")
        try:
            watch.take()
            watch.do("open('old/file', 'w').write('x')")
            assert not watch.take()
            assert not watch.source.pending
        finally:
            run("umount", watch.root / "old")


def test_more_than_is_kept_is_a_loss(place):
    kind, root = place
    with watched(root, kind(root, limit=100)) as watch:
        watch.do("for i in range(200): os.mknod(f'{i}')")
        dirty = watch.source.take()
        assert "more than 100" in dirty.lost
        watch.do("os.mknod('after')")
        assert watch.name(b"after") in watch.take().names


def test_an_overflow_is_a_loss_and_watching_goes_on(place):
    kind, root = place
    with open(f"/proc/sys/fs/{kind.kind}/max_queued_events", encoding="ascii") as limit:
        queue = int(limit.read())
    require(queue <= 50_000, "a small event queue")
    (root / "d").mkdir()
    with watched(root, kind(root) if kind is InotifySource else kind(root, unlimited=False)) as watch:
        watch.do(f"for i in range({queue}): os.mknod(f'd/{{i}}')\nos.mkdir('unseen')")
        dirty = watch.source.take()
        assert "overflow" in dirty.lost
        watch.do("os.mknod('unseen/after')")
        assert watch.name(b"unseen/after") in watch.take().names


def test_the_system_directory_is_left_out_and_tells_watching_from_blind(place):
    kind, root = place
    system = root / ".snapfeed"

    def touch():
        (system / "canary").touch()
        (system / "canary").unlink()

    with watched(root, kind(root)) as watch:
        system.mkdir()
        assert watch.run(self_test(watch.source, touch, DEADLINE)) is True
        assert watch.run(self_test(watch.source, lambda: None, 0.05)) is False
        (system / "database").write_bytes(b"x")
        assert not watch.take()
        watch.do("os.mknod('seen')")
        assert watch.name(b"seen") in watch.take().names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fs", ["xfs", "subvolume", "ext4", "tmpfs"])
def test_umount_is_not_hindered(kind, fs, tmp_path):
    with mounted(fs, tmp_path / "m") as root:
        run("mkdir", "-p", root / "d" / "e")
        source = KINDS[kind](root)
        with asyncio.Runner() as runner:

            async def watch_and_umount():
                source.start(lambda: None)
                run("touch", root / "d" / "e" / "f")
                await asyncio.sleep(0)
                assert source.take().names
                run("umount", root)  # at once, not lazily
                source.take()
                assert not source.take()

            try:
                runner.run(watch_and_umount())
            finally:
                source.close()


def test_fanotify_does_not_see_ourselves_nor_the_ignored(roots):
    root = cleared(roots("xfs"))
    with watched(root, FanotifySource(root)) as watch:
        (root / "own").write_bytes(b"x")
        watch.do("open('own', 'a').write('x')")
        dirty = watch.take()
        assert dirty.names == set()
        assert dirty.written == {watch.ident(b"own")}
        watch.source.ignored_pids.add(watch.other.pid)
        watch.do("open('own', 'a').write('x')")
        assert not watch.take()


@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4"])
def test_fanotify_leaves_out_what_is_in_a_directory_of_ours(fs, roots):
    """And only that: not what is beside it, nor what moves out of it."""
    root = cleared(roots(fs))
    (root / "ours").mkdir()
    (root / "others").mkdir()
    with watched(root, FanotifySource(root)) as watch:
        fd = os.open(root / "ours", os.O_RDONLY | os.O_DIRECTORY)
        watch.source.leave_out(fd)
        os.close(fd)
        work = (
            "import os\n"
            "for number in range(20):\n"
            "    open(f'{d}/{number}', 'w').write('x')\n"
            "    os.chmod(f'{d}/{number}', 0o600)\n"
            "os.unlink(f'{d}/3')"
        )
        watch.do("open('ours/3', 'w').close()")
        removed = {watch.ident(b"ours/3")}
        watch.do(f"d = 'ours'\n{work}")
        dirty = watch.take()
        assert (dirty.names, dirty.written) == (set(), set())
        assert dirty.objects <= removed, "a removed one's link count is told without its directory"
        watch.do(f"d = 'others'\n{work}")
        assert len(watch.take().names) == 20
        watch.do("os.rename('ours/4', 'others/moved')")
        assert Name(watch.ident(b"others"), b"moved") in watch.take().names
        watch.source.leave_out(-1)  # a favour: nothing is said
        watch.source.close()
        watch.source.leave_out(0)


def test_fanotify_keeps_other_subvolumes_out(tmp_path):
    with mounted("subvolume", tmp_path / "m") as root:
        top = root.parent / "btrfs"
        run("btrfs", "subvolume", "create", top / "neighbour")
        with watched(root, FanotifySource(root)) as watch, watched(top, FanotifySource(top)) as above:
            above.do("open('neighbour/file', 'w').write('x'); open('at_top', 'w').write('x')")
            watch.do("open('ours', 'w').write('x')")
            run("btrfs", "subvolume", "create", root / "nested")
            run("sh", "-c", f"echo x > {root}/nested/file")
            dirty = watch.take()
            assert dirty.names == {Name(watch.ident(), b"ours"), Name(watch.ident(), b"nested")}
            assert dirty.written == {watch.ident(b"ours")}
            assert above.take().names == {above.name(b"at_top")}


def test_fanotify_on_a_read_only_superblock(tmp_path):
    with mounted("subvolume", tmp_path / "m") as root:
        run("mount", "-o", "remount,ro", root.parent / "btrfs")
        run("mount", "-o", "remount,ro", root)
        with watched(root, FanotifySource(root)) as watch:
            assert not watch.take()
            with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
                assert all(line.split()[3].startswith("ro,") for line in mounts if f" {root} " in line)
            with pytest.raises(AssertionError, match="Read-only"):
                watch.do("os.mknod('x')")


def test_fanotify_says_where_it_cannot_watch(tmp_path):
    async def start(source):
        source.start(lambda: None)

    for root in ("/proc", str(tmp_path / "nosuch")):
        with pytest.raises(SourceError):
            asyncio.run(start(FanotifySource(root)))
    with pytest.raises(SourceError):
        asyncio.run(start(InotifySource(tmp_path / "nosuch")))


def test_a_directory_moved_out_of_sight_is_watched_no_longer(roots):
    root = cleared(roots("ext4"))
    (root / ".snapfeed").mkdir()
    (root / "d" / "e").mkdir(parents=True)
    with watched(root, InotifySource(root)) as watch:
        watch.do("os.rename('d', '.snapfeed/d')")
        assert {Name(watch.ident(), b"d")} == watch.take().names
        watch.take()
        watch.do("os.mknod('.snapfeed/d/e/f')")
        assert not watch.take()
        watch.do("os.rename('.snapfeed/d', 'd')")
        assert {watch.name(b"d"), watch.name(b"d/e"), watch.name(b"d/e/f")} <= watch.take().names
        watch.do("os.mknod('d/e/g')")
        assert watch.name(b"d/e/g") in watch.take().names
        watch.do("os.rename('d', '.snapfeed/d')")
        drain = watch.source._batch
        watch.until(lambda: drain() is False and not watch.source._detached_before)
        watch.do("os.unlink('.snapfeed/d/e/g'); os.rename('.snapfeed/d', 'd')")
        assert "came back" in watch.source.take().lost


IN_A_NAMESPACE = """
import asyncio, os, sys
from watcher.sources.inotify import InotifySource
async def main():
    root = sys.argv[1]
    source = InotifySource(root)
    source.start(lambda: None)
    first = source.take()
    os.mkdir(os.path.join(root, "new"))
    os.mknod(os.path.join(root, "new", "file"))
    second = source.take()
    print(first.lost, second.lost, sorted(n.name for n in second.names), len(second.objects), sep="|")
    source.close()
asyncio.run(main())
"""


UNPRIVILEGED = """
import ctypes, os
import watcher.sources.inotify
os.setgroups([]); os.setgid(65534); os.setuid(65534)
PR_SET_DUMPABLE = 4
ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)  # lost by setuid; without it /proc/self belongs to root
"""


def in_a_process(root, *prefix, unprivileged=False):
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = UNPRIVILEGED + IN_A_NAMESPACE if unprivileged else IN_A_NAMESPACE
    command = [*prefix, sys.executable, "-c", code, str(root)]
    done = run(*command, env={"PYTHONPATH": here, "PATH": os.environ["PATH"]})
    return done.stdout.decode().strip().split("|")


def test_too_few_watches_are_a_loss_that_names_the_remedy(roots):
    root = cleared(roots("tmpfs"))
    for i in range(5):
        (root / f"d{i}").mkdir()
    script = 'echo 3 > /proc/sys/user/max_inotify_watches && exec "$0" "$@"'
    require(run("unshare", "-Ur", "true", check=False).returncode == 0, "user namespaces")
    first, second, names, _ = in_a_process(root, "unshare", "-Ur", "sh", "-c", script)
    assert "fs.inotify.max_user_watches" in first
    assert "fs.inotify.max_user_watches" in second
    assert names == "[b'new']"


def test_inotify_needs_no_privilege():
    """The process gives up root itself, since nobody may not be able to execute this interpreter."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "secret").mkdir(mode=0o700)
        root.chmod(0o777)
        first, second, names, objects = in_a_process(root, unprivileged=True)
    assert (first, second, names, objects) == ("None", "None", "[b'file', b'new']", "3")


def test_a_source_waits_for_nobody(roots):
    """Taking never blocks, also with nothing in the queue."""
    root = cleared(roots("xfs"))
    for kind in KINDS.values():
        with watched(root, kind(root)) as watch:
            started = time.monotonic()
            for _ in range(100):
                watch.take()
            assert time.monotonic() - started < 5
            wait_until(lambda: not watch.source.pending, "nothing pending")
