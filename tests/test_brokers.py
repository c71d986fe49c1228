"""One suite for several brokers: what the feed needs of a broker, and what each of them gives. docs/brokers.md tells the results.

What a broker cannot do is in its `Kind` and asserted as such, so a test also fails when a broker does more than is said here.
"""

import asyncio
import base64
import contextlib
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import pytest
from broker_processes import ROOT, Broker, collector, embedded, eventually, mosquitto, nats, rabbitmq
from consumer import Consumer
from daemon_process import daemon
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from partitions import run, wait_until
from publishing import ListOutbox, running
from trees import attr
from workload import HOSTILE, Worker

from comparer.model import Change, FileType, Ident, Op
from feed.backoff import Backoff
from feed.broker import BrokerConfig
from feed.cloudevents import ROOM
from feed.commands import answer, parse_command
from feed.connection import LinkError
from feed.dialer import Dialer
from feed.encode import encode_bytes
from feed.outbox import OutPage, Position
from feed.pages import PACKET, Chunk, Envelope, payload_limit, payloads
from feed.publisher import Publisher

BASE = "snapfeed/edge7"
STATUS = f"{BASE}/status"
PROBE = f"{BASE}/ready-{{token}}/changes"  # what the one may write and the other may read
USERS = ("edge7", "commander")  # the daemon, and a consumer that may also ask, as in etc/mosquitto/acl
LIMIT = 20_000  # bytes of a packet, where a broker is started with a limit


# ---- the brokers


@dataclass(frozen=True)
class Kind:
    """A broker as configured here, and what it gives. Each field that is not how it should be is a line of docs/brokers.md."""

    start: Callable[[Path], contextlib.AbstractContextManager[Broker]]
    protocol: int  # the MQTT that the publisher arrives at: 4 is 3.1.1
    asked: int = 0  # the MQTT that the publisher is told to speak; 0: it finds out
    login: str = "nobody"  # or `password`, `certificate`
    limited: Callable[[Path], contextlib.AbstractContextManager[Broker]] | None = None  # with LIMIT, where it has one
    limit_told: bool = False  # in the CONNACK
    retained_by_pattern: bool = True  # a subscription with + gets retained messages
    live_retained: bool = False  # who is subscribed sees that a message was published as a retained one
    # By the signal that ends it: what of the pages it acknowledged it keeps for a consumer's session. `most`: all but the last.
    kept: dict[int, str] = field(default_factory=dict)
    shared: bool = True  # $share
    forbidden: str | None = None  # what its ACL makes of a page: `refused`, `swallowed`, `hung up`; None: no ACL here


@contextlib.contextmanager
def mosquitto_plain(directory: Path, version: str = "mqttv311") -> Iterator[Broker]:
    keeping = ("persistence true", f"persistence_location {directory}/", "max_queued_messages 10000")
    with mosquitto(directory, config=keeping) as broker:
        broker.options += ["-V", version]
        yield broker


def mosquitto_limited(directory: Path):
    return mosquitto(directory, config=(f"max_packet_size {LIMIT}",))


@contextlib.contextmanager
def mosquitto_guarded(directory: Path) -> Iterator[Broker]:
    """TLS only, the certificate says who it is, our ACL says what it may."""
    acl = (ROOT / "etc/mosquitto/acl").read_text(encoding="utf-8")
    keeping = ("persistence true", f"persistence_location {directory}/", "max_queued_messages 10000")
    with mosquitto(directory, acl=acl, tls=True, config=("use_identity_as_username true", *keeping)) as broker:
        broker.options += ["-V", "mqttv5"]
        broker.reading = [word.replace("/client.", "/commander.") for word in broker.options]
        broker.probe = PROBE
        yield broker


def with_passwords(broker: Broker) -> Broker:
    plain = broker.options
    broker.options, broker.reading = ([*plain, "-u", user, "-P", f"secret of {user}"] for user in USERS)
    broker.probe = PROBE
    return broker


