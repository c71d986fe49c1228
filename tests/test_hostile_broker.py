"""The publisher against a broker that refuses, lies, stalls and talks nonsense: nothing lost, nothing early, everything said."""

import asyncio
import contextlib
import json
import logging
import re
import struct
import threading
import tracemalloc
from collections import Counter

import orjson
import pytest
from broker_processes import eventually, mosquitto
from daemon_process import HOST, daemon
from hostile_broker import PUBACK, PUBLISH, SUBACK, Command, HostileBroker, Script, packet
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from partitions import wait_until
from publishing import ListOutbox, outbox, publisher, running

import feed.connection
import feed.requests
from comparer.model import Attr, ByteRanges, Change, FileType, Ident, Op, Quality
from feed.backoff import Backoff
from feed.commands import LARGEST, answer, readable_id
from feed.connection import Limits
from feed.encode import encode_bytes
from feed.outbox import OutPage, Position
from feed.pages import SMALLEST_PACKET, Chunk, Envelope, chunks, payload_limit, payloads
from snapshotter.systemfile import DiffRow, Settings, SnapshotRow, SystemFile
from watcher.outbox import JournalOutbox
from watcher.replays import ReplayOutbox

QUICK = Limits(connect=0.2, acknowledge=0.25, incoming=2_000_000)
REFUSALS = (0x80, 0x83, 0x87, 0x97, 0x99)
GOODBYES = (0x93, 0x95, 0x8E, 0x89, 0x8B)


class Watched(ListOutbox):
    """A violation if a page is said to be acknowledged that the broker did not take, or one before it."""

    broker: HostileBroker

    async def acknowledge(self, position):
        taken = {publish.payload for publish in self.broker.good}
        missing = [page.position for page in self.pages if page.position <= position and page.payload not in taken]
        if missing:
            self.broker.violations.append(f"acknowledged up to {position}, but {missing} got no good PUBACK")
        await super().acknowledge(position)


def watched(broker: HostileBroker, partition: str, diffs: int = 12, size: int = 100) -> Watched:
    box = Watched(partition, outbox(partition, diffs, size).pages)
    box.broker = broker
    return box


def arrived(broker: HostileBroker, box: ListOutbox) -> bool:
    """Whether who takes only what follows what he has got every page, from what the broker took in the order it did."""
    wanted = iter([page.payload for page in box.pages])
    following = next(wanted)
    good = {id(publish) for publish in broker.good}  # in the order of their PUBACKs
    for publish in broker.received:
        if id(publish) in good and publish.payload == following:
            following = next(wanted, None)
            if following is None:
                return True
    return False


@contextlib.asynccontextmanager
async def hostile(scripts, **more):
    """(broker, publisher, errors that it showed); the publisher runs, with two partitions to tell of."""
    async with HostileBroker(scripts) as broker:
        errors: list[str] = []

        def noted():
            errors.extend(
                text for text in (made.last_error, *(lane.last_error for lane in made.stats.lanes.values())) if text
            )

        more.setdefault("backoff", lambda: Backoff(0.01, 0.05))
        config = {"protocol": more.pop("protocol", 5), **more.pop("config", {})}
        made = publisher(broker.url, config=config, limits=more.pop("limits", QUICK), on_status=noted, **more)
        async with running(made):
            yield broker, made, errors


async def delivered(scripts, error: str | None = None, diffs: int = 12, size: int = 100, **more) -> HostileBroker:
    """Hostile as the scripts say, then kind: everything arrives, `error` was shown and is gone."""
    async with hostile([*scripts, Script()], **more) as (broker, made, errors):
        boxes = [watched(broker, name, diffs, size) for name in ("data", "home")]
        for box in boxes:
            made.add(box)
        try:
            await eventually(lambda: all(box.done for box in boxes), "every page is acknowledged")
        except AssertionError as late:
            raise AssertionError(f"{late}; {broker.connections} connections, {made.stats}, {made.last_error}") from None
        assert all(arrived(broker, box) for box in boxes)
        await eventually(lambda: made.connected and made.last_error is None, "nothing is the matter any more")
        assert [lane.last_error for lane in made.stats.lanes.values()] == [None, None]
        if error is not None:
            assert any(re.search(error, text) for text in errors), errors
        return broker


def refusing(code: int, which=lambda seq: seq % 4 == 0, times: int = 2):
    """Refuse some pages the first few times."""
    seen: Counter[bytes] = Counter()

    def reason(publish):
        if not publish.topic.endswith("/changes") or not which(orjson.loads(publish.payload)["seq"]):
            return 0
        seen[publish.payload] += 1
        return code if seen[publish.payload] <= times else 0

    return reason


# ---- one kind of hostility after the other


