"""The system file damaged, replaced, restored from an old copy: set aside, a new epoch, consumers exact again."""

import contextlib
import shutil
import sqlite3
from dataclasses import replace
from importlib import resources

import pytest
from broker_processes import collector, mosquitto
from consumer import Consumer
from daemon_process import HOST, adopt, daemon
from partitions import partition, wait_until

from comparer.errors import DamageError, OperatorError, TransientError
from snapshotter.retention import Limits, needed, prune, to_squash
from snapshotter.systemfile import ConsumerRow, DiffRow, Settings, SnapshotRow, SystemFile

SETTINGS = Settings("an-epoch", "a-uuid", "partition", 1 << 20, 60.0, 0)


@pytest.fixture
def made(tmp_path):
    path = bytes(tmp_path / "system.db")
    SystemFile.create(path, SETTINGS).close()
    return path


def record(file, seq, parent, pages=((1, b"{}"),), time_ns=0):
    with file.transaction():
        for number, (count, body) in enumerate(pages, 1):
            file.add_page(seq, number, count, body)
        file.add(
            SnapshotRow(seq, 0, "command", 0, 1, "metadata", None),
            DiffRow(seq, parent, time_ns, "command", 0, "metadata", None, 1, len(pages), 1000),
        )


def test_what_is_written_is_there_again(made):
    with SystemFile.open(made) as file:
        assert file.settings() == SETTINGS
        assert file.head() is None
        record(file, 1, None, [(1, b"x" * 100), (2, b"y" * 5000)])
    with SystemFile.open(made, check=True) as file:
        assert (file.head(), file.next_seq()) == (1, 2)
        assert file.page(1, 2) == (2, b"y" * 5000)
        assert file.backlog() == 1
        file.acknowledge(1, 1)
        assert file.backlog() == 1
        file.acknowledge(1, 2)
        assert file.backlog() == 0


def test_numbers_go_on_and_what_is_unpublished_is_kept(made):
    with SystemFile.open(made) as file:
        for seq in range(1, 11):
            record(file, seq, seq - 1 or None)
        file.acknowledge(7, 1)
        with file.transaction():
            assert file.forget(2) == [8, 7, 6, 5, 4, 3, 2, 1]
            prune(file, Limits(bytes=0), 0)
        assert [row.seq for row in file.snapshots()] == [9, 10]
        assert file.diff(7) is None
        assert [file.diff(seq).seq for seq in (8, 9, 10)] == [8, 9, 10]
        assert file.next_seq() == 11


def test_published_diffs_go_by_age_and_by_bytes(made):
    with SystemFile.open(made) as file:
        for seq in range(1, 21):
            record(file, seq, seq - 1 or None, [(1, bytes(100))], time_ns=seq * 10**9)
        file.acknowledge(15, 1)
        with file.transaction():
            file.forget(2)
            prune(file, Limits(age=15.0, bytes=10**9), 20 * 10**9)
            assert [row.seq for row in file.journal()] == list(range(5, 21))
            prune(file, Limits(age=10**6, bytes=700), 20 * 10**9)
            assert [row.seq for row in file.journal()] == list(range(14, 21))
            prune(file, Limits(age=10**6, bytes=0), 20 * 10**9)
            assert [row.seq for row in file.journal()] == list(range(16, 21)), "what is not published stays"


def test_a_consumer_holds_snapshots_up_to_a_bound(made):
    with SystemFile.open(made) as file:
        for seq in range(1, 41):
            record(file, seq, seq - 1 or None)
        file.set_consumers([ConsumerRow(n, s, has=True, time_ns=100 * 10**9) for n, s in (("late", 10), ("later", 20))])
        now = 101 * 10**9
        assert needed(file, Limits(), now) == 10
        assert needed(file, Limits(hold_snapshots=5), now) == 36
        assert needed(file, Limits(hold_age=0.5), now) is None, "not heard of for too long"
        with file.transaction():
            assert file.forget(2, needed(file, Limits(), now)) == list(range(9, 0, -1))
        assert [row.seq for row in file.snapshots()] == list(range(10, 41))
        assert file.drop_consumer("late")
        assert not file.drop_consumer("late")
        assert needed(file, Limits(), now) == 20


def test_what_nobody_can_have_seen_is_squashed_beyond_the_bounds(made):
    with SystemFile.open(made) as file:
        for seq in range(1, 41):
            record(file, seq, seq - 1 or None, [(1, bytes(100))], time_ns=seq * 10**9)
        file.acknowledge(3, 1)
        file.offer(5)
        now = 40 * 10**9
        assert to_squash(file, Limits(), now, 16) is None
        assert to_squash(file, Limits(bytes=2000), now, 16) == (6, 25)
        assert to_squash(file, Limits(age=30.0), now, 16) == (6, 9)
        file.set_consumers([ConsumerRow("one", 12, has=True, time_ns=now)])
        assert to_squash(file, Limits(bytes=2000), now, 16) == (6, 12)
        merged = file.diff(12)
        file.merge_diffs(6, replace(merged, parent=5), [(3, b"abc"), (4, b"def")])
        found = file.diff(12)
        assert (found.parent, found.changes, found.pages, found.bytes) == (5, 7, 2, 6)
        assert file.page(12, 2) == (4, b"def")
        assert file.next_diff(6).seq == 12
        assert to_squash(file, Limits(bytes=1000), now, 16) == (13, 25), "what is large already is left alone"
        file.merge_diffs(13, replace(file.diff(25), parent=12), [])
        assert (file.diff(25).pages, file.diff(25).changes, file.page(25, 1)) == (1, 0, (0, b""))


