"""Pages as CloudEvents: attributes that name them, as a foreign MQTT 5 client sees them, and never beyond a packet's limit."""

import asyncio
import subprocess
from datetime import UTC, datetime

import orjson
import pytest
from broker_processes import collector, eventually, mosquitto
from hostile_broker import HostileBroker, Script
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from partitions import run
from publishing import ListOutbox, outbox, publisher, running

from comparer.errors import DamageError
from feed.cloudevents import CONTENT_TYPE, ROOM, described, event
from feed.connection import event_properties
from feed.outbox import OutPage, Position
from feed.pages import Chunk, Envelope, page_payload, payloads

CHANGES = "snapfeed/edge7/data/changes"
REPLAY = "snapfeed/edge7/data/replay/copy"


def envelope(**more):
    fields = ("edge7", "data", "u-1", "e-1", 42, 41, 1795351234000001999, "volume", 67108864, "per-file", None)
    names = (
        "host",
        "partition",
        "uuid",
        "epoch",
        "seq",
        "parent",
        "time_ns",
        "trigger",
        "volume",
        "consistency",
        "snapshot",
    )
    return Envelope(**dict(zip(names, fields, strict=True)) | more)


def attributes(topic=CHANGES, page=3, **more):
    return dict(event(page_payload(envelope(**more), page, 7, b'{"op":"create"}'), topic).attributes)


def test_the_attributes():
    found = attributes()
    assert found == {
        "specversion": "1.0",
        "id": "e-1/42/3",
        "source": "/snapfeed/edge7/data",
        "type": "io.snapfeed.changes.v1",
        "subject": "u-1",
        "time": "2026-11-22T12:40:34.000001Z",
    }
    assert datetime.fromisoformat(found["time"]) == datetime.fromtimestamp(1795351234, UTC).replace(microsecond=1)
    Draft202012Validator(described() | {"required": list(found), "additionalProperties": False}).validate(found)
    assert event(page_payload(envelope(), 1, 1, b""), CHANGES).content_type == "application/json"


def test_source_and_id_name_one_thing():
    """A diff that is sent again is the event it was; a baseline made for one consumer is no diff of the same number."""
    keys = ("source", "id")

    def key(*arguments, **more):
        found = attributes(*arguments, **more)
        return tuple(found[name] for name in keys)

    assert key(CHANGES) == key(REPLAY)
    made = {"parent": None, "baseline": True}
    assert key(REPLAY, **made) == ("/snapfeed/edge7/data/replay/copy", "e-1/42/3")
    others = [key(CHANGES), key(REPLAY, **made), key(REPLAY + "2", **made), key(CHANGES, 4), key(CHANGES, seq=43)]
    others += [key(CHANGES, epoch="e-2"), key(CHANGES, host="edge8"), key(CHANGES, partition="home")]
    assert len(set(others)) == len(others)
    assert key(CHANGES, **made) == key(CHANGES)  # the first diff of an epoch is a baseline, in `changes` as everywhere


@given(st.text(max_size=30) | st.just('","changes":[],"epoch":"forged') | st.just(',"changes":['))
def test_what_a_page_holds_forges_nothing(text):
    chunk = orjson.dumps({"path": text, "epoch": "forged", "changes": [text]})
    payload = page_payload(envelope(snapshot=text), 3, 7, chunk)
    assert dict(event(payload, CHANGES).attributes) == attributes()


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 2**63), st.integers(0, 2**63), st.booleans())
def test_the_size_is_what_goes_over_the_wire_and_there_is_room(short, long, seq, time_ns, own):
    page = envelope(
        host="h" * long,
        partition="p" * short,
        uuid="u" * long,
        epoch="e" * long,
        seq=seq,
        time_ns=time_ns,
        baseline=own,
    )
    made = event(page_payload(page, 10**9, 10**9, b""), f"base/{page.host}/{page.partition}/replay/{'c' * long}")
    assert made.size() == len(event_properties(made).pack()) <= ROOM


