"""Consumers that come and go: replay, baseline, ack over the broker; what is kept for them; commands that are not done twice."""

import json
import os
import time
import uuid

import pytest
from broker_processes import collector, mosquitto
from consumer import Consumer
from daemon_process import HOST, daemon
from partitions import run, wait_until
from workload import Worker

from feed.signing import sign

pytestmark = pytest.mark.kernel
BASE = f"snapfeed/{HOST}"


class Asking:
    """Commands over the broker, in the way of MQTT 3.1.1: the answer is the one with our id."""

    def __init__(self, broker, answers, secret=None):
        self.broker, self.answers, self.secret = broker, answers, secret

    def __call__(self, verb, **fields):
        identifier = fields.pop("id", None) or uuid.uuid4().hex
        document = {"id": identifier, **fields}
        if self.secret is not None:
            document = sign(self.secret, verb, HOST, document, int(time.time()) + 60)
        return self.raw(verb, json.dumps(document), identifier)

    def raw(self, verb, payload, identifier):
        before = len(self.answers.messages())
        self.broker.publish(f"{BASE}/request/{verb}", payload)

        def answered():
            for message in self.answers.messages()[before:]:
                document = json.loads(message.payload)
                if document["id"] == identifier:
                    return document
            return None

        return wait_until(answered, f"the answer to {verb}")


def name_of(feed, part):
    return feed.partition(part.path)["partition"]


def take_baseline(asking, replayed, partition, consumer="late"):
    """Ask for a baseline; a model that took it, and the answer's data."""
    found = asking("baseline", partition=partition, consumer=consumer)
    assert found["status"] == "ok", found
    replayed.new()
    model = Consumer()

    def complete():
        model.feed(m.payload for m in replayed.new())
        return model.head is not None

    wait_until(complete, "the whole baseline")
    assert model.head == (found["data"]["epoch"], found["data"]["seq"])
    return model, found["data"]


def test_a_consumer_that_comes_late_becomes_exact(part, tmp_path):
    """The journal was cut off; a baseline while writes go on, then the diffs after it."""
    config = f'[broker]\nhost = "{HOST}"\n[journal]\nbytes = "1KiB"\nage = "1s"\n[defaults]\nkeep = 2\n'
    with (
        mosquitto(tmp_path) as broker,
        daemon(tmp_path, part.path, broker=broker.url, config=config) as feed,
        collector(broker, f"{BASE}/response/+") as answers,
        collector(broker, f"{BASE}/+/replay/late") as replayed,
        collector(broker, f"{BASE}/+/changes") as live,
    ):
        asking, partition = Asking(broker, answers), name_of(feed, part)
        work = Worker(os.fsencode(part.path), 11)
        for _ in range(12):
            for _ in range(25):
                work.step()
            last = feed.snapshot()["seq"]

        def cut_off():
            """What is old and published goes with the next snapshot."""
            (part.path / "another").write_text(uuid.uuid4().hex)
            feed.snapshot()
            return feed.partition()["journal"]["oldest"] > 2

        wait_until(cut_off, "the journal does not reach back any more")
        last = feed.partition()["head"]
        wait_until(lambda: feed.published(last), "all published")
        epoch = feed.partition()["epoch"]
        for wrong in ({"epoch": "another", "seq": 1}, {"epoch": epoch, "seq": last + 99}):
            refused = asking("ack", partition=partition, consumer="late", **wrong)
            assert (refused["status"], refused["data"]) == (
                "error", {"partition": partition, "epoch": epoch, "seq": last},
            )  # fmt: skip
        gap = asking("replay", partition=partition, consumer="late", since={"epoch": epoch, "seq": 1})
        assert gap["status"] == "error"
        assert gap["error"].startswith("gap:")
        assert gap["data"]["gap"] is True
        assert 1 < gap["data"]["oldest"] <= gap["data"]["seq"] == last
        live.new()
        for _ in range(40):
            work.step()
        model, data = take_baseline(asking, replayed, partition)
        assert all(diff["baseline"] and diff["parent"] is None for diff in model.diffs)
        for _ in range(3):
            for _ in range(20):
                work.step()
            feed.snapshot()
        feed.snapshot()
        head = feed.partition()["head"]
        pages = []

        def arrived():
            pages.extend(json.loads(m.payload) for m in live.new())
            return any(p["seq"] == head and p["page"] == p["pages"] for p in pages) or head == data["seq"]

        wait_until(arrived, "the diffs after the baseline")
        for page in pages:
            if page["seq"] > data["seq"]:
                model.take(page)
        assert model.head == (epoch, head)
        model.compare(part.path)


