"""The `snapshot` command at the real daemon: over the socket, MQTT 5 and MQTT 3.1.1; and two at once."""

import contextlib
import json
import socket
import subprocess
import threading

import pytest
from broker_processes import collector, mosquitto
from consumer import Consumer
from daemon_process import CLI, HOST, ROOT, daemon
from partitions import run, wait_until

pytestmark = pytest.mark.kernel
REQUEST = f"snapfeed/{HOST}/request/snapshot"
RESPONSE = f"snapfeed/{HOST}/response/snapshot"


@pytest.fixture
def running(request, tmp_path):
    part = request.getfixturevalue(request.param)
    with (
        mosquitto(tmp_path) as broker,
        collector(broker, "snapfeed/#") as seen,
        daemon(tmp_path, part.path, broker=broker.url) as snapfeed,
    ):
        wait_until(lambda: snapfeed.partition()["head"], "the first snapshot")
        wait_until(lambda: snapfeed.status()["broker"]["connected"], "the broker")
        yield part, broker, seen, snapfeed


def committed(snapfeed, part) -> int:
    """The newest snapshot in the system file, asked without the daemon."""
    return max(row["seq"] for row in snapfeed.facts("snapshots", part.path, "--socket", "/nonexistent/socket"))


@pytest.mark.parametrize("running", ["xfs"], indirect=True)
def test_the_answer_comes_after_the_commit(running):
    part, broker, seen, snapfeed = running
    label = snapfeed.partition()["partition"]
    keys = {"partition", "epoch", "seq", "changes", "volume", "trigger"}

    # the socket, by the command line: name, mount point or UUID
    uuid = snapfeed.partition()["uuid"]
    for named in ([], [label], [part.path], [uuid]):
        (part.path / "file").write_text(f"socket {named}")
        (answer,) = snapfeed.facts("snapshot", *named)
        assert committed(snapfeed, part) == answer["seq"]
        assert keys <= answer.keys()
        assert (answer["partition"], answer["trigger"]) == (label, "command")
        assert answer["changes"] >= 1
    head = answer["seq"]
    (answer,) = snapfeed.facts("snapshot")
    assert (answer["seq"], answer["changes"]) == (head, 0)
    assert "nothing changed" in snapfeed.command("snapshot").stdout

    # MQTT 5: response topic and correlation data
    (part.path / "file").write_text("mqtt 5")
    request = json.dumps({"id": "five", "partition": label})
    done = run(
        "mosquitto_rr", *broker.options, "-V", "mqttv5", "-q", "1", "-W", "10", "-t", REQUEST, "-e", "answers/here",
        "-m", request, "-D", "publish", "correlation-data", "c0rr", "-F", "%t %D %p",
    )  # fmt: skip
    topic, correlation, payload = done.stdout.decode().split(" ", 2)
    reply = json.loads(payload)
    assert committed(snapfeed, part) == reply["data"]["seq"] == head + 1
    assert (topic, correlation) == ("answers/here", "c0rr")
    assert (reply["id"], reply["status"], reply.get("error")) == ("five", "ok", None)

    # MQTT 3.1.1: the response topic, told apart by the id
    (part.path / "file").write_text("mqtt 3.1.1")
    broker.publish(REQUEST, json.dumps({"id": "three", "partition": label}), "-V", "mqttv311")

    def replies(identifier):
        found = [json.loads(m.payload) for m in seen.messages(RESPONSE)]
        return [m for m in found if m["id"] == identifier]

    (reply,) = wait_until(lambda: replies("three"), "the answer", 10)
    assert committed(snapfeed, part) == reply["data"]["seq"] == head + 2

    # the same id again is the same command, not another one
    (part.path / "file").write_text("not yet")
    broker.publish(REQUEST, json.dumps({"id": "three", "partition": label}))
    wait_until(lambda: len(replies("three")) == 2, "the answer again", 10)
    assert replies("three")[1]["data"] == reply["data"]
    assert committed(snapfeed, part) == head + 2

    # what is no command is answered and harms nothing
    broker.publish(REQUEST, json.dumps({"id": "unknown", "partition": "nowhere"}))
    (reply,) = wait_until(lambda: replies("unknown"), "the answer", 10)
    assert reply["status"] == "error"
    assert label in reply["error"]
    broker.publish(REQUEST, "[" * 100_000)
    broker.publish(REQUEST, "{")
    (answer,) = snapfeed.facts("snapshot")
    assert answer["seq"] == head + 3