def subjects(*words: str) -> str:
    return "[" + ", ".join(f'"snapfeed.{word}"' for word in words) + "]"


@contextlib.contextmanager
def nats_guarded(directory: Path, more: str = "") -> Iterator[Broker]:
    """The same rules as etc/mosquitto/acl; topics are subjects: dots for slashes, * for +, > for #.

    A session with QoS 1 is delivered by a subject of its own ($MQTT.sub.*), which has to be allowed.
    """
    daemon_reads = subjects("edge7.request.*")
    daemon_writes = subjects("edge7.status", "edge7.*.state", "edge7.*.changes", "edge7.*.replay.*", "edge7.response.>")
    reads = subjects("*.status", "*.*.state", "*.*.changes", "*.*.replay.commander", "*.response.>")
    own = '"$MQTT.sub.>"'
    users = f"""
authorization {{ users: [
  {{ user: edge7, password: "secret of edge7",
    permissions: {{ publish: {daemon_writes}, subscribe: [{daemon_reads[1:-1]}, {own}] }} }}
  {{ user: commander, password: "secret of commander",
    permissions: {{ publish: {subjects("*.request.*")}, subscribe: [{reads[1:-1]}, {own}] }} }}
] }}
{more}"""
    with nats(directory, config=users) as broker:
        yield with_passwords(broker)


