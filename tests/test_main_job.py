"""The main job on real partitions: a real daemon, a real broker, a foreign subscriber, and what arrives is what was done."""

import json
import os
import stat

import pytest
from broker_processes import collector, mosquitto
from consumer import Consumer, name
from daemon_process import HOST, daemon
from partitions import wait_until
from workload import Worker

pytestmark = pytest.mark.kernel


class Feed:
    """A partition, its daemon, and a mosquitto_sub whose pages go into a Consumer."""

    def __init__(self, part, snapfeed, seen):
        self.part, self.snapfeed, self.seen = part, snapfeed, seen
        self.consumer = Consumer()
        self._taken = 0
        self.topic = f"snapfeed/{HOST}/{snapfeed.partition()['partition']}/changes"

    def take(self):
        messages = self.seen.messages(self.topic)
        fresh, self._taken = messages[self._taken :], len(messages)
        assert not any(m.retained for m in fresh)
        self.consumer.feed(m.payload for m in fresh)

    def until(self, epoch, seq):
        def there():
            self.take()
            return self.consumer.head is not None and self.consumer.head >= (epoch, seq)

        wait_until(there, f"seq {seq} arrives", 15)

    def take_baseline(self):
        head = wait_until(lambda: self.snapfeed.partition()["head"], "the first snapshot")
        self.until(self.snapfeed.partition()["epoch"], head)
        self.consumer.compare(self.part.path)

    def after(self, action) -> list[dict]:
        """The changes of a snapshot taken after `action`."""
        self.take()
        before = len(self.consumer.diffs)
        action()
        answer = self.snapfeed.snapshot()
        self.until(answer["epoch"], answer["seq"])
        found = self.consumer.diffs[before:]
        assert [d["seq"] for d in found] == ([answer["seq"]] if answer["changes"] else [])
        changes = [c for d in found for c in d["changes"]]
        assert len(changes) == answer["changes"]
        self.consumer.compare(self.part.path)
        return changes


@pytest.fixture
def feed(part, tmp_path):
    with (
        mosquitto(tmp_path) as broker,
        collector(broker, "snapfeed/#") as seen,
        daemon(tmp_path, part.path, broker=broker.url) as snapfeed,
    ):
        made = Feed(part, snapfeed, seen)
        made.take_baseline()
        yield made


def only(changes, parents=("",)):
    """The one change that is not just a directory's news about its own entries."""
    news = {"times", "size", "links"}
    rest = [
        c
        for c in changes
        if not (c["op"] == "modify" and c["type"] == "dir" and c["path"] in parents and set(c["changed"]) <= news)
    ]
    assert len(rest) == 1, json.dumps(rest, indent=1)
    return rest[0]


def differing(change):
    return {k for k in change["after"] if change["after"][k] != change["before"].get(k)}


