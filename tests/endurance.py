"""The soak: writers, partitions, brokers and daemons that are killed at random, and a consumer that must be exact all the same.

python tests/endurance.py [--seconds 3600] [--seed 1] [--report FILE]

Two daemons on one broker, each with an XFS, a btrfs and an ext4: that of host "killed" dies again and again, that of host
"steady" never does, since a leak shows only in who lives long. Four writers work on all six. At quiet points, with the writers
paused, two consumers are compared with a walk of each partition: one that follows from the first diff on, and must never need a
second baseline; one that begins anew after each quiet point, with a baseline made while everything moves.

The report is one JSON object a line, `t` in seconds since the start, `kind` one of

- `begin`: `seed`, `seconds`
- `event`: `what` happened
- `sample` of a daemon: `host`, `pid`, `age` (s), `rss`, `pss`, `anon` (bytes), `fds`, `threads`, and of its partitions together
  `journal` (bytes of the system files and what lies beside them), `free` (bytes of free pages in the system files),
  `spools` (files beside them), `kept` (entries of snapshots/ and clones/)
- `quiet`: `number`, `took` (s), `steps` of the writers so far, `heads`, `entries` compared
- `end`: `complaints` (nothing, if all is well), `quiet`, `events`
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
from broker_processes import Broker, mosquitto
from consumer import Consumer, check
from daemon_process import Daemon, daemon
from partitions import partition, wait_until

from feed.broker import BrokerConfig
from feed.positions import MemoryPositions
from feed.subscriber import Diff, Subscriber

HOSTS = ("killed", "steady")
SYSTEMS = ("xfs", "btrfs", "ext4")
WRITERS = 4
TIME = "1s"  # a snapshot at least so often
CONFIG = """[broker]
host = "{host}"
[journal]
age = "5m"
bytes = "64MiB"
[consumers]
hold_age = "5m"
[defaults]
keep = 4
"""
QUIET_DEADLINE = 120.0  # seconds for everything to be quiet, and for the consumers to be there
MIB = 1 << 20


class Model(Consumer):
    """The strict consumer, of whole diffs, without a memory of all there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.baselines = self.count = 0

    def whole(self, diff: Diff) -> None:
        page = {**orjson.loads(diff.envelope.head() + b"}"), "page": 1, "pages": 1, "changes": diff.documents}
        if page.get("baseline"):
            check(self.head is None or self.head[0] == page["epoch"], f"another epoch: {page['epoch']}, at {self.head}")
            self.head, self.baselines = None, self.baselines + 1
        self.take(page)
        self._seen.clear()
        self.diffs.clear()
        self.count += 1


class Following:
    """One consumer's Subscriber in a thread of its own, and what it makes of each partition."""

    def __init__(self, broker: Broker, consumer: str) -> None:
        self.config, self.consumer = BrokerConfig(url=broker.url), consumer
        self.models: dict[tuple[str, str], Model] = {}
        self.error: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def heads(self) -> dict[tuple[str, str], tuple[str, int] | None]:
        if self.error is not None:
            raise AssertionError(f"consumer {self.consumer}: {self.error!r}") from self.error
        return {key: model.head for key, model in list(self.models.items())}

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), f"consumer {self.consumer} does not end"

    def _run(self) -> None:
        try:
            asyncio.run(self._follow())
        except BaseException as error:  # noqa: BLE001 - told in the main thread
            self.error = error

    async def _follow(self) -> None:
        task = asyncio.create_task(self._take())
        stopped = asyncio.create_task(asyncio.to_thread(self._stopping.wait))
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        self._stopping.set()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _take(self) -> None:
        subscriber = Subscriber(self.config, consumer=self.consumer, positions=MemoryPositions())
        async with contextlib.aclosing(aiter(subscriber)) as items:
            async for item in items:
                assert isinstance(item, Diff), item
                key = (item.envelope.host, item.envelope.partition)
                self.models.setdefault(key, Model()).whole(item)
                await subscriber.commit(item)


