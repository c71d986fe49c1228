"""The broker killed, stopped, wiped and started again at random, under load on two partitions: no consumer loses anything.

SNAPFEED_KILLS: how often (200 in `make soak`); SNAPFEED_SEED: another run of dice.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import threading
import time
import uuid

import orjson
import pytest
from broker_processes import collector, mosquitto
from consumer import Consumer
from daemon_process import HOST, daemon
from partitions import partition, wait_until
from workload import Worker

from feed.broker import BrokerConfig
from feed.positions import MemoryPositions
from feed.subscriber import Diff, Subscriber

pytestmark = pytest.mark.kernel
KILLS = int(os.environ.get("SNAPFEED_KILLS", "10"))
SEED = int(os.environ.get("SNAPFEED_SEED", "1"))


class Following(threading.Thread):
    """A Subscriber, and what it makes of each partition."""

    def __init__(self, broker):
        super().__init__(daemon=True)
        self.config = BrokerConfig(url=broker.url)
        self.models: dict[str, Consumer] = {}
        self.error = None
        self.stopping = threading.Event()

    def run(self):
        try:
            asyncio.run(self._follow())
        except BaseException as error:  # noqa: BLE001 - told in the test's thread
            self.error = error

    async def _follow(self):
        subscriber = Subscriber(self.config, consumer="library", positions=MemoryPositions())
        task = asyncio.create_task(self._take(subscriber))
        stopped = asyncio.create_task(asyncio.to_thread(self.stopping.wait))
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _take(self, subscriber):
        async with contextlib.aclosing(aiter(subscriber)) as items:
            async for item in items:
                assert isinstance(item, Diff), item
                envelope = item.envelope
                page = {**orjson.loads(envelope.head() + b"}"), "page": 1, "pages": 1, "changes": item.documents}
                self.models.setdefault(envelope.partition, Consumer()).take(page)
                await subscriber.commit(item)


class Plain:
    """Pages from mosquitto_sub, duplicates dropped by key; a gap is closed with mosquitto_pub, as docs/feed.md says."""

    def __init__(self, broker, collected):
        self.broker, self.collected = broker, collected
        self.models: dict[str, Consumer] = {}
        self.pages: dict[str, dict[tuple, dict]] = {}
        self.asked: dict[str, float] = {}
        self.replays = 0

    def look(self):
        for message in self.collected.new():
            page = json.loads(message.payload)
            self.pages.setdefault(page["partition"], {})[page["epoch"], page["seq"], page["page"]] = page
        for name, pages in self.pages.items():
            self._apply(self.models.setdefault(name, Consumer()), pages)

    def _apply(self, model, pages):
        """Whole diffs that go from where the model is."""
        while True:
            starts = [p for (_, seq, number), p in sorted(pages.items(), key=lambda item: item[0][1:]) if number == 1]
            usable = [p for p in starts if p["parent"] == (model.head[1] if model.head else None)]
            for first in usable:
                keys = [(first["epoch"], first["seq"], n) for n in range(1, first["pages"] + 1)]
                if all(key in pages for key in keys):
                    for key in keys:
                        model.take(pages[key])
                    break
            else:
                break
        for key in [key for key in pages if model.head and key[1] <= model.head[1]]:
            del pages[key]

    def close_gaps(self, heads):
        for name, head in heads.items():
            model = self.models.get(name)
            behind = model is not None and model.head is not None and model.head[1] < head
            if behind and time.monotonic() > self.asked.get(name, 0):
                self.asked[name] = time.monotonic() + 2
                self.replays += 1
                since = {"epoch": model.head[0], "seq": model.head[1]}
                command = {"id": uuid.uuid4().hex, "partition": name, "consumer": "plain", "since": since}
                with contextlib.suppress(AssertionError):
                    self.broker.publish(f"snapfeed/{HOST}/request/replay", json.dumps(command))


class Load(threading.Thread):
    """Work on a partition until it is stopped."""

    def __init__(self, top, seed):
        super().__init__(daemon=True)
        self.worker, self.stopping = Worker(os.fsencode(top), seed), threading.Event()

    def run(self):
        while not self.stopping.is_set():
            for _ in range(5):
                self.worker.step()
            self.stopping.wait(0.03)


def disturb(broker, store, dice):
    """One thing that happens to brokers; it runs again afterwards."""
    what = dice.choice(["kill", "kill", "term", "stop", "wipe", "away"])
    if what == "stop":
        broker.signal(signal.SIGSTOP)
        threading.Event().wait(dice.uniform(0.1, 1.5))
        broker.signal(signal.SIGCONT)
        return
    if what == "term":
        broker.signal(signal.SIGTERM)
        broker.process.wait(10)
    else:
        broker.kill()
    if what == "wipe":
        for file in store.iterdir():
            file.unlink()
    if what == "away":
        threading.Event().wait(dice.uniform(0.1, 2))
    broker.start()


def test_no_consumer_loses_anything(tmp_path):
    dice = random.Random(SEED)
    kept = ("persistence true", f"persistence_location {tmp_path}/store/", "autosave_interval 1")
    (tmp_path / "store").mkdir()
    with (
        partition("xfs", tmp_path) as one,
        partition("btrfs", tmp_path) as other,
        mosquitto(tmp_path, config=kept) as broker,
        daemon(tmp_path, one.path, other.path, broker=broker.url, time="300ms", started=False) as feed,
        collector(broker, f"snapfeed/{HOST}/+/changes", f"snapfeed/{HOST}/+/replay/plain") as collected,
    ):
        following = Following(broker)
        following.start()
        feed.start()
        plain = Plain(broker, collected)
        loads = [Load(part.path, SEED + number) for number, part in enumerate((one, other))]
        for load in loads:
            load.start()
        try:
            for _ in range(KILLS):
                threading.Event().wait(dice.uniform(0.1, 0.8))
                plain.look()
                disturb(broker, tmp_path / "store", dice)
                assert following.error is None, following.error
        finally:
            for load in loads:
                load.stopping.set()
                load.join()
        tops = {p["partition"]: p["mount"] for p in feed.status()["partitions"]}

        def quiet():
            return not any(answer["changes"] for answer in feed.ask("snapshot")[0])

        wait_until(quiet, "nothing changes any more")
        heads = {p["partition"]: p["head"] for p in feed.status()["partitions"]}

        def there():
            plain.look()
            plain.close_gaps(heads)
            assert following.error is None, following.error
            return all(
                models.get(name) is not None and models[name].head is not None and models[name].head[1] == head
                for models in (plain.models, following.models)
                for name, head in heads.items()
            )

        wait_until(there, f"both consumers have {heads}", 90)
        for models in (plain.models, following.models):
            for name, top in tops.items():
                models[name].compare(top)
        following.stopping.set()
        following.join(10)
        counts = {name: len(model.diffs) for name, model in following.models.items()}
        print(
            f"{KILLS} disturbances, diffs {counts}, {feed.status()['broker']['connections']} connections, {plain.replays} replays"
        )
