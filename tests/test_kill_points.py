"""Killed before every durable step: a snapshot, a first one, pruning, publishing, replays, a start, formatting, adopting, ...

After each kill it is started again and must be ready in time; a strict consumer that outlives the kills must hold what a walk of
the partition finds; no number is used again; nothing lies about. A sample here, every step with SNAPFEED_POINTS=all.
"""

import contextlib
import os
import shutil
import sqlite3
import sys
import time

import oracle
import pytest
from broker_processes import free_port
from consumer import Consumer
from daemon_process import CLI, snapfeed
from kill_points import CONSUMER, adopted, change, explore, litter, scene, traced, wipe
from partitions import loop_device, nobodys, partition, run, wait_until

from comparer.dirty import Dirty
from snapshotter.partition import is_adopted, partition_at
from snapshotter.visit import Visit
from watcher.work import Order, take

pytestmark = pytest.mark.kernel
KEEP_TWO = '[broker]\nhost = "testhost"\n[defaults]\nkeep = 2\n'


def disks(first, *others):
    """In the suite a scenario is run on one kind of file system, with SNAPFEED_POINTS on all of them."""
    return [first, *others] if "SNAPFEED_POINTS" in os.environ else [first]


@pytest.mark.parametrize("fs", disks("xfs", "btrfs", "ext4"))
def test_a_snapshot(fs, tmp_path):
    with partition(fs, tmp_path) as part, scene(part.path, tmp_path) as it:
        it.snapfeed.start()
        it.judge()

        def once(number, tally):
            change(it.top, it.rounds)
            it.rounds += 1
            outcome = it.through(number, tally, it.snapfeed.snapshot)
            it.judge()
            return outcome

        explore(f"snapshot {fs}", {"xfs": 60, "btrfs": 40, "ext4": 40}[fs], once)


@pytest.mark.parametrize("fs", disks("ext4", "xfs", "btrfs"))
def test_a_first_snapshot(fs, tmp_path):
    with partition(fs, tmp_path) as part, scene(part.path, tmp_path) as it:
        for number in range(3):
            change(it.top, number)

        def once(number, tally):
            it.snapfeed.kill()
            wipe(it.top)
            adopted(it.top)
            outcome = it.through(number, tally, nothing, start=True)
            it.judge()
            return outcome

        explore(f"baseline {fs}", {"xfs": 110, "btrfs": 50, "ext4": 50}[fs], once)
        assert all(one["baseline"] for one in it.consumer.diffs if one["parent"] is None)


@pytest.mark.parametrize("fs", disks("btrfs", "xfs", "ext4"))
def test_a_start_after_changes_while_it_was_away(fs, tmp_path):
    with partition(fs, tmp_path) as part, scene(part.path, tmp_path) as it:
        it.snapfeed.start()
        it.judge()

        def once(number, tally):
            it.snapfeed.kill()
            change(it.top, it.rounds)
            it.rounds += 1
            outcome = it.through(number, tally, nothing, start=True)
            it.judge()
            return outcome

        explore(f"reconcile {fs}", {"xfs": 70, "btrfs": 50, "ext4": 50}[fs], once)


@pytest.mark.parametrize("fs", disks("xfs", "btrfs"))
def test_a_start_after_a_kill(fs, tmp_path):
    """What a killed snapshot has left is swept by one that is killed as well."""
    with partition(fs, tmp_path) as part, scene(part.path, tmp_path) as it:
        it.snapfeed.start()
        it.judge()

        def once(number, tally):
            change(it.top, it.rounds)
            it.rounds += 1
            it.snapfeed.arm({"xfs": 30, "btrfs": 15}[fs] + number % 6)
            with contextlib.suppress(AssertionError, OSError, ValueError):
                it.snapfeed.snapshot()
            it.snapfeed.process.wait(10)
            assert it.snapfeed.outcome().killed
            outcome = it.through(number, tally, nothing, start=True)
            it.judge()
            return outcome

        explore(f"sweep {fs}", {"xfs": 70, "btrfs": 50}[fs], once)


