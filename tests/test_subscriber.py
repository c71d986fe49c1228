"""A consumer with a name over a real broker that is killed, against a scripted daemon; its positions; `snapfeed tail`."""

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from unittest import mock

import orjson
import pytest
from broker_processes import ROOT, eventually, mosquitto
from daemon_process import CLI, environment
from partitions import wait_until
from scripted_daemon import HOST, PARTITION, Ledger, ScriptedDaemon

from comparer.errors import DamageError, OperatorError
from feed import connection as connection_module
from feed.broker import BrokerConfig
from feed.connection import LinkError
from feed.dialer import Dialer
from feed.positions import FilePositions
from feed.subscriber import Damage, Diff, Gap, Subscriber, Timing

SEED = int(os.environ.get("SNAPFEED_TEST_SEED", "4"))
TIMING = Timing(answer=1.0, stall=2.0, longest=4.0, behind=1.0, first=0.1, cap=0.5, acks=0.1)
TOPIC = f"snapfeed/{HOST}/{PARTITION}"


class Runner:
    """The scripted daemon at a broker: publishes what is committed, answers, comes back when the broker does."""

    def __init__(self, daemon, config):
        self.daemon = daemon
        self.seen = []
        self.refuse = None
        self._dialer = Dialer(config, "")
        self._wake = asyncio.Event()

    def wake(self):
        self._wake.set()

    async def run(self):
        while True:
            with contextlib.suppress(LinkError):
                async with self._dialer.open_client() as link:
                    await link.subscribe_live(f"snapfeed/{HOST}/request/+")
                    online = orjson.dumps({"state": "online"})
                    await link.publish_acknowledged(f"snapfeed/{HOST}/status", online, retain=True)
                    await self._state(link)
                    tasks = [asyncio.create_task(self._serve(link)), asyncio.create_task(self._publish(link))]
                    try:
                        done, _ = await asyncio.wait({*tasks, link.lost}, return_when=asyncio.FIRST_COMPLETED)
                        for task in done - {link.lost}:
                            task.result()
                    finally:
                        for task in tasks:
                            task.cancel()
                        await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.05)

    async def _state(self, link):
        await link.publish_acknowledged(f"{TOPIC}/state", orjson.dumps(self.daemon.state()), retain=True)

    async def _publish(self, link):
        while True:
            before = self.daemon.epoch, self.daemon.published
            try:
                while pages := self.daemon.publish():
                    for page in pages:
                        assert await link.publish_acknowledged(f"{TOPIC}/changes", page) < 0x80
                    await self._state(link)
                    before = self.daemon.epoch, self.daemon.published
            except LinkError:
                if before[0] == self.daemon.epoch:
                    self.daemon.published = before[1]  # the cursor: only what was acknowledged
                raise
            self._wake.clear()
            await self._wake.wait()

    async def _serve(self, link):
        while True:
            message = await link.receive()
            verb, document = message.topic.value.rpartition("/")[2], orjson.loads(message.payload)
            self.seen.append((verb, document))
            if self.refuse:
                answer, pages = {"id": document["id"], "status": "error", "error": self.refuse, "data": None}, []
            else:
                answer, pages = self.daemon.request(verb, document)
            await link.publish_acknowledged(f"snapfeed/{HOST}/response/{verb}", orjson.dumps(answer))
            for page in pages:
                await link.publish_acknowledged(f"{TOPIC}/replay/{document['consumer']}", page)