@pytest.mark.parametrize("code", REFUSALS)
@pytest.mark.parametrize("maximum", [None, 1])
def test_refused_pages_are_kept_and_told(code, maximum):
    script = Script(reason=refusing(code), receive_maximum=maximum)
    broker = asyncio.run(delivered([script], f"refuses page . of diff .*{code:#04x}.*kept"))
    assert broker.connections == 1


PUBLISHED_TO_US = {
    "topic that is not UTF-8": packet(PUBLISH << 4, b"\0\x02\xff\xfe\0x"),
    "topic with a wildcard": packet(PUBLISH << 4, b"\0\x03a/+\0x"),
    "QoS 3": packet(PUBLISH << 4 | 6, b"\0\x01a\0\x01\0x"),
}
NONSENSE = {
    "zeros": b"\0" * 50,
    "reserved type": b"\xf0\x00",
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "half a PUBACK": b"\x40\x01\x00",
    "PUBACK with no such reason": packet(PUBACK << 4, b"\0\x07\x42\0"),
    "SUBACK of nothing": packet(SUBACK << 4, b"\x30\x39\0\0"),
    "256 MiB": b"\x30\xff\xff\xff\x7f" + b"x" * 1000,
    "length of five bytes": b"\x30\xff\xff\xff\xff\x7f",
    "AUTH": b"\xf0\x02\x18\x00",
    **PUBLISHED_TO_US,
}
GREETINGS = {
    **{name: data for name, data in NONSENSE.items() if name not in PUBLISHED_TO_US},
    "properties that are none": b"\x20\x05\x00\x00\x02\xfe\x00",
    "reason that is none": b"\x20\x03\x00\x42\x00",
}
CONNACKS = (*range(0x80, 0x8B), 0x8C, 0x90, 0x95, 0x97, 0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9F)
CASES = {
    **{f"goodbye {code:#x}": ([Script(after=5, then=code)] * 3, None) for code in GOODBYES},
    "taken over": ([Script(after=0, then=0x8E)], "second daemon"),
    "session present": ([Script(session_present=True)], None),
    "receive maximum 1": ([Script(receive_maximum=1, after=9)], None),
    "receive maximum 2": ([Script(receive_maximum=2, acks="reordered", after=9)], None),
    "QoS 0 only": ([Script(maximum_qos=0)] * 2, "QoS 0 only.*could not be known.*use another broker"),
    "no retained messages": ([Script(retain_available=0)] * 2 + [Script(retain_available=0, after=9)], "0x9A|Retain"),
    "no wildcards": ([Script(wildcards=0, after=9)], None),
    "tiny packets": ([Script(max_packet=64)], f"64 bytes at most.*{SMALLEST_PACKET}.*raise its limit"),
    "no topic aliases": ([Script(properties=b"\x22\0\0", after=9)], None),
    "another identifier": ([Script(properties=b"\x12\0\x03abc", after=9)], None),
    "says nothing": ([Script(connack="none")], "not reachable"),
    "half a CONNACK": ([Script(connack="half")], "before it answered"),
    "hangs up": ([Script(connack="hangup")], "before it answered"),
    "two CONNACKs": ([Script(connack="twice", receive_maximum=1)], None),
    **{f"refuses {code:#x}": ([Script(connack=code)] * 2, "refuses the login") for code in (0x86, 0x87)},
    "refuses for any reason": ([Script(connack=code) for code in CONNACKS], "refuses the connection"),
    "a CONNACK later": ([Script(receive_maximum=1, after=3, then=b"\x20\x06\0\0\x03\x21\0\x09")], "CONNECT twice"),
    "answers pings only": ([Script(after=5, then="mute")], "acknowledged nothing"),
    "stops reading": ([Script(after=5, then="deaf")], "acknowledged nothing"),
    "drops": ([Script(after=5)] * 4, "is gone"),
    "reordered": ([Script(acks="reordered")], None),
    "twice": ([Script(acks="twice")], None),
    "unknown": ([Script(acks="unknown")], None),
    "early": ([Script(acks="early", after=20)] * 3, None),
    "slow": ([Script(slow=True)], None),
    "no commands": ([Script(suback=0x87, after=9)], None),
    "nothing granted": ([Script(suback=None, after=9)], None),
    **{f"answers {name}": ([Script(connack=data)], "broker") for name, data in GREETINGS.items()},
    **{f"goes on with {name}": ([Script(after=3, then=data)], None) for name, data in NONSENSE.items()},
}  # fmt: skip
OLD = """hangs up,half a CONNACK,says nothing,answers pings only,stops reading,drops,reordered,twice,unknown,early,slow,
no commands,answers zeros,goes on with 256 MiB,two CONNACKs,refuses 0x87""".replace("\n", "").split(",")


async def _handled(request):
    return answer(readable_id(request.payload), {})


