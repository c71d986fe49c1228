"""The publisher against real brokers: order, nothing lost, trouble that stays where it is, status, states, commands."""

import asyncio
import contextlib
import logging
import os
import signal
import ssl
import subprocess
import sys
from itertools import count

import orjson
import pytest
from broker_processes import ROOT, Collector, collector, embedded, eventually, free_port, mosquitto
from hostile_broker import HostileBroker, Script
from partitions import run, wait_until
from publishing import ListOutbox, outbox, publisher, running

from comparer.errors import OperatorError
from feed.broker import BrokerConfig, address, check, slug, topics
from feed.commands import CommandError, answer, parse_command
from feed.dialer import Dialer
from feed.outbox import OutPage, Position
from feed.pages import Chunk, Envelope, payloads
from feed.subscriber import Damage, Diff, Gap, Subscriber


def keys(seen: Collector, partition: str) -> list[Position]:
    """The positions of the pages that arrived, duplicates dropped, in order of first arrival."""
    documents = [orjson.loads(one.payload) for one in seen.messages(f"snapfeed/edge7/{partition}/changes")]
    return list(dict.fromkeys(Position(one["seq"], one["page"]) for one in documents))


@pytest.mark.parametrize("kind", [mosquitto, embedded])
def test_order_states_and_status(kind, tmp_path):
    async def scenario(broker, seen):
        made, boxes = publisher(broker.url), [outbox("data", 40), outbox("home", 40)]
        made.set_state("data", b'{"head":1}')
        async with running(made):
            for box in boxes:
                made.add(box)
            await eventually(lambda: all(box.done for box in boxes), "all pages are acknowledged")
            assert made.connected
            assert made.stats.protocol == (5 if kind is mosquitto else 4)
            made.set_state("data", b'{"head":2}')
            states = "snapfeed/edge7/data/state"
            await eventually(lambda: [m.payload for m in seen.messages(states)][-1:] == [b'{"head":2}'], "the state")
        assert not made.connected
        for box in boxes:
            await eventually(lambda box=box: len(keys(seen, box.partition)) == len(box.pages), "all pages arrive")
            assert keys(seen, box.partition) == [page.position for page in box.pages]
        await eventually(lambda: len(seen.messages("snapfeed/edge7/status")) == 2, "both status messages")
        status = [orjson.loads(m.payload) for m in seen.messages("snapfeed/edge7/status")]
        assert [one["state"] for one in status] == ["online", "offline"]
        assert status[0].keys() == {"state", "version", "since"}

    with kind(tmp_path) as broker, collector(broker, "snapfeed/#") as seen:
        asyncio.run(scenario(broker, seen))
        with collector(broker, "snapfeed/+/status", "snapfeed/+/+/state") as late:
            # Sets, as amqtt sends a retained message again for every further filter.
            expected = {("snapfeed/edge7/status", True), ("snapfeed/edge7/data/state", True)}
            wait_until(
                lambda: {(m.topic, m.retained) for m in late.messages()} == expected, "retained status and state"
            )


