"""The pace of reading events: a single one at once, many in batches."""

import asyncio
import os
from itertools import pairwise

from watcher.sources.batched import INTERVAL, SHORTEST, BatchedReader


class Times:
    """A loop's clock and timers by hand: readers are called while their descriptor is said to be readable."""

    def __init__(self):
        self.now, self.timers, self.reader = 1000.0, [], None

    def time(self):
        return self.now

    def call_later(self, seconds, call):
        self.timers.append((self.now + seconds, call))

    def add_reader(self, _, call):
        self.reader = call

    def remove_reader(self, _):
        self.reader = None

    def pass_until(self, end, *, readable):
        while self.now < end:
            if readable and self.reader:
                self.reader()
            if not self.timers:
                self.now = end
                return
            self.now, call = self.timers.pop(0)
            call()


def reads_while_busy(seconds, monkeypatch, quiet=1.0):
    times, reads = Times(), []
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: times)
    BatchedReader(0, lambda: bool(reads.append(times.now)), lambda: None)
    times.pass_until(times.now + quiet, readable=False)
    times.pass_until(times.now + seconds, readable=True)
    return reads, times


def test_the_first_events_are_read_at_once_and_soon_again(monkeypatch):
    reads, _ = reads_while_busy(1.0, monkeypatch)
    waits = [b - a for a, b in pairwise(reads)]
    assert waits[0] == SHORTEST or abs(waits[0] - SHORTEST) < 1e-9
    assert all(b <= 2 * a + 1e-9 for a, b in pairwise(waits))
    assert abs(waits[-1] - INTERVAL) < 1e-9


def test_under_load_batches_are_as_long_as_may_be(monkeypatch):
    reads, _ = reads_while_busy(10.0, monkeypatch)
    assert len(reads) <= 10.0 / INTERVAL + 6


def test_a_quiet_time_makes_the_next_one_short_again(monkeypatch):
    reads, times = reads_while_busy(1.0, monkeypatch)
    before = len(reads)
    times.pass_until(times.now + 3 * INTERVAL, readable=False)
    times.pass_until(times.now + 0.01, readable=True)
    assert reads[before + 1] - reads[before] < 2 * SHORTEST


def test_it_reads_a_real_descriptor():
    async def scenario():
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        woken = asyncio.Event()
        got = []
        reader = BatchedReader(reading, lambda: bool(got.append(os.read(reading, 100)) or True), woken.set)
        try:
            for text in (b"one", b"two"):
                os.write(writing, text)
                async with asyncio.timeout(10):
                    await woken.wait()
                woken.clear()
            assert got == [b"one", b"two"]
        finally:
            reader.close()
            os.close(reading)
            os.close(writing)

    asyncio.run(scenario())
