"""What is sent to single consumers, from the inside: nothing leaks, nothing meets, nothing of one epoch lands in another."""

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
import time

import pytest
from daemon_process import adopt

from comparer.dirty import Dirty
from comparer.errors import SnapfeedError, TransientError
from feed.broker import topics
from feed.commands import CommandError
from feed.lane import LaneStats
from feed.outbox import Position
from feed.pages import Envelope
from snapshotter.held import copy_table
from snapshotter.partition import partition_at
from snapshotter.retention import MOST_CONSUMERS, Limits
from snapshotter.systemfile import ConsumerRow, SystemFile
from snapshotter.visit import Visit
from watcher.outbox import JournalOutbox
from watcher.pipeline import Pipeline, Rules
from watcher.replays import AT_ONCE, Replays, register
from watcher.work import Order, take

pytestmark = pytest.mark.kernel


class NoLanes:
    """A publisher that has no connection: nothing is ever acknowledged."""

    topics = topics("snapfeed", "edge7")
    packet = 131_072

    def __init__(self):
        self.outboxes = []

    def add(self, outbox, consumer=None):
        self.outboxes.append(outbox)
        return LaneStats()

    def remove(self, outbox):
        self.outboxes.remove(outbox)


def envelope(name, uuid, epoch):
    return Envelope("edge7", name, uuid, epoch, 0, None, 0, "", 0, "", None)


@contextlib.asynccontextmanager
async def attached(part):
    """A pipeline that follows a partition, with its first snapshot, and the replays of it."""
    adopt(part.path)
    rules = Rules(1 << 40, 3600.0, 4, 86400.0, 100_000)
    nothing = lambda *_: None  # noqa: E731
    pipeline = Pipeline(
        partition_at(os.fsencode(part.path)),
        "data",
        rules,
        envelope,
        "t",
        changed=nothing,
        opened=nothing,
        closed=nothing,
    )
    lanes = NoLanes()
    replays = Replays(lambda: lanes)
    pipeline.sending = lambda: replays.running("data")
    task = asyncio.create_task(pipeline.run())
    try:
        while pipeline.state.head is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        yield pipeline, replays, lanes
    finally:
        await replays.end_all()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await pipeline.close()


def leftovers(part):
    return [name for name in os.listdir(part.path / ".snapfeed") if name.startswith("baseline-")]


def test_one_thing_at_a_time_for_a_consumer(part):
    async def scenario():
        async with attached(part) as (pipeline, replays, lanes):
            asked = [replays.baseline(pipeline, "one", time.time_ns()) for _ in range(6)]
            assert all(isinstance(found, dict) for found in await asyncio.gather(*asked))
            assert replays.running("data") == [("one", "baseline")]
            assert len({name.rpartition(".")[0] for name in leftovers(part)}) == 1
            others = [replays.baseline(pipeline, f"other{n}", time.time_ns()) for n in range(8)]
            found = await asyncio.gather(*others, return_exceptions=True)
            assert sum(isinstance(one, dict) for one in found) == AT_ONCE - 1
            assert all("ask again later" in str(one) for one in found if not isinstance(one, dict))
            await replays.end_all()
            assert not lanes.outboxes
            assert (pipeline.pins, leftovers(part)) == ({}, [])
            assert isinstance(await replays.baseline(pipeline, "again", time.time_ns()), dict), (
                "the places are free again"
            )

    asyncio.run(scenario())


@pytest.mark.parametrize("fails", ["refresh", "in_visit", "cancelled"])
def test_a_baseline_that_cannot_begin_leaves_nothing(part, fails, monkeypatch):
    async def scenario():
        async with attached(part) as (pipeline, replays, _):

            async def refresh():
                if fails == "cancelled":
                    await asyncio.sleep(60)
                raise TransientError("unmounted")

            if fails == "in_visit":
                monkeypatch.setattr(
                    "watcher.baselines.Spool._open", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
                )
            else:
                monkeypatch.setattr(pipeline, "refresh", refresh)
            task = asyncio.create_task(replays.baseline(pipeline, "one", time.time_ns()))
            if fails == "cancelled":
                while not pipeline.pins:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                task.cancel()
            (found,) = await asyncio.gather(task, return_exceptions=True)
            assert isinstance(found, TransientError | asyncio.CancelledError)
            monkeypatch.undo()
            assert (pipeline.pins, leftovers(part), replays.running("data")) == ({}, [], [])

    asyncio.run(scenario())


def test_a_baseline_that_is_ended_before_its_first_step_leaves_nothing(ext4, monkeypatch):
    """A task that is cancelled then runs no `finally`."""

    async def scenario():
        async with attached(ext4) as (pipeline, replays, _):
            start = replays._start

            def at_once(*arguments):
                start(*arguments)
                for running in replays._running.values():
                    running.task.cancel()

            monkeypatch.setattr(replays, "_start", at_once)
            for _ in range(AT_ONCE + 1):
                assert isinstance(await replays.baseline(pipeline, "one", time.time_ns()), dict)
                await asyncio.sleep(0)
                await replays.end_all()
            assert (pipeline.pins, leftovers(ext4), replays.running("data")) == ({}, [], [])

    asyncio.run(scenario())