@contextlib.asynccontextmanager
async def running(daemon, broker, **login):
    made = Runner(daemon, BrokerConfig(url=broker.url, host="x", **login))
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def consuming(subscriber, take):
    """A task that hands on every item to `take`, which may be async; whatever it raises is raised here."""

    async def consume():
        async with contextlib.aclosing(aiter(subscriber)) as items:
            async for item in items:
                result = take(item)
                if asyncio.iscoroutine(result):
                    await result

    task = asyncio.create_task(consume())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_nothing_is_lost_while_the_broker_is_killed(tmp_path):
    """Broker killed, consumer killed, epochs, trimmed journals, outages squashed; the consumer commits, and ends there."""
    chance = random.Random(SEED)
    daemon = ScriptedDaemon(per_page=3)
    ledger = Ledger(daemon)
    path = os.fspath(tmp_path / "positions")
    made = {}

    async def take(item):
        assert isinstance(item, Diff), item
        ledger.take(item)
        await asyncio.sleep(chance.choice([0, 0, 0.003]))
        await made["subscriber"].commit(item)

    def consumer(broker):
        positions = FilePositions(path)
        ledger.position = positions.load(HOST, PARTITION)
        ledger.files = list(daemon.truth[ledger.position]) if ledger.position else []
        config = BrokerConfig(url=broker.url)
        made["subscriber"] = Subscriber(config, consumer="me", positions=positions, timing=TIMING)
        return consuming(made["subscriber"], take)

    async def work(runner, diffs):
        for _ in range(diffs):
            daemon.commit(chance.randrange(12), chance.choice([0, 0, 5]))
            runner.wake()
            await asyncio.sleep(0.002)

    async def scenario(broker):
        async with running(daemon, broker) as runner:
            for turn in range(6):
                async with consumer(broker) as task:
                    for _ in range(2):
                        await work(runner, 60)
                        broker.kill()
                        await work(runner, 10)
                        if turn % 2:
                            daemon.squash()
                        if turn == 3:
                            daemon.new_epoch()
                        await asyncio.to_thread(broker.start)
                        await work(runner, 20)
                    if turn != 4:
                        await eventually(
                            lambda task=task: task.done() or ledger.is_there(), f"all is there, {turn}", 30
                        )
                    if task.done():
                        task.result()
                if turn == 1:
                    daemon.trim(0)
                if turn == 2:
                    daemon.trim(3)
                await work(runner, 15)
            async with consumer(broker) as task:
                await eventually(lambda: task.done() or ledger.is_there(), "all is there in the end", 30)
                if task.done():
                    task.result()
                there = (daemon.epoch, daemon.head)
                await eventually(lambda: daemon.acknowledged.get("me") == there, "acknowledged")

    with mosquitto(tmp_path) as broker:
        asyncio.run(scenario(broker))
    assert FilePositions(path).load(HOST, PARTITION) == (daemon.epoch, daemon.head)
    assert daemon.verbs.count("replay") > 3
    assert "baseline" in daemon.verbs
    # rate: the daemon takes 20 commands a second from everybody
    assert len(daemon.verbs) < 250


@pytest.mark.parametrize("protocol", [4, 5])
def test_quiet_partitions_are_found_and_commands_are_signed(protocol, tmp_path):
    daemon = ScriptedDaemon()
    daemon.commit(5)
    daemon.published = daemon.head
    ledger = Ledger(daemon)

    def sign(verb, host, document):
        return {**document, "signature": f"{verb} {host}"}

    async def scenario(broker):
        async with running(daemon, broker) as runner:
            config = BrokerConfig(url=broker.url, protocol=protocol)
            subscriber = Subscriber(config, consumer="me", sign=sign, timing=TIMING)
            async with consuming(subscriber, ledger.take):
                await eventually(ledger.is_there, "a baseline, and nothing was published")
            assert [verb for verb, _ in runner.seen] == ["baseline"]
            assert {document["signature"] for _, document in runner.seen} == {f"baseline {HOST}"}
            # a second iteration without a commit begins anew
            async with consuming(subscriber, ledger.take):
                ledger.position = None
                await eventually(ledger.is_there, "again")

    with mosquitto(tmp_path) as broker:
        asyncio.run(scenario(broker))