@pytest.mark.parametrize("fs", disks("btrfs", "xfs"))
def test_pruning(fs, tmp_path):
    with partition(fs, tmp_path) as part, scene(part.path, tmp_path, config=KEEP_TWO) as it:
        it.snapfeed.start()
        it.judge()

        def act():
            for _ in range(2):
                change(it.top, it.rounds)
                it.rounds += 1
                it.snapfeed.snapshot()

        for _ in range(2):
            act()

        def once(number, tally):
            outcome = it.through(number, tally, act)
            it.judge()
            return outcome

        explore(f"prune {fs}", {"xfs": 150, "btrfs": 80}[fs], once)
        kept = part.path / ".snapfeed" / {"xfs": "clones", "btrfs": "snapshots"}[fs]
        assert len(list(kept.iterdir())) <= 8


@pytest.mark.parametrize("fs", disks("ext4", "btrfs"))
def test_publishing(fs, tmp_path):
    """A backlog of several diffs, cut into many pages at the first sending, is published."""
    small = '[broker]\nhost = "testhost"\nmax_packet = 8192\n'
    with partition(fs, tmp_path) as part, scene(part.path, tmp_path, config=small) as it:
        it.snapfeed.start()
        it.judge()

        def once(number, tally):
            it.snapfeed.kill()
            for _ in range(3):
                change(it.top, it.rounds)
                it.rounds += 1
                snapshot(it.top)
            outcome = it.through(number, tally, nothing, start=True)
            it.judge()
            return outcome

        explore(f"publish {fs}", 90, once)
        assert max(one["pages"] for one in it.consumer.diffs[1:]) > 1


def test_what_the_broker_s_absence_piled_up_is_squashed(xfs, tmp_path):
    """Several diffs, of which nobody has heard, become one."""
    small = '[broker]\nhost = "testhost"\n[defaults]\nkeep = 2\n[journal]\nbytes = "4KiB"\n'
    with scene(xfs.path, tmp_path, config=small) as it:
        here = it.snapfeed.arguments.index("--broker") + 1
        reached, dead = it.snapfeed.arguments[here], f"mqtt://127.0.0.1:{free_port()}"
        it.snapfeed.start()
        it.judge()

        def act():
            for _ in range(4):
                change(it.top, it.rounds)
                it.rounds += 1
                it.snapfeed.snapshot()
            it.snapfeed.stop()

        def once(number, tally):
            it.snapfeed.kill()
            it.snapfeed.arguments[here] = dead
            it.snapfeed.start()
            it.snapfeed.arm(number)
            with contextlib.suppress(AssertionError, OSError, ValueError):
                act()
            it.snapfeed.process.wait(10)
            outcome = it.snapfeed.outcome()
            assert outcome.killed or outcome.code == 0, outcome
            it.snapfeed.arguments[here] = reached
            it.snapfeed.start()
            tally.ready.append(it.snapfeed.ready)
            it.judge()
            return outcome

        explore("squash xfs", 300, once)


def test_a_replay(xfs, tmp_path):
    with scene(xfs.path, tmp_path) as it:
        it.snapfeed.start()
        it.judge()
        reader = Reader(it)
        reader.baseline()

        def once(number, tally):
            for _ in range(2):
                change(it.top, it.rounds)
                it.rounds += 1
                it.snapfeed.snapshot()
            wait_until(it.settled, "it is published")
            outcome = it.through(number, tally, reader.replay)
            it.judge()
            reader.replay()
            reader.consumer.compare(it.top)
            return outcome

        explore("replay xfs", 25, once)


