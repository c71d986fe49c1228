"""Replicas of real partitions: exact after every diff, after being killed at any point, and whatever a hostile feed says."""

import argparse
import asyncio
import base64
import contextlib
import filecmp
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys

import oracle
import pytest
from broker_processes import collector, mosquitto
from daemon_process import HOST, ROOT, daemon, environment, snapfeed
from partitions import partition, wait_until
from real_directory import comparable
from workload import Worker

from comparer.errors import DamageError, OperatorError
from feed.pages import Envelope, parse_page
from feed.replica import Replica, ReplicaPositions
from feed.replica_content import Kernel
from feed.replica_verify import ContentCheck
from feed.subscriber import Assembler, Diff
from snapshotter.linux.fallocate import punch_hole, syncfs
from snapshotter.linux.fiemap import ficlone
from watcher import command_replicate

KERNEL = Kernel(ficlone, punch_hole, syncfs)
OWN = b".snapfeed-replica"


def open_replica(top, source=None, boot_id="boot"):
    return Replica(
        os.fsencode(top), kernel=KERNEL, boot_id=boot_id, source=None if source is None else os.fsencode(source)
    )


# ---- diffs made by hand


class Made:
    """A feed of one partition: `diff` and `baseline` number themselves."""

    def __init__(self, epoch="e1", uuid="u1"):
        self.epoch, self.uuid, self.seq, self.parent = epoch, uuid, 0, None

    def _diff(self, documents, *, baseline):
        self.seq += 1
        envelope = Envelope(
            "h", "p", self.uuid, self.epoch, self.seq, None if baseline else self.parent, 0, "command", 0, "metadata", None,
            baseline,
        )  # fmt: skip
        self.parent = self.seq
        return Diff(envelope, documents)

    def baseline(self, *documents):
        return self._diff([change("modify", "dir", 2, b"", mode=0o755), *documents], baseline=True)

    def diff(self, *documents):
        return self._diff(list(documents), baseline=False)


def put(document, field, value):
    if value is not None:
        document[field] = value.decode("utf-8", "backslashreplace")
        document[field + "_b64"] = base64.b64encode(value).decode()


def change(
    op, kind, ino, path, *, old=None, target=None, content=None, changed=(), ranges=None, before=None, **attributes
):
    attr = {
        "size": "0", "blocks": "0", "mode": 0o644, "uid": 0, "gid": 0, "nlink": 1, "mtime_ns": "1000000000",
        "ctime_ns": "1", "btime_ns": None, "rdev": None,
    } | attributes  # fmt: skip
    document = {"op": op, "type": kind, "id": f"{ino}.1", "changed": list(changed), "before": before}
    document["after"] = None if op == "delete" else attr
    put(document, "path", path)
    put(document, "from", old)
    put(document, "target", target)
    put(document, "content", content)
    if ranges is not None:
        document |= {"ranges": ranges, "ranges_quality": "exact", "cleared": []}
    return document


def entries(top):
    """An independent walk, the replica's own directory left out."""
    return {p: e for p, e in oracle.walk(top).items() if p.split(b"/")[0] != OWN}


def content(top, tree):
    return {p: (os.fsencode(top) + b"/" + p) for p, e in tree.items() if e["type"] == "file"}


def assert_same(source, copy):
    there, here = entries(source), entries(copy)
    assert comparable(here) == comparable(there)
    for path, full in content(source, there).items():
        assert filecmp.cmp(content(copy, here)[path], full, shallow=False), path
    groups = []
    for tree in (there, here):
        by_inode = {}
        for path, entry in tree.items():
            by_inode.setdefault(entry["ino"], set()).add(path)
        groups.append(sorted(map(sorted, by_inode.values())))
    assert groups[0] == groups[1]
    roots = [{k: e[b""][k] for k in ("mode", "uid", "gid", "mtime_ns", "xattrs")} for e in (there, here)]
    assert roots[0] == roots[1]


# ---- a real feed