def hashed(password: str) -> str:
    """As RabbitMQ keeps passwords: a salt of four bytes, then SHA-256 of salt and password."""
    salt = os.urandom(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


@contextlib.contextmanager
def rabbitmq_guarded(directory: Path) -> Iterator[Broker]:
    """The same rules as etc/mosquitto/acl, as topic permissions: regular expressions over topics with dots for slashes."""
    name = "[A-Za-z0-9_-]+"
    topics = {
        "edge7": (
            rf"^snapfeed\.edge7\.(status|{name}\.(state|changes)|{name}\.replay\.{name}|response\..+)$",
            rf"^snapfeed\.edge7\.request\.(\*|{name})$",
        ),
        "commander": (
            rf"^snapfeed\.{name}\.request\.{name}$",
            r"^snapfeed\.[^.]+\.(status|[^.]+\.(state|changes)|[^.]+\.replay\.commander|response\..+)$",
        ),
    }
    queues = "^(mqtt-subscription-.*|amq\\.topic)$"
    definitions = {
        "vhosts": [{"name": "/"}],
        "users": [
            {
                "name": user,
                "password_hash": hashed(f"secret of {user}"),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": "",
            }
            for user in USERS
        ],
        "permissions": [
            {"user": user, "vhost": "/", "configure": queues, "write": queues, "read": queues} for user in USERS
        ],
        "topic_permissions": [
            {"user": user, "vhost": "/", "exchange": "amq.topic", "write": write, "read": read}
            for user, (write, read) in topics.items()
        ],
    }
    with rabbitmq(directory, definitions=definitions) as broker:
        yield with_passwords(broker)


TERM, KILL = signal.SIGTERM, signal.SIGKILL
KINDS = {  # RabbitMQ first: it starts slowly, and several workers take tests from each other at the end
    "rabbitmq": Kind(
        rabbitmq_guarded, protocol=4, login="password", retained_by_pattern=False, kept={KILL: "all"}, shared=False,
        forbidden="hung up",
    ),
    "mosquitto-3.1.1": Kind(
        mosquitto_plain, protocol=4, asked=4, limited=mosquitto_limited, kept={TERM: "all", KILL: "none"}
    ),
    "mosquitto-5": Kind(
        lambda directory: mosquitto_plain(directory, "mqttv5"),
        protocol=5,
        limited=mosquitto_limited,
        limit_told=True,
        live_retained=True,
        kept={TERM: "all", KILL: "none"},
    ),
    "mosquitto-tls": Kind(
        mosquitto_guarded, protocol=5, login="certificate", live_retained=True, kept={TERM: "all", KILL: "none"},
        forbidden="refused",
    ),
    "nats": Kind(
        nats_guarded, protocol=4, login="password", kept={TERM: "most", KILL: "some"}, shared=False,
        forbidden="swallowed",
    ),
    "embedded": Kind(embedded, protocol=4, kept={KILL: "none"}, shared=False),
}  # fmt: skip


@dataclass
class Running:
    """A broker that runs for all tests of its kind, and how to log in to it."""

    kind: Kind
    broker: Broker

    def config(self, user: str = "edge7", **more) -> BrokerConfig:
        if self.kind.login == "password":
            more |= {"username": user, "password": f"secret of {user}"}
        if self.kind.login == "certificate":
            files, name = self.broker.log.parent.parent, "client" if user == "edge7" else user
            more |= {
                "ca_file": f"{files}/ca.pem",
                "cert_file": f"{files}/{name}.pem",
                "key_file": f"{files}/{name}.key",
            }
        return BrokerConfig(**{"url": self.broker.url, "host": "edge7", "protocol": self.kind.asked, **more})

    def publisher(self, handler=None, **more) -> Publisher:
        return publisher(self.config(**more), handler)

    def ask(self, topic: str, payload: str, *options: str) -> None:
        """Publish as the consumer that may ask."""
        options = (*(self.broker.reading or self.broker.options), *options)
        run("mosquitto_pub", *options, "-q", "1", "-t", topic, "-m", payload)


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def there(request, tmp_path_factory):
    with request.param.start(tmp_path_factory.mktemp("broker")) as broker:
        yield Running(request.param, broker)


def publisher(config: BrokerConfig, handler=None) -> Publisher:
    return Publisher(config, version="1", handler=handler, backoff=lambda: Backoff(0.05, 0.2))


# ---- pages


def change(number: int, name: bytes) -> Chunk:
    made = Change(Op.CREATE, Ident(number, 1), FileType.FILE, b"%d/%b" % (number, name), after=attr())
    return Chunk(1, encode_bytes(made))


def box(partition: str, diffs: int, size: int = 0, **more) -> ListOutbox:
    """Diffs with a hostile name each, some with two pages; each page is `size` bytes larger than it need be."""
    pages = []
    for seq in range(1, diffs + 1):
        envelope = Envelope("edge7", partition, "u", "e", seq, seq - 1, 10**18, "time", 0, "metadata", None)
        hostile = HOSTILE[seq % len(HOSTILE)] + b"y" * size
        cut = payloads(envelope, [change(seq, hostile)] * (2 if seq % 3 == 0 else 1), 10**7)
        pages += [OutPage(Position(seq, n), n == len(cut), payload) for n, payload in enumerate(cut, 1)]
    return ListOutbox(partition, pages, **more)


def topic_of(partition: str) -> str:
    return f"{BASE}/{partition}/changes"


def arrived(seen, partition: str) -> list[bytes]:
    """The payloads that arrived for a partition, in order, those that came again left out."""
    return list(dict.fromkeys(message.payload for message in seen.messages(topic_of(partition))))


def sent(made: ListOutbox) -> list[bytes]:
    return [page.payload for page in made.pages]


async def all_arrive(seen, *boxes: ListOutbox) -> None:
    for made in boxes:
        await eventually(
            lambda made=made: arrived(seen, made.partition)[-1:] == sent(made)[-1:], "the last page arrives"
        )
        assert arrived(seen, made.partition) == sent(made)


def test_all_pages_arrive_in_order_and_exactly(there):
    async def scenario(seen):
        boxes = [box("order-1", 60), box("order-2", 60)]
        async with running(there.publisher()) as made:
            for one in boxes:
                made.add(one)
            await eventually(lambda: all(one.done for one in boxes), "all pages are acknowledged")
            assert made.stats.protocol == there.kind.protocol
            assert made.stats.connections == 1
            for one in boxes:
                stats = made.stats.lanes[one.partition]
                assert (stats.acknowledged, stats.refused) == (len(one.pages), 0)
                assert stats.position == one.pages[-1].position
            await all_arrive(seen, *boxes)
        assert not any(message.retained for message in seen.messages(topic_of("order-1")))

    with collector(there.broker, *map(topic_of, ("order-1", "order-2"))) as seen:
        asyncio.run(scenario(seen))


def test_the_largest_page_passes(there):
    """Of the default, and of 1,000,000 bytes, below every broker's own default."""

    async def scenario(seen):
        for number, packet in enumerate((PACKET, 1_000_000)):
            partition = f"large-{number}"
            limit = payload_limit(packet, topic_of(partition), ROOM)
            one = box(partition, 1, limit - len(box(partition, 1).pages[0].payload))
            assert len(one.pages[0].payload) == limit
            async with running(there.publisher(max_packet=packet)) as made:
                made.add(one)
                await eventually(lambda one=one: one.done, "acknowledged")
                assert made.stats.connections == 1
                await all_arrive(seen, one)

    with collector(there.broker, topic_of("large-0"), topic_of("large-1")) as seen:
        asyncio.run(scenario(seen))


# ---- status and state


def test_status_last_will_and_retained_state(there):
    async def scenario(seen):
        def states():
            return [orjson.loads(one.payload)["state"] for one in seen.messages(STATUS) if not one.retained]

        made = there.publisher()
        made.set_state("state-1", b'{"head":1}')
        async with running(made):
            await eventually(lambda: states()[-1:] == ["online"], "online")
            made.set_state("state-1", b'{"head":2}')
            await eventually(lambda: seen.messages(f"{BASE}/state-1/state"), "the state")
        await eventually(lambda: states()[-1:] == ["offline"], "the farewell")
        before = len(states())
        task = asyncio.create_task(there.publisher().run())
        await eventually(lambda: states()[before:] == ["online"], "online again")
        task.cancel()  # cuts the connection, as a crash does
        await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: states()[before:] == ["online", "offline"], "the last will")

    with collector(there.broker, STATUS, f"{BASE}/state-1/state") as seen:
        asyncio.run(scenario(seen))
        heads = [one.payload for one in seen.messages(f"{BASE}/state-1/state")]
        assert heads[-1] == b'{"head":2}'
    with collector(there.broker, STATUS, f"{BASE}/state-1/state") as late:
        wait_until(lambda: {(one.topic, one.retained) for one in late.messages()} == {
            (STATUS, True), (f"{BASE}/state-1/state", True)
        }, "who comes later is told")  # fmt: skip
        told = {one.topic: one.payload for one in late.messages()}
        assert orjson.loads(told[STATUS])["state"] == "offline"
        assert told[f"{BASE}/state-1/state"] == b'{"head":2}'