def test_refused_and_silent_daemons_are_asked_again(tmp_path, caplog):
    daemon = ScriptedDaemon()
    daemon.published = 1
    ledger = Ledger(daemon)

    async def scenario(broker):
        subscriber = Subscriber(
            BrokerConfig(url=broker.url), topic_filter=f"{TOPIC}/changes", consumer="me", timing=TIMING
        )
        async with consuming(subscriber, ledger.take):
            await asyncio.wait_for(subscriber.subscribed.wait(), 10)
            async with running(daemon, broker) as runner:
                runner.refuse = "not now\x1b[31m"
                await eventually(lambda: len(runner.seen) > 4, "asked again and again")
                runner.refuse = None
                await eventually(ledger.is_there, "a baseline")
                assert len({document["id"] for _, document in runner.seen}) == len(runner.seen)

    with mosquitto(tmp_path) as broker:
        asyncio.run(scenario(broker))
    (warning,) = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert warning.isprintable()


def test_a_consumer_slower_than_the_feed_gets_everything(tmp_path):
    """What is more than fits is dropped on our side, and asked for again."""
    daemon = ScriptedDaemon(per_page=50)
    ledger = Ledger(daemon)

    async def scenario(broker):
        async with running(daemon, broker) as runner:
            subscriber = Subscriber(BrokerConfig(url=broker.url), consumer="me", timing=TIMING)

            async def take(item):
                ledger.take(item)
                await asyncio.sleep(0.02)

            async with consuming(subscriber, take) as task:
                await eventually(lambda: ledger.position is not None, "it begins")
                for _ in range(150):
                    daemon.commit(20)
                    runner.wake()
                    await asyncio.sleep(0)
                await eventually(lambda: task.done() or ledger.is_there(), "all is there", 40)
                if task.done():
                    task.result()

    with mosquitto(tmp_path) as broker, mock.patch.object(connection_module, "INBOX", 20_000):
        asyncio.run(scenario(broker))
    assert "replay" in daemon.verbs
    assert ledger.baselines <= 2  # on `changes`, and the one that was asked for, if more was there by then


def test_one_that_is_ended_at_any_moment_of_connecting_ends(tmp_path):
    """aiomqtt waits with asyncio.wait_for, which in Python 3.11 drops a cancellation that comes as the wait ends."""

    async def scenario(broker):
        async def follow():
            async for _ in Subscriber(BrokerConfig(url=broker.url), consumer="me", timing=TIMING):
                pass

        for number in range(300):
            task = asyncio.create_task(follow())
            await asyncio.sleep(0.0001 * number)
            task.cancel()
            await asyncio.wait({task}, timeout=5)
            assert task.cancelled(), number

    with mosquitto(tmp_path) as broker:
        asyncio.run(scenario(broker))


def test_foreign_messages_do_no_harm(tmp_path):
    daemon = ScriptedDaemon()
    ledger = Ledger(daemon)
    damages = []

    async def scenario(broker):
        async with running(daemon, broker) as runner:
            subscriber = Subscriber(BrokerConfig(url=broker.url), consumer="me", timing=TIMING)

            def take(item):
                if isinstance(item, Damage):
                    damages.append(item)
                else:
                    ledger.take(item)

            async with consuming(subscriber, take):
                await eventually(ledger.is_there, "it begins")
                page = daemon.pages(1, 2, (7,))[0]
                for topic, payload in [
                    (f"{TOPIC}/changes", "x"),
                    (f"{TOPIC}/replay/me", "{}"),
                    (f"snapfeed/{HOST}/other/changes", page),
                    (f"{TOPIC}/state", "[1]"),
                    (f"{TOPIC}/state", orjson.dumps({"partition": PARTITION, "epoch": 7, "head": "x", "backlog": 0})),
                    (f"snapfeed/{HOST}/response/state", orjson.dumps({"id": "a", "status": "ok", "data": {}})),
                    (f"snapfeed/{HOST}/response/replay", "nonsense"),
                    (f"snapfeed/{HOST}/response/replay", orjson.dumps({"id": ["x"], "status": "ok", "data": {}})),
                    (f"snapfeed/{HOST}/status", "7"),
                ]:
                    await asyncio.to_thread(broker.publish, topic, payload)
                daemon.commit(2)
                runner.wake()
                await eventually(ledger.is_there, "it goes on")
            assert [one.topic for one in damages] == [
                f"{TOPIC}/changes", f"{TOPIC}/replay/me", f"snapfeed/{HOST}/other/changes",
            ]  # fmt: skip
            assert daemon.verbs == ["baseline"]

    with mosquitto(tmp_path) as broker:
        asyncio.run(scenario(broker))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"consumer": "a/b"}, "no name"),
        ({"consumer": "x", "topic_filter": "snapfeed/#"}, "follows"),
        ({"consumer": "x", "topic_filter": "$share/g/snapfeed/+/+/changes"}, "follows"),
        ({"consumer": "x", "topic_filter": "snapfeed/a b/+/changes"}, "follows"),
        ({"sign": lambda *_: {}}, "name"),
    ],
)
def test_what_a_consumer_cannot_be(options, text):
    with pytest.raises(OperatorError, match=text):
        Subscriber(BrokerConfig(), **options)