class Pages:
    """The diffs of a daemon as they were published."""

    def __init__(self, seen, snapfeed):
        self.seen, self.assembler = seen, Assembler()
        self.topic = f"snapfeed/{HOST}/{snapfeed.partition()['partition']}/changes"
        self.snapfeed, self.seq = snapfeed, -1

    def until(self, seq):
        found = []

        def there():
            for message in self.seen.new():
                if message.topic == self.topic:
                    for item in self.assembler.add(parse_page(message.payload)):
                        assert isinstance(item, Diff), item
                        found.append(item)
                        self.seq = item.envelope.seq
            return self.seq >= seq

        wait_until(there, f"seq {seq}", 60)
        return found

    def snapshot(self):
        return self.until(self.snapfeed.snapshot()["seq"])

    def first(self):
        return self.until(wait_until(lambda: self.snapfeed.partition()["head"], "the first snapshot"))


@contextlib.contextmanager
def feed_of(tmp_path, part, config=None):
    with (
        mosquitto(tmp_path) as broker,
        collector(broker, "snapfeed/#") as seen,
        daemon(tmp_path, part.path, broker=broker.url, config=config) as snapfeed,
    ):
        yield Pages(seen, snapfeed)


class Gardener(Worker):
    """Removes less than it makes, so that trees grow."""

    def rmtree(self, target, fresh, anything):
        if self.random.random() < 0.1:
            super().rmtree(target, fresh, anything)

    def unlink(self, target, fresh, anything):
        if self.random.random() < 0.3:
            super().unlink(target, fresh, anything)


def work(part, worker, steps):
    for _ in range(steps):
        worker.step()