def test_retained_state_by_a_pattern(there):
    async def scenario():
        made = there.publisher()
        made.set_state("state-2", b"{}")
        async with running(made):
            await eventually(lambda: made.connected, "connected")
            with collector(there.broker, f"{BASE}/state-2/state") as exact:
                await eventually(exact.messages, "it is retained")
            with collector(there.broker, "snapfeed/+/+/state") as late:
                # What is retained comes right after the subscription, so before what is published now.
                made.set_state("state-2", b'{"new":true}')
                await eventually(lambda: b'{"new":true}' in [one.payload for one in late.messages()], "the next one")
                kept = [one for one in late.messages() if one.topic.endswith("/state-2/state") and one.retained]
                # A set, as amqtt sends it twice.
                assert {one.payload for one in kept} == ({b"{}"} if there.kind.retained_by_pattern else set())

    asyncio.run(scenario())


# ---- commands


def handler(calls: list[str]):
    async def handle(request):
        command = parse_command(request.verb, request.payload)
        calls.append(command.id)
        return answer(command.id, {"verb": command.verb})

    return handle


def test_commands_and_answers(there):
    topic, replies = f"{BASE}/request/snapshot", f"{BASE}/response/snapshot"

    async def scenario(seen):
        calls = []
        async with running(there.publisher(handler(calls))) as made:

            def asked():
                there.ask(topic, '{"id":"plain"}')
                return seen.messages(replies)

            await eventually(asked, "an answer")
            assert orjson.loads(seen.messages(replies)[0].payload) == {
                "id": "plain", "status": "ok", "error": None, "data": {"verb": "snapshot"}
            }  # fmt: skip
            if there.kind.protocol == 5:
                await with_response_topic(made)

    async def with_response_topic(made):
        mine = f"{replies}/mine"
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic, properties.CorrelationData = mine, b"\x00\xff"
        properties.UserProperty = ("traceparent", "00-1")
        async with Dialer(there.config("commander"), "").open_client() as commander:
            await commander.subscribe_live(mine)
            assert await commander.publish_acknowledged(topic, b'{"id":"five"}', properties=properties) < 0x80
            message = await asyncio.wait_for(commander.receive(), 10)
            assert message.topic.value == mine
            assert message.properties.CorrelationData == b"\x00\xff"
            assert orjson.loads(message.payload)["id"] == "five"
            assert made.stats.requests.refused_topics == 0
            # The feed has no use for user properties; they pass, for who has.
            async with Dialer(there.config(), "another").open_client() as host:
                await host.publish_acknowledged(mine, b"{}", properties=properties)
            message = await asyncio.wait_for(commander.receive(), 10)
            assert message.properties.UserProperty == [("traceparent", "00-1")]

    with collector(there.broker, replies) as seen:
        asyncio.run(scenario(seen))