def test_each_operation_is_seen_as_what_it_is(feed):
    top, fs = feed.part.path, feed.part.fs
    after = feed.after

    change = only(after(lambda: (top / "file").write_bytes(b"x" * 10_000)))
    assert (change["op"], change["type"], change["path"]) == ("create", "file", "file")
    assert change["before"] is None
    assert (change["after"]["size"], change["after"]["nlink"]) == ("10000", 1)
    first = change["id"]
    assert first.split(".")[0] == str((top / "file").stat().st_ino)

    def append():
        with (top / "file").open("ab") as file:
            file.write(b"y" * 5000)

    change = only(after(append))
    assert (change["op"], change["path"], change["id"]) == ("modify", "file", first)
    assert {"data", "size", "times"} <= set(change["changed"]) <= {"data", "size", "times"}
    assert (change["before"]["size"], change["after"]["size"]) == ("10000", "15000")

    def overwrite():
        with (top / "file").open("r+b") as file:
            file.seek(4096)
            file.write(b"z" * 10)

    change = only(after(overwrite))
    assert (change["op"], change["path"], change["id"]) == ("modify", "file", first)
    assert set(change["changed"]) == {"data", "times"}
    if fs == "ext4":
        assert change["ranges_quality"] == "unknown"
        assert change["content"] is None
    else:
        assert any(o <= 4096 and o + n >= 4106 for o, n in change["ranges"])
        assert (top / change["content"]).read_bytes() == (top / "file").read_bytes()

    change = only(after((top / "dir").mkdir))
    assert (change["op"], change["type"], change["path"]) == ("create", "dir", "dir")

    change = only(after(lambda: (top / "file").rename(top / "dir" / "moved")), ("", "dir"))
    assert (change["op"], change["path"], change["from"], change["id"]) == ("rename", "dir/moved", "file", first)
    assert set(change["changed"]) <= {"times"}
    assert change["before"]["mtime_ns"] == change["after"]["mtime_ns"]

    change = only(after(lambda: (top / "dir").rename(top / "folder")))
    assert (change["op"], change["type"], change["path"], change["from"]) == ("rename", "dir", "folder", "dir")

    changes = after(lambda: os.link(top / "folder" / "moved", top / "second"))
    link = only([c for c in changes if c["op"] == "link"])
    assert (link["path"], link["from"], link["id"]) == ("second", "folder/moved", first)
    assert link["after"]["nlink"] == 2

    change = only(after(lambda: (top / "second").chmod(0o640)))
    assert (change["op"], change["id"]) == ("modify", first)
    assert change["path"] in ("second", "folder/moved")
    assert set(change["changed"]) == {"mode", "times"}
    assert (change["before"]["mode"], change["after"]["mode"]) == (0o644, 0o640)
    assert differing(change) == {"mode", "ctime_ns"}

    change = only(after(lambda: os.chown(top / "second", 1, 2)))
    assert set(change["changed"]) == {"owner", "times"}
    assert [(change[k]["uid"], change[k]["gid"]) for k in ("before", "after")] == [(0, 0), (1, 2)]

    change = only(after(lambda: os.setxattr(top / "second", "user.note", b"\0\xff")))
    assert set(change["changed"]) == {"xattr", "times"}
    assert differing(change) - {"xattrs"} == {"ctime_ns"}

    change = only(after(lambda: os.symlink("folder/moved", top / "sym")))
    assert (change["op"], change["type"], change["path"], change["target"]) == (
        "create",
        "symlink",
        "sym",
        "folder/moved",
    )

    changes = after((top / "second").unlink)
    unlink = only([c for c in changes if c["op"] == "unlink"])
    assert (unlink["path"], unlink["id"]) == ("second", first)

    change = only(after((top / "folder" / "moved").unlink), ("folder",))
    assert (change["op"], change["type"], change["path"], change["id"]) == ("delete", "file", "folder/moved", first)
    assert change["after"] is None
    assert change["before"]["uid"] == 1

    change = only(after((top / "folder").rmdir))
    assert (change["op"], change["type"], change["path"]) == ("delete", "dir", "folder")

    assert after(lambda: None) == []


def test_the_special_ones(feed):
    """Things that are easily mistaken for one another."""
    top = feed.part.path

    def make():
        for number in range(3):
            (top / f"f{number}").write_bytes(b"%d" % number)
        (top / "a").mkdir()
        (top / "b").mkdir()
        (top / "a" / "in").write_bytes(b"in")
        os.mkfifo(top / "fifo")
        os.mknod(top / "char", stat.S_IFCHR | 0o600, os.makedev(7, 99))

    types = {c["path"]: c["type"] for c in feed.after(make) if c["op"] == "create"}
    assert types == {
        "f0": "file", "f1": "file", "f2": "file", "a": "dir", "b": "dir", "a/in": "file", "fifo": "fifo", "char": "char"
    }  # fmt: skip

    def swap():
        os.rename(top / "f0", top / "tmp")
        os.rename(top / "f1", top / "f0")
        os.rename(top / "tmp", top / "f1")
        os.rename(top / "b", top / "a" / "b")

    changes = feed.after(swap)
    assert {c["op"] for c in changes} == {"rename", "modify"}

    def replace():
        (top / "new").write_bytes(b"another")
        os.replace(top / "new", top / "f2")

    ops = sorted(c["op"] for c in feed.after(replace) if c["path"] == "f2")
    assert ops == ["create", "delete"]

    def same_size_and_time():
        before = (top / "f1").stat()
        (top / "f1").write_bytes(b"9")
        os.utime(top / "f1", ns=(before.st_atime_ns, before.st_mtime_ns))

    change = only(feed.after(same_size_and_time))
    assert change["path"] == "f1"
    assert "times" in change["changed"]
    assert feed.part.fs == "ext4" or "data" in change["changed"]

    def comes_and_goes():
        (top / "short").write_bytes(b"x")
        (top / "short").unlink()

    assert all(c["path"] == "" for c in feed.after(comes_and_goes))

    hostile = [b"new\nline", b"\x1b[2J", b"\xff\xfe", b"-rf", b"#", b"+", b"x" * 255, "\u202etxt".encode(), b"\\xff"]

    def names():
        for one in hostile:
            with open(os.path.join(os.fsencode(top), one), "wb"):
                pass

    made = {name(c, "path") for c in feed.after(names) if c["op"] == "create"}
    assert made == set(hostile)


def test_random_work_arrives_exactly(feed):
    """The sum of all pages is the partition, after each of the snapshots."""
    work = Worker(os.fsencode(feed.part.path), int(os.environ.get("SEED", "7")), reflink=feed.part.fs != "ext4")
    for _ in range(int(os.environ.get("ROUNDS", "15"))):

        def some():
            for _ in range(work.random.randrange(1, 40)):
                work.step()

        feed.after(some)