@pytest.mark.kernel
@pytest.mark.parametrize(("fs", "seed"), [("xfs", 1), ("xfs", 2), ("btrfs", 3), ("ext4", 4)])
def test_random_work_gives_an_exact_copy(fs, seed, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    with partition(fs, tmp_path) as part, feed_of(tmp_path, part) as pages:
        worker = Gardener(os.fsencode(part.path), seed, reflink=fs != "ext4")
        work(part, worker, 150)
        first = pages.first()
        with open_replica(copy, part.path) as replica:
            for number in range(8):
                for diff in [*first, *pages.snapshot()]:
                    assert replica.apply(diff) is not None
                first = []
                assert replica.stale == 0, replica.source.trouble
                assert replica.flaws == 0
                assert_same(part.path, copy)
                assert list(replica.verify(ContentCheck())) == []
                work(part, worker, 40 + number)


KILLED = """
import json, os, random, signal, sys
from feed.pages import Envelope
from feed.replica import Replica
from feed.replica_content import Kernel
from feed.subscriber import Diff
from snapshotter.linux.fallocate import punch_hole, syncfs
from snapshotter.linux.fiemap import ficlone

diffs, copy, source, left = sys.argv[1], os.fsencode(sys.argv[2]), os.fsencode(sys.argv[3]), int(sys.argv[4])

def counted(call):
    def counting(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        done = call(*args, **kwargs)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return counting

kernel = Kernel(counted(ficlone), counted(punch_hole), counted(syncfs))
with Replica(copy, kernel=kernel, boot_id="boot", source=source) as replica:
    for name in "rename link unlink mkdir rmdir pwrite ftruncate mknod symlink chown chmod setxattr utime open stat".split():
        setattr(os, name, counted(getattr(os, name)))
    replica.resume()
    for line in open(diffs):
        envelope, documents = json.loads(line)
        replica.apply(Diff(Envelope(**envelope), documents))
    left = 0
"""


@pytest.mark.kernel
@pytest.mark.parametrize(("fs", "reflink"), [("xfs", False), ("btrfs", True)])
def test_killed_at_any_point_it_resumes_and_is_exact(fs, reflink, tmp_path):
    """The replica lies on ext4 (changed in place) or on a file system with reflinks (changed in a clone)."""
    there = tmp_path / "there"
    there.mkdir()
    with (
        partition(fs, tmp_path) as part,
        partition("xfs" if reflink else "ext4", there) as place,
        feed_of(tmp_path, part, f'[broker]\nhost = "{HOST}"\n[defaults]\nkeep = 100\n') as pages,
    ):
        copy = place.path / "copy"
        copy.mkdir()
        worker = Gardener(os.fsencode(part.path), 11, reflink=True)
        work(part, worker, 100)
        diffs = pages.first()
        for _ in range(8):
            work(part, worker, 60)
            diffs += pages.snapshot()
        saved = tmp_path / "diffs"
        fields = Envelope.__dataclass_fields__
        saved.write_text(
            "".join(json.dumps([{f: getattr(d.envelope, f) for f in fields}, d.documents]) + "\n" for d in diffs)
        )
        chance, kills = random.Random(5), 0
        while True:
            limit = chance.randrange(1, 300) if kills < 40 else 0
            command = [sys.executable, "-c", KILLED, saved, copy, part.path, str(limit)]
            done = subprocess.run(command, capture_output=True, env=environment(), cwd=ROOT, timeout=60, check=False)
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr.decode()
            kills += 1
        assert kills >= 20
        assert_same(part.path, copy)
        with open_replica(copy, part.path) as replica:
            assert replica.repaired is None
            assert list(replica.verify(ContentCheck())) == []


GIB, BLOCK = 1 << 30, 4096


@pytest.mark.kernel
@pytest.mark.parametrize("target", ["ext4", "xfs"])
def test_only_changed_blocks_are_copied(target, tmp_path):
    """Three blocks of a file of 1 GiB, mostly holes, to another file system; which stays sparse there."""
    there = tmp_path / "there"
    there.mkdir()
    with partition("xfs", tmp_path) as part, partition(target, there) as place, feed_of(tmp_path, part) as pages:
        copy = place.path / "copy"
        copy.mkdir()
        with (part.path / "big").open("wb") as file:
            file.truncate(GIB)
            for offset in (0, 100 << 20, GIB - (1 << 20)):
                file.seek(offset)
                file.write(os.urandom(1 << 20))
        with open_replica(copy, part.path) as replica:
            for diff in [*pages.first(), *pages.snapshot()]:
                first = replica.apply(diff)
                if first.baseline:
                    assert first.copied < 4 << 20
            with (part.path / "big").open("r+b") as file:
                for offset in (5 * BLOCK, 300 << 20, GIB - BLOCK):
                    file.seek(offset)
                    file.write(b"\xa5" * BLOCK)
            (diff,) = pages.snapshot()
            applied = replica.apply(diff)
            assert (applied.copied, applied.cloned, applied.stale) == (3 * BLOCK, 0, 0)
            punched = os.open(part.path / "big", os.O_RDWR)
            punch_hole(punched, 100 << 20, 1 << 20)
            os.ftruncate(punched, GIB - 10)
            os.close(punched)
            (diff,) = pages.snapshot()
            assert replica.apply(diff).copied <= BLOCK
            assert_same(part.path, copy)
            assert (copy / "big").stat().st_blocks * 512 < 4 << 20


@pytest.mark.kernel
def test_on_the_same_file_system_nothing_is_copied(tmp_path):
    """A btrfs subvolume beside the one that is followed: all content is shared."""
    with partition("btrfs", tmp_path) as part:
        for name in ("data", "copy"):
            subprocess.run(["btrfs", "subvolume", "create", part.path / name], check=True, capture_output=True)
        mount = tmp_path / "data"
        mount.mkdir()
        subprocess.run(["mount", "-o", "subvol=data", part.device, mount], check=True)

        class Subvolume:
            path = mount

        (mount / "file").write_bytes(os.urandom(1 << 20))
        with feed_of(tmp_path, Subvolume) as pages, open_replica(part.path / "copy", mount) as replica:
            done = [replica.apply(diff) for diff in pages.first()]
            with (mount / "file").open("r+b") as file:
                file.write(b"x" * 10)
            done += [replica.apply(diff) for diff in pages.snapshot()]
            assert sum(one.copied for one in done) == 0
            assert [one.cloned for one in done] == [1 << 20, 1 << 20]
            assert_same(mount, part.path / "copy")
        subprocess.run(["umount", mount], check=True)


# ---- what is hostile, and what is odd


def outside(tmp_path):
    return {p: e for p, e in oracle.walk(tmp_path).items() if p.split(b"/")[0] != b"copy"}


@pytest.fixture
def copy(tmp_path):
    made = tmp_path / "copy"
    made.mkdir()
    return made


HOSTILE = [
    b"../x", b"/x", b"a/../../x", b"a/../x", b"..", b".", b"a//x", b"a/", b"/", b"a/./x", b"x\0y", b"a/\0",
    b".snapfeed-replica/x", b".snapfeed-replica", b".snapfeed/x", b".snapfeed", b"x" * 256,
]  # fmt: skip


@pytest.mark.parametrize("path", [*HOSTILE, b".snapfeed/../x", b"x/.snapfeed/x"])
@pytest.mark.parametrize("field", ["path", "from", "content"])
def test_paths_that_lead_astray_are_refused(path, field, tmp_path, copy):
    made = Made()
    (tmp_path / "source" / ".snapfeed").mkdir(parents=True)
    (tmp_path / "x").write_bytes(b"outside")
    good = [change("create", "dir", 3, b"a"), change("create", "file", 4, b"a/f"), change("create", "file", 9, b"g")]
    with open_replica(copy, tmp_path / "source") as replica:
        replica.apply(made.baseline(*good))
        before = outside(tmp_path), entries(copy), sorted(os.listdir(copy / ".snapfeed-replica"))
        first = change("create", "file", 5, b"harmless")
        bad = {
            "path": [
                change("create", "file", 6, path),
                change("delete", "file", 9, path),
                change("create", "dir", 6, path),
            ],
            "from": [change("rename", "file", 9, b"h", old=path), change("link", "file", 4, b"h", old=path)],
            "content": [change("create", "file", 6, b"h", content=path, size="7")],
        }[field]
        if field == "content" and path == b".snapfeed/x":
            return  # where snapshots are
        for one in bad:
            seq, parent = made.seq, made.parent
            with pytest.raises(DamageError):
                replica.apply(made.diff(first, one))
            made.seq, made.parent = seq, parent
        assert (outside(tmp_path), entries(copy), sorted(os.listdir(copy / ".snapfeed-replica"))) == before
        assert (tmp_path / "x").read_bytes() == b"outside"
        replica.apply(made.diff(first))  # and it goes on
        assert (copy / "harmless").exists()


def test_a_symlink_is_never_crossed(tmp_path, copy):
    """Whether the feed itself put it there, or somebody else did."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "f").write_bytes(b"mine")
    made = Made()
    before = oracle.walk(victim)
    link = change("create", "symlink", 5, b"link", target=os.fsencode(victim), size="3", mode=0o777)
    with open_replica(copy) as replica:
        replica.apply(made.baseline(change("create", "dir", 3, b"a"), change("create", "file", 4, b"a/f"), link))
        for bad in (
            change("create", "file", 6, b"link/x"),
            change("delete", "file", 4, b"link/f"),
            change("rename", "file", 4, b"link/f", old=b"a/f"),
            change("modify", "symlink", 5, b"link", target=b"a", size="3"),
        ):
            seq, parent = made.seq, made.parent
            with pytest.raises(DamageError):
                replica.apply(made.diff(bad))
            made.seq, made.parent = seq, parent
        # somebody swaps the directory, and then a file, for a link to the outside
        shutil.rmtree(copy / "a")
        (copy / "a").symlink_to(victim)
        replica.apply(made.diff(change("create", "file", 7, b"a/g"), change("delete", "file", 4, b"a/f")))
        assert oracle.walk(victim) == before
        assert not (copy / "a").is_symlink()
        assert [p.name for p in (copy / "a").iterdir()] == ["g"]
        (copy / "a" / "g").unlink()
        (copy / "a" / "g").symlink_to(victim / "f")
        late = change(
            "modify", "file", 7, b"a/g", size="9", mode=0o600, changed=["size", "data", "mode"], ranges=[[0, 9]]
        )
        replica.apply(made.diff(late))
        assert oracle.walk(victim) == before
        assert (copy / "a" / "g").stat(follow_symlinks=False).st_size == 9


def test_content_is_read_below_the_source_only(tmp_path, copy):
    """A link, a pipe, a directory or a device in the source is no content; nor is what links lead to."""
    source = tmp_path / "source"
    (source / ".snapfeed").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret!")
    kept = source / ".snapfeed"
    (kept / "out").symlink_to(tmp_path)
    (kept / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(kept / "pipe")
    (kept / "dir").mkdir()
    (kept / "good").write_bytes(b"content")
    made = Made()
    places = [b".snapfeed/" + name for name in (b"out/secret", b"link", b"pipe", b"dir", b"gone", b"good/x")]
    files = [change("create", "file", 10 + n, b"f%d" % n, size="7", content=place) for n, place in enumerate(places)]
    with open_replica(copy, source) as replica:
        done = replica.apply(
            made.baseline(*files, change("create", "file", 9, b"fine", size="7", content=b".snapfeed/good"))
        )
        assert (done.stale, done.copied) == (len(places), 7)
        assert (copy / "fine").read_bytes() == b"content"
        for number in range(len(places)):
            assert (copy / f"f{number}").read_bytes() == bytes(7)
        assert {d.what for d in replica.verify()} >= {"stale"}


def test_names_of_every_byte_value(tmp_path, copy):
    made = Made()
    names = [bytes([n]) + b"-" + bytes([n]) for n in range(1, 256) if n != ord("/")]
    with open_replica(copy) as replica:
        replica.apply(made.baseline(*[change("create", "file", 10 + i, n) for i, n in enumerate(names)]))
        assert sorted(os.listdir(os.fsencode(copy))) == sorted([OWN, *names])
        renames = [change("rename", "file", 10 + i, b"d-" + n, old=n) for i, n in enumerate(names)]
        replica.apply(made.diff(*renames))
        assert sorted(os.listdir(os.fsencode(copy))) == sorted([OWN, *(b"d-" + n for n in names)])
        assert list(replica.verify()) == []


def test_a_baseline_converges_what_is_there(tmp_path, copy):
    source = tmp_path / "source"
    (source / ".snapfeed").mkdir(parents=True)
    for name in ("one", "two", "new"):
        (source / ".snapfeed" / name).write_bytes(name.encode() * 100)
    made = Made()

    def file(ino, path, kept, **more):
        return change("create", "file", ino, path, size="300", content=b".snapfeed/" + kept, **more)

    first = [
        change("create", "dir", 3, b"d"), change("create", "dir", 4, b"d/e"), file(5, b"d/e/one", b"one"),
        file(6, b"two", b"two", nlink=2), change("link", "file", 6, b"d/two", old=b"two", size="300", nlink=2),
        file(7, b"gone", b"one"),
    ]  # fmt: skip
    again = [
        change("create", "dir", 4, b"moved"), file(5, b"moved/uno", b"one"), file(6, b"two", b"new", mtime_ns="5"),
        file(8, b"gone", b"two"),
    ]  # fmt: skip
    with open_replica(copy, source) as replica:
        assert replica.apply(made.baseline(*first)).copied == 900
        assert (copy / "d" / "two").samefile(copy / "two")
        kept = (copy / "d" / "e" / "one").stat().st_ino
        (copy / "stranger" / "deep").mkdir(parents=True)
        (copy / "stranger" / "deep" / "file").write_bytes(b"not of the feed")
        done = replica.apply(made.baseline(*again))
        assert done.copied == 600  # not what only moved
        assert sorted(entries(copy)) == [b"", b"gone", b"moved", b"moved/uno", b"two"]
        assert (copy / "moved" / "uno").stat().st_ino == kept
        assert (copy / "two").read_bytes() == b"new" * 100
        assert (copy / "gone").read_bytes() == b"two" * 100
        assert list(replica.verify(ContentCheck())) == []
        # another file system under the same name: ids mean nothing, everything is made again
        other = Made("e2", "u2")
        done = replica.apply(other.baseline(*again))
        assert done.copied == 900
        assert list(replica.verify(ContentCheck())) == []
        assert replica.position == ("e2", 1)


def test_what_is_no_replica_is_left_alone(tmp_path, copy):
    (copy / "mine").write_bytes(b"dear")
    with pytest.raises(OperatorError, match="not empty"):
        open_replica(copy)
    assert os.listdir(copy) == ["mine"]
    inside = tmp_path / "source" / "inside"
    inside.mkdir(parents=True)
    (tmp_path / "source" / ".snapfeed").mkdir()
    with pytest.raises(OperatorError, match="lies in the source"):
        open_replica(inside, tmp_path / "source")
    assert os.listdir(inside) == []
    with pytest.raises(OperatorError, match="is the partition mounted"):
        open_replica(copy, copy)


def test_two_at_once_are_refused(copy):
    with open_replica(copy), pytest.raises(OperatorError, match="another snapfeed replicate"):
        open_replica(copy)


def test_gaps_duplicates_and_strangers(copy):
    made = Made()
    with open_replica(copy) as replica:
        early = Made()
        early.seq = early.parent = 4
        with pytest.raises(DamageError, match="needs a baseline"):
            replica.apply(early.diff())
        first = made.baseline(change("create", "file", 3, b"f"))
        replica.apply(first)
        second = made.diff(change("delete", "file", 3, b"f"))
        replica.apply(second)
        assert replica.apply(first) is None
        assert replica.apply(second) is None
        made.parent = 9
        with pytest.raises(DamageError, match="needs a baseline"):
            replica.apply(made.diff())
        positions = ReplicaPositions(replica)
        assert positions.load("h", "p") == ("e1", 2)
        assert positions.load("h", "q") is None
        positions.store("h", "p", "e1", 2)
        with pytest.raises(DamageError):
            positions.store("h", "p", "e1", 3)


def test_content_that_comes_late(tmp_path, copy):
    """Expired in the snapshots, and the live file has changed: stale, told, and made good as soon as it can be."""
    source = tmp_path / "source"
    (source / ".snapfeed").mkdir(parents=True)
    live = source / "f"
    live.write_bytes(b"as it was then")
    facts = live.stat()
    told = {"size": str(facts.st_size), "mtime_ns": str(facts.st_mtime_ns), "ctime_ns": str(facts.st_ctime_ns)}
    ino = facts.st_ino
    live.write_bytes(b"as it is now..")
    made = Made()
    with open_replica(copy, source) as replica:
        done = replica.apply(made.baseline(change("create", "file", ino, b"f", content=b".snapfeed/gone", **told)))
        assert (done.stale, done.copied) == (1, 0)
        assert (copy / "f").read_bytes() == bytes(14)
        facts = live.stat()
        told = {"size": str(facts.st_size), "mtime_ns": str(facts.st_mtime_ns), "ctime_ns": str(facts.st_ctime_ns)}
        late = change("modify", "file", ino, b"f", changed=["data", "times"], ranges=[[0, 1]], **told)
        done = replica.apply(made.diff(late))
        assert (done.stale, done.copied) == (0, 14)  # not just the range: what was there was not what it changed from
        assert (copy / "f").read_bytes() == b"as it is now.."


def test_without_a_source_there_are_sizes_and_attributes(copy):
    made = Made()
    with open_replica(copy) as replica:
        done = replica.apply(made.baseline(change("create", "file", 3, b"f", size=str(1 << 30), mode=0o640)))
        facts = (copy / "f").stat()
        assert (facts.st_size, facts.st_blocks, facts.st_mode & 0o777, facts.st_mtime) == (1 << 30, 0, 0o640, 1.0)
        assert done.stale == 1


def test_verify_names_every_disagreement_and_repair_ends_them(tmp_path, copy):
    source = tmp_path / "source"
    (source / ".snapfeed").mkdir(parents=True)
    (source / ".snapfeed" / "c").write_bytes(b"content")
    made = Made()
    names = [b"wrong", b"size", b"mode", b"time", b"gone", b"type"]
    files = [change("create", "file", 10 + i, n, size="7", content=b".snapfeed/c") for i, n in enumerate(names)]
    more = [
        change("create", "dir", 3, b"d"), change("create", "file", 4, b"d/f"), change("create", "file", 5, b"l", nlink=2),
        change("link", "file", 5, b"m", old=b"l", nlink=2), change("create", "symlink", 6, b"s", target=b"t", size="1"),
    ]  # fmt: skip
    with open_replica(copy, source) as replica:
        replica.apply(made.baseline(*files, *more))
        assert list(replica.verify(ContentCheck())) == []
        facts = (copy / "wrong").stat()
        (copy / "wrong").write_bytes(b"CONTENT")
        os.utime(copy / "wrong", ns=(facts.st_atime_ns, facts.st_mtime_ns))
        (copy / "size").write_bytes(b"x")
        (copy / "mode").chmod(0o777)
        os.utime(copy / "time", ns=(1, 1))
        (copy / "gone").unlink()
        (copy / "type").unlink()
        (copy / "type").mkdir()
        shutil.rmtree(copy / "d")
        (copy / "m").unlink()
        (copy / "m").write_bytes(b"")
        (copy / "s").unlink()
        (copy / "s").symlink_to("elsewhere")
        (copy / "ex\ntra").write_bytes(b"")
        found = {(d.what, d.path) for d in replica.verify(ContentCheck())}
        assert found >= {
            ("content", b"wrong"), ("attributes", b"size"), ("attributes", b"mode"), ("attributes", b"time"),
            ("missing", b"gone"), ("type", b"type"), ("missing", b"d"), ("link", b"m"), ("attributes", b"s"),
            ("extra", b"ex\ntra"),
        }  # fmt: skip
    # as if the machine had stopped without warning, and come back
    with contextlib.closing(sqlite3.connect(copy / ".snapfeed-replica" / "state.db")) as state:
        state.execute("INSERT OR REPLACE INTO meta VALUES ('open', 1)")
        state.commit()
    with open_replica(copy, source, boot_id="another") as replica:
        assert replica.repaired >= 9
        assert {(d.what, d.path) for d in replica.verify(ContentCheck())} == {("content", b"wrong")}


# ---- the command


def following(copy, replica, diffs, *, once=None, json=False):
    """`command_replicate.follow` with a subscriber that has these diffs, in order; the diffs it was told are applied."""
    committed = []

    class Diffs:
        def __aiter__(self):
            return self._items()

        async def _items(self):
            for diff in diffs:
                yield diff
            assert once is not None, "it goes on after the last one"

        async def commit(self, diff):
            committed.append(diff.envelope.seq)

    options = argparse.Namespace(json=json, once=once is not None)
    asyncio.run(command_replicate.follow(replica, Diffs(), options, once))
    return committed


def test_the_command_applies_commits_and_says_so(copy, capsys):
    made = Made()
    diffs = [made.baseline(change("create", "file", 3, b"f", size="5")), made.diff(), made.diff()]
    with open_replica(copy) as replica:
        assert following(copy, replica, diffs, once=("e1", 2), json=True) == [1, 2]
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        keys = {"partition", "epoch", "seq", "changes", "copied_bytes", "cloned_bytes", "stale"}
        assert [{k: line[k] for k in keys} for line in lines] == [
            {
                "partition": "p",
                "epoch": "e1",
                "seq": seq,
                "changes": count,
                "copied_bytes": 0,
                "cloned_bytes": 0,
                "stale": 1,
            }
            for seq, count in ((1, 2), (2, 0))
        ]
        assert following(copy, replica, diffs, once=("e1", 2)) == []  # there already
        assert following(copy, replica, diffs, once=("e1", 3)) == [2, 3]  # 2 again: the first time may not have arrived


def test_a_diff_that_cannot_be_is_an_error_and_is_not_acknowledged(copy):
    made = Made()
    diffs = [made.baseline(), made.diff(change("create", "file", 3, b"../f"))]
    with open_replica(copy) as replica:
        with pytest.raises(DamageError, match="not allowed"):
            following(copy, replica, diffs, once=("e1", 2))
        assert replica.position == ("e1", 1)


def test_verify_as_a_command(tmp_path, copy):
    source = tmp_path / "source"
    (source / ".snapfeed").mkdir(parents=True)
    (source / ".snapfeed" / "c").write_bytes(b"content")
    made = Made()
    with open_replica(copy, source) as replica:
        replica.apply(made.baseline(change("create", "file", 3, b"f\x1b\n", size="7", content=b".snapfeed/c")))
    done = snapfeed("replicate", "--verify", "--source", source, copy)
    assert "0 disagreements; content of 1 files compared (7 B)" in done.stdout
    (copy / "f\x1b\n").write_bytes(b"CONTENT")
    done = snapfeed("replicate", "--verify", "--source", source, copy, check=False)
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    assert "content     $'f\\e\\n'  differs from the source at byte 0" in done.stdout
    lines = facts_of(snapfeed("replicate", "--verify", "--json", "--source", source, copy, check=False))
    assert {line["what"] for line in lines[:-1]} == {"content", "attributes"}
    assert lines[-1]["disagreements"] == 2


def facts_of(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["DEST"], "--partition"),
        (["--partition", "a/b", "DEST"], "--partition"),
        (["--partition", "p", "--host", "+", "DEST"], "--host"),
        (["--partition", "p", "--broker", "nonsense", "DEST"], "broker"),
        (["--verify", "DEST"], "is no replica"),
        (["--partition", "p", "DEST/deep/deeper"], "cannot be made"),
        (["--partition", "p", "--once", "--consumer", "a b", "DEST"], "--consumer"),
        (["--partition", "p", "--source", "DEST", "DEST"], "is the partition mounted"),
    ],
)
def test_wrong_calls_say_what_to_do(arguments, told, copy):
    done = snapfeed("replicate", *[a.replace("DEST", str(copy)) for a in arguments], check=False)
    assert done.returncode == (2 if told.startswith("--") else 1)
    assert told in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_consumer_has_a_name_of_its_own(tmp_path):
    one, other = (command_replicate.consumer_name(None, str(tmp_path / name), "edge7") for name in ("a", "b"))
    assert one != other
    assert re.fullmatch("[A-Za-z0-9_-]{1,64}", one)