@pytest.mark.parametrize("name", CASES)
def test_after_hostility_everything_arrives(name):
    scripts, error = CASES[name]
    asyncio.run(delivered(scripts, error, handler=_handled))


@pytest.mark.parametrize("name", OLD)
def test_after_hostility_everything_arrives_with_mqtt_311(name):
    scripts, error = CASES[name]
    asyncio.run(delivered(scripts, error, handler=_handled, protocol=4))


# ---- which version it speaks


def test_a_broker_that_hangs_up_once_is_not_taken_for_an_old_one():
    """With MQTT 3.1.1 a refused page looks like one that was taken."""

    async def scenario():
        for death in ("half", "hangup", b"\0\0"):
            async with hostile([Script(connack=death), Script()], protocol=0) as (_, made, _errors):
                await eventually(lambda made=made: made.connected, "connected")
                assert made.stats.protocol == 5
            hangups = [Script(connack=death)] * 2
            async with hostile([*hangups, Script(after=0), Script()], protocol=0) as (_, made, _errors):
                made.add(box := outbox("data", 3))
                await eventually(lambda box=box: box.done, "delivered")
                assert made.stats.protocol == 5  # asked again after the loss of a connection with 3.1.1

    asyncio.run(scenario())


# ---- limits


class CutBox(Watched):
    """One diff of many changes, cut for whatever limit it is asked with; begun again when that changes."""

    limit = 0

    async def fetch(self, after, limit, count):
        if limit != self.limit:
            self.limit, after = limit, None
            envelope = Envelope("edge7", self.partition, "u", "e", 1, 0, 0, "time", 0, "metadata", None)
            objects = [Chunk(60, b",".join([b'{"n":%d,"x":"%s"}' % (n, b"y" * 1000) for n in range(60)]))]
            cut = payloads(envelope, objects, limit)
            self.pages = [OutPage(Position(1, n), n == len(cut), one) for n, one in enumerate(cut, 1)]
            self.acknowledged.clear()
        return await super().fetch(after, limit, count)


@pytest.mark.parametrize("announce", [True, False])
def test_a_limit_of_8_kib_is_kept_or_learnt(announce):
    async def scenario():
        async with hostile([Script(max_packet=SMALLEST_PACKET, announce=announce)]) as (broker, made, errors):
            box = CutBox("data", [])
            box.broker = broker
            made.add(box)
            await eventually(lambda: box.pages and box.done, "all pages fit")
            assert arrived(broker, box)
            assert max(publish.packet for publish in broker.good) <= SMALLEST_PACKET
            assert made.stats.packet == SMALLEST_PACKET
            assert announce == (broker.connections == 1)
            assert announce or any("packet too large" in text for text in errors)

    asyncio.run(scenario())


def test_a_broker_that_finds_even_the_smallest_page_too_large():
    async def scenario():
        async with hostile([Script(max_packet=3000, announce=False)]) as (broker, made, errors):
            box = CutBox("data", [])
            box.broker = broker
            made.add(box)
            await eventually(
                lambda: any("pages need as much; raise its limit" in text for text in errors), "it is said"
            )
            broker.kind()
            await eventually(lambda: box.done, "delivered when the limit is raised")

    asyncio.run(scenario())


def big_change(path: bytes, ranges: int = 0, xattr: int = 0) -> bytes:
    before = Attr(
        FileType.FILE, 1 << 40, 0, 0o644, 0, 0, 1, 0, 0, 0, None, ((b"user.x", b"x" * xattr),) if xattr else ()
    )
    after = Attr(FileType.FILE, 1 << 40, 0, 0o644, 0, 0, 1, 1, 1, 0, None, before.xattrs)
    written = ByteRanges(tuple((n * 8192, 4096) for n in range(ranges)), (), Quality.EXACT) if ranges else None
    return encode_bytes(
        Change(Op.MODIFY, Ident(7, 1), FileType.FILE, path, None, ("data",), before, after, written), path
    )


@pytest.fixture
def journal(tmp_path):
    """A function that puts diffs (lists of encoded changes) into a system file, and gives an outbox over it."""
    path = bytes(tmp_path / "system.db")
    SystemFile.create(path, Settings("e", "u", "partition", 1 << 20, 60.0, 0)).close()
    envelope = Envelope("edge7", "data", "u", "e", 0, None, 0, "", 0, "", None)

    async def in_file(function):
        with SystemFile.open(path) as file:
            return function(file)

    def opened(*diffs, limit: int = 1 << 17):
        with SystemFile.open(path) as file:
            for seq, diff in enumerate(diffs, 1):
                with file.transaction():
                    cut = list(chunks(diff, limit))
                    for number, chunk in enumerate(cut, 1):
                        file.add_page(seq, number, chunk.count, chunk.data)
                    common = (0, "command", 0)
                    file.add(
                        SnapshotRow(seq, *common, len(diff), "metadata", None),
                        DiffRow(seq, seq - 1 or None, *common, "metadata", None, len(diff), len(cut), limit),
                    )
        return JournalOutbox("data", "snapfeed/edge7/data/changes", envelope, in_file)

    return opened