@pytest.mark.parametrize("fs", disks("xfs", "btrfs"))
def test_a_baseline_for_a_consumer(fs, tmp_path):
    small = '[broker]\nhost = "testhost"\nmax_packet = 8192\n'
    with partition(fs, tmp_path) as part, scene(part.path, tmp_path, config=small) as it:
        for number in range(3):
            change(it.top, number)
        it.rounds = 3
        it.snapfeed.start()
        it.judge()
        reader = Reader(it)

        def once(number, tally):
            change(it.top, it.rounds)
            it.rounds += 1
            it.judge()
            outcome = it.through(number, tally, reader.baseline)
            it.judge()
            reader.baseline()
            reader.consumer.compare(it.top)
            it.clean()
            return outcome

        explore(f"consumer's baseline {fs}", 60, once)


class Reader:
    """A consumer that asks for what it has."""

    def __init__(self, it):
        self.it = it
        self.consumer = Consumer()

    def take(self):
        self.it.take()
        fresh, self.it.replayed = self.it.replayed, []
        for page in fresh:
            self.consumer.take(page)
        return self.consumer.head

    def baseline(self):
        """From nothing."""
        self.it.take()
        self.it.replayed.clear()
        self.consumer = Consumer()
        snapfeed = self.it.snapfeed
        (told,) = snapfeed.ask("baseline", partition=self.it.label, consumer=CONSUMER)
        self._until(told)

    def replay(self):
        epoch, seq = self.take()
        snapfeed = self.it.snapfeed
        since = {"epoch": epoch, "seq": seq}
        (told,) = snapfeed.ask("replay", partition=self.it.label, consumer=CONSUMER, since=since)
        self._until(told)

    def _until(self, told):
        told = told[0] if isinstance(told, list) else told

        def arrived():
            assert self.it.snapfeed.alive()
            return self.take() == (told["epoch"], told["seq"])

        wait_until(arrived, "what was asked for arrives")
        self.it.snapfeed.ask("ack", partition=self.it.label, consumer=CONSUMER, epoch=told["epoch"], seq=told["seq"])


def nothing():
    """What it is to do it does by itself."""


def snapshot(top):
    """A snapshot without a daemon."""
    with Visit(partition_at(os.fsencode(top))) as visit:
        take(visit, Order("command", Dirty(lost="test"), 0, time.time_ns(), 16, 1 << 17), Dirty, lambda _: None)


@pytest.mark.parametrize("fs", disks("xfs", "btrfs"))
def test_setting_a_damaged_system_file_aside(fs, tmp_path):
    with partition(fs, tmp_path) as part, scene(part.path, tmp_path) as it:
        it.snapfeed.start()
        it.judge()

        def once(number, tally):
            it.snapfeed.kill()
            change(it.top, it.rounds)
            it.rounds += 1
            with (it.top / ".snapfeed/system.db").open("r+b") as file:
                file.write(b"\xff" * 8192)
            outcome = it.through(number, tally, nothing, start=True)
            it.judge()
            aside = list(it.top.glob(".snapfeed/damaged-*"))
            assert any((one / "system.db").read_bytes()[:8192] == b"\xff" * 8192 for one in aside)
            for one in aside:
                shutil.rmtree(one)
            return outcome

        explore(f"set aside {fs}", 60, once)


@pytest.mark.parametrize("fs", disks("btrfs", "xfs", "ext4"))
def test_adopting(fs, tmp_path):
    """`snapfeed init`: adopted or not, and not half; the next one does it."""
    with partition(fs, tmp_path) as part:
        top = part.path
        change(top, 0)
        found = oracle.walk(top)
        del found[b""]

        def once(number, tally):
            wipe(top)
            command = [*CLI, "init", top, "--io-threshold", "1GiB", "--time-threshold", "1h"]
            outcome, _ = traced(tmp_path, *command, at=number)
            if not is_adopted(os.fsencode(top)):
                assert outcome.killed
                snapfeed("init", top, "--io-threshold", "1GiB", "--time-threshold", "1h")
            whole(top, 1 << 30)
            left = oracle.walk(top)
            del left[b""]
            assert left == found
            return outcome

        explore(f"init {fs}", {"xfs": 25, "btrfs": 28, "ext4": 25}[fs], once)