@pytest.mark.parametrize("running", ["xfs", "btrfs", "ext4"], indirect=True)
def test_commands_at_once(running):
    """One snapshot or several for commands that meet, never an error or a hole; each sees what was done before it was asked."""
    part, _broker, seen, snapfeed = running
    label = snapfeed.partition()["partition"]
    before = snapfeed.partition()["head"]
    answers, errors = [], []

    def ask(number):
        try:
            (part.path / f"file{number}").write_text("x")
            answers.append((number, snapfeed.snapshot()))
        except Exception as error:  # noqa: BLE001 - shown by the test's own thread
            errors.append(error)

    for round_ in range(3):
        threads = [threading.Thread(target=ask, args=(round_ * 2 + n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    command = [*CLI, "snapshot"]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=snapfeed.env) for _ in range(2)]
    assert [p.wait(30) for p in processes] == [0, 0]
    for process in processes:
        process.stdout.close()
    assert not errors
    assert len(answers) == 6

    head = snapfeed.partition()["head"]
    assert before + 3 <= head <= before + 6
    consumer = Consumer()
    topic = f"snapfeed/{HOST}/{label}/changes"
    taken = 0

    def complete():
        nonlocal taken
        messages = seen.messages(topic)
        consumer.feed(m.payload for m in messages[taken:])
        taken = len(messages)
        return consumer.head is not None and consumer.head[1] >= head

    wait_until(complete, "all diffs", 10)
    assert [d["seq"] for d in consumer.diffs] == list(range(consumer.diffs[0]["seq"], head + 1))
    consumer.compare(part.path)
    created = {c["path"]: d["seq"] for d in consumer.diffs for c in d["changes"] if c["op"] == "create"}
    for number, answer in answers:
        assert created[f"file{number}"] <= answer["seq"]


def test_abuse_of_the_socket(xfs, tmp_path):
    with daemon(tmp_path, xfs.path) as snapfeed:
        wait_until(lambda: snapfeed.partition()["head"], "the first snapshot")
        assert (snapfeed.socket.stat().st_mode & 0o777) == 0o600
        lines = [b"", b"{", b"[]", b'{"verb": 1}', b'{"verb": "nonsense"}', b"x" * 5000]
        lines.append(b'{"verb": "status", "x": ' + b"[" * 1000 + b"]" * 1000 + b"}")
        lines.append(b'{"verb": "diff", "partition": 3}')
        lines.append(b'{"verb": "diff", "partition": "nowhere", "from": 1, "to": 2}')
        lines.append(b'{"verb": "snapshot", "id": "x", "surplus": 1}')
        lines.append(b'{"verb": "diff", "from": ' + b"9" * 3000 + b"}")
        for line in lines:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(10)
                connection.connect(str(snapfeed.socket))
                connection.sendall(line + b"\n")
                answer = json.loads(connection.makefile("rb").readline())
                if b"status" not in line:
                    assert answer["status"] == "error", line[:50]
                    assert answer["error"], line[:50]
        with socket.socket(socket.AF_UNIX) as connection:  # a line that never ends
            connection.settimeout(10)
            connection.connect(str(snapfeed.socket))
            with contextlib.suppress(OSError):
                for _ in range(64):
                    connection.sendall(b"x" * 65536)
                assert connection.recv(1000) == b""
        (xfs.path / "after").write_text("x")
        assert snapfeed.snapshot()["changes"] >= 1
        assert "Traceback" not in snapfeed.output()