def changes_of(broker: HostileBroker) -> dict[int, list[dict]]:
    """What a consumer has of each diff: its last whole set of pages, in order."""
    diffs: dict[int, dict[int, dict]] = {}
    for publish in broker.good:
        if publish.topic.endswith("/data/changes"):
            page = orjson.loads(publish.payload)
            held = diffs.setdefault(page["seq"], {})
            if held and next(iter(held.values()))["pages"] != page["pages"]:
                held.clear()
            held[page["page"]] = page
    for held in diffs.values():
        assert sorted(held) == list(range(1, next(iter(held.values()))["pages"] + 1)), "a diff that never gets whole"
    return {seq: [change for n in sorted(held) for change in held[n]["changes"]] for seq, held in diffs.items()}


def test_what_does_not_fit_is_coarsened_and_never_dropped(journal):
    async def scenario():
        async with hostile([Script(max_packet=SMALLEST_PACKET)]) as (broker, made, _):
            small = [big_change(b"small%d" % n) for n in range(40)]
            box = journal(
                [*small[:20], big_change(b"ranges", ranges=2000), *small[20:], big_change(b"xattr", xattr=9000)]
            )
            made.add(box)
            await eventually(lambda: made.stats.lanes["data"].position and not box.ready.is_set(), "published")
            await eventually(lambda: changes_of(broker)[1][-1]["path"] == "xattr", "the last one")
            changes = {change["path"]: change for change in changes_of(broker)[1]}
            assert len(changes) == 42
            assert changes["ranges"]["ranges_quality"] == "superset"
            spans = [(offset, offset + size) for offset, size in changes["ranges"]["ranges"]]
            assert all(any(a <= n * 8192 and n * 8192 + 4096 <= b for a, b in spans) for n in range(2000))
            assert changes["xattr"]["omitted_xattrs"] == ["user.x"]
            assert max(publish.packet for publish in broker.good) <= SMALLEST_PACKET

    asyncio.run(scenario())


def test_a_change_that_fits_no_page_is_told_and_kept(journal):
    """A path of 4,000 control characters, six bytes each in JSON: no limit is kept by leaving something out."""

    async def scenario():
        name = b"\x01" * 4000
        async with hostile([Script(max_packet=SMALLEST_PACKET)]) as (broker, made, errors):
            made.add(journal([big_change(b"before")], [big_change(name)], [big_change(b"after")]))
            await eventually(
                lambda: any("does not fit a page" in text and "max_packet" in text for text in errors), "told"
            )
            await eventually(lambda: made.stats.lanes["data"].position == (1, 1), "what comes before it goes on")
            assert not any("\x01" in text for text in errors)
            assert made.connected
            assert set(changes_of(broker)) == {1}
            broker.kind()
            await eventually(lambda: made.stats.lanes["data"].position == (3, 1), "a larger limit is all it takes")
            assert changes_of(broker)[2][0]["path"] == name.decode()

    asyncio.run(scenario())


def test_a_diff_cut_anew_is_sent_whole_whenever_the_connection_breaks(journal):
    """The limit falls in the middle of a diff, and the connection is lost right after the diff was cut for it."""

    async def scenario():
        for deaths in range(4):
            first = Script(after=2, then="mute")
            smaller = [Script(max_packet=SMALLEST_PACKET, after=deaths - 1 + n) for n in range(2)]
            async with hostile([first, *smaller, Script(max_packet=SMALLEST_PACKET)]) as (broker, made, _):
                diff = [big_change(b"%d" % n, xattr=500) for n in range(60)]
                box = journal(diff, [big_change(b"end")], limit=20_000)
                made.add(box)
                await eventually(lambda made=made: made.stats.lanes["data"].position == (2, 1), "both diffs")
                await box.flush()
                paths = [change["path"] for change in changes_of(broker)[1]]
                assert paths == [str(n) for n in range(60)]
            with SystemFile.open(_path_of(box)) as file, file.transaction():
                for table in ("page", "diff", "snapshot"):
                    file.db.execute(f"DELETE FROM {table}")
                file.db.execute("UPDATE meta SET value = 1 WHERE key = 'next_seq'")
                file.db.execute("UPDATE meta SET value = 0 WHERE key LIKE 'acknowledged_%'")

    def _path_of(box):
        return box._in_file.__closure__[0].cell_contents

    asyncio.run(scenario())