def test_a_retained_command_is_ignored(there):
    """One that lay there before is never carried out. One that comes while we listen is told apart only with MQTT 5."""
    topic, replies = f"{BASE}/request/state", f"{BASE}/response/state"

    async def scenario(seen):
        calls = []
        await asyncio.to_thread(there.ask, topic, '{"id":"old"}', "-r")
        async with running(there.publisher(handler(calls))) as made:

            def asked():
                there.ask(topic, '{"id":"live"}')
                return "live" in calls

            await eventually(asked, "a command is carried out")
            await asyncio.to_thread(there.ask, topic, '{"id":"now"}', "-r")
            await asyncio.to_thread(there.ask, topic, '{"id":"after"}')
            await eventually(lambda: "after" in calls, "the next one is carried out")
            assert "old" not in calls
            assert ("now" in calls) == (not there.kind.live_retained)
            # MQTT 5 asks the broker not to send what lay there; with 3.1.1 it comes, marked, where patterns give it.
            lay_there = there.kind.protocol == 4 and there.kind.retained_by_pattern
            if (
                there.kind.start is embedded
            ):  # to who comes back it sends everything retained that anybody subscribed to
                assert made.stats.requests.retained >= 1
            else:
                assert made.stats.requests.retained == lay_there + there.kind.live_retained
            answered = [orjson.loads(one.payload)["id"] for one in seen.messages(replies)]
            assert "old" not in answered

    with collector(there.broker, replies) as seen:
        try:
            asyncio.run(scenario(seen))
        finally:
            there.ask(topic, "", "-r")


# ---- packet limits


class Cutting(ListOutbox):
    """Cuts its diffs for the limit it is asked for, as the journal does; `limits` are those it was asked for."""

    def __init__(self, partition: str) -> None:
        super().__init__(partition, [])
        self.limits = []

    async def fetch(self, after, limit, count):
        if limit not in self.limits:
            self.limits.append(limit)
            envelope = Envelope("edge7", self.partition, "u", "e", 1, 0, 10**18, "time", 0, "metadata", None)
            diff = Chunk(30, b",".join(change(number, b"z" * 2000).data for number in range(30)))
            cut = payloads(envelope, [diff], limit)
            self.pages = [OutPage(Position(1, n), n == len(cut), one) for n, one in enumerate(cut, 1)]
        return await super().fetch(after, limit, count)