def test_nothing_of_one_epoch_is_written_into_the_next(ext4):
    adopt(ext4.path)
    part = partition_at(os.fsencode(ext4.path))

    async def in_file(function):
        with SystemFile.open(part.system_file) as file:
            return function(file)

    async def scenario():
        outbox = JournalOutbox("data", "t", envelope("data", "u", "the epoch before"), in_file)
        await outbox.acknowledge(Position(500, 3))
        await outbox.flush()
        assert await in_file(SystemFile.acknowledged) == (0, 0)
        with pytest.raises(TransientError, match="another epoch"):
            await outbox.fetch(None, 1 << 17, 10)
        outbox.close()

    asyncio.run(scenario())


def test_copying_the_system_file_keeps_its_lock(part):
    """Closing any descriptor of a file drops the process's POSIX locks of it, SQLite's too."""
    adopt(part.path)
    there = partition_at(os.fsencode(part.path))
    text = (
        "import sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], timeout=0.1)\n"
        "try:\n    db.execute('BEGIN IMMEDIATE'); db.execute('UPDATE meta SET value = value'); print('written')\n"
        "except sqlite3.OperationalError as error:\n    print(error)\n"
    )
    with Visit(there) as visit:
        copy_table(visit, there.system_file + b".copy")
        visit.file.set_consumers([ConsumerRow("one", 1, has=True, time_ns=0)])
        command = [sys.executable, "-c", text, os.fsdecode(there.system_file)]
        assert "locked" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with contextlib.closing(sqlite3.connect(os.fsdecode(there.system_file) + ".copy")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_there_are_not_more_consumers_than_a_state_can_name(ext4):
    adopt(ext4.path)
    now = time.time_ns()
    with Visit(partition_at(os.fsencode(ext4.path))) as visit:
        for number in range(MOST_CONSUMERS):
            register(visit.file, ConsumerRow(f"c{number}", 0, has=True, time_ns=now))
        with pytest.raises(CommandError, match="--forget"):
            register(visit.file, ConsumerRow("more", 0, has=True, time_ns=now))
        register(visit.file, ConsumerRow("c5", 7, has=True, time_ns=now))
        later = now + 8 * 86400 * 10**9
        register(visit.file, ConsumerRow("more", 0, has=True, time_ns=later))
        assert len(visit.file.consumers()) == MOST_CONSUMERS, "who was silent for long makes room"


def test_a_clock_that_is_set_forgets_nobody(ext4, monkeypatch):
    async def scenario():
        async with attached(ext4) as (pipeline, _, _):
            pipeline.acknowledge("one", pipeline.state.epoch, pipeline.state.head, time.time_ns())
            first = pipeline.state.head
            ahead = time.time_ns() + 10 * 365 * 86400 * 10**9
            monkeypatch.setattr("watcher.pipeline.time.time_ns", lambda: ahead)
            for number in range(10):
                (ext4.path / f"file{number}").write_text("x")
                await pipeline.snapshot()
            kept = await pipeline.in_file(lambda file: [row.seq for row in file.snapshots()])
            assert kept[0] == first, "held, though its holder seems ten years old"
            journal = await pipeline.in_file(lambda file: [row.seq for row in file.journal()])
            assert journal[0] == first, "and the journal is not ten years old"

    asyncio.run(scenario())


def test_a_squash_that_fails_costs_no_snapshot(ext4, monkeypatch):
    adopt(ext4.path)
    monkeypatch.setattr("watcher.work.to_squash", lambda *_: (_ for _ in ()).throw(MemoryError))
    with Visit(partition_at(os.fsencode(ext4.path))) as visit:
        order = Order("command", Dirty(), 0, time.time_ns(), 4, 100_000, Limits(bytes=0))
        assert take(visit, order, Dirty, lambda _: None).recorded
        assert visit.file.head() == 1


def test_acknowledgements_are_written_many_at_a_time(ext4):
    async def scenario():
        async with attached(ext4) as (pipeline, _, _):
            visits = []
            plain = pipeline._visit

            async def counted(*arguments, **more):
                visits.append(1)
                return await plain(*arguments, **more)

            pipeline._visit = counted
            for number in range(1000):
                pipeline.acknowledge(f"c{number % 8}", pipeline.state.epoch, pipeline.state.head, time.time_ns())
            await pipeline.flush_acks()
            assert len(visits) == 1
            rows = await pipeline.in_file(SystemFile.consumers)
            assert [(row.name, row.seq) for row in rows] == [(f"c{n}", pipeline.state.head) for n in range(8)]
            with pytest.raises(SnapfeedError, match="does not exist yet"):
                pipeline.acknowledge("c1", pipeline.state.epoch, pipeline.state.head + 1, 0)

    asyncio.run(scenario())