def test_a_cursor_written_before_a_diff_is_cut_anew_does_not_skip_pages(journal):
    """The daemon dies after the cut; its successor has only the file."""

    async def scenario():
        diff = [big_change(b"%d" % n, xattr=500) for n in range(30)]
        box = journal(diff, [big_change(b"end")], limit=20_000)
        old = await box.fetch(None, 1 << 17, 2)
        await box.acknowledge(old[-1].position)
        await box.fetch(None, SMALLEST_PACKET, 1)
        await box.flush()
        successor = JournalOutbox("data", box._topic, box._envelope, box._in_file)
        (page,) = await successor.fetch(None, SMALLEST_PACKET, 1)
        assert page.position == (1, 1)
        # A diff that is told in full is not cut, and not told again, also if it is cut anew for a consumer.
        await successor.acknowledge(Position(1, orjson.loads(page.payload)["pages"]))
        assert [page.position for page in await successor.fetch(None, SMALLEST_PACKET - 600, 9)] == [(2, 1)]
        other = ReplayOutbox("data", box._topic, box._envelope, box._in_file, 0, 2, lambda _: None)
        (page,) = await other.fetch(None, SMALLEST_PACKET - 2500, 1)
        assert orjson.loads(page.payload)["pages"] > successor.acknowledged.page
        assert [page.position for page in await successor.fetch(None, SMALLEST_PACKET - 2500, 9)] == [(2, 1)]
        await successor.flush()
        third = JournalOutbox("data", box._topic, box._envelope, box._in_file)
        assert [page.position for page in await third.fetch(None, SMALLEST_PACKET - 2500, 9)] == [(2, 1)]

    asyncio.run(scenario())


def test_a_diff_cut_anew_for_a_consumer_is_begun_again_on_the_feed(journal):
    """Two outboxes over one journal: the feed stands in the middle of a diff that is cut for what a consumer asked for."""

    async def scenario():
        box = journal([big_change(b"%d" % n, xattr=500) for n in range(60)], [big_change(b"end")], limit=20_000)
        first = await box.fetch(None, 1 << 17, 100)  # the end, too
        await box.acknowledge(Position(1, 2))
        await box.flush()
        await box.acknowledge(Position(1, 3))
        longest = f"snapfeed/edge7/data/replay/{'c' * 64}"
        other = ReplayOutbox("data", longest, box._envelope, box._in_file, 0, 2, lambda _: None)
        packet_of = 9000
        cut = await other.fetch(None, payload_limit(packet_of, longest), 100)
        assert len(cut) > len(first) * 2
        await box.flush()
        assert await box._in_file(SystemFile.acknowledged) == (1, 0)
        again = await box.fetch(None, payload_limit(packet_of, box._topic), 100)
        assert [page.payload for page in again] == [
            page.payload for page in cut
        ]  # and not cut once more for a shorter topic

    asyncio.run(scenario())


# ---- what it costs


class Fake(Backoff):
    """Counts, takes no time, and remembers what it would have waited."""

    waits: list[float]

    def __init__(self):
        super().__init__(uniform=lambda _low, high: high)
        self.waits = []

    def delay(self):
        self.waits.append(super().delay())
        return 0.001


@pytest.mark.parametrize(
    "script",
    [
        Script(after=0),
        Script(connack="hangup"),
        Script(connack=0x88),
        Script(after=0, then=0x97),
        Script(maximum_qos=0),
    ],
)
def test_no_busy_reconnecting(script):
    async def scenario():
        made_of: list[Fake] = []

        def backoff():
            made_of.append(Fake())
            return made_of[-1]

        async with hostile([script] * 9, backoff=backoff) as (broker, made, _):
            made.add(watched(broker, "data"))
            await eventually(lambda: broker.connections >= 9, "several attempts")
            waits = next(one.waits for one in made_of if len(one.waits) >= 8)
            assert waits[:8] == [1, 2, 4, 8, 16, 30, 30, 30]
            assert broker.connections <= made.stats.failures + 1

    asyncio.run(scenario())


def test_refusals_are_not_hammered():
    async def scenario():
        async with hostile(
            [Script(reason=lambda p: 0x97 if p.topic.endswith("changes") else 0)], backoff=Fake
        ) as found:
            broker, made, _ = found
            made.add(box := watched(broker, "data"))
            await eventually(lambda: made.stats.lanes["data"].refused >= 6, "refused")
            lane = made._lanes["data", None][0]
            assert lane._backoff.waits[:6] == [1, 2, 4, 8, 16, 30]
            pages = [p for p in broker.received if p.topic.endswith("changes")]
            assert len(pages) <= len(box.pages) + 2 * made.stats.lanes["data"].refused  # one at a time after the first
            assert not box.acknowledged

    asyncio.run(scenario())


