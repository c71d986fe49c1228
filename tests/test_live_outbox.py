"""A new diff handed to the publisher out of memory: the same pages as from the journal, in order, none twice, none left out."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feed.outbox import Position
from feed.pages import Envelope
from snapshotter.systemfile import DiffRow, Settings, SystemFile
from watcher.live_outbox import Fresh, LiveOutbox

LIMIT = 60_000
ENVELOPE = Envelope("edge7", "data", "u", "e", 0, None, 0, "command", 0, "metadata", None)


class Journal:
    """A real system file; `visits` counts how often it was asked."""

    def __init__(self, path):
        self.file = SystemFile.create(path, Settings("e", "u", "partition", 1 << 20, 60.0, 0))
        self.visits = 0
        self.outbox = LiveOutbox("data", "snapfeed/edge7/data/changes", ENVELOPE, self.in_file)

    async def in_file(self, function):
        self.visits += 1
        found = function(self.file)
        await asyncio.sleep(0)  # the answer takes its way through the loop, in which other things happen
        return found

    def add(self, seq, bodies, *, fresh):
        diff = DiffRow(seq, seq - 1 or None, seq, "command", 0, "metadata", None, len(bodies), len(bodies), 1000)
        with self.file.transaction():
            for number, body in enumerate(bodies, 1):
                self.file.add_page(seq, number, 1, body)
            self.file._add_diff(diff)
            if fresh:
                self.file.offer(seq)
        return Fresh(diff, tuple(bodies)) if fresh else None


@pytest.fixture
def journal(tmp_path):
    made = Journal(bytes(tmp_path / "system.db"))
    yield made
    made.file.close()


def body(seq, page=1):
    return b'{"seq":%d,"page":%d}' % (seq, page)


async def drained(outbox, after=None):
    got = []
    while pages := await outbox.fetch(after, LIMIT, 128):
        got += pages
        after = pages[-1].position
    return got, after


def test_a_fresh_diff_needs_no_visit(journal):
    async def scenario():
        journal.outbox.news(journal.add(1, [body(1)], fresh=False))
        _, after = await drained(journal.outbox)
        visits = journal.visits
        assert journal.outbox.live
        journal.outbox.news(journal.add(2, [body(2), body(2, 2)], fresh=True))
        assert not journal.outbox.live
        got, after = await drained(journal.outbox, after)
        assert [page.position for page in got] == [(2, 1), (2, 2)]
        assert [page.last for page in got] == [False, True]
        assert journal.visits == visits
        again, _ = await drained(LiveOutbox("data", "snapfeed/edge7/data/changes", ENVELOPE, journal.in_file))
        assert again[1:] == got

    asyncio.run(scenario())


def test_a_fresh_diff_is_not_taken_if_it_is_too_large_or_not_the_next_one(journal):
    async def scenario():
        journal.outbox.news(journal.add(1, [body(1)], fresh=False))
        _, after = await drained(journal.outbox)
        fresh = journal.add(2, [body(2)], fresh=True)
        journal.outbox.news(Fresh(replace(fresh.diff, parent=7), fresh.bodies))
        assert [page.position for page in (await drained(journal.outbox, after))[0]] == [(2, 1)]
        journal.outbox.news(journal.add(3, [body(3)], fresh=True))
        visits = journal.visits
        small = await journal.outbox.fetch(Position(2, 1), 1600, 128)
        assert journal.visits > visits
        assert [page.position for page in small] == [(3, 1)]

    asyncio.run(scenario())


def test_news_while_the_journal_is_read_are_not_lost(journal):
    async def scenario():
        journal.outbox.news(journal.add(1, [body(1)], fresh=False))
        _, after = await drained(journal.outbox)
        journal.outbox._end = None
        asking = asyncio.create_task(journal.outbox.fetch(after, LIMIT, 128))
        await asyncio.sleep(0)  # it has read that there is nothing
        journal.outbox.news(journal.add(2, [body(2)], fresh=False))
        assert await asking == []
        assert [page.position for page in (await drained(journal.outbox, after))[0]] == [(2, 1)]

    asyncio.run(scenario())


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["fresh", "plain", "fetch", "reconnect", "ack"]), st.integers(1, 3))))
def test_any_order_gives_every_page_once_for_a_connection(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("journal")

    async def scenario():
        journal = Journal(bytes(path / "system.db"))
        outbox, seq, after, sent, wanted, acknowledged = journal.outbox, 0, None, [], [], 0
        try:
            for what, count in [*steps, ("fetch", 1)]:
                if what in ("fresh", "plain"):
                    seq += 1
                    bodies = [body(seq, page) for page in range(1, count + 1)]
                    wanted += [(seq, page) for page in range(1, count + 1)]
                    outbox.news(journal.add(seq, bodies, fresh=what == "fresh" and outbox.live))
                elif what == "fetch":
                    got, last = await drained(outbox, after)
                    after = last or after
                    sent += [page.position for page in got]
                elif what == "ack" and sent:
                    acknowledged = len(sent)
                    await outbox.acknowledge(sent[-1])
                elif what == "reconnect":
                    after, sent = None, sent[:acknowledged]
            assert sent == wanted
        finally:
            outbox.close()
            journal.file.close()

    asyncio.run(scenario())