def test_what_was_missed_comes_again(part, tmp_path):
    with (
        mosquitto(tmp_path) as broker,
        daemon(tmp_path, part.path, broker=broker.url) as feed,
        collector(broker, f"{BASE}/response/+") as answers,
        collector(broker, f"{BASE}/+/changes") as live,
        collector(broker, f"{BASE}/+/replay/again") as replayed,
    ):
        asking, partition = Asking(broker, answers), name_of(feed, part)
        work, all_pages = Worker(os.fsencode(part.path), 3), []
        for _ in range(8):
            for _ in range(20):
                work.step()
            last = feed.snapshot()["seq"]
        wait_until(lambda: feed.published(last), "all published")

        def all_here():
            """The broker's acknowledgement comes before its delivery to others."""
            pages = [json.loads(m.payload) for m in live.messages()]
            return pages if pages and (pages[-1]["seq"], pages[-1]["page"]) == (last, pages[-1]["pages"]) else None

        all_pages = {(p["seq"], p["page"]): p for p in wait_until(all_here, "all pages")}
        epoch = feed.partition()["epoch"]
        found = asking("replay", partition=partition, consumer="again", since={"epoch": epoch, "seq": 3})
        expected = sorted(key for key in all_pages if key[0] > 3)
        assert found["data"] == {
            "partition": partition, "epoch": epoch, "from": 3, "seq": last, "diffs": len({s for s, _ in expected}),
            "topic": f"{BASE}/{partition}/replay/again",
        }  # fmt: skip
        wait_until(lambda: len(replayed.messages()) >= len(expected), "the pages again")
        again = [json.loads(m.payload) for m in replayed.messages()]
        assert [(p["seq"], p["page"]) for p in again] == expected
        assert all(page == all_pages[page["seq"], page["page"]] for page in again)
        nothing = asking("replay", partition=partition, consumer="again", since={"epoch": epoch, "seq": last})
        assert nothing["data"]["diffs"] == 0
        for since in ({"epoch": "another", "seq": 3}, {"epoch": epoch, "seq": last + 5}):
            gap = asking("replay", partition=partition, consumer="again", since=since)
            assert gap["data"] == {"gap": True, "partition": partition, "epoch": epoch, "oldest": 1, "seq": last}
        wait_until(lambda: not feed.partition()["consumers"][0]["sending"], "it is over")


def test_snapshots_are_kept_for_a_consumer_until_it_acknowledges(part, tmp_path):
    config = f'[broker]\nhost = "{HOST}"\n[defaults]\nkeep = 2\n[consumers]\nhold_snapshots = 6\n'
    with mosquitto(tmp_path) as broker, daemon(tmp_path, part.path, broker=broker.url, config=config) as feed:

        def another():
            (part.path / "file").write_text(uuid.uuid4().hex)
            return feed.snapshot()["seq"]

        first = another()
        epoch = feed.partition()["epoch"]
        partition = name_of(feed, part)
        feed.ask("ack", partition=partition, consumer="backup", epoch=epoch, seq=first)
        for _ in range(4):
            last = another()
        kept = [row["seq"] for row in feed.ask("snapshots", partition=partition)]
        assert kept == list(range(first, last + 1)), "held from what it has on"
        (told,) = feed.partition()["consumers"]
        assert (told["consumer"], told["seq"], told["lag"], told["holds"]) == ("backup", first, 4, True)
        for _ in range(5):
            last = another()
        assert [row["seq"] for row in feed.ask("snapshots", partition=partition)] == list(range(last - 5, last + 1))
        assert feed.partition()["hold"] == {"snapshots": 6, "age": 7 * 86400.0}, "the bound is announced"
        feed.ask("ack", partition=partition, consumer="backup", epoch=epoch, seq=last)
        last = another()
        assert [row["seq"] for row in feed.ask("snapshots", partition=partition)] == [last - 1, last]
        feed.kill()
        feed.start()
        assert feed.partition()["consumers"][0]["seq"] == last - 1, "remembered"
        feed.ask("forget", partition=partition, consumer="backup")
        assert feed.partition()["consumers"] == []
        for wrong, text in (
            ({"epoch": "x", "seq": 1}, "epoch"),
            ({"epoch": epoch, "seq": last + 9}, "does not exist yet"),
        ):
            with pytest.raises(AssertionError, match=text):
                feed.ask("ack", partition=partition, consumer="backup", **wrong)