def test_a_partition_that_is_taken_away_while_it_is_refused_sends_no_more():
    async def scenario():
        async with hostile(
            [Script(reason=lambda p: 0x97 if p.topic.endswith("changes") else 0)], backoff=Fake
        ) as found:
            _, made, _ = found
            await eventually(lambda: made.connected, "connected")
            for rounds in range(1, 30):
                made.add(box := outbox("data", 3))
                task = made._lanes["data", None][1]
                await eventually(lambda n=rounds: made.stats.lanes["data"].refused >= 2 * n, "refused")
                made.remove(box)
                await eventually(task.done, "the lane ends")

    asyncio.run(scenario())


def test_memory_is_bounded_while_the_broker_does_not_read(monkeypatch):
    """Pages of 400 kB: the window's twenty, and no more, wait; and what is acknowledged without having left is not believed."""

    monkeypatch.setattr(feed.connection, "_QUEUED", 500)

    async def scenario():
        topic = b"snapfeed/edge7/request/x"
        flood = packet(PUBLISH << 4 | 2, struct.pack("!H", len(topic)) + topic + b"\0\x09\0{}")
        lies = b"".join(packet(PUBACK << 4, struct.pack("!HBB", n, 0, 0)) for n in range(18, 60))
        for then, error in (
            (b"", "acknowledged nothing"),
            (flood * 2_000, "reads nothing"),
            (lies, "had not been sent"),
        ):
            script = Script(after=2, then=then)
            more = {"config": {"max_packet": 1 << 20}, "limits": Limits(0.3, 0.8, 2_000_000)}
            async with hostile([script, Script()], handler=_handled, **more) as (broker, made, errors):
                box = watched(broker, "data", 60, 400_000)
                tracemalloc.start()
                held, _ = tracemalloc.get_traced_memory()
                made.add(box)
                await eventually(lambda errors=errors, e=error: any(e in text for text in errors), error)
                most = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                assert most - held < 50 << 20
                await eventually(lambda box=box: box.done, "delivered when it is kind")
                assert arrived(broker, box)

    asyncio.run(scenario())


def test_a_short_keep_alive_of_the_broker_is_kept():
    async def scenario():
        async with hostile([Script(keep_alive=1)]) as (broker, made, _):
            made.add(box := watched(broker, "data"))
            await eventually(lambda: box.done, "delivered")
            quiet = asyncio.get_running_loop().time()
            await eventually(
                lambda: asyncio.get_running_loop().time() > quiet + 2.5 or broker.violations, "a quiet time"
            )
            assert broker.connections == 1

    asyncio.run(scenario())


# ---- status and states


def test_refused_status_and_states_are_told_and_tried_again():
    async def scenario():
        refused = {"on": True}

        def reason(publish):
            return 0x87 if refused["on"] and publish.topic.endswith(("/state", "/status")) else 0

        async with hostile([Script(reason=reason)]) as (broker, made, errors):
            made.set_state("data", b"{}")
            made.add(box := watched(broker, "data"))
            await eventually(lambda: box.done and made.stats.state_refusals > 3, "pages go on")
            assert {"state", "status"} <= {re.search(r"refuses snapfeed/.*/(\w+) ", text)[1] for text in errors}
            refused["on"] = False
            await eventually(lambda: any(p.topic.endswith("/state") for p in broker.good), "tried again")
            assert broker.connections == 1
            made.set_state("data", b"x" * 200_000)
            await eventually(lambda: made.last_error and "too large" in made.last_error, "a state that fits no packet")

    asyncio.run(scenario())


def test_a_broker_without_retained_messages_gets_the_pages():
    async def scenario():
        async with hostile([Script(retain_available=0)], protocol=0) as (broker, made, _):
            made.set_state("data", b"{}")
            made.add(box := watched(broker, "data"))
            await eventually(lambda: box.done and any(p.topic.endswith("/state") for p in broker.good), "all of it")
            assert not any(publish.retain for publish in broker.received)

    asyncio.run(scenario())


@pytest.mark.parametrize(("setting", "works"), [("retain_available false", True), ("max_qos 0", False)])
@pytest.mark.parametrize("protocol", [0, 5])
def test_a_real_broker_with_less(setting, works, protocol, tmp_path):
    async def scenario(url):
        made = publisher(url, config={"protocol": protocol})
        async with running(made):
            made.add(box := outbox("data", 5))
            if works:
                await eventually(lambda: box.done, "delivered")
            else:
                await eventually(lambda: made.last_error and "QoS 0 only" in made.last_error, "told")
                assert not box.acknowledged

    with mosquitto(tmp_path, config=(setting,)) as broker:
        asyncio.run(scenario(broker.url))


# ---- commands

REQUEST = "snapfeed/edge7/request/snapshot"


def answers(broker: HostileBroker, topic: str = "snapfeed/edge7/response/snapshot") -> list[dict]:
    return [orjson.loads(publish.payload) for publish in broker.good if publish.topic == topic]