def test_broker_killed_in_mid_stream_loses_nothing(tmp_path):
    async def scenario(broker, seen):
        made, box = publisher(broker.url), outbox("data", 600, released=60)
        deaths = []
        async with running(made):
            made.add(box)
            for round_ in range(3):
                await eventually(lambda: box.acknowledged, "pages flow")
                target = 60 + 200 * round_
                box.release(target + 150)
                await eventually(lambda at=target: len(box.acknowledged) and _index(box) >= at, "the middle is reached")
                await asyncio.to_thread(broker.kill)
                await eventually(lambda: not made.connected, "the publisher notices")
                deaths.append(_index(box))
                box.release(_index(box))  # nothing new until the foreign subscriber, whose session died, is back
                await asyncio.to_thread(broker.start)
                await eventually(lambda: made.connected, "connected again")
                assert await eventually(seen.subscribed, "mosquitto_sub is back")
            box.release()
            await eventually(lambda: box.done, "all pages are acknowledged")
        await eventually(lambda: keys(seen, "data")[-1:] == [box.pages[-1].position], "the last page arrives")
        received = keys(seen, "data")
        assert received == sorted(received)
        # What a broker acknowledged and had not delivered yet when it died is gone with it (a PUBACK is no durability): at most
        # what was in flight. Nothing else may be missing.
        in_flight = {page.position for death in deaths for page in box.pages[max(0, death - 20) : death]}
        assert {page.position for page in box.pages} - set(received) <= in_flight
        assert made.stats.connections == 4

    def _index(box):
        return next(n for n, page in enumerate(box.pages, 1) if page.position == box.acknowledged[-1])

    with mosquitto(tmp_path, config=("max_inflight_messages 0",)) as broker, collector(broker, "snapfeed/#") as seen:
        asyncio.run(scenario(broker, seen))


def test_an_outbox_that_comes_while_a_connection_ends_is_published_on_the_next(tmp_path):
    class Late(ListOutbox):
        """Adds another one to the publisher while its own fetching is being cancelled."""

        async def fetch(self, after, limit, count):
            if not tried:
                tried.append(True)
                try:
                    await asyncio.Event().wait()
                finally:
                    made.add(other)
                    added.append(True)
            return await super().fetch(after, limit, count)

    tried, added, other = [], [], outbox("other", 5)

    async def scenario(broker):
        box = Late("data", outbox("data", 5).pages)
        async with running(made):
            made.add(box)
            await eventually(lambda: tried, "it fetches")
            await asyncio.to_thread(broker.kill)
            await eventually(lambda: not made.connected, "the publisher notices")
            assert added
            await asyncio.to_thread(broker.start)
            await eventually(lambda: box.done and other.done, "all pages are acknowledged")

    with mosquitto(tmp_path) as broker:
        made = publisher(broker.url)
        asyncio.run(scenario(broker))


def test_login_refused_then_allowed(tmp_path, caplog):
    async def scenario(broker):
        made = publisher(broker.url, config={"username": "edge7", "password": "secret"})
        async with running(made):
            made.add(box := outbox("data", 3))
            await eventually(lambda: made.stats.failures >= 3, "refused several times")
            assert "refuses the login" in made.last_error
            assert "password_file" in made.last_error
            assert "secret" not in made.last_error + repr(made.config)
            broker.set_user("edge7", "secret")
            broker.signal(signal.SIGHUP)
            await eventually(lambda: box.done, "pages are taken")
            assert made.last_error is None

    with mosquitto(tmp_path, users={"admin": "x"}) as broker, caplog.at_level(logging.WARNING):
        asyncio.run(scenario(broker))
    assert len([r for r in caplog.records if "refuses the login" in r.getMessage()]) == 1


def test_unreachable_then_there(tmp_path):
    async def scenario(broker):
        seen = []
        made = publisher(broker.url, on_status=lambda: seen.append(made.connected))
        async with running(made):
            made.add(box := outbox("data", 3))
            await eventually(lambda: made.stats.failures >= 2, "tried in vain")
            assert "not reachable" in made.last_error
            assert not made.connected
            await asyncio.to_thread(broker.start)
            await eventually(lambda: box.done, "pages are taken")
        assert seen[0] is False
        assert True in seen

    with mosquitto(tmp_path, started=False) as broker:
        asyncio.run(scenario(broker))


def test_a_broker_that_is_away_between_connections_is_no_second_client(tmp_path, caplog):
    async def scenario(broker):
        async with running(made := publisher(broker.url)):
            for _ in range(4):
                await asyncio.to_thread(broker.start)
                await eventually(lambda: made.connected, "connected")
                await asyncio.to_thread(broker.kill)
                await eventually(lambda: "not reachable" in (made.last_error or ""), "tried in vain")

    with mosquitto(tmp_path, started=False) as broker:
        asyncio.run(scenario(broker))
    assert "not reachable" in caplog.text
    assert "another client" not in caplog.text