def test_a_command_is_done_once_also_by_the_next_daemon(xfs, tmp_path):
    with (
        mosquitto(tmp_path) as broker,
        daemon(tmp_path, xfs.path, broker=broker.url) as feed,
        collector(broker, f"{BASE}/response/+") as answers,
    ):
        asking, partition = Asking(broker, answers), name_of(feed, xfs)
        (xfs.path / "a").write_text("a")
        first = asking("snapshot", partition=partition, id="nightly")
        (xfs.path / "b").write_text("b")
        assert asking("snapshot", partition=partition, id="nightly") == first
        feed.kill()
        feed.start()
        head = feed.snapshot()["seq"]
        (xfs.path / "c").write_text("c")
        assert asking("snapshot", partition=partition, id="nightly") == first
        assert feed.partition()["head"] == head
        assert asking("snapshot", partition=partition, id="another")["data"]["seq"] == head + 1


def test_commands_must_be_signed_where_there_is_a_secret(xfs, tmp_path):
    secret = b"correct horse battery"
    (tmp_path / "secret").write_bytes(secret + b"\n")
    config = f'[broker]\nhost = "{HOST}"\n[commands]\nsecret_file = "{tmp_path}/secret"\n'
    with (
        mosquitto(tmp_path) as broker,
        daemon(tmp_path, xfs.path, broker=broker.url, config=config) as feed,
        collector(broker, f"{BASE}/response/+") as answers,
    ):
        partition = name_of(feed, xfs)
        assert Asking(broker, answers, secret)("state", partition=partition)["status"] == "ok"
        plain = Asking(broker, answers)("snapshot", partition=partition)
        assert "must be signed" in plain["error"]
        assert "wrong" in Asking(broker, answers, b"another secret, too")("snapshot", partition=partition)["error"]
        raw = Asking(broker, answers).raw
        late = sign(secret, "snapshot", HOST, {"id": "late", "partition": partition}, int(time.time()) - 5)
        assert "expired" in raw("snapshot", json.dumps(late), "late")["error"]
        other = sign(secret, "state", HOST, {"id": "other"}, int(time.time()) + 60)
        assert "wrong" in raw("snapshot", json.dumps(other), "other")["error"]
        assert feed.status()["commands"]["refused"] == 4
        assert feed.output().count("refused") == 4, "one line each"
        feed.snapshot()  # the control socket knows who calls