def packet(payload: bytes, partition: str) -> int:
    return len(payload) + PACKET - payload_limit(PACKET, topic_of(partition))


def whole_diff(payloads_: list[bytes]) -> list[str]:
    """The paths of the diff whose last page came last."""
    documents = [orjson.loads(one) for one in payloads_]
    documents = [one for one in documents if one["pages"] == documents[-1]["pages"]]
    assert [one["page"] for one in documents] == list(range(1, documents[-1]["pages"] + 1))
    return [one["path"] for document in documents for one in document["changes"]]


@contextlib.contextmanager
def limited(there, directory):
    """A broker with LIMIT; where there is no such thing, the one that runs."""
    if there.kind.limited is None:
        yield there
    else:
        with there.kind.limited(directory) as broker:
            yield Running(Kind(there.kind.start, there.kind.protocol, there.kind.asked), broker)


def test_a_configured_packet_limit_is_kept(there, tmp_path):
    async def scenario(place, seen):
        async with running(place.publisher(max_packet=16_384)) as made:
            made.add(one := Cutting("limit-1"))
            await eventually(lambda: one.pages and one.done, "all pages are taken")
            assert made.stats.connections == 1
            await all_arrive(seen, one)
        assert len(one.pages) >= 4
        assert max(packet(payload, "limit-1") for payload in arrived(seen, "limit-1")) <= 16_384
        assert whole_diff(arrived(seen, "limit-1")) == [f"{n}/{'z' * 2000}" for n in range(30)]

    with limited(there, tmp_path) as place, collector(place.broker, topic_of("limit-1")) as seen:
        asyncio.run(scenario(place, seen))


def test_a_packet_limit_is_learnt(there, tmp_path):
    """MQTT 5 tells it; with 3.1.1 the broker just hangs up, and smaller pages are tried."""
    if there.kind.limited is None:
        # The broker has no limit that one could set: nothing to learn, large pages pass (test_the_largest_page_passes).
        assert there.kind.start in {rabbitmq_guarded, nats_guarded, embedded, mosquitto_guarded}
        return

    async def scenario(place, seen):
        async with running(place.publisher()) as made:
            made.add(one := Cutting("limit-2"))
            await eventually(lambda: one.pages and one.done, "all pages are taken")
            assert (made.stats.connections == 1) == there.kind.limit_told
            await all_arrive_cut(seen, one)
            assert made.stats.packet <= LIMIT

    async def all_arrive_cut(seen, one):
        await eventually(lambda: arrived(seen, "limit-2")[-1:] == sent(one)[-1:], "the last page")
        assert max(packet(payload, "limit-2") for payload in arrived(seen, "limit-2")) <= LIMIT
        assert whole_diff(arrived(seen, "limit-2")) == [f"{n}/{'z' * 2000}" for n in range(30)]

    with limited(there, tmp_path) as place, collector(place.broker, topic_of("limit-2")) as seen:
        asyncio.run(scenario(place, seen))


# ---- restarts, and what a PUBACK is worth