ODD_COMMANDS = {  # command, the count it leaves, the log line, the id in the answer (None: no answer)
    "retained": (Command(REQUEST, b'{"id":"r"}', retain=True), "retained", "retained", None),
    "oversize": (Command(REQUEST, b'{"id":"%s"}' % (b"x" * LARGEST)), "oversize", "at most 4096", "null"),
    "elsewhere": (Command("snapfeed/edge7/data/snapshot", b'{"id":"e"}'), "stray", "not subscribed", None),
    "deeper": (Command("snapfeed/edge7/request/a/b", b'{"id":"e"}'), "stray", "not subscribed", None),
    "wildcards": (Command(REQUEST, b'{"id":"w"}', response="mine/+"), "refused_topics", "no answer on 'mine/\\+'", "w"),
    "in the feed": (
        Command(REQUEST, b'{"id":"f"}', response="snapfeed/edge7/data/changes"),
        "refused_topics",
        "below",
        "f",
    ),
    "control": (Command(REQUEST, b'{"id":"c"}', response="mine/\x1b[31m"), "refused_topics", r"\\x1b", "c"),
    "QoS 2": (Command(REQUEST, b'{"id":"2"}', qos=2), "answered", None, "2"),
    "fault": (Command(REQUEST, b'{"id":"fault"}'), "answered", "failed", "fault"),
    "too much to say": (Command(REQUEST, b'{"id":"much"}'), "answered", None, "much"),
}


@pytest.mark.parametrize("name", ODD_COMMANDS)
def test_odd_commands_leave_one_line_and_one_count(name, caplog):
    command, count, line, identifier = ODD_COMMANDS[name]

    async def handler(request):
        if b"fault" in request.payload:
            raise ZeroDivisionError
        return answer(readable_id(request.payload), "x" * 200_000 if b"much" in request.payload else 1)

    async def scenario():
        async with hostile([Script(commands=[command])], handler=handler) as (broker, made, _):
            stats = made.stats.requests
            await eventually(lambda: getattr(stats, count) == 1, "counted")
            await eventually(lambda: broker.puback_from_client == (command.qos > 0), "acknowledged")
            if identifier is not None:
                (reply,) = await eventually(lambda: answers(broker), "answered")
                assert reply["id"] == (None if identifier == "null" else identifier)
                assert reply["status"] == ("error" if name in {"oversize", "fault", "too much to say"} else "ok")
            assert stats.received == 1
            assert not any(publish.topic.startswith("mine") for publish in broker.received)
            assert made.stats.connections == 1

    with caplog.at_level(logging.INFO, "snapfeed.feed"):
        asyncio.run(scenario())
    lines = [
        one.getMessage() for one in caplog.records if "command" in one.getMessage() or "message" in one.getMessage()
    ]
    assert len(lines) == (line is not None), lines
    assert line is None or re.search(line, lines[0])


@pytest.fixture
def few_places(monkeypatch):
    monkeypatch.setattr(feed.requests, "AT_ONCE", 16)
    monkeypatch.setattr(feed.requests, "_WAITING", 64)


def test_too_many_commands_are_told_so(caplog, few_places):
    async def scenario():
        gate = asyncio.Event()

        async def handler(request):
            await gate.wait()
            return answer(readable_id(request.payload), 1)

        commands = [Command(REQUEST, b'{"id":"%d"}' % number) for number in range(200)]
        async with hostile([Script(commands=commands)], handler=handler, limits=Limits(0.3, 5)) as (broker, made, _):
            stats = made.stats.requests
            await eventually(lambda: stats.received == 200, "all came")
            await eventually(lambda: len(answers(broker)) == stats.busy > 0, "who is turned away is told")
            gate.set()
            await eventually(lambda: stats.answered == 200 - stats.dropped, "the others are answered")
            assert stats.busy + stats.dropped == 200 - 16
            assert {reply["id"] for reply in answers(broker)} <= {str(number) for number in range(200)}
            return stats.busy, stats.dropped

    with caplog.at_level(logging.WARNING, "snapfeed.feed"):
        told = asyncio.run(scenario())
    lines = [one.getMessage() for one in caplog.records]
    assert (len([one for one in lines if "refused" in one]), len([one for one in lines if "dropped" in one])) == told
    assert len(lines) == 184


def test_commands_are_dropped_where_no_answer_gets_out(caplog, few_places):
    async def scenario():
        commands = [Command(REQUEST, b'{"id":"%d"}' % number) for number in range(200)]
        deaf = Script(commands=commands, reason=lambda publish: None if "/response/" in publish.topic else 0)
        async with hostile([deaf], handler=_handled, limits=Limits(0.3, 5)) as (broker, made, _):
            stats = made.stats.requests
            await eventually(lambda: stats.received == 200, "all came")
            assert (stats.busy, stats.dropped) == (0, 136)
            broker.kind()
            await eventually(lambda: made.stats.connections == 2 and made.connected, "connected again")

    with caplog.at_level(logging.WARNING, "snapfeed.feed"):
        asyncio.run(scenario())
    assert len([one for one in caplog.records if "dropped" in one.getMessage()]) == 136