def test_export_leads_from_the_acknowledged_to_the_head(part, tmp_path):
    with mosquitto(tmp_path) as broker, daemon(tmp_path, part.path, broker=broker.url) as feed:
        partition = name_of(feed, part)
        work = Worker(os.fsencode(part.path), 4)
        for _ in range(60):
            work.step()
        feed.snapshot()
        position, *lists = feed.ask("export", partition=partition, consumer="restic")
        assert position["baseline"] is True
        assert position["from"] is None
        model = Consumer()
        page = {
            "format": "snapfeed/1", "page": 1, "pages": 1, "parent": None, "time_ns": "0", "trigger": "", "volume": 0,
            "uuid": "", **{key: position[key] for key in ("epoch", "seq", "snapshot", "consistency")},
        }  # fmt: skip
        model.take({**page, "baseline": True, "changes": [c for one in lists for c in one]})
        model.compare(part.path)
        feed.ask("ack", partition=partition, consumer="restic", epoch=position["epoch"], seq=position["seq"])
        for _ in range(3):
            for _ in range(20):
                work.step()
            feed.snapshot()
        after, *lists = feed.ask("export", partition=partition, consumer="restic")
        assert (after["from"], after["baseline"]) == (position["seq"], False)
        changes = [c for one in lists for c in one]
        model.take(
            {**page, "seq": after["seq"], "parent": after["from"], "snapshot": after["snapshot"], "changes": changes}
        )
        feed.snapshot()
        if feed.partition()["head"] == after["seq"]:
            model.compare(part.path)
        assert not [n for n in os.listdir(part.path / ".snapfeed") if n.startswith("baseline-")], "nothing is left"


def test_abuse_over_the_broker(xfs, tmp_path):
    """The daemon stays well, each refusal is answered, logged once and counted."""
    abuse = {
        "megabyte": b'{"id": "megabyte", "x": "' + b"x" * (1 << 20) + b'"}',
        "nested": b'{"id": "nested", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "deep": b'{"id": "deep", "x": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        "digits": b'{"id": "digits", "partition": ' + b"9" * 4000 + b"}",
        "exponent": b'{"id": "exponent", "partition": 1e999}',
        "list": b'["id", "list"]',
        "cut": b'{"id": "cut"',
        "latin": b'{"id": "latin", "partition": "\xff\xfe"}',
        "nul": b'{"id": "nul", "partition": "\\u0000"}',
        "long": json.dumps({"id": "x" * 500}).encode(),
        "surplus": b'{"id": "surplus", "sudo": true}',
        "nobody": b'{"id": "nobody", "partition": "\\u001b[31mred"}',
        "consumer": b'{"id": "consumer", "partition": "x", "consumer": "../x"}',
        "blank": b" ",
    }
    verbs = {"consumer": "baseline"}
    with (
        mosquitto(tmp_path, config=("message_size_limit 0",)) as broker,
        daemon(tmp_path, xfs.path, broker=broker.url) as feed,
        collector(broker, f"{BASE}/response/+") as answers,
    ):
        head = feed.snapshot()["seq"]
        for number, (name, payload) in enumerate(abuse.items(), 1):
            verb = verbs.get(name, "snapshot")
            broker.publish(f"{BASE}/request/{verb}", payload)
            found = wait_until(lambda number=number: answers.messages()[number - 1 :], f"the answer to {name}")
            reply = json.loads(found[0].payload)
            assert (reply["status"], bool(reply["error"])) == ("error", True), (name, reply)
            assert reply["error"].isprintable(), name
            assert reply["id"] in (name, None), name
        broker.publish(f"{BASE}/request/sudo", b'{"id": "verb"}')
        wait_until(lambda: len(answers.messages()) == len(abuse) + 1, "the answer to an unknown verb")
        assert feed.status()["commands"]["refused"] == len(abuse) + 1
        lines = [line for line in feed.output().splitlines() if "refused" in line]
        assert len(lines) == len(abuse) + 1, "one line each"
        assert all(line.isprintable() for line in lines)

        # a thousand at once: those that are too many are told so
        storm = "\n".join(json.dumps({"id": f"storm{n}"}) for n in range(1000))
        run("mosquitto_pub", *broker.options, "-q", "1", "-t", f"{BASE}/request/state", "-l", input=storm.encode())
        broker.publish(f"{BASE}/request/state", b'{"id": "after the storm"}')
        before = len(abuse) + 1

        def settled():
            status = feed.status()["commands"]
            return status["refused"] + status["executed"] >= before + 1000

        wait_until(settled, "all of them are answered, or counted")
        (xfs.path / "after").write_text("x")
        assert feed.snapshot()["seq"] == head + 1
        assert "Traceback" not in feed.output()
