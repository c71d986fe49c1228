"""The nine invariants of the design, where no other test fails when one of them is broken on purpose.

1 replay                   steps that are easily put in a wrong order; a tree also of what was seen in motion
2 events are hints         a loss demotes no other partition; what no event tells is found
3 durable before public    a stranger's system file; the cursor waits for the PUBACK; and test_kill_points.py, test_power_cut.py
4 own writes invisible     what happens in the system directory; low thresholds and idleness; volume
5 cost                     system calls of a snapshot do not grow with what exists
6 no guess                 an error at any system call; content, consistency and quality are what they say
7 names are bytes          errors, mount points and logs show nothing unescaped
8 one's own trouble        a frozen partition, and a bug met by one, delay no other
9 the host comes first     no permission events; no descriptor stays on a partition; the extent guard as configured
"""

import asyncio
import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import pytest
from broker_processes import collector, mosquitto
from consumer import Consumer
from daemon_process import HOST, adopt, daemon
from daemon_process import snapfeed as command
from partitions import partition, require, run, tmpfs, wait_until
from strangers import stranger
from test_compare import replay
from test_no_guess import ident
from test_overflow import LIMITED, sysctl
from test_table_backends import Engine
from trees import ROOT, Tree

from comparer.dirty import Dirty
from comparer.errors import DamageError, SnapfeedError, TransientError
from comparer.model import FileType, Name
from feed.pages import Envelope
from snapshotter.partition import partition_at
from snapshotter.systemfile import SystemFile
from snapshotter.visit import Visit
from watcher.outbox import JournalOutbox
from watcher.said import describe
from watcher.work import Order, take

DISKS = ["xfs", "btrfs", "ext4"]


class Feed:
    """A partition's pages, taken by a Consumer as they arrive."""

    def __init__(self, top, snapfeed, seen, label=None):
        self.top, self.snapfeed, self.seen = top, snapfeed, seen
        self.label = label or snapfeed.partition(top)["partition"]
        self.consumer = Consumer()
        self._taken = 0
        self.topic = f"snapfeed/{HOST}/{self.label}/changes"

    def take(self):
        messages = self.seen.messages(self.topic)
        fresh, self._taken = messages[self._taken :], len(messages)
        self.consumer.feed(m.payload for m in fresh)
        return self.consumer

    def until(self, answer):
        wait_until(lambda: self.take().head == (answer["epoch"], answer["seq"]), f"seq {answer['seq']} arrives")

    def exact(self):
        answer = self.snapfeed.snapshot(self.label)
        self.until(answer)
        self.consumer.compare(self.top)
        return answer

    def after(self, action) -> list[dict]:
        """The changes of a snapshot taken after `action`, but for the root directory's times."""
        before = len(self.take().diffs)
        action()
        self.exact()
        changes = [c for d in self.consumer.diffs[before:] for c in d["changes"]]
        return [c for c in changes if not (c["path"] == "" and set(c["changed"]) <= {"times", "size", "links"})]

    def quiet(self):
        """Everything is published, and the cursor written."""

        def published():
            (mine,) = [p for p in self.snapfeed.status()["partitions"] if p["partition"] == self.label]
            return mine["backlog"] == 0

        wait_until(published, "it is published")


@contextlib.contextmanager
def place(fs, directory, size="512M"):
    """A partition of kind `fs`, or a directory of one that is watched by inotify."""
    if fs == "inotify":
        with tmpfs(directory) as top:
            (top / "watched").mkdir()
            command("init", "--directory", top / "watched", "--io-threshold", "1GiB", "--time-threshold", "1h")
            yield top / "watched"
    else:
        with partition(fs, directory, size) as part:
            yield part.path


@contextlib.contextmanager
def feeding(top, directory, **options):
    """A Feed of a partition that has its baseline."""
    with (
        mosquitto(directory) as broker,
        collector(broker, "snapfeed/#") as seen,
        daemon(directory, top, broker=broker.url, **options) as snapfeed,
    ):
        made = Feed(top, snapfeed, seen, snapfeed.partition()["partition"])
        wait_until(lambda: snapfeed.partition()["head"], "the baseline")
        made.exact()
        yield made