def test_a_topic_that_can_hold_no_answer_costs_no_place_in_the_window():
    """`response/<verb>` is longer than `request/<verb>`: of a verb of 65,000 characters there is no answer there."""

    async def scenario():
        prefix = "snapfeed/edge7/request/"
        commands = [Command(prefix + "v" * (65_535 - len(prefix)), b'{"id":"v"}') for _ in range(30)]
        commands += [Command(REQUEST, b'{"id":"long"}', response="r" * 65_535, correlation=b"c" * 65_535)]
        async with hostile([Script(commands=commands)], handler=_handled) as (broker, made, _):
            await eventually(lambda: made.stats.requests.unanswered == 30, "counted")
            assert (await eventually(lambda: answers(broker), "answered on the usual topic"))[0]["id"] == "long"
            made.add(box := watched(broker, "data"))
            await eventually(lambda: box.done, "pages go on")
            assert broker.connections == 1

    asyncio.run(scenario())


# ---- any mixture

PAGES_LEFT = st.integers(0, 30)
ENDS = st.sampled_from([*GOODBYES, 0x00, "drop", "mute", "deaf", *NONSENSE.values()])
FIRST = st.sampled_from([0] * 12 + ["half", "hangup", "twice", 0x87, 0x88, 0x97, 0x9B, *list(GREETINGS.values())[:4]])
SCRIPTS = st.builds(
    lambda which, **fields: Script(reason=(lambda p: which[len(p.payload) % 7 + p.packet % 3]), **fields),
    st.lists(st.sampled_from([0, 0, 0x10, 0, 0, 0, *REFUSALS]), min_size=9, max_size=9),
    connack=FIRST,
    session_present=st.booleans(),
    receive_maximum=st.sampled_from([None, None, 1, 2, 5]),
    max_packet=st.sampled_from([None, None, None, 100, SMALLEST_PACKET, 20_000]),
    retain_available=st.sampled_from([None, None, 0, 1]),
    maximum_qos=st.sampled_from([None] * 8 + [0, 1]),
    wildcards=st.sampled_from([None, 0, 1]),
    acks=st.sampled_from(["each", "reordered", "twice", "unknown"]),
    after=PAGES_LEFT,
    then=ENDS,
    suback=st.sampled_from([1, 1, 0x87, None]),
    commands=st.just([Command(REQUEST, b'{"id":"1"}', qos=2), Command(REQUEST, b"{", response="a/#")]),
)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(st.lists(SCRIPTS, min_size=1, max_size=5), st.sampled_from([5, 5, 4, 0]))
def test_any_mixture(scripts, protocol):
    quick = Limits(0.1, 0.1, 2_000_000)
    asyncio.run(delivered(scripts, protocol=protocol, limits=quick, handler=_handled, diffs=20, size=900))


# ---- the daemon


@contextlib.contextmanager
def in_a_thread(*scripts: Script):
    """A hostile broker in a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)

    broker = HostileBroker(scripts)
    call(broker.__aenter__())
    try:
        yield broker
    finally:
        call(broker.__aexit__(None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.kernel
def test_the_daemon_says_what_the_broker_refuses(ext4, tmp_path):
    refuse = {"on": True}

    def reason(publish):
        return 0x97 if refuse["on"] and publish.topic.endswith("/changes") else 0

    script = Script(maximum_qos=0, reason=reason)
    with in_a_thread(script) as broker:
        (ext4.path / "file").write_text("x")
        with daemon(tmp_path, ext4.path, broker=broker.url) as snapfeed:

            def told(text):
                return text in (snapfeed.partition()["feed_error"] or "")

            wait_until(lambda: told("QoS 0 only"), "status says that the broker cannot be used")
            assert "QoS 0 only" in snapfeed.command("status", check=False).stdout
            script.maximum_qos = None
            wait_until(lambda: told("0x97"), "status says that the page is refused")

            def states():
                topic = f"snapfeed/{HOST}/{snapfeed.partition()['partition']}/state"
                return [json.loads(p.payload) for p in broker.good if p.topic == topic and p.retain]

            wait_until(
                lambda: any("0x97" in (state["feed_error"] or "") for state in states()), "the retained state, too"
            )
            assert snapfeed.partition()["backlog"] == 1
            assert snapfeed.partition()["published"] is None
            refuse["on"] = False
            wait_until(lambda: snapfeed.published(1), "taken at last")
            wait_until(lambda: states()[-1]["feed_error"] is None and states()[-1]["backlog"] == 0, "the state says so")
            assert "Traceback" not in snapfeed.output()
            assert snapfeed.stop() == 0