def test_a_client_with_the_same_identifier_is_guessed_where_the_broker_says_nothing(tmp_path, caplog):
    async def scenario(broker):
        async with running(first := publisher(broker.url)), running(publisher(broker.url)):
            await eventually(lambda: "another client" in (first.last_error or ""), "it is asked")

    with mosquitto(tmp_path) as broker:
        asyncio.run(scenario(broker))
    assert "'snapfeed-edge7'" in caplog.text


def test_stop_while_unreachable_is_quick():
    async def scenario():
        async with running(publisher(f"mqtt://127.0.0.1:{free_port()}")) as made:
            await eventually(lambda: made.stats.failures, "tried in vain")

    asyncio.run(asyncio.wait_for(scenario(), 3))


def test_tls_with_client_certificates(tmp_path):
    async def scenario(broker, files):
        async with running(publisher(broker.url, config=files)) as made:
            made.add(box := outbox("data", 3))
            await eventually(lambda: box.done, "pages are taken")
        async with running(publisher(broker.url)) as made:  # the test's authority is not one of the machine's
            await eventually(lambda: made.last_error, "refused")
            assert "ca_file" in made.last_error

    with mosquitto(tmp_path, tls=True) as broker:
        files = {"ca_file": "ca.pem", "cert_file": "client.pem", "key_file": "client.key"}
        asyncio.run(scenario(broker, {key: str(tmp_path / name) for key, name in files.items()}))


def test_last_will_after_sigkill(tmp_path):
    script = (
        "import asyncio, sys\n"
        "from feed.broker import BrokerConfig\n"
        "from feed.publisher import Publisher\n"
        "asyncio.run(Publisher(BrokerConfig(url=sys.argv[1], host='edge7'), version='1').run())\n"
    )
    with mosquitto(tmp_path) as broker, collector(broker, "snapfeed/edge7/status") as seen:

        def states():
            return [orjson.loads(one.payload)["state"] for one in seen.messages()]

        process = subprocess.Popen([sys.executable, "-c", script, broker.url], cwd=ROOT, env=os.environ)
        try:
            wait_until(lambda: states() == ["online"], "online")
        finally:
            process.kill()
            process.wait()
        wait_until(lambda: states() == ["online", "offline"], "the last will")


async def _handle(request):
    try:
        command = parse_command(request.verb, request.payload)
    except CommandError as error:
        return answer(error.id, error=str(error))
    return answer(command.id, {"verb": command.verb})


