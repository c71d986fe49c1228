"""Full disks and failing calls: no wrong diff, the state says so within five seconds, and all is well once the cause is gone.

SNAPFEED_POINTS=all: every call of a snapshot's cycle fails once, and every call from there on; the suite tries a spread of them.
"""

import contextlib
import itertools
import os
import shutil
import sqlite3
import time

import pytest
from daemon_process import HOST
from life import Life
from partitions import partition, require, run, tmpfs, wait_until
from reporting import report
from test_invariants import feeding, strace, within

from comparer.dirty import Dirty
from comparer.errors import SnapfeedError
from snapshotter.visit import Visit

pytestmark = pytest.mark.kernel
SOON = 5.0  # seconds until a partition's state must say what is wrong
ALL_POINTS = os.environ.get("SNAPFEED_POINTS") == "all"

# What a cycle does that a disk can refuse. open: openat with O_CREAT among them; a descriptor too many.
FAULTS = [
    ("pwrite64", "ENOSPC"), ("pwrite64", "EIO"), ("fdatasync", "EIO"), ("fdatasync", "ENOSPC"), ("openat", "ENOSPC"),
    ("openat", "EMFILE"), ("openat", "EIO"), ("pread64", "EIO"), ("unlink,unlinkat", "EIO"), ("mkdir,mkdirat", "ENOSPC"),
    ("setxattr", "ENOSPC"), ("ioctl", "ENOSPC"), ("ioctl", "EIO"), ("ftruncate", "EIO"), ("newfstatat,fstat", "EIO"),
]  # fmt: skip


def kept(life):
    """The content of the newest snapshot is still there: each clone the table knows, or btrfs's snapshot."""
    with Visit(life.partition) as visit:
        head = visit.file.head()
        if visit.abilities.backend == "btrfs":
            assert os.path.isdir(os.path.join(life.directory, b"snapshots", b"%d" % head))
            return
        rows = visit.file.db.execute("SELECT clone, ino, gen FROM inode WHERE clone IS NOT NULL").fetchall()
    for seq, ino, gen in rows:
        assert os.path.exists(os.path.join(life.directory, b"clones", b"%d" % seq, b"%d.%d" % (ino, gen))), (seq, ino)


def numbers():
    """Which call of its kind fails."""
    return itertools.count(1) if ALL_POINTS else (1, 4, 15)


@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4"])
def test_an_error_at_any_call_of_a_cycle(fs, tmp_path):
    require(shutil.which("strace") is not None, "strace")
    seed = int(os.environ.get("SNAPFEED_SEED", "1"))
    cases = failed = 0
    met = set()
    with partition(fs, tmp_path) as part:
        life = Life(part, seed)
        epoch = life.consumer.head[0]
        for call, error in FAULTS:
            for number in numbers():
                for more in ("", "+") if ALL_POINTS else (life.random.choice(["", "+"]),):
                    life.step()
                    fault = f"inject={call}:error={error}:when={number}{more}"
                    try:
                        with strace(os.getpid(), tmp_path / "trace", "-e", f"trace={call}", "-e", fault), within(30):
                            life.snapshot(Dirty(lost="test"))
                            life.publish()
                    except (OSError, SnapfeedError, sqlite3.Error) as trouble:
                        failed += 1
                        met.add(type(trouble).__name__)
                    cases += 1
                    kept(life)
                    assert life.begin() == [], (
                        fault
                    )  # as the daemon does after any trouble; nothing is taken for damage
                    life.exact()
                    assert life.consumer.head[0] == epoch
                    kept(life)
                if b"INJECTED" not in (tmp_path / "trace").read_bytes():
                    break
    report("errors at calls", cases, fs=fs, seed=seed, failed=failed, all_points=ALL_POINTS, raised=sorted(met))
    assert failed >= 10, (failed, cases)


# ---- the daemon


class Trouble:
    """A cause of errors under a running daemon: what its state says of it, and when; and that all is well afterwards."""

    def __init__(self, feed):
        self.feed, self.slowest, self.reasons = feed, 0.0, []
        self.epoch = feed.consumer.head[0]

    def state(self):
        return self.feed.snapfeed.partition(self.feed.top)

    def met(self, word, *, always=True):
        """A snapshot that is asked for fails, and the state says why; or, unless it `always` fails, it may be taken."""
        started = time.monotonic()
        done = self.feed.snapfeed.command("snapshot", self.feed.label, check=False)
        if done.returncode == 0 and not always:
            return
        assert done.returncode == 1, (done.stdout, done.stderr)

        def told():
            found = self.state()
            return found["state"] == "failed" and found["reason"]

        reason = wait_until(told, "the state says so", SOON)
        self.slowest = max(self.slowest, time.monotonic() - started)
        assert word in reason.lower(), reason
        self.reasons.append(reason)
        self.keeps()

    def keeps(self):
        """The newest snapshot and the content that was told of are still there."""
        contents = {}
        for diff in self.feed.consumer.diffs:
            for change in diff["changes"]:
                if change["op"] == "delete":
                    contents.pop(change["id"], None)
                elif change.get("content"):
                    contents[change["id"]] = change["content"]
        assert contents or self.feed.consumer.diffs[-1]["consistency"] == "metadata"
        if self.feed.consumer.diffs[-1]["consistency"] == "per-file":
            for path in contents.values():
                assert (self.feed.top / path).exists(), path
        if self.feed.consumer.diffs[-1]["consistency"] == "subvolume":
            assert (self.feed.top / f".snapfeed/snapshots/{self.feed.consumer.head[1]}").is_dir()

    def over(self):
        wait_until(lambda: self.state()["state"] == "watching", "it goes on by itself")
        self.feed.exact()
        assert self.feed.consumer.head[0] == self.epoch
        assert sum(bool(d.get("baseline")) for d in self.feed.consumer.diffs) == 1
        assert "Traceback" not in self.feed.snapfeed.output()


