"""P9, P10: how soon a page is there after a write, and how fast a large diff leaves."""

import contextlib
import json
import os
import queue
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import paho.mqtt.client as paho
from broker_processes import Broker, mosquitto
from partitions import partition, wait_until

from . import peers
from .process import cpu, memory, reset_peak, wait_quiet
from .row import Figure, Goal, Row, Series, percentile
from .stage import LONG, Measured, Stage, Step, following

MS = 1000.0


def steps(stage: Stage) -> Iterator[Step]:
    if stage.wants("P9"):
        yield "P9", lambda: latency(stage)


class Subscriber:
    """A subscriber in this process, connected: (when it arrived, topic, payload) of each message, in order."""

    def __init__(self, broker: Broker, *topics: str) -> None:
        self.arrived: queue.SimpleQueue[tuple[float, str, bytes]] = queue.SimpleQueue()
        subscribed = queue.SimpleQueue()
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
        self.client.on_message = lambda _client, _data, message: self.arrived.put(
            (time.perf_counter(), message.topic, message.payload)
        )
        self.client.on_subscribe = lambda *_: subscribed.put(None)
        self.client.connect("127.0.0.1", broker.port)
        self.client.loop_start()
        self.client.subscribe([(topic, 1) for topic in topics])
        subscribed.get(timeout=10)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def write(path: Path) -> float:
    """A single write of a block; when it began."""
    started = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, b"w" * 4096)
    os.close(fd)
    return started


def latencies(
    seen: Subscriber, top: Path, count: int, random: Random, tells: Callable[[bytes, str], bool]
) -> list[float]:
    """Milliseconds from each of `count` writes, at random moments, to the message that tells of it. Raises queue.Empty."""
    times = []
    for number in range(count):
        time.sleep(random.uniform(0.1, 0.3))
        while not seen.arrived.empty():
            seen.arrived.get_nowait()
        path = top / f"f{number}"
        started = write(path)
        while True:
            arrived, _, payload = seen.arrived.get(timeout=30)
            if tells(payload, path.name):
                break
        times.append(MS * (arrived - started))
    return times


def latency(stage: Stage) -> Row:
    count = stage.rounds(80, 300)
    theirs: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    with (
        partition("xfs", stage.place(), "2G") as part,
        mosquitto(stage.place(), config=("log_type none", "set_tcp_nodelay true")) as broker,
    ):
        top = part.path / "work"
        top.mkdir()
        with following(stage.place(), part.path, broker=broker.url, io="1B") as feed:
            feed.settled()
            with contextlib.closing(Subscriber(broker, "snapfeed/+/+/changes")) as seen:
                wait_quiet(feed.pid)
                ours = latencies(seen, top, count, Random(9), in_page)
            seconds = feed.partition()["last"]["seconds"]
        name = "inotifywait | mosquitto_pub"
        try:
            with inotifywait_piped(top, broker) as pipe, contextlib.closing(Subscriber(broker, "peer")) as seen:
                wait_until(lambda: tells(seen, top / "probe"), f"{name} tells of something")
                wait_quiet(pipe.pid)
                theirs[name] = latencies(seen, top, count, Random(9), lambda payload, file: payload.decode() == file)
        except peers.MissingError as why:
            missing[name] = str(why)
    shares = [(part, {n: percentile(values, part) for n, values in theirs.items()}) for part in (0.5, 0.99)]
    return Row(
        "P9",
        "from a write to its page at a mosquitto subscriber, volume threshold 1 byte",
        (
            Figure("median", "ms", percentile(ours, 0.5), (Goal(15),), shares[0][1]),
            Figure("99th percentile", "ms", percentile(ours, 0.99), (Goal(60),), shares[1][1]),
        ),
        (Series("snapfeed", "ms", ours), *(Series(n, "ms", values) for n, values in theirs.items())),
        missing,
        f"{count} single writes of 4 KiB to new files, 0.1 to 0.3 "
        "s apart, XFS, otherwise idle; a durable snapshot each time (the last one took "
        f"{MS * seconds:.1f} ms). The peer publishes a bare name with QoS 0, and nothing is durable.",
    )


def in_page(payload: bytes, file: str) -> bool:
    return any(change["path"] == f"work/{file}" for change in json.loads(payload)["changes"])


def tells(seen: Subscriber, probe: Path) -> bool:
    write(probe)
    with contextlib.suppress(queue.Empty):
        return bool(seen.arrived.get(timeout=0.2))
    return False


@contextlib.contextmanager
def inotifywait_piped(top: Path, broker: Broker) -> Iterator[subprocess.Popen]:
    """inotifywait and mosquitto_pub -l, joined by a pipe; the first of the two."""
    peers.need("inotifywait", "mosquitto_pub")
    watch = ["inotifywait", "-mrq", "-e", "close_write", "--format", "%f", str(top)]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as first:
        publish = ["mosquitto_pub", *broker.options, "-t", "peer", "-l"]
        with subprocess.Popen(publish, stdin=first.stdout) as second:
            try:
                yield first
            finally:
                for process in (first, second):
                    process.kill()


# ---- a large diff


def published(feed: Measured, broker: Broker, seq: int, changes: int) -> Row:
    """Start the broker that a large diff waits for, and look how it leaves; the daemon must have been started with its phases."""
    reset_peak(feed.pid)
    before = cpu(feed.pid)
    broker.start()
    (done,) = wait_until(
        lambda: [one for one in feed.took() if one.get("published") == seq], "the diff is published", LONG
    )
    used = cpu(feed.pid) - before
    seconds = done["last"] - done["first"]
    peak = memory(feed.pid).peak
    return Row(
        "P10",
        f"publishing a diff of {changes:,} changes into mosquitto",
        (
            Figure("rate", "changes/s", changes / seconds, (Goal(500_000, least=True, full=True),)),
            Figure("resident meanwhile, peak", "MB", peak, (Goal(100, full=True),)),
            Figure("CPU of the daemon for a million changes", "s", used * 1e6 / changes),
        ),
        (Series("snapfeed", "s", [seconds]),),
        note=f"{seconds:.2f} s from asking for the first page to the last PUBACK, QoS 1, without a subscriber. The "
        "diff is a baseline: each change is a "
        "`create` with all attributes.",
    )