def test_commands(tmp_path):
    async def scenario(broker, seen):
        made = publisher(broker.url, handler=_handle)
        async with running(made):
            await eventually(lambda: made.connected and seen.subscribed(), "connected")

            def answers(topic):
                return [orjson.loads(one.payload) for one in seen.messages(topic)]

            async def foreign(*command):
                return await asyncio.to_thread(run, *command)

            ask = ["mosquitto_rr", *broker.options, "-V", "mqttv5", "-q", "1", "-W", "10", "-F", "%D %p"]
            ask += ["-D", "publish", "correlation-data", "c0rr"]
            request = ["-t", "snapfeed/edge7/request/snapshot", "-m", '{"id":"five"}']
            reply = await foreign(*ask, *request, "-e", "mine/answers")
            correlation, _, payload = reply.stdout.decode().partition(" ")
            assert correlation == "c0rr"
            assert orjson.loads(payload) == {"id": "five", "status": "ok", "error": None, "data": {"verb": "snapshot"}}
            old = "snapfeed/edge7/request/state"
            await asyncio.to_thread(broker.publish, old, '{"id":"three"}', "-V", "mqttv311")
            await eventually(lambda: answers("snapfeed/edge7/response/state"), "an answer over MQTT 3.1.1")
            assert answers("snapfeed/edge7/response/state")[0]["id"] == "three"
            await asyncio.to_thread(broker.publish, old, b"[" * 100_000)
            await asyncio.to_thread(broker.publish, old, b"x" * 1_000_000)
            await asyncio.to_thread(broker.publish, "snapfeed/edge7/request/explode", '{"id":"4"}')
            await eventually(lambda: len(answers("snapfeed/edge7/response/state")) == 3, "abuse is answered")
            assert {one["status"] for one in answers("snapfeed/edge7/response/state")[1:]} == {"error"}
            await eventually(lambda: answers("snapfeed/edge7/response/explode"), "an unknown verb is answered")
            # A retained command, and an answer asked for inside the feed, go nowhere.
            await asyncio.to_thread(broker.publish, old, '{"id":"late"}', "-r")
            forged = "snapfeed/edge7/data/changes"
            options = ("-D", "publish", "response-topic", forged)
            await asyncio.to_thread(broker.publish, old, '{"id":"forged"}', "-V", "mqttv5", *options)
            await eventually(
                lambda: answers("snapfeed/edge7/response/state")[-1]["id"] == "forged", "answered elsewhere"
            )
            assert made.stats.requests.retained == 1
            assert made.stats.requests.refused_topics == 1
            assert not seen.messages(forged)
            assert "late" not in {one["id"] for one in answers("snapfeed/edge7/response/state")}

    with mosquitto(tmp_path) as broker, collector(broker, "snapfeed/#") as seen:
        asyncio.run(scenario(broker, seen))


def test_commands_while_the_broker_speaks_311_only(tmp_path):
    async def scenario(broker, seen):
        made = publisher(broker.url, handler=_handle)
        async with running(made):
            await eventually(lambda: made.connected and seen.subscribed(), "connected")
            topic = "snapfeed/edge7/request/snapshot"

            def asked():
                broker.publish(topic, '{"id":"a"}')
                return seen.messages("snapfeed/edge7/response/snapshot")

            assert await eventually(asked, "an answer")

    with embedded(tmp_path) as broker, collector(broker, "snapfeed/#") as seen:
        asyncio.run(scenario(broker, seen))


def test_a_refused_partition_delays_no_other_and_keeps_its_pages():
    async def scenario():
        refusing = {"on": True}

        def reason(publish):
            return 0x97 if refusing["on"] and publish.topic.endswith("/data/changes") else 0

        async with HostileBroker([Script(reason=reason)]) as broker, running(publisher(broker.url)) as made:
            made.add(refused := outbox("data", 10))
            made.add(other := outbox("home", 200))
            await eventually(lambda: other.done and made.stats.lanes["data"].refused >= 3, "the other is done")
            assert not refused.acknowledged
            assert "0x97" in made.stats.lanes["data"].last_error
            refusing["on"] = False
            await eventually(lambda: refused.done, "taken at last")
            assert made.stats.lanes["data"].last_error is None
            assert broker.connections == 2  # one to find the protocol, one that worked all the time

    asyncio.run(scenario())


@pytest.mark.parametrize(("maximum", "most"), [(1, 1), (5, 5), (None, 20)])
def test_window(maximum, most):
    async def scenario():
        # The status is acknowledged, or nothing else would be sent; pages are not.
        script = Script(
            reason=lambda publish: None if publish.topic.endswith("changes") else 0, receive_maximum=maximum
        )
        async with HostileBroker([script]) as broker:
            made = publisher(broker.url)
            task = asyncio.create_task(made.run())
            for name in ("data", "home", "var"):
                made.add(outbox(name, 50))
            await eventually(lambda: broker.most >= most, "the window is full")
            await asyncio.to_thread(lambda: None)
            made.set_state("data", b"{}")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert broker.most == most

    asyncio.run(scenario())