@contextlib.contextmanager
def troubled(top, tmp_path, **options):
    config = f'[broker]\nhost = "{HOST}"\n[defaults]\nkeep = 2\n'
    with feeding(top, tmp_path, config=config, **options) as feed:
        for number in range(4):
            (top / f"file{number}").write_bytes(b"x" * 5000)
            (top / "often").write_bytes(b"%d" % number * 3000)
            feed.exact()
        feed.exact()
        feed.quiet()
        yield Trouble(feed)


def fill(top):
    """Take all the space there is; returns the files that have it."""
    made = []
    for size in (64 << 20, 4 << 20, 256 << 10, 16 << 10, 4096):
        with contextlib.suppress(OSError):
            while True:
                made.append(top / f"filler{len(made)}")
                with made[-1].open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
    return made


@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4"])
def test_a_full_partition(fs, tmp_path):
    with partition(fs, tmp_path, "320M") as part, troubled(part.path, tmp_path) as trouble:
        top = part.path
        (top / "spare").write_bytes(b"x" * 100_000)
        trouble.feed.exact()
        made = fill(top)
        for number in range(3):  # more than are kept
            with contextlib.suppress(OSError):  # btrfs needs space also for that
                (top / f"file{number}").chmod(0o600)
            trouble.met("full", always=False)
            if trouble.feed.consumer.head[1] < trouble.state()["head"]:
                trouble.feed.until({"epoch": trouble.epoch, "seq": trouble.state()["head"]})
        for file in made:
            file.unlink(missing_ok=True)

        def room():
            os.sync()  # btrfs gives back what was freed with its next commit
            with contextlib.suppress(OSError):
                return (top / "after").write_text("x")

        wait_until(room, "there is room again")
        trouble.over()
        report("full partition", 1, fs=fs, failed=len(trouble.reasons), seconds_until_told=round(trouble.slowest, 2))


def test_no_inodes_left(tmp_path):
    with partition("ext4", tmp_path, "64M", ("-N", "128")) as part, troubled(part.path, tmp_path) as trouble:
        made = []
        with contextlib.suppress(OSError):
            while True:
                made.append(part.path / f"inode{len(made)}")
                made[-1].touch()
        trouble.met("")
        made.pop()
        for file in made:
            file.unlink(missing_ok=True)
        trouble.over()
        report("no inodes left", 1, seconds_until_told=round(trouble.slowest, 2), reason=trouble.reasons[-1][-60:])


@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4"] if ALL_POINTS else ["ext4"])
def test_mounted_read_only_for_a_while(fs, tmp_path):
    with partition(fs, tmp_path) as part, troubled(part.path, tmp_path) as trouble:
        (part.path / "file0").write_text("before")
        remount = ("mount", "-o", "remount,ro", part.path)
        wait_until(lambda: run(*remount, check=False).returncode == 0, "nobody writes")
        trouble.met("read-only")
        run("mount", "-o", "remount,rw", part.path)
        trouble.over()
        report("read-only for a while", 1, fs=fs, seconds_until_told=round(trouble.slowest, 2))


@pytest.mark.parametrize("fs", ["xfs", "ext4"] if ALL_POINTS else ["xfs"])
def test_a_disk_that_has_less_than_it_promised(fs, tmp_path):
    """An image on a tmpfs that is too small for it: the device itself fails; then it has room, and is mounted anew."""
    with tmpfs(tmp_path) as below:
        run("mount", "-o", "remount,size=48m", below)
        if fs == "xfs":
            run("mount", "-o", "remount,size=96m", below)
        with partition(fs, below, "320M") as part, troubled(part.path, tmp_path) as trouble:
            top = part.path
            with contextlib.suppress(OSError), (top / "big").open("wb") as file:
                for _ in range(200):
                    file.write(os.urandom(1 << 20))
                os.fsync(file.fileno())
            with contextlib.suppress(OSError):
                (top / "more").write_bytes(os.urandom(1 << 16))
            trouble.met("", always=False)
            run("mount", "-o", "remount,size=1g", below)
            wait_until(lambda: run("umount", top, check=False).returncode == 0, "nobody holds it")
            part.mount()
            trouble.over()
            report("device errors", 1, fs=fs, failed=len(trouble.reasons), seconds_until_told=round(trouble.slowest, 2))


def test_calls_that_fail_until_mended(xfs, tmp_path):
    faults = [
        ("pwrite64", "ENOSPC", "-wal"),
        ("fdatasync", "EIO", "-wal"),
        ("openat", "EMFILE", "-wal"),
        ("pread64", "EIO", ""),
    ]
    with troubled(xfs.path, tmp_path) as trouble:
        for call, error, suffix in faults:
            (xfs.path / "often").write_text(f"{call} {error}")
            fault = (
                "-P",
                f"{xfs.path}/.snapfeed/system.db{suffix}",
                "-e",
                f"trace={call}",
                "-e",
                f"inject={call}:error={error}",
            )
            with strace(trouble.feed.snapfeed.pid, tmp_path / "trace", *fault):
                trouble.met("")
            trouble.over()
            trouble.feed.quiet()
        report("calls that fail until mended", len(faults), seconds_until_told=round(trouble.slowest, 2))