def test_version_1_is_brought_up_to_date(tmp_path):
    path = bytes(tmp_path / "system.db")
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript((resources.files("snapshotter.schema") / "001.sql").read_text())
        values = {**SETTINGS._asdict(), "next_seq": 8, "acknowledged_seq": 7, "acknowledged_page": 1}
        db.executemany("INSERT INTO meta VALUES (?, ?)", values.items())
        db.execute("INSERT INTO diff VALUES (7, 6, 0, 'command', 0, 'metadata', NULL, 1, 1, 1000)")
        db.execute("INSERT INTO page VALUES (7, 1, 1, 0, x'7b7d')")
        db.execute("PRAGMA user_version = 1")
        db.commit()
    with SystemFile.open(path, check=True) as file:
        assert file.settings() == SETTINGS
        assert (file.offered(), file.next_seq(), file.consumers()) == (7, 8, [])
        assert file.diff(7).bytes == 2


def test_a_transaction_that_fails_leaves_nothing(made):
    with SystemFile.open(made) as file:
        with contextlib.suppress(ZeroDivisionError), file.transaction():
            file.add_page(1, 1, 1, b"{}")
            raise ZeroDivisionError
        assert file.page_count(1) == 0


def test_a_second_process_is_told(made):
    with SystemFile.open(made) as file:
        record(file, 1, None)
        with pytest.raises(OperatorError, match="in use by another process"):
            SystemFile.open(made).close()


def made_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def test_a_newer_schema_is_refused_and_left_alone(made):
    with SystemFile.open(made) as file, file.transaction():
        file.db.execute("PRAGMA user_version = 999")
    before = made_bytes(made)
    for check in (False, True):
        with pytest.raises(OperatorError, match="update snapfeed"):
            SystemFile.open(made, check=check)
    assert made_bytes(made) == before


def test_none_there_is_not_made(tmp_path):
    with pytest.raises(TransientError):
        SystemFile.open(bytes(tmp_path / "nothing.db"))
    assert not (tmp_path / "nothing.db").exists()


@pytest.mark.parametrize("damage", ["noise", "empty", "text", "page"])
def test_damage_is_named_so(made, damage):
    with SystemFile.open(made) as file:
        for seq in range(1, 40):
            record(file, seq, seq - 1 or None, [(1, bytes(900))])
    with open(made, "r+b") as file:
        if damage == "empty":
            file.truncate(0)
        elif damage == "text":
            file.write(b"this is no database at all")
        else:
            size = file.seek(0, 2)
            file.seek(0 if damage == "noise" else 4096)
            file.write(b"\xa5" * (size if damage == "noise" else 4096))
    with pytest.raises(DamageError):
        SystemFile.open(made, check=True)


@pytest.mark.kernel
@pytest.mark.parametrize("fs", ["xfs", "btrfs"])
def test_the_daemon_begins_a_new_epoch(fs, tmp_path):
    with contextlib.ExitStack() as stack:
        part = stack.enter_context(partition(fs, tmp_path))
        (tmp_path / "other").mkdir()
        other = stack.enter_context(partition("ext4", tmp_path / "other"))
        adopt(other.path)
        broker = stack.enter_context(mosquitto(tmp_path))
        pages = stack.enter_context(collector(broker, f"snapfeed/{HOST}/+/changes"))
        feed = stack.enter_context(daemon(tmp_path, part.path, broker=broker.url))
        store, old = part.path / ".snapfeed/system.db", tmp_path / "old.db"
        consumer, epochs = Consumer(), []

        def exact():
            answer = feed.snapshot()

            def caught_up():
                consumer.feed(m.payload for m in pages.new())
                return consumer.head == (answer["epoch"], answer["seq"])

            wait_until(caught_up, "the head")
            consumer.compare(part.path)
            epochs.append(answer["epoch"])

        def foreign():
            shutil.copy(other.path / ".snapfeed/system.db", store)

        damages = [
            lambda: store.write_bytes(store.read_bytes()[:5000]),
            lambda: store.write_bytes(b"\xff" * 20000),
            lambda: shutil.copy(old, store),
            foreign,
        ]
        wait_until(lambda: feed.partition()["head"], "the baseline")
        for number, damage in enumerate(damages):
            (part.path / f"before{number}").write_text("x")
            exact()
            assert feed.stop() == 0
            shutil.copy(store, old)
            feed.start()
            (part.path / f"between{number}").write_text("x")
            exact()
            assert feed.stop() == 0
            damage()
            (part.path / f"after{number}").write_text("x")
            feed.start()
            wait_until(lambda: feed.partition()["head"], "a new baseline")
            exact()
            assert epochs[-1] != epochs[-2], number
            assert epochs[-2] == epochs[-3]
        kept = [p for p in (part.path / ".snapfeed").iterdir() if p.name.startswith("damaged-")]
        assert len(kept) == len(damages)
        assert "kept aside" in feed.output()


@pytest.mark.kernel
def test_a_damaged_one_on_a_full_partition_does_not_stop_the_daemon(tmp_path):
    """It cannot be set aside; that partition waits, and goes on by itself once there is space."""
    with partition("ext4", tmp_path, "64M") as part, daemon(tmp_path, part.path) as snapfeed:
        wait_until(lambda: snapfeed.partition()["head"], "the first snapshot")
        epoch = snapfeed.partition()["epoch"]
        snapfeed.kill()
        with (part.path / ".snapfeed/system.db").open("r+b") as file:
            file.write(b"\xff" * 4096)
        with (part.path / "large").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        snapfeed.start()
        found = wait_until(lambda: (p := snapfeed.partition())["state"] == "failed" and p, "it has failed")
        assert "space" in found["reason"] or "full" in found["reason"], found
        (part.path / "large").unlink()
        wait_until(lambda: snapfeed.partition()["head"], "it goes on")
        assert snapfeed.partition()["epoch"] != epoch
        assert "Traceback" not in snapfeed.output()