def test_packet_limit_of_the_broker_is_kept_or_learnt():
    async def scenario(announce):
        async with HostileBroker([Script(max_packet=20_000, announce=announce)]) as broker:
            limits = []

            class Box(ListOutbox):
                async def fetch(self, after, limit, count):
                    limits.append(limit)
                    envelope = Envelope("edge7", "data", "u", "e", 1, 0, 0, "time", 0, "metadata", None)
                    objects = [Chunk(30, b",".join([b'{"x":"' + b"y" * 2000 + b'"}'] * 30))]
                    cut = payloads(envelope, objects, limit)
                    self.pages = [OutPage(Position(1, n), n == len(cut), one) for n, one in enumerate(cut, 1)]
                    return await super().fetch(after, limit, count)

            async with running(publisher(broker.url)) as made:
                made.add(box := Box("data", []))
                await eventually(lambda: box.pages and box.done, "all pages fit")
                assert max(publish.packet for publish in broker.received) <= 20_000
                assert limits[-1] < 20_000
                assert announce == (made.stats.connections == 1)

    asyncio.run(scenario(announce=True))
    asyncio.run(scenario(announce=False))


def test_a_partition_that_cannot_be_read_waits_alone(tmp_path):
    async def scenario(broker):
        async with running(publisher(broker.url)) as made:
            bad, good = outbox("data", 5, failing=True), outbox("home", 5)
            made.add(bad)
            made.add(good)
            await eventually(lambda: good.done and made.stats.lanes["data"].last_error, "the other is done")
            bad.failing = False
            bad.ready.set()
            await eventually(lambda: bad.done, "read again")
            made.remove(bad)
            made.add(more := outbox("var", 5))
            await eventually(lambda: more.done, "added while connected")

    with mosquitto(tmp_path) as broker:
        asyncio.run(scenario(broker))


def test_subscriber_reassembles_and_tells_gaps(tmp_path):
    async def scenario(broker):
        subscriber = Subscriber(BrokerConfig(url=broker.url, host="x"))
        items = []

        async def consume():
            async for item in subscriber:
                items.append(item)  # noqa: PERF401 -- looked at while it grows

        task = asyncio.create_task(consume())
        try:
            await asyncio.wait_for(subscriber.subscribed.wait(), 10)
            box = outbox("data", 9)
            topic = "snapfeed/edge7/data/changes"
            async with running(publisher(broker.url)) as made:
                made.add(box)
                await eventually(lambda: box.done, "published")
                made.remove(box)
                made.add(
                    ListOutbox("data", [page for page in outbox("data", 13).pages if page.position.seq not in {10, 11}])
                )
                await asyncio.to_thread(broker.publish, topic, b"\x1b no page")
                await eventually(lambda: len(items) == 13, "everything arrives")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        diffs = [item for item in items if isinstance(item, Diff)]
        assert [diff.envelope.seq for diff in diffs] == [*range(1, 10), 12, 13]
        assert [len(diff.documents) for diff in diffs] == [1, 1, 2] * 3 + [2, 1]
        (gap,) = [item for item in items if isinstance(item, Gap)]
        assert (gap.seq, gap.parent, gap.next_seq) == (9, 11, 12)
        assert items.index(gap) == items.index(diffs[9]) - 1
        assert len([item for item in items if isinstance(item, Damage)]) == 1
        assert subscriber.duplicates == 12

    with mosquitto(tmp_path) as broker:
        asyncio.run(scenario(broker))