@contextlib.contextmanager
def strace(pid, log, *options):
    """strace attached to a process and all its threads, its output in `log`."""
    require(shutil.which("strace") is not None, "strace")
    process = subprocess.Popen(
        ["strace", "-f", "-o", log, *options, "-p", str(pid)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        line = process.stderr.readline()
        assert b"attached" in line, line
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=1)
        except subprocess.TimeoutExpired:  # it waits for what it has killed
            process.kill()
            process.communicate()


@contextlib.contextmanager
def within(seconds):
    """Our own code that goes in circles is a failure, not a wait."""

    def late(*_):
        raise AssertionError(f"not within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- 1: replay


def ordered(tree):
    """Directories d and e, d/e2, and files in each of them."""
    made = {"d": tree.create(ROOT, b"d", FileType.DIR), "e": tree.create(ROOT, b"e", FileType.DIR)}
    made["d/e2"] = tree.create(made["d"], b"e2", FileType.DIR)
    for place in ("d", "e", "d/e2"):
        tree.create(made[place], b"f", FileType.FILE)
    return made


STEPS = {
    "a file leaves a directory that goes": [("d/f", "f"), ("d", None)],
    "a directory leaves a directory that goes": [("d/e2", "e2"), ("d", None)],
    "a file leaves the depth of a tree that goes": [("d/e2/f", "e/g"), ("d", None)],
    "a directory gives its name to what was in it": [("d/e2", "t"), ("d", None), ("t", "d")],
    "parent and child change places": [("d/e2", "t"), ("d", "t/e2"), ("t", "d")],
    "a file takes the name of a directory that goes": [("e", None), ("d/f", "e")],
    "a directory takes the name of a file that goes": [("d/f", None), ("e", "d/f")],
    "two directories change places": [("d", "t"), ("e", "d"), ("t", "e")],
    "three files in a circle": [("d/f", "t"), ("e/f", "d/f"), ("d/e2/f", "e/f"), ("t", "d/e2/f")],
    "a chain of names": [("d/f", "g"), ("e/f", "d/f"), ("d/e2/f", "e/f")],
    "into a new directory, which takes the place of the old one": [("e/f", "t"), ("e", None), ("d", "e"), ("t", "d")],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_steps_that_are_easily_put_in_a_wrong_order(steps):
    old = Tree()
    ordered(old)
    new = old.copy()

    def find(path):
        directory, _, last = path.rpartition("/")
        return Name(new.by_path()[directory.encode()][0], last.encode())

    for source, target in steps:
        if target is None:
            new.remove(find(source))
        else:
            new.rename(find(source), find(target))
    replay(old, new)


@pytest.mark.kernel
def test_what_was_seen_in_motion_leaves_a_tree(xfs):
    """A new directory is looked at, with the files moved into it, and moves on before the look is over."""
    top = xfs.path
    (top / "old").mkdir()
    names = [b"f%d" % number for number in range(30)]
    for name in names:
        (top / "old" / os.fsdecode(name)).write_text("x")
    engine = Engine(top, "ficlone")
    engine.snapshot(Dirty())
    root, old = ident(top, ""), ident(top, "old")
    (top / "new").mkdir()
    for name in names:
        os.rename(top / "old" / os.fsdecode(name), top / "new" / os.fsdecode(name))
    events = [Dirty(names={Name(root, b"new")})]

    def more():
        if not events:
            return Dirty()
        os.rename(top / "new", top / "moved on")  # its event is one for the next snapshot
        return events.pop()

    dirty = Dirty(objects={root, old}, names={Name(root, b"new"), *(Name(old, name) for name in names)})
    with contextlib.suppress(FileNotFoundError):  # of the engine's own look at the content: the files are on their way
        engine.snapshot(dirty, more)
    with contextlib.closing(sqlite3.connect(top / ".snapfeed/system.db")) as db:
        assert not db.execute("SELECT * FROM entry WHERE ino NOT IN (SELECT ino FROM inode)").fetchall()
    engine.snapshot(Dirty(objects={root}, names={Name(root, b"new"), Name(root, b"moved on")}))
    engine.check()


@pytest.mark.kernel
def test_swapped_names_without_handles(tmp_path):
    with tmpfs(tmp_path) as top:
        for name in ("a", "b", "c"):
            (top / name).write_text(name)
        os.link(top / "a", top / "a too")
        engine = Engine(top, "metadata", by_handle=False)
        engine.snapshot(Dirty())
        for old, new in (("a", "t"), ("b", "a"), ("c", "b"), ("t", "c")):
            os.rename(top / old, top / new)
        with within(20):
            changes = engine.snapshot(Dirty(lost="test"))
        assert {c.op for c in changes} <= {"rename", "modify"}
        engine.check()


# ---- 2: events are hints


@pytest.mark.kernel
def test_a_loss_demotes_no_other_partition(tmp_path):
    with contextlib.ExitStack() as stack:
        hit, other = (stack.enter_context(partition(fs, tmp_path)).path for fs in ("xfs", "ext4"))
        stack.enter_context(sysctl("fs.fanotify.max_queued_events", 16))
        broker = stack.enter_context(mosquitto(tmp_path))
        seen = stack.enter_context(collector(broker, "snapfeed/#"))
        snapfeed = stack.enter_context(daemon(tmp_path, hit, other, broker=broker.url, config=LIMITED, time="1s"))
        feeds = [Feed(top, snapfeed, seen) for top in (hit, other)]
        for feed in feeds:
            (feed.top / "old").write_text("x")
            feed.exact()
        feeds[0].exact()  # what was young is looked at again
        feeds[1].exact()
        before = [len(feed.consumer.diffs) for feed in feeds]
        snapfeed.send(signal.SIGSTOP)
        for number in range(40):
            (hit / f"file{number}").write_text("x")
        (other / "file").write_text("x")
        snapfeed.send(signal.SIGCONT)
        triggers = []
        for feed, least in zip(feeds, before, strict=True):
            wait_until(lambda feed=feed, least=least: len(feed.take().diffs) > least, "a diff of what was done")
            triggers.append({d["trigger"] for d in feed.consumer.diffs[least:]})
            feed.exact()
        assert triggers == [{"reconcile"}, {"time"}]
        # the true difference, and not all there is
        told = [c["path"] for d in feeds[0].consumer.diffs[before[0] :] for c in d["changes"]]
        assert sorted(told) == sorted(["", *(f"file{number}" for number in range(40))])


@pytest.mark.kernel
@pytest.mark.parametrize("trigger", ["volume", "reconcile"])
def test_what_no_event_tells_is_found(xfs, tmp_path, trigger):
    """A file written through a mapping that stays open: by its volume, or with the periodic comparison of everything."""
    size = 16 << 20 if trigger == "volume" else 4096
    check = 'reconcile = "1s"' if trigger == "reconcile" else ""
    config = f'[broker]\nhost = "{HOST}"\n[defaults]\n{check}\n'
    (xfs.path / "mapped").write_bytes(bytes(size))
    with (
        feeding(xfs.path, tmp_path, config=config, io="1MiB") as feed,
        (xfs.path / "mapped").open("r+b") as file,
        mmap.mmap(file.fileno(), size) as memory,
    ):
        feed.exact()
        memory[:] = b"x" * size
        memory.flush()

        def told():
            changes = [(d["trigger"], c) for d in feed.take().diffs for c in d["changes"] if c["op"] == "modify"]
            return [t for t, c in changes if c["path"] == "mapped" and "data" in c["changed"]]

        assert wait_until(told, "it is told") == [trigger]
        feed.consumer.compare(xfs.path)


# ---- 3: durable before public


def order(dirty=None):
    return Order("command", dirty or Dirty(lost="test"), 0, 0, 4, 1 << 17)


@pytest.mark.kernel
def test_a_system_file_of_another_partition_is_not_taken(xfs, tmp_path):
    """Also not one that is further on."""
    (tmp_path / "other").mkdir()
    with partition("xfs", tmp_path / "other") as other:
        for part, count in ((xfs, 1), (other, 3)):
            adopt(part.path)
            for number in range(count):
                (part.path / f"file{number}").write_text("x")
                with Visit(partition_at(os.fsencode(part.path))) as visit:
                    take(visit, order(), Dirty, lambda _: None)
        store = ".snapfeed/system.db"
        shutil.copy(xfs.path / store, tmp_path / "kept")
        shutil.copy(other.path / store, xfs.path / store)
        for foreign in ("uuid", "epoch"):  # each of the two tells
            with contextlib.closing(sqlite3.connect(xfs.path / store)) as db, db:
                (value,) = (
                    sqlite3.connect(tmp_path / "kept")
                    .execute("SELECT value FROM meta WHERE key = ?", ("epoch" if foreign == "uuid" else "uuid",))
                    .fetchone()
                )
                db.execute("UPDATE meta SET value = ? WHERE key = ?", (value, "epoch" if foreign == "uuid" else "uuid"))
            with pytest.raises(DamageError), Visit(partition_at(os.fsencode(xfs.path))):
                pass
            shutil.copy(other.path / store, xfs.path / store)


@pytest.mark.kernel
def test_the_cursor_waits_for_the_acknowledgement(ext4):
    adopt(ext4.path)
    part = partition_at(os.fsencode(ext4.path))
    with Visit(part) as visit:
        take(visit, order(), Dirty, lambda _: None)
        epoch = visit.file.settings().epoch

    async def in_file(function):
        with SystemFile.open(part.system_file) as file:
            return function(file)

    async def scenario():
        envelope = Envelope("edge7", "data", "u", epoch, 0, None, 0, "", 0, "", None)
        outbox = JournalOutbox("data", "t", envelope, in_file)
        pages = await outbox.fetch(None, 1 << 17, 10)
        await outbox.flush()
        assert await in_file(SystemFile.acknowledged) == (0, 0)
        assert await outbox.fetch(None, 1 << 17, 10) == pages
        await outbox.acknowledge(pages[-1].position)
        await outbox.flush()
        assert await in_file(SystemFile.acknowledged) == tuple(pages[-1].position)

    asyncio.run(scenario())


# ---- 4: own writes are invisible


@pytest.mark.kernel
@pytest.mark.parametrize("fs", [*DISKS, "inotify"])
def test_what_happens_in_the_system_directory_is_no_change(fs, tmp_path):
    with place(fs, tmp_path) as top, feeding(top, tmp_path) as feed:
        system = top / ".snapfeed"

        def work():
            (system / "x").write_text("x")
            (system / "d").mkdir()
            (system / "d" / "f").write_text("x")
            os.rename(system / "x", system / "d" / "y")
            os.setxattr(system / "d", "trusted.mine", b"x")
            system.chmod(0o711)
            system.chmod(0o700)

        assert feed.after(work) == []

        def aside():
            os.rename(system, top / "aside")
            os.rename(top / "aside", system)

        assert feed.after(aside) == []
        if fs != "btrfs":  # there it is a subvolume of its own
            (came,) = feed.after(lambda: os.rename(system / "d", top / "d"))[:1]
            assert (came["op"], came["path"]) == ("create", "d")


@pytest.mark.kernel
@pytest.mark.parametrize("fs", DISKS)
def test_low_thresholds_do_not_feed_on_our_own_work(fs, tmp_path):
    """One write, one diff; then heartbeats alone, though the threshold is less than a snapshot writes."""
    with partition(fs, tmp_path) as part, feeding(part.path, tmp_path, io="1B", time="1s") as feed:
        before = len(feed.consumer.diffs)
        (part.path / "file").write_bytes(b"x" * 8192)

        def beats():
            feed.take()
            states = [json.loads(m.payload) for m in feed.seen.messages(feed.topic.replace("changes", "state"))]
            told = [s["last"]["skipped"] for s in states if s["last"] and s["head"] == feed.consumer.head[1]]
            return len(feed.consumer.diffs) > before and len([t for t in told if t]) >= 2

        wait_until(beats, "two heartbeats after the diff")
        changes = [c for d in feed.consumer.diffs[before:] for c in d["changes"]]
        assert sorted({c["path"] for c in changes}) == ["", "file"]
        assert len(feed.consumer.diffs) - before <= 2  # the write may have been seen half done
        feed.consumer.compare(part.path)


# ---- 5: a snapshot costs what changed

LOOKS = "statx,newfstatat,openat,open_by_handle_at,name_to_handle_at,getdents64,ioctl,pread64,pwrite64,listxattr,getxattr,readlinkat"  # noqa: E501


@pytest.mark.kernel
@pytest.mark.parametrize("fs", [*DISKS, "inotify"])
def test_a_snapshot_costs_what_changed(fs, tmp_path):
    with place(fs, tmp_path, "1G") as top, feeding(top, tmp_path) as feed:
        costs, made = [], 0
        for total in (40, 4000):
            while made < total:
                if made % 100 == 0:
                    (top / f"d{made // 100}").mkdir()
                (top / f"d{made // 100}" / f"f{made}").write_bytes(b"x")
                made += 1
            for _ in range(3):
                feed.snapfeed.snapshot()  # what was young is looked at again by the next one
            feed.quiet()
            found = []
            for number in range(3):
                (top / "d0" / f"f{number}").write_bytes(b"changed")
                log = tmp_path / f"calls{total}-{number}"
                with strace(feed.snapfeed.pid, log, "-e", f"trace={LOOKS}"):
                    answer = feed.snapfeed.snapshot()
                assert 1 <= answer["changes"] <= 3
                found.append(len(log.read_bytes().splitlines()))
                feed.quiet()
            costs.append(min(found))
        # a visit of the publisher may fall among them; looking at what did not change would be some thousand
        assert costs[1] <= costs[0] + 300, costs
        feed.exact()


# ---- 6: no guess is published as fact

CALLS = ["ioctl", "statx", "openat", "name_to_handle_at", "getdents64", "listxattr", "getxattr", "readlinkat"]
FAULTS = [
    *((call, "EIO", "") for call in CALLS),
    *(("open_by_handle_at", error, more) for error in ("EIO", "ESTALE") for more in ("", "+")),  # once, or from then on
]


@pytest.mark.kernel
@pytest.mark.parametrize("fs", DISKS)
def test_an_error_at_any_call_invents_and_loses_nothing(fs, tmp_path):
    """Each kind of call that tells something fails, early or late: the snapshot tells of the one change there is, or fails."""
    require(shutil.which("strace") is not None, "strace")
    with partition(fs, tmp_path) as part:
        top = part.path
        adopt(top)
        for directory in ("d", "d/e", "d/e/g"):
            (top / directory).mkdir()
            for number in range(3):
                (top / directory / f"f{number}").write_bytes(b"x" * 5000)
                os.setxattr(top / directory / f"f{number}", "user.x", b"x")
            (top / directory / "link").symlink_to("f0")
        os.sync()
        found = partition_at(os.fsencode(top))
        with Visit(found) as visit:
            abilities = visit.abilities
        paths = [b"", *(os.path.relpath(p, os.fsencode(top)) for p in map(os.fsencode, top.rglob("*")))]
        paths = [p for p in paths if not p.startswith(b".snapfeed")]
        places = {path: ident(top, path) for path in paths}
        names = {Name(places[os.path.dirname(p)], os.path.basename(p)) for p in paths if p}

        def snapshot(dirty, *inject):
            """Whether it succeeded."""
            with Visit(found, abilities) as visit, contextlib.ExitStack() as stack:
                if inject:
                    stack.enter_context(strace(os.getpid(), tmp_path / "trace", *inject))
                with contextlib.suppress(OSError, SnapfeedError), within(20):
                    take(visit, order(dirty), Dirty, lambda _: None)
                    return True
            return False

        def told(after):
            """(The newest snapshot, what the journal tells after another one.)"""
            with SystemFile.open(found.system_file) as file:
                bodies = [file.page(seq, 1)[1] for seq in range(after + 1, file.head() + 1)]
                changes = [change for body in bodies for change in json.loads(b"[" + body + b"]")]
                return file.head(), [(c["op"], c["path"]) for c in changes]

        head, before = 0, -1
        while head != before:  # until nothing is young
            assert snapshot(Dirty(lost="test"))
            before, head = head, told(0)[0]
        hints = [
            lambda: Dirty(lost="test"),
            lambda: Dirty(objects=set(places.values()), names=set(names)),
            lambda: Dirty(names=set(names)),
        ]
        rounds = failed = 0
        for hint in hints:
            for call, error, more in FAULTS:
                number = 1
                while True:
                    rounds += 1
                    changed = f"d/e/g/f{rounds % 3}"  # not one that is looked at because it is young
                    (top / changed).chmod(0o600 + rounds % 7)
                    fault = f"inject={call}:error={error}:when={number}{more}"
                    if not snapshot(hint(), "-e", fault):
                        failed += 1
                        assert snapshot(hint()), fault
                    head, changes = told(head)
                    assert changes == [("modify", changed)], fault
                    if b"INJECTED" not in (tmp_path / "trace").read_bytes():
                        break
                    number += 1 if call == "ioctl" else 1 + number // 2
        assert failed >= 10, (failed, rounds)


@pytest.mark.kernel
@pytest.mark.parametrize("fs", [*DISKS, "inotify"])
def test_the_feed_says_how_far_it_is_to_be_believed(fs, tmp_path):
    with place(fs, tmp_path) as top, feeding(top, tmp_path) as feed:
        feed.after(lambda: (top / "file").write_bytes(b"x" * 8192))
        (change,) = feed.after(lambda: (top / "file").write_bytes(b"y" * 8192))
        expected = {"xfs": ("per-file", "exact"), "btrfs": ("subvolume", "exact")}.get(fs, ("metadata", "unknown"))
        assert {d["consistency"] for d in feed.consumer.diffs} == {expected[0]}
        assert feed.snapfeed.partition()["consistency"] == expected[0]
        assert change["ranges_quality"] == expected[1]
        assert (change["content"] is None) == (expected[0] == "metadata")


@pytest.mark.kernel
def test_ranges_are_exact_only_where_nobody_can_have_moved_blocks(xfs, tmp_path):
    with feeding(xfs.path, tmp_path) as feed:
        feed.after(lambda: (xfs.path / "file").write_bytes(b"x" * 16384))
        before = (xfs.path / "file").stat()

        def write():
            with (xfs.path / "file").open("r+b") as file:
                file.write(b"y" * 4096)
            os.utime(xfs.path / "file", ns=(before.st_atime_ns, before.st_mtime_ns))

        (change,) = feed.after(write)
        assert (change["ranges"], change["ranges_quality"]) == ([[0, 4096]], "superset")


@pytest.mark.kernel
def test_content_is_as_long_as_its_change_says(xfs, tmp_path):
    """Of a file that grows without a pause."""
    with feeding(xfs.path, tmp_path) as feed, stranger(xfs.path) as other:
        other.begin(
            "fd = os.open('log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
            "while not os.path.exists('stop'): os.write(fd, b'x')"
        )
        wait_until((xfs.path / "log").exists, "it writes")
        wrong = []
        for _ in range(20):
            feed.until(feed.snapfeed.snapshot())
            for change in feed.consumer.diffs[-1]["changes"]:
                if change["path"] == "log" and change["content"] is not None:
                    kept = (xfs.path / change["content"]).stat().st_size
                    wrong += [(kept, change["after"]["size"])] * (str(kept) != change["after"]["size"])
        (xfs.path / "stop").touch()
        other.wait()
        assert wrong == []
        feed.exact()


# ---- 7: names are bytes


@pytest.mark.kernel
def test_errors_and_mount_points_show_nothing_unescaped(tmp_path):
    bad = "\x1b]0;t\x07\n\u202e"
    (tmp_path / bad).mkdir()
    with partition("btrfs", tmp_path / bad) as part, contextlib.ExitStack() as stack:
        stack.callback(run, "umount", "-l", part.path, check=False)
        run("btrfs", "subvolume", "create", part.path / f"sub{bad}")
        with feeding(part.path, tmp_path) as feed:
            (part.path / bad).write_text("x")
            answer = feed.exact()
            label = feed.label
            assert re.fullmatch("[A-Za-z0-9_-]{1,64}", label)
            shown = [
                feed.snapfeed.command(*words, check=False)
                for words in (
                    ["status"],
                    ["snapshots", label],
                    ["diff", label, "1", str(answer["seq"])],
                    ["snapshot"],
                    ["snapshot", bad],
                    ["verify", label],
                )
            ]
            feed.snapfeed.ask("status")
            part.umount()
            wait_until(lambda: feed.snapfeed.partition()["state"] == "unmounted", "it is seen")
            shown += [feed.snapfeed.command("status"), feed.snapfeed.command("snapshot", check=False)]
            texts = [s.stdout + s.stderr for s in shown] + [feed.snapfeed.output()]
        for text in texts:
            assert not set(text) & {"\x1b", "\x07", "\u202e"}, text
            assert "]0;t" in texts[-1]  # it was spoken of
        assert not any(bad in m.topic for m in feed.seen.messages())


@pytest.mark.parametrize("error", [OSError(5, "I/O error", b"\x1b[2J\n\xff"), TransientError("\x1b[2J\n\u202e\udcff")])
def test_an_error_is_one_line_that_moves_nothing(error):
    assert describe(error).isprintable()


# ---- 8: one partition's trouble stays its own


def blocked(pid):
    """Whether a thread of a process waits in the kernel, not to be woken."""
    states = [Path(task, "stat").read_text().rpartition(") ")[2][0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return "D" in states


@pytest.mark.kernel
@pytest.mark.parametrize("fs", DISKS)
def test_a_partition_that_blocks_delays_no_other(fs, tmp_path):
    require(shutil.which("fsfreeze") is not None, "fsfreeze")
    (tmp_path / "other").mkdir()
    with contextlib.ExitStack() as stack:
        stuck = stack.enter_context(partition(fs, tmp_path))
        other = stack.enter_context(partition("xfs", tmp_path / "other"))
        broker = stack.enter_context(mosquitto(tmp_path))
        seen = stack.enter_context(collector(broker, "snapfeed/#"))
        snapfeed = stack.enter_context(daemon(tmp_path, stuck.path, other.path, broker=broker.url))
        feeds = [Feed(part.path, snapfeed, seen) for part in (stuck, other)]
        for feed in feeds:
            feed.exact()
            feed.quiet()
        (stuck.path / "file").write_text("x")
        answers = []
        asking = threading.Thread(target=lambda: answers.append(snapfeed.snapshot(stuck.path)))
        run("fsfreeze", "-f", stuck.path)
        try:
            asking.start()
            wait_until(lambda: blocked(snapfeed.pid), "it waits for the disk")
            snapfeed.send(signal.SIGHUP)  # every partition has news to tell

            def heads():
                found = seen.messages(feeds[1].topic.replace("changes", "state"))
                return [json.loads(m.payload)["head"] for m in found if m.payload]

            for number in range(3):
                started = time.monotonic()
                (other.path / f"file{number}").write_text("x")
                answer = feeds[1].exact()
                wait_until(lambda answer=answer: heads()[-1] == answer["seq"], "its state is published", 2)
                snapfeed.status()
                assert time.monotonic() - started < 2
            other.umount()
            wait_until(lambda: snapfeed.partition(other.path)["state"] == "unmounted", "it is seen", 5)
            other.mount()
            wait_until(lambda: snapfeed.partition(other.path)["state"] == "watching", "it is seen", 5)
            feeds[1].exact()
            assert asking.is_alive()
        finally:
            run("fsfreeze", "-u", stuck.path)
            asking.join(30)
        assert answers[0]["changes"] >= 1
        feeds[0].exact()


@pytest.mark.kernel
def test_a_bug_that_one_partition_meets_is_its_own(xfs, ext4, tmp_path):
    with daemon(tmp_path, xfs.path, ext4.path, started=False) as snapfeed:
        with SystemFile.open(os.fsencode(xfs.path / ".snapfeed/system.db")) as file, file.transaction():
            file.db.execute("UPDATE meta SET value = 'soon' WHERE key = 'time_threshold'")  # what no version writes
        snapfeed.start(ready=False)
        wait_until(
            lambda: snapfeed.socket.exists() and snapfeed.alive() and snapfeed.partition(xfs.path)["state"] == "failed",
            "it has failed",
        )
        (ext4.path / "file").write_text("x")
        assert snapfeed.snapshot(ext4.path)["changes"] >= 1
        assert snapfeed.partition(ext4.path)["state"] == "watching"
        assert snapfeed.alive()


# ---- 9: the host comes first


@pytest.mark.kernel
def test_no_permission_events_and_no_descriptor_that_stays(part, tmp_path):
    with feeding(part.path, tmp_path) as feed:
        (part.path / "d").mkdir()
        (part.path / "d" / "file").write_text("x")
        feed.exact()
        feed.quiet()
        groups = []
        for fd in Path(f"/proc/{feed.snapfeed.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                assert os.stat(fd).st_dev != os.stat(part.path).st_dev, os.readlink(fd)
                text = Path(f"/proc/{feed.snapfeed.pid}/fdinfo/{fd.name}").read_text()
                if "fanotify flags:" in text:
                    groups.append(text)
        assert groups
        for text in groups:
            assert int(re.search("fanotify flags:([0-9a-f]+)", text)[1], 16) & 0xC == 0, "a class that may block"
            for mask in re.findall(" mask:([0-9a-f]+)", text):
                assert int(mask, 16) & 0x170000 == 0, "events that must be answered"
        run("umount", part.path)  # at once


@pytest.mark.kernel
def test_a_file_in_many_pieces_is_not_cloned(xfs, tmp_path):
    config = f'[broker]\nhost = "{HOST}"\n[defaults]\nmax_extents = 100\n'
    with feeding(xfs.path, tmp_path, config=config) as feed:

        def pieces(name, count):
            with (xfs.path / name).open("wb") as file:
                for number in range(count):
                    file.seek(number * 8192)
                    file.write(b"x" * 4096)
            os.sync()

        found = {c["path"]: c for c in feed.after(lambda: (pieces("few", 40), pieces("many", 400)))}
        assert found["few"]["content"] is not None
        assert found["many"]["content"] is None

        def touch():
            for name in ("few", "many"):
                with (xfs.path / name).open("r+b") as file:
                    file.write(b"y" * 4096)

        found = {c["path"]: c for c in feed.after(touch)}
        assert (found["few"]["ranges"], found["few"]["ranges_quality"]) == ([[0, 4096]], "exact")
        assert (found["many"]["content"], found["many"]["ranges_quality"]) == (None, "unknown")