def test_the_widest_page_needs_all_the_room():
    names = {name: letter * 64 for name, letter in zip(("host", "partition", "uuid", "epoch"), "hpue", strict=True)}
    page = envelope(**names, seq=2**63, baseline=True)
    made = event(page_payload(page, 10**9, 10**9, b""), f"base/{'h' * 64}/{'p' * 64}/replay/{'c' * 64}")
    assert made.size() == ROOM


@pytest.mark.parametrize(
    "payload",
    [b"", b"{}", b"\xff", b'{"host":"h","changes":[', b'[1,"changes":[]', b"x" * 1000, b'{"host":1,"changes":[]}'],
)
def test_what_is_no_page_is_damage(payload):
    with pytest.raises(DamageError, match="not a page"):
        event(payload, CHANGES)


@pytest.mark.parametrize("protocol", [5, 4])
def test_a_foreign_client_sees_them(protocol, tmp_path):
    """mosquitto_sub over MQTT 5: Content Type and user properties; over MQTT 3.1.1 there are none, the payload is the same."""

    async def scenario(broker, seen, output):
        made, box = publisher(broker.url, config={"protocol": protocol}), outbox("data", 3)
        async with running(made):
            made.add(box)
            await eventually(lambda: box.done, "published")
        lines = await eventually(lambda: (found := output.read_text().splitlines())[4:] and found, "all pages arrive")
        expected = [page.payload for page in box.pages]
        await eventually(lambda: [m.payload for m in seen.messages(CHANGES)] == expected, "the payloads arrive")
        if protocol == 4:
            assert lines[1:] == ["|"] * 4
            return
        contents, _, first = lines[1].partition("|")
        assert contents == CONTENT_TYPE
        assert first.split(" ") == [f"{name}:{value}" for name, value in event(expected[0], CHANGES).attributes]
        assert [line.split("id:")[1].split()[0] for line in lines[1:]] == ["e/1/1", "e/2/1", "e/3/1", "e/3/2"]

    with mosquitto(tmp_path) as broker, collector(broker, CHANGES) as seen:
        output = tmp_path / "properties"
        command = ["mosquitto_sub", *broker.options, "-V", "5", "-q", "1", "-t", CHANGES, "-t", "probe", "-F", "%C|%P"]
        with output.open("wb") as file:
            process = subprocess.Popen(["stdbuf", "-oL", *command], stdout=file)
        try:

            async def subscribed():
                run("mosquitto_pub", *broker.options, "-V", "5", "-q", "1", "-r", "-t", "probe", "-m", "x")
                await eventually(lambda: output.read_text().count("\n") == 1, "mosquitto_sub is subscribed")
                await scenario(broker, seen, output)

            asyncio.run(subscribed())
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("protocol", [0, 5])
@pytest.mark.parametrize("announce", [True, False])
def test_packets_hold_the_properties_too(protocol, announce):
    """Pages filled to the brim, under the longest names: with their properties they fit, and little room is left."""
    host, partition = "h" * 64, "p" * 64
    limit = 20_000

    async def scenario():
        async with HostileBroker([Script(max_packet=limit, announce=announce)]) as broker:

            class Box(ListOutbox):
                async def fetch(self, after, room, count):
                    page = envelope(host=host, partition=partition, uuid="u" * 64, epoch="e" * 64)
                    cut = payloads(page, [Chunk(6000, b",".join([b'{"x":"yyyy"}'] * 6000))], room)
                    self.pages = [OutPage(Position(42, n), n == len(cut), one) for n, one in enumerate(cut, 1)]
                    return await super().fetch(after, room, count)

            config = {"protocol": protocol, "host": host} | ({} if announce else {"max_packet": limit})
            made = publisher(broker.url, config=config)
            async with running(made):
                made.add(box := Box(partition, []))
                await eventually(lambda: box.pages and box.done, "all pages fit")
            assert made.stats.connections == 1
            pages = [one for one in broker.received if one.topic.endswith("/changes")]
            assert len(pages) == len(box.pages) > 3
            assert all(len(one.payload) + ROOM // 2 < one.packet <= limit for one in pages)
            assert max(one.packet for one in pages) > limit - 200
            assert [one.payload for one in pages] == [page.payload for page in box.pages]

    asyncio.run(scenario())