class Writers:
    def __init__(self, tops: list[Path], seed: int) -> None:
        script = str(Path(__file__).parent / "writer.py")
        self.processes = [
            subprocess.Popen(
                [sys.executable, script, str(seed * 100 + number), *map(str, tops)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for number in range(WRITERS)
        ]
        self.steps = 0

    def go(self) -> None:
        self._say(b"go\n")

    def pause(self) -> None:
        self._say(b"pause\n")
        answers = [process.stdout.readline().split() for process in self.processes]
        assert all(len(answer) == 2 for answer in answers), "a writer died"
        self.steps = sum(int(answer[1]) for answer in answers)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def _say(self, line: bytes) -> None:
        for process in self.processes:
            process.stdin.write(line)
            process.stdin.flush()


# ---- samples


def rollup(pid: int) -> dict[str, int]:
    """rss, pss and anon of a process, bytes."""
    found = {}
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            words = line.split()
            if words[0] in ("Rss:", "Pss:", "Anonymous:"):
                found[{"Anonymous": "anon"}.get(words[0][:-1], words[0][:-1].lower())] = int(words[1]) * 1024
    return found


def kept(top: Path) -> Counter[str]:
    """`journal`, `free`, `kept` and `spools` of the report, of one partition."""
    found = Counter({"journal": 0, "free": 0, "kept": 0, "spools": 0})
    for entry in os.scandir(top / ".snapfeed"):
        with contextlib.suppress(FileNotFoundError):
            if entry.is_file(follow_symlinks=False):
                found["journal"] += entry.stat(follow_symlinks=False).st_blocks * 512
                found["spools"] += not entry.name.startswith("system.db")
                if entry.name == "system.db":
                    found["free"] = free(Path(entry.path))
            elif entry.name == "snapshots":
                found["kept"] += len(os.listdir(entry.path))
            else:
                found["kept"] += sum(len(os.listdir(inner.path)) for inner in os.scandir(entry.path) if inner.is_dir())
    return found


def free(system_file: Path) -> int:
    """Bytes of free pages, as its header said when the log was last copied to it: https://sqlite.org/fileformat2.html, 1.3."""
    with system_file.open("rb") as file:
        header = file.read(40)
    size, count = int.from_bytes(header[16:18], "big"), int.from_bytes(header[36:40], "big")
    return count * (65536 if size == 1 else size)


def sample(pid: int, tops: list[Path]) -> dict[str, int]:
    """Of a living process, and of the partitions it serves."""
    found = rollup(pid)
    found["fds"] = len(os.listdir(f"/proc/{pid}/fd"))
    found["threads"] = len(os.listdir(f"/proc/{pid}/task"))
    disks = Counter({"journal": 0, "free": 0, "kept": 0, "spools": 0})
    for top in tops:
        disks.update(kept(top))
    return found | disks


class Sampler(threading.Thread):
    """Samples of daemons, at equal distances, into the report."""

    def __init__(self, report: "Report", every: float, served: dict[str, tuple[Daemon, list[Path]]]) -> None:
        super().__init__(daemon=True)
        self.report, self.every, self.served = report, every, served
        self.stopping = threading.Event()

    def run(self) -> None:
        born: dict[int, float] = {}
        while not self.stopping.wait(self.every):
            for host, (feed, tops) in self.served.items():
                if not feed.alive():
                    continue
                pid = feed.pid
                age = time.monotonic() - born.setdefault(pid, time.monotonic())
                with contextlib.suppress(OSError):  # killed meanwhile
                    self.report.add("sample", host=host, pid=pid, age=round(age, 1), **sample(pid, tops))

    def stop(self) -> None:
        self.stopping.set()
        self.join()


class Report:
    """What happened, in memory and as JSON lines in a file."""

    def __init__(self, path: str | None) -> None:
        self.lines: list[dict] = []
        self._started, self._lock = time.monotonic(), threading.Lock()
        self._file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115 - closed by `close`

    def add(self, kind: str, **fields) -> dict:
        line = {"kind": kind, "t": round(time.monotonic() - self._started, 2), **fields}
        with self._lock:
            self.lines.append(line)
            if self._file is not None:
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()
        return line

    def of(self, kind: str) -> list[dict]:
        return [line for line in self.lines if line["kind"] == kind]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


# ---- judging

# What may be between the median of the first and the last third, once warm: a factor, and a few more of it.
SLACK = {
    "anon": (1.05, 2 * MIB),
    "fds": (1.0, 2),
    "threads": (1.0, 1),
    "journal": (1.25, 2 * MIB),
    "spools": (1.0, 2),
    "kept": (1.25, 50),
}
# Of descriptors most are directories that are held open while a partition is looked at: 256 at most, for each of three.
BOUNDS = {"rss": 200 * MIB, "fds": 900, "threads": 40}
LONG = 600.0  # seconds: what runs for less is not warm yet, and is judged by the bounds alone


def judge(samples: list[dict]) -> list[str]:
    """What is not flat, or beyond all bounds, in the samples of a run; in words."""
    found = []
    for host in HOSTS:
        mine = [one for one in samples if one["host"] == host]
        for key, bound in BOUNDS.items():
            most = max((one[key] for one in mine), default=0)
            if most > bound:
                found.append(f"{host}: {key} {most} is more than {bound}")
        end = max((one["t"] for one in mine), default=0.0)
        if end >= LONG:
            found += _grown(host, [one for one in mine if one["t"] >= end / 4], end)
    return found


def _grown(host: str, mine: list[dict], end: float) -> list[str]:
    """What has grown, by the samples after the warm-up (a quarter of `end`); of the killed one, what it reaches in each life."""
    if host == "killed":
        lives: dict[int, list[dict]] = {}
        for one in mine:
            lives.setdefault(one["pid"], []).append(one)
        mine = [{"t": life[-1]["t"], **{k: max(one[k] for one in life) for k in SLACK}} for life in lives.values()]
    third = (end - end / 4) / 3
    first = [one for one in mine if one["t"] < end / 4 + third]
    last = [one for one in mine if one["t"] >= end - third]
    if not first or not last:
        return [f"{host}: no samples to compare"]
    found = []
    for key, (factor, more) in SLACK.items():
        before, after = (statistics.median(one[key] for one in some) for some in (first, last))
        if after > before * factor + more:
            found.append(f"{host}: {key} has grown from {before:g} to {after:g}")
    return found


def plot(lines: list[dict], path: str) -> None:
    """Draw the samples of a report over time: a row for each quantity, a line for each daemon, the kills as ticks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = {"anon": "anonymous memory, MiB", "fds": "descriptors", "threads": "threads", "journal": "journal, MiB"}
    figure, axes = plt.subplots(len(rows), 1, sharex=True, figsize=(9, 9))
    deaths = [one["t"] / 60 for one in lines if one["kind"] == "event" and one["what"].startswith("daemon ")]
    for axis, (key, label) in zip(axes, rows.items(), strict=True):
        for host in HOSTS:
            mine = [one for one in lines if one["kind"] == "sample" and one["host"] == host]
            scale = MIB if "MiB" in label else 1
            style = "." if host == "killed" else "-"
            axis.plot([one["t"] / 60 for one in mine], [one[key] / scale for one in mine], style, ms=2, label=host)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[0].plot(deaths, [0] * len(deaths), "|", color="grey", label="the daemon was killed")
    axes[0].legend(loc="lower right")
    axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- faults


class Faults:
    """What happens to daemons and the broker. Each ends with all of them running again, or about to."""

    def __init__(
        self, feeds: dict[str, Daemon], broker: Broker, store: Path, dice: random.Random, report: Report
    ) -> None:
        self.feeds, self.broker, self.store, self.dice, self.report = feeds, broker, store, dice, report
        self.counts: Counter[str] = Counter()

    def one(self) -> None:
        """One of them, by the dice."""
        choices: list[tuple[Callable[[], None], int]] = [
            (self.daemon_kill, 5),
            (self.daemon_twice, 2),
            (self.daemon_term, 2),
            (self.daemon_stop, 2),
            (self.broker_kill, 3),
            (self.broker_term, 1),
            (self.broker_stop, 2),
            (self.broker_wipe, 1),
            (self.broker_away, 1),
        ]
        (fault,) = self.dice.choices([f for f, _ in choices], [weight for _, weight in choices])
        what = fault.__name__.replace("_", " ")
        self.counts[what] += 1
        self.report.add("event", what=what)
        fault()

    def _pause(self, most: float) -> None:
        time.sleep(self.dice.uniform(0, most))  # its length is the fault itself, nothing is waited for

    def daemon_kill(self) -> None:
        feed = self.feeds["killed"]
        assert feed.alive(), f"the daemon exited by itself: {feed.output()[-3000:]}"
        feed.kill()
        self._pause(1)
        feed.start(ready=False)

    def daemon_twice(self) -> None:
        """Killed again while it starts."""
        self.daemon_kill()
        self._pause(1.5)
        self.daemon_kill()

    def daemon_term(self) -> None:
        feed = self.feeds["killed"]
        wait_until(lambda: answers(feed), "the daemon has started")
        code = feed.stop()
        assert code == 0, f"the daemon exited with {code} when it was told to stop"
        feed.start(ready=False)

    def daemon_stop(self) -> None:
        feed = self.feeds[self.dice.choice(HOSTS)]
        assert feed.alive(), f"the daemon exited by itself: {feed.output()[-3000:]}"
        feed.send(signal.SIGSTOP)
        self._pause(3)
        feed.send(signal.SIGCONT)

    def broker_kill(self) -> None:
        self.broker.kill()
        self.broker.start()

    def broker_term(self) -> None:
        self.broker.end(signal.SIGTERM)
        self.broker.start()

    def broker_stop(self) -> None:
        self.broker.signal(signal.SIGSTOP)
        self._pause(2)
        self.broker.signal(signal.SIGCONT)

    def broker_wipe(self) -> None:
        """It forgets everything: sessions, what waits for them, retained messages."""
        self.broker.kill()
        for file in self.store.iterdir():
            file.unlink()
        self.broker.start()

    def broker_away(self) -> None:
        self.broker.kill()
        self._pause(4)
        self.broker.start()


def answers(feed: Daemon) -> bool:
    with contextlib.suppress(OSError, AssertionError):
        feed.status()
        return True
    return False


# ---- the run


class Soak:
    def __init__(self, feeds: dict[str, Daemon], broker: Broker, writers: Writers, report: Report) -> None:
        self.feeds, self.broker, self.writers, self.report = feeds, broker, writers, report
        self.library = Following(broker, "library")
        self.newcomer = Following(broker, "newcomer")
        self.quiets = 0

    def quiet(self) -> None:
        """A quiet point: nobody writes, everything has arrived, and both consumers hold what a walk finds."""
        started = time.monotonic()
        self.writers.pause()
        heads: dict[tuple[str, str], tuple[str, int]] = {}
        tops: dict[tuple[str, str], str] = {}
        for host, feed in self.feeds.items():
            wait_until(lambda feed=feed: watching(feed), f"{host} watches its partitions", QUIET_DEADLINE)
            wait_until(lambda feed=feed: unchanged(feed), f"nothing changes any more at {host}", QUIET_DEADLINE)
            for one in feed.status()["partitions"]:
                heads[host, one["partition"]] = (one["epoch"], one["head"])
                tops[host, one["partition"]] = one["mount"]
        for who in (self.library, self.newcomer):
            wait_until(lambda who=who: who.heads() == heads, f"consumer {who.consumer} has {heads}", QUIET_DEADLINE)
            for key, model in who.models.items():
                model.compare(tops[key])
        again = {key: model.baselines for key, model in self.library.models.items() if model.baselines != 1}
        assert not again, f"the consumer that was always there needed baselines: {again}"
        for host, feed in self.feeds.items():
            text = feed.output()
            assert "Traceback" not in text, f"{host} logged: {text[text.index('Traceback') - 500 :][:3000]}"
        entries = sum(len(model.names) for model in self.library.models.values())
        self.quiets += 1
        took, numbers = round(time.monotonic() - started, 2), [seq for _, seq in heads.values()]
        line = {"number": self.quiets, "took": took, "steps": self.writers.steps, "heads": numbers, "entries": entries}
        self.report.add("quiet", **line, diffs=sum(model.count for model in self.library.models.values()))
        self.writers.go()
        self.newcomer.stop()
        self.newcomer = Following(self.broker, "newcomer")

    def end(self) -> None:
        self.library.stop()
        self.newcomer.stop()


def watching(feed: Daemon) -> bool:
    with contextlib.suppress(OSError):
        found = feed.status()["partitions"]
        return len(found) == len(SYSTEMS) and all(one["state"] in ("watching", "scanning") for one in found)
    assert feed.alive(), f"the daemon exited by itself: {feed.output()[-3000:]}"
    return False


def unchanged(feed: Daemon) -> bool:
    return not any(answer["changes"] for answer in feed.ask("snapshot")[0])


@contextlib.contextmanager
def scene(
    directory: Path, seed: int, report: Report
) -> Iterator[tuple[Soak, dict[str, tuple[Daemon, list[Path]]], Path]]:
    with contextlib.ExitStack() as stack:
        tops: dict[str, list[Path]] = {}
        for host in HOSTS:
            (directory / host).mkdir()
            parts = [stack.enter_context(partition(fs, directory / host)) for fs in SYSTEMS]
            tops[host] = [part.path for part in parts]
        store = directory / "store"
        store.mkdir()
        lines = ("persistence true", f"persistence_location {store}/", "autosave_interval 1", "log_type error")
        broker = stack.enter_context(mosquitto(directory, config=lines))
        feeds = {
            host: stack.enter_context(
                daemon(directory / host, *tops[host], broker=broker.url, config=CONFIG.format(host=host), time=TIME)
            )
            for host in HOSTS
        }
        writers = Writers([top for host in HOSTS for top in tops[host]], seed)
        stack.callback(writers.end)
        yield Soak(feeds, broker, writers, report), {host: (feeds[host], tops[host]) for host in HOSTS}, store


def endure(directory: Path, seconds: float, seed: int, path: str | None = None, quiets: float = 45.0) -> Report:
    """Run it for `seconds`, with a quiet point about every `quiets` seconds, and one at the end.

    The report goes to the file `path` as well. Raises AssertionError for what is not exact, or not flat.
    """
    report, dice = Report(path), random.Random(seed)
    report.add("begin", seed=seed, seconds=seconds)
    with contextlib.closing(report), scene(directory, seed, report) as (soak, served, store):
        faults = Faults(soak.feeds, soak.broker, store, dice, report)
        sampler = Sampler(report, min(5.0, seconds / 50), served)
        sampler.start()
        end = time.monotonic() + seconds
        soak.writers.go()
        while time.monotonic() < end:
            until = min(end, time.monotonic() + quiets * dice.uniform(0.3, 1.5))
            while time.monotonic() < until:
                time.sleep(dice.uniform(0, min(6.0, quiets / 5)))
                faults.one()
            soak.quiet()
        sampler.stop()
        soak.end()
        complaints = judge(report.of("sample"))
        report.add("end", complaints=complaints, quiet=soak.quiets, events=dict(faults.counts))
        assert not complaints, complaints
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="endurance", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", help="a file that the report is appended to, one JSON object a line")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("endurance: ended by SIGTERM"))
    with tempfile.TemporaryDirectory(prefix="snapfeed-endurance-") as directory:
        report = endure(Path(directory), options.seconds, options.seed, options.report)
    print(json.dumps(report.lines[-1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