@pytest.mark.parametrize("end", [TERM, KILL], ids=["ended", "killed"])
def test_a_broker_restarted_in_mid_stream(there, end):
    """Order is kept, nothing is lost that the broker keeps, and for who was away what the PUBACK promised is there, or is not."""
    if end not in there.kind.kept:
        # RabbitMQ starts slowly, and amqtt keeps everything in memory: to be killed is the harder half, or the only one.
        assert there.kind.start in {rabbitmq_guarded, embedded}
        return
    kept = there.kind.kept[end]
    partition = f"restart-{end.name}"
    name = f"away-{end.name}"
    session = ["-c", "-i", name, *(["-x", "3600"] if there.kind.protocol == 5 else [])]

    async def scenario(seen):
        one = box(partition, 300, 500, released=120)
        async with running(there.publisher()) as made:
            made.add(one)
            await eventually(
                lambda: one.acknowledged and one.acknowledged[-1] == one.pages[119].position, "120 are acknowledged"
            )
            one.release(250)
            await eventually(lambda: one.acknowledged[-1] > one.pages[140].position, "the middle is reached")
            await asyncio.to_thread(there.broker.end, end)
            await eventually(lambda: not made.connected, "the publisher notices")
            before = [page for page in one.pages if page.position <= one.acknowledged[-1]]
            one.release(len(before))  # nothing new until the foreign subscriber is back
            await asyncio.to_thread(there.broker.start)
            await eventually(lambda: made.connected, "connected again")
            await eventually(seen.subscribed, "mosquitto_sub is back")
            one.release()
            await eventually(lambda: one.done, "all pages are acknowledged")
            await eventually(lambda: arrived(seen, partition)[-1:] == sent(one)[-1:], "the last page arrives")
            assert made.stats.connections == 2
        return one, before

    with collector(there.broker, topic_of(partition), options=tuple(session)):
        pass  # killed: its session stays
    watcher = ["-c", "-i", f"there-{end.name}", *session[3:]]
    with collector(there.broker, topic_of(partition), options=tuple(watcher)) as seen:
        one, before = asyncio.run(scenario(seen))
        got = arrived(seen, partition)
        assert got == [payload for payload in sent(one) if payload in set(got)]  # in order
        missing = [page for page in one.pages if page.payload not in set(got)]
        # What was acknowledged and not delivered yet may have died with the broker; nothing else. It is the end of it, but
        # with NATS also pages between others: it does not finish in order what it was storing.
        assert (
            missing
            == {
                "all": [],
                "none": before[len(before) - len(missing) :],
                "most": [page for page in before[100:] if page in missing],
                "some": [page for page in before[100:] if page in missing],
            }[kept]
        )
    with collector(there.broker, topic_of(partition), options=tuple(session)) as back:

        def owed():
            """What was published after the restart, or before as well, and is not there yet."""
            got = set(arrived(back, partition))
            return [page for page in one.pages[0 if kept == "all" else len(before) :] if page.payload not in got]

        if kept == "some":
            return  # NATS, killed: in one of some twenty runs a page was gone for a session that was away
        if kept != "none":
            # Twice NATS's ack_wait: what it handed to a session that broke off comes again after that.
            wait_until(lambda: not owed(), "who was away gets what was kept", 60)
        got = set(arrived(back, partition))
        held = [page for page in before if page.payload in got]
        assert {"none": not held, "most": held[:100] == before[:100], "all": held == before}[kept]


# ---- shared subscriptions, ACLs


def test_shared_subscriptions(there):
    """Pages are shared out, or the broker refuses, or takes `$share` for the first word of a topic, which never comes."""
    shared = f"$share/workers/{topic_of('share-1')}"

    async def sharing(one, seen, first, second):
        async with running(there.publisher()) as made:
            made.add(one)
            await all_arrive(seen, one)

        def got():
            return arrived(first, "share-1"), arrived(second, "share-1")

        await eventually(lambda: sum(map(len, got())) == len(one.pages), "shared out")
        assert all(got())
        assert sorted([*got()[0], *got()[1]]) == sorted(sent(one))

    async def not_sharing(one, seen):
        end = ListOutbox("share-2", box("share-2", 1).pages)
        async with Dialer(there.config("commander"), "").open_client() as worker:
            try:
                await worker.subscribe_live(topic_of("share-2"))
                await asyncio.wait_for(worker.subscribe_live(shared), 2)
            except TimeoutError:  # the ACL knows no such topic; RabbitMQ then answers nothing
                assert there.kind.start is rabbitmq_guarded
                return
            except LinkError:
                assert there.kind.start is nats_guarded
                return
            async with running(there.publisher()) as made:
                made.add(one)
                await all_arrive(seen, one)
                made.add(end)
                message = await asyncio.wait_for(worker.receive(), 10)
                assert message.topic.value == topic_of("share-2")

    with collector(there.broker, topic_of("share-1")) as seen:
        one = box("share-1", 60)
        if there.kind.shared:
            with collector(there.broker, shared) as first, collector(there.broker, shared) as second:
                asyncio.run(sharing(one, seen, first, second))
        else:
            asyncio.run(not_sharing(one, seen))