def test_embedded_broker_drops_nobody_while_clients_come_and_go(tmp_path):
    """amqtt iterates over its tables across awaits; see feed.embedded."""

    async def scenario(broker, seen):
        stop = asyncio.Event()

        async def come_and_go(number):
            for turn in count():
                if stop.is_set():
                    break
                config = BrokerConfig(url=broker.url, host="x", protocol=4)
                subscriber = Subscriber(config, topic_filter=f"other/{number}/{turn}")
                task = asyncio.create_task(anext(aiter(subscriber)))
                await eventually(subscriber.subscribed.is_set, "subscribed")
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        crowd = [asyncio.create_task(come_and_go(number)) for number in range(4)]
        async with running(publisher(broker.url)) as made:
            made.add(box := outbox("data", 1500))
            await eventually(lambda: box.done, "all pages are acknowledged")
        stop.set()
        await asyncio.gather(*crowd)
        await eventually(lambda: keys(seen, "data")[-1:] == [box.pages[-1].position], "the last page arrives")
        assert keys(seen, "data") == [page.position for page in box.pages]
        assert "dictionary changed" not in broker.log.read_text()

    with embedded(tmp_path) as broker, collector(broker, "snapfeed/#") as seen:
        asyncio.run(scenario(broker, seen))


@pytest.mark.parametrize("port", [None, "taken"])
def test_embedded_broker_on_a_taken_port(port, tmp_path):
    from feed.embedded import EmbeddedBroker

    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            first = EmbeddedBroker(port=0)
            await first.start()
            stack.push_async_callback(first.stop)
            assert first.port
            if port == "taken":
                with pytest.raises(OperatorError, match="in use"):
                    await EmbeddedBroker(port=first.port).start()
            else:
                both = EmbeddedBroker(), EmbeddedBroker()
                for one in both:
                    await one.start()
                    stack.push_async_callback(one.stop)
                assert both[0].port != both[1].port

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"url": "http://x"}, "url"),
        ({"url": "mqtt://"}, "no host"),
        ({"url": "mqtt://u:geheim@x"}, "password_file"),
        ({"url": "mqtt://x:99999"}, "url"),
        ({"url": "mqtt://x/path"}, "more than"),
        ({"base": "a b"}, "base"),
        ({"host": "a/b"}, "host"),
        ({"max_packet": 100}, "max_packet"),
        ({"password": "x"}, "username"),
        ({"url": "mqtts://x", "cert_file": "c"}, "belong together"),
        ({"ca_file": "c"}, "mqtts"),
        ({"protocol": 3}, "protocol"),
    ],
)
def test_config_errors_name_the_key(wrong, text):
    with pytest.raises(OperatorError, match=text) as error:
        check(BrokerConfig(**{"host": "edge7", **wrong}))
    assert "geheim" not in str(error.value)


def test_names_for_topics():
    assert slug("/srv/data") == "srv-data"
    assert slug("/") == "root"
    assert slug("edge7.example.com") == "edge7-example-com"
    assert slug("größe #+\x1b[31m/") == "groe-31m" or slug("größe") == "groe"
    assert len(slug("x" * 300)) == 64
    assert topics("a/b", "h").changes("data") == "a/b/h/data/changes"
    assert topics("snapfeed", "h").requests == "snapfeed/h/request/+"
    assert address("mqtts://[::1]").host == "::1"
    assert address("mqtt://x:2000").port == 2000
    with pytest.raises(OperatorError):
        topics("snapfeed", "h").changes("a#")


def test_stop_with_a_broker_that_hangs(tmp_path):
    async def scenario(broker):
        made = publisher(broker.url)
        task = asyncio.create_task(made.run())
        made.add(box := outbox("data", 3))
        await eventually(lambda: box.done, "pages are taken")
        broker.signal(signal.SIGSTOP)
        await asyncio.wait_for(made.stop(patience=0.1), 5)
        await task

    with mosquitto(tmp_path) as broker:
        asyncio.run(scenario(broker))


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("CA cert does not include key usage extension", "docs/install.md"),
        ("Missing Authority Key Identifier", "docs/install.md"),
        ("unable to get local issuer certificate", "check [broker] ca_file"),
    ],
)
def test_what_to_do_about_a_certificate_is_said(said, remedy):
    """The first two as Python 3.13 says them."""
    error = ssl.SSLCertVerificationError(1, f"[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {said}")
    told = str(Dialer(BrokerConfig(url="mqtts://broker.example"), "edge7")._explained(error))
    assert said in told
    assert remedy in told