@pytest.mark.parametrize("fs", disks("xfs", "btrfs"))
@pytest.mark.parametrize("mounted", disks(False, True), ids=lambda mounted: "mounted" if mounted else "left unmounted")
def test_formatting(fs, mounted, tmp_path):
    """What was begun can be done again; nothing that nobody asked for stays mounted."""
    point = tmp_path / "point"
    with loop_device(tmp_path / "disk.img", "320M") as device:

        def once(number, tally):
            run("blkdiscard", "-f", device)
            more = ["--mount", point] if mounted else []
            command = ["format", device, "--fs", fs, "--yes", "--io-threshold", "1GiB", *more]
            outcome, _ = traced(tmp_path, *CLI, *command, at=number)
            assert mounts_of(device) in ([], [str(point)] if mounted else [])
            assert not list(tmp_path.glob("snapfeed-*")), "a directory to mount it at"
            if mounts_of(device):
                whole(point, 1 << 30)
            else:
                snapfeed(*command, "--force")
                if not mounted:
                    point.mkdir(exist_ok=True)
                    run("mount", device, point)
                whole(point, 1 << 30)
            run("umount", point)
            assert not mounts_of(device)
            # a copy of the mount in another process's name space would write its superblock after the next round's discard
            wait_until(lambda: nobodys(device), "the device is nobody's")
            return outcome

        try:
            explore(f"format {fs}{' and mount' if mounted else ''}", {"xfs": 90, "btrfs": 90}[fs], once)
        finally:
            for mount in mounts_of(device):
                run("umount", mount)


def test_migrating(xfs, tmp_path):
    top = xfs.path
    adopted(top)
    for number in range(6):
        change(top, number)
        snapshot(top)
    store, old, script = top / ".snapfeed/system.db", tmp_path / "old.db", tmp_path / "migrate.py"
    script.write_text(
        "import sys\nfrom snapshotter.systemfile import SystemFile\nSystemFile.open(sys.argv[1].encode()).close()\n"
    )
    expected = everything(store)
    shutil.copy(store, old)
    with contextlib.closing(sqlite3.connect(old)) as db:
        for trigger in ("diff_added", "diff_dropped", "diff_changed"):
            db.execute(f"DROP TRIGGER {trigger}")
        db.execute("DROP TABLE page_sum")
        db.execute("DROP TABLE consumer")
        db.execute("ALTER TABLE diff DROP COLUMN bytes")
        db.execute("DELETE FROM meta WHERE key IN ('offered', 'journal_bytes')")
        db.execute("PRAGMA user_version = 1")
        db.commit()
    before = everything(old)
    second = {**expected, "offered": before["next_seq"] - 1, "version": 2}

    def once(number, tally):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{store}-wal")
        shutil.copy(old, store)
        outcome, _ = traced(tmp_path, sys.executable, script, store, at=number)
        assert everything(store) in (before, second, {**second, "version": expected["version"]})
        with Visit(partition_at(os.fsencode(top)), check=True):
            pass
        assert everything(store) == {**second, "version": expected["version"]}
        assert litter(top) == []
        return outcome

    explore("migration", 20, once)


def everything(store):
    """All that a system file holds, as values: the settings by their names, the rows by their table. No checksums of itself."""
    with contextlib.closing(sqlite3.connect(store)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (*tables,) = (name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'"))
        tables = [table for table in tables if table not in ("meta", "page_sum")]
        found = {table: sorted(db.execute(f"SELECT * FROM {table}").fetchall(), key=repr) for table in tables}
        return {"version": version, **dict(db.execute("SELECT * FROM meta")), **found}


def whole(top, io_threshold):
    """It is adopted, as asked for, and nothing lies about."""
    with Visit(partition_at(os.fsencode(top)), check=True) as visit:
        assert visit.file.settings().io_threshold == io_threshold
    assert litter(top) == []


def mounts_of(device):
    with open("/proc/self/mounts") as mounts:
        return [line.split()[1] for line in mounts if line.split()[0] == device]