@pytest.mark.parametrize("version", [0, 4])
def test_what_the_acl_forbids(there, version):
    """The daemon of edge7 tries to write as edge8."""
    if there.kind.forbidden is None:
        assert there.kind.login == "nobody"
        return
    outcome = "swallowed" if version == 4 and there.kind.forbidden == "refused" else there.kind.forbidden

    async def scenario(seen):
        one = ListOutbox("acl-1", box("acl-1", 3).pages)
        made = there.publisher(host="edge8", protocol=version)
        task = asyncio.create_task(made.run())
        made.add(one)
        try:
            if outcome == "refused":
                await eventually(lambda: made.stats.lanes["acl-1"].last_error, "told")
                assert "check the broker's ACL" in made.stats.lanes["acl-1"].last_error
                assert not one.acknowledged
            elif outcome == "hung up":
                await eventually(lambda: made.stats.failures >= 4, "cut off again and again")
                assert not one.acknowledged
                # A broker that hangs up on small pages is not taken for one with a limit.
                assert made.stats.packet == PACKET
            else:
                await eventually(lambda: one.done, "acknowledged, though it goes nowhere")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(wait_until, seen.subscribed, "what is allowed arrives")
        assert not seen.messages("snapfeed/edge8/acl-1/changes")

    with collector(there.broker, "snapfeed/edge8/acl-1/changes") as seen:
        asyncio.run(scenario(seen))


# ---- the daemon


def configuration(there, directory) -> str:
    """snapfeed.toml for the broker, as docs/brokers.md shows it."""
    config = there.config()
    values = {"url": config.url, "host": config.host}
    if config.password is not None:
        (directory / "password").write_text(f"{config.password}\n")
        (directory / "password").chmod(0o600)
        values |= {"username": config.username, "password_file": f"{directory}/password"}
    values |= {key: getattr(config, key) for key in ("ca_file", "cert_file", "key_file") if getattr(config, key)}
    return "[broker]\n" + "".join(f'{key} = "{value}"\n' for key, value in values.items())


@pytest.mark.kernel
def test_the_daemon_on_a_real_partition(there, xfs, tmp_path):
    """Random work, hostile names, a broker that dies: in the end a consumer has the same tree."""
    worker = Worker(os.fsencode(xfs.path), 7)
    consumer = Consumer()

    def take(seen, answer):
        def complete():
            consumer.feed(message.payload for message in seen.new() if message.topic != seen.probe)
            return consumer.head == (answer["epoch"], answer["seq"])

        wait_until(complete, f"diff {answer['seq']} arrives")
        consumer.compare(xfs.path)

    with (
        collector(there.broker, "snapfeed/edge7/+/changes") as seen,
        daemon(tmp_path, xfs.path, config=configuration(there, tmp_path)) as snapfeed,
    ):
        for number, name in enumerate(HOSTILE):
            (xfs.path / os.fsdecode(name)).write_text("x" * number)
        take(seen, snapfeed.snapshot())
        dies = there.kind.start is not rabbitmq_guarded  # which starts slowly
        if dies:
            there.broker.end(KILL)
        for _ in range(200):
            worker.step()
        answer = snapfeed.snapshot()  # does not wait for a broker
        assert answer["changes"]
        if dies:
            snapfeed.send(signal.SIGSTOP)  # until the consumer is back, whose session may have died with the broker
            there.broker.start()
            wait_until(seen.subscribed, "mosquitto_sub is back")
            snapfeed.send(signal.SIGCONT)
        take(seen, answer)
        assert snapfeed.stop() == 0
