"""A broker that is away for long: the disk it costs is bounded, and all of it arrives afterwards, exact and in order.

SNAPFEED_DIFFS: how many diffs pile up; 86,400 are a day at one a second.
"""

import os
import signal
import time

import pytest
from broker_processes import collector, mosquitto
from consumer import Consumer
from daemon_process import HOST, daemon
from partitions import wait_until
from workload import Worker

pytestmark = pytest.mark.kernel
DIFFS = int(os.environ.get("SNAPFEED_DIFFS", "150"))
BOUND = int(os.environ.get("SNAPFEED_BOUND", str(100 * DIFFS)))  # bytes; some 700 are used a diff
SECONDS = 30 + DIFFS // 100


def pile_up(feed, work, diffs):
    """Changes and snapshots while nobody takes them; returns the head, and the journal's largest size in bytes."""
    largest, head = 0, 0
    for number in range(diffs):
        if diffs > 1000:
            twenty(work.top, number)
        else:
            for _ in range(6):
                work.step()
        head = feed.snapshot()["seq"]
        if number % 10 == 0:
            largest = max(largest, feed.partition()["journal"]["bytes"])
    return head, max(largest, feed.partition()["journal"]["bytes"])


def twenty(top, number):
    """Twenty changes, made fast: what a day of them is made of."""
    for one in range(12):
        with open(b"%b/steady%d" % (top, (number + 7 * one) % 100), "ab") as file:
            file.write(b"x")
    for one in range(3):
        with open(b"%b/new%d-%d" % (top, number, one), "wb") as file:
            file.write(b"%d" % number)
        if number:
            os.unlink(b"%b/new%d-%d" % (top, number - 1, one))
    if number > 1:
        os.rename(b"%b/moving%d" % (top, number - 1), b"%b/moving%d" % (top, number))
    else:
        open(b"%b/moving%d" % (top, number), "wb").close()


@pytest.mark.parametrize("bounded", [False, True])
def test_a_long_outage_costs_bounded_disk_and_no_change(part, tmp_path, bounded):
    config = f'[broker]\nhost = "{HOST}"\n[defaults]\nkeep = 4\n'
    if bounded:
        config += f'[journal]\nbytes = "{BOUND}B"\n'
    # or mosquitto drops what waits for a client that reads slowly beyond 1,000 messages
    with (
        mosquitto(tmp_path, config=("max_queued_messages 0",)) as broker,
        daemon(tmp_path, part.path, broker=broker.url, config=config, started=False) as feed,
    ):
        work, consumer = Worker(os.fsencode(part.path), 8), Consumer()
        with collector(broker, f"snapfeed/{HOST}/+/changes") as before:
            feed.start()
            for _ in range(3):
                for _ in range(10):
                    work.step()
                last = feed.snapshot()["seq"]

            def taken():
                consumer.feed(m.payload for m in before.new())
                return consumer.head is not None and consumer.head[1] == last and feed.published(last)

            wait_until(taken, "published, and here")
            work.step()
            broker.kill()
        head, largest = pile_up(feed, work, DIFFS)
        if bounded:
            # what may have been seen (16) and what lies between the kept snapshots (4) is never squashed
            assert largest < BOUND + 64 * 1024, "the journal is bounded"
        feed.send(signal.SIGSTOP)
        broker.start()
        with collector(broker, f"snapfeed/{HOST}/+/changes") as after:
            feed.send(signal.SIGCONT)
            started = time.monotonic()
            wait_until(lambda: feed.published(head), "everything is published", SECONDS)
            print(f"{DIFFS} diffs, journal at most {largest} bytes, delivered in {time.monotonic() - started:.1f} s")
            head = feed.snapshot()["seq"]

            def arrived():
                consumer.feed(m.payload for m in after.new())
                return consumer.head[1] == head

            wait_until(arrived, "it is here, and read", SECONDS)
        consumer.compare(part.path)
        seqs = [diff["seq"] for diff in consumer.diffs]
        assert seqs == sorted(seqs)
        told = sum(len(diff["changes"]) for diff in consumer.diffs)
        print(f"{told} changes in {len(seqs)} diffs, exact")
        skipped = sum(d["seq"] - d["parent"] > 1 for d in consumer.diffs if d["parent"] is not None)
        assert bool(skipped) == bounded, "squashed only beyond the bound"