def test_who_has_no_name_cannot_commit():
    with pytest.raises(OperatorError, match="name"):
        asyncio.run(Subscriber(BrokerConfig()).commit(None))


# ---- positions


def test_positions_survive_and_are_written_as_a_whole(tmp_path):
    path = os.fspath(tmp_path / "p.json")
    positions = FilePositions(path)
    assert positions.load("h", "p") is None
    positions.store("h", "p", "e", 1)
    positions.store("h", "q", "f", 2)
    positions.store("h", "p", "e", 3)
    again = FilePositions(path)
    assert (again.load("h", "p"), again.load("h", "q"), again.load("x", "p")) == (("e", 3), ("f", 2), None)
    before = (tmp_path / "p.json").read_bytes()
    for name in ("fsync", "rename"):
        full = mock.patch(f"feed.positions.os.{name}", side_effect=OSError(28, "No space left on device"))
        with full, pytest.raises(OperatorError, match="No space left"):
            again.store("h", "p", "e", 4)
        assert (tmp_path / "p.json").read_bytes() == before
        assert again.load("h", "p") == ("e", 3)
    assert os.listdir(tmp_path) == ["p.json"]
    (tmp_path / "link").symlink_to("p.json")
    FilePositions(os.fspath(tmp_path / "link")).store("h", "p", "e", 9)
    assert (tmp_path / "link").is_symlink()
    assert FilePositions(path).load("h", "p") == ("e", 9)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "snapfeed-positions/1"}', '{"format": "snapfeed-positions/2", "positions": {}}',
     '{"format": "snapfeed-positions/1", "positions": {"h": {"p": {"epoch": "e", "seq": true}}}}'],
)  # fmt: skip
def test_a_file_that_holds_no_positions_is_not_overwritten(text, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(DamageError, match=r"p\.json.*baseline"):
        FilePositions(os.fspath(path))
    assert path.read_text() == text


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(OperatorError, match="directory"):
        FilePositions(os.fspath(tmp_path / "no" / "p"))  # at once, not when the first diff has been shown


# ---- snapfeed tail


async def tail(*arguments, **options):
    return await asyncio.to_thread(
        subprocess.run,
        [*CLI, "tail", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
        **options,
    )


def test_tail_with_a_login_begins_where_it_stopped(tmp_path):
    daemon = ScriptedDaemon()
    (tmp_path / "password").write_text("geheim\n")
    config = tmp_path / "config.toml"
    config.write_text(f'[broker]\nusername = "u"\npassword_file = "{tmp_path}/password"\n')
    env = environment(XDG_STATE_HOME=str(tmp_path / "state"))

    async def scenario(broker):
        async with running(daemon, broker, username="u", password="geheim") as runner:
            more = ("--config", config, "--broker", broker.url, "--json", "--consumer", "audit")
            first = await tail(*more, "--count", "1", env=env)
            assert first.returncode == 0, first.stderr
            for _ in range(3):
                daemon.commit(2)
            runner.wake()
            await eventually(lambda: daemon.published == daemon.head, "published while nobody listens")
            second = await tail(*more, "--count", "3", env=env)
            assert second.returncode == 0, second.stderr
            shown = [json.loads(line) for line in (first.stdout + second.stdout).splitlines()]
            assert [one["seq"] for one in shown] == [1, 2, 3, 4]
            assert [one["parent"] for one in shown] == [None, 1, 2, 3]
            assert shown[0]["baseline"] is True
            assert daemon.verbs.count("baseline") == 1
        kept = FilePositions(os.fspath(tmp_path / "state" / "snapfeed" / "tail-audit.json"))
        assert kept.load(HOST, PARTITION) == ("e1", 4)

    with mosquitto(tmp_path, users={"u": "geheim"}) as broker:
        asyncio.run(scenario(broker))


def test_tail_shows_nothing_as_it_came(tmp_path, capfd):
    """Whatever is in a page, also where no file name belongs."""
    from watcher import command_tail

    evil = "\x1b[31m\n\u202e\x9b\x7f"
    page = orjson.loads(ScriptedDaemon().pages(1, 2, (1,))[0])
    page |= {"trigger": evil, "partition": evil, "consistency": evil, "changes": [{"path": evil}]}
    from feed.pages import parse_page

    parsed = parse_page(orjson.dumps(page))
    diff = Diff(parsed.envelope, parsed.changes)
    command_tail._show(diff, as_json=True)
    command_tail._show(diff, as_json=False)
    for gap in (Gap(evil, evil, "e", 1, 2, "e", 3), Gap(evil, evil, evil, 1, 2, "f", 3)):
        print(command_tail._gap(gap))
    written = capfd.readouterr().out
    assert all(line.isprintable() for line in written.splitlines())
    assert len(written.splitlines()) == 5
    assert json.loads(written.splitlines()[0])["trigger"] == evil


@pytest.mark.parametrize(
    ("code", "arguments", "text"),
    [
        (2, ("--position", "x"), "--consumer"),
        (2, ("--consumer", "a b"), "no name"),
        (2, ("a+/b",), "no topic filter"),
        (1, ("--consumer", "a", "snapfeed/#"), "follows"),
        (1, ("--consumer", "a", "--position", "/nonexistent/p"), "/nonexistent"),
        (1, ("--config", "/nonexistent"), "/nonexistent"),
    ],
)
def test_tail_called_wrongly(code, arguments, text, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "watcher.cli", "tail", "--broker", "mqtt://127.0.0.1:1", *arguments],
        capture_output=True, text=True, timeout=30, cwd=ROOT, check=False, env=environment(XDG_STATE_HOME=str(tmp_path)),
    )  # fmt: skip
    assert done.returncode == code
    assert text in done.stderr
    assert done.stdout == ""
    assert "listening" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("configured", [False, True])
def test_tail_without_a_configuration_names_it_where_tls_fails(configured, tmp_path):
    """A broker with a certificate of an authority of one's own."""
    (tmp_path / "config.toml").write_text("")
    with mosquitto(tmp_path, tls=True) as broker:
        more = ["--config", str(tmp_path / "config.toml")] if configured else []
        with (tmp_path / "said").open("wb") as file:
            process = subprocess.Popen(
                [*CLI, "tail", "--broker", broker.url, *more], stderr=file, stdout=file, cwd=ROOT, env=environment()
            )
        try:
            wait_until(lambda: "CERTIFICATE" in (tmp_path / "said").read_text(), "the broker is not trusted", 20)
        finally:
            process.kill()
            process.wait()
    said = (tmp_path / "said").read_text()
    assert "ca_file" in said
    assert ("--config FILE" in said) != configured
