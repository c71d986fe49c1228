"""The real daemon through unmounts, kills, signals, and brokers that are away, silent or refuse."""

import contextlib
import json
import os
import random
import signal
import socket
import threading

import pytest
from broker_processes import collector, free_port, mosquitto
from consumer import Consumer
from daemon_process import HOST, daemon
from daemon_process import snapfeed as command
from partitions import partition, run, wait_until
from workload import Worker

pytestmark = pytest.mark.kernel


class Received:
    """A Consumer of one partition's pages, fed from a mosquitto_sub."""

    def __init__(self, seen, label):
        self.seen, self.topic, self.consumer, self._taken = seen, f"snapfeed/{HOST}/{label}/changes", Consumer(), 0

    def reached(self, seq):
        messages = self.seen.messages(self.topic)
        fresh, self._taken = messages[self._taken :], len(messages)
        self.consumer.feed(m.payload for m in fresh)
        return self.consumer.head is not None and self.consumer.head[1] >= seq

    def until(self, seq, deadline=15.0):
        wait_until(lambda: self.reached(seq), f"seq {seq} arrives", deadline)


class Forwarder:
    """A TCP port of our own that leads to a broker, once `open` and until `close`."""

    def __init__(self, to):
        self.to, self.port = to, free_port()
        self._listener = None

    def open(self):
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        if self._listener is not None:
            self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.to))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def state_of(snapfeed, part):
    return snapfeed.partition(part.path)["state"]


def goes_on(snapfeed, part, received):
    """A partition that is there again is watched by itself, and the next snapshot of it is exact."""
    wait_until(lambda: state_of(snapfeed, part) == "watching", "it goes on by itself", 10)
    (part.path / "last").write_text("x")
    received.until(snapfeed.snapshot(part.path)["seq"])
    received.consumer.compare(part.path)


def is_free(device):
    """Whether nobody has the device in use, as an mkfs would ask."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_EXCL))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4"])
def test_unmount_and_mount_again(fs, tmp_path):
    (tmp_path / "other").mkdir()
    with contextlib.ExitStack() as stack:
        part = stack.enter_context(partition(fs, tmp_path))
        other = stack.enter_context(partition("ext4", tmp_path / "other"))
        broker = stack.enter_context(mosquitto(tmp_path))
        seen = stack.enter_context(collector(broker, "snapfeed/#"))
        snapfeed = stack.enter_context(daemon(tmp_path, part.path, other.path, broker=broker.url))
        for one in (part, other):
            (one.path / "kept").write_text("x")
            snapfeed.snapshot(one.path)
        label, uuid = (snapfeed.partition(part.path)[k] for k in ("partition", "uuid"))
        received = Received(seen, label)
        second = Received(seen, snapfeed.partition(other.path)["partition"])

        part.umount()
        wait_until(lambda: state_of(snapfeed, part) == "unmounted", "the daemon sees it", 10)
        (part.path / "below").write_text("on the directory that was mounted over")
        done = snapfeed.command("snapshot", uuid, check=False)
        assert done.returncode == 1
        assert "mounted" in done.stderr

        def states():
            return [json.loads(m.payload)["state"] for m in seen.messages(f"snapfeed/{HOST}/{label}/state")]

        wait_until(lambda: states()[-1] == "unmounted", "it is published", 10)
        (other.path / "new").write_text("x")
        answer = snapfeed.snapshot(other.path)
        assert answer["changes"] >= 1
        second.until(answer["seq"])
        second.consumer.compare(other.path)
        assert state_of(snapfeed, other) == "watching"

        # elsewhere somebody works on it
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        run("mount", part.device, elsewhere)
        (elsewhere / "kept").write_text("changed")
        (elsewhere / "born").write_text("x")
        run("umount", elsewhere)

        (part.path / "below").unlink()
        part.mount()
        goes_on(snapfeed, part, received)
        assert sum(bool(d.get("baseline")) for d in received.consumer.diffs) == 1
        assert not [c for d in received.consumer.diffs for c in d["changes"] if c["op"] == "delete"]
        wait_until(lambda: states()[-1] == "watching", "it is published", 10)

        part.umount()  # and nothing of ours holds it, nor its device
        wait_until(lambda: is_free(part.device), "the device is free", 5)
        assert snapfeed.alive()
        assert "Traceback" not in snapfeed.output()


@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4"])
def test_killed_in_the_middle(fs, tmp_path):
    """Killed at random moments of work under load: nothing is lost, and no number stands for two things."""
    seed = int(os.environ.get("SEED", "11"))
    chance = random.Random(seed)
    with contextlib.ExitStack() as stack:
        part = stack.enter_context(partition(fs, tmp_path))
        broker = stack.enter_context(mosquitto(tmp_path))
        seen = stack.enter_context(collector(broker, "snapfeed/#"))
        snapfeed = stack.enter_context(daemon(tmp_path, part.path, broker=broker.url, io="64KiB", time="100ms"))
        label = snapfeed.partition()["partition"]
        received = Received(seen, label)
        over = threading.Event()

        def load():
            work = Worker(os.fsencode(part.path), seed, reflink=fs != "ext4")
            while not over.is_set():
                work.step()
                over.wait(0.001)

        worker = threading.Thread(target=load)
        worker.start()
        try:
            for _ in range(int(os.environ.get("ROUNDS", "4"))):
                head = snapfeed.partition()["head"] or 0
                wait_until(lambda head=head: (snapfeed.partition()["head"] or 0) >= head + 3, "snapshots", 20)
                over.wait(chance.random() * 0.1)  # any moment will do: this is the fault, not a wait
                snapfeed.kill()
                snapfeed.start()
        finally:
            over.set()
            worker.join()
        answer = snapfeed.snapshot()
        received.until(answer["seq"])
        received.consumer.compare(part.path)
        assert sum(bool(d.get("baseline")) for d in received.consumer.diffs) == 1
        kept = {r["seq"]: r["changes"] for r in snapfeed.ask("snapshots", partition=str(part.path))}
        published = {d["seq"]: len(d["changes"]) for d in received.consumer.diffs}
        assert kept.items() <= published.items()
        assert "Traceback" not in snapfeed.output()


def test_signals(xfs, tmp_path):
    with mosquitto(tmp_path) as broker, collector(broker, "snapfeed/#") as seen:
        config = f'[broker]\nhost = "{HOST}"\n[defaults]\nio_threshold = "5MiB"\n'
        with daemon(tmp_path, xfs.path, broker=broker.url, config=config) as snapfeed:
            wait_until(lambda: snapfeed.partition()["head"], "the first snapshot")
            found = snapfeed.partition()
            assert found["thresholds"] == {"io": 5 << 20, "time": 3600.0}

            # SIGHUP: thresholds at once, and they act
            toml = snapfeed.log.parent / "snapfeed.toml"
            toml.write_text(config.replace("5MiB", "1MiB"))
            snapfeed.send(signal.SIGHUP)
            wait_until(lambda: snapfeed.partition()["thresholds"]["io"] == 1 << 20, "the threshold is read again", 10)
            (xfs.path / "big").write_bytes(b"x" * (2 << 20))
            wait_until(lambda: snapfeed.partition()["last"]["trigger"] == "volume", "it acts", 10)

            # what was configured no longer falls back to the system file
            toml.write_text(f'[broker]\nhost = "{HOST}"\n')
            snapfeed.send(signal.SIGHUP)
            wait_until(lambda: snapfeed.partition()["thresholds"]["io"] == 1 << 30, "the system file's again", 10)

            # a wrong configuration changes nothing
            toml.write_text(config + "nonsense = 1\n")
            snapfeed.send(signal.SIGHUP)
            wait_until(lambda: "nonsense" in snapfeed.output(), "the log names the key", 10)
            assert snapfeed.partition()["thresholds"]["io"] == 1 << 30
            toml.write_text(config)

            # a second daemon on the same socket
            second = snapfeed.command("run", "--broker", broker.url, xfs.path, check=False)
            assert second.returncode == 1
            assert "another snapfeed daemon" in second.stderr
            assert str(snapfeed.socket) in second.stderr
            assert snapfeed.status()["pid"] == snapfeed.pid

            # SIGTERM
            (xfs.path / "last").write_text("x")
            head = snapfeed.snapshot()["seq"]
            received = Received(seen, found["partition"])
            received.until(head)
            assert snapfeed.stop() == 0
            assert not snapfeed.socket.exists()
            topic = f"snapfeed/{HOST}/status"
            kept = run("mosquitto_sub", *broker.options, "-t", topic, "-C", "1", "-W", "5", "--retained-only").stdout
            assert json.loads(kept)["state"] == "offline"
            states = [json.loads(m.payload)["state"] for m in seen.messages(topic)]
            assert states == ["online", "offline"]
            assert "Traceback" not in snapfeed.output()
            done = snapfeed.command("status", check=False)
            assert done.returncode == 1
            assert "snapfeed run" in done.stderr
            wait_until(lambda: run("umount", xfs.path, check=False).returncode == 0, "nothing holds it", 2)
            xfs.mount()

            # and on again, nothing published twice but by its key, SIGINT ends it as well
            snapfeed.start()
            (xfs.path / "after").write_text("x")
            received.until(snapfeed.snapshot()["seq"])
            received.consumer.compare(xfs.path)
            assert snapfeed.stop(signal.SIGINT) == 0

            # killed: the last will says so; a socket left behind does not keep the next one from starting
            snapfeed.start()
            wait_until(lambda: snapfeed.status()["broker"]["connected"], "the broker")
            snapfeed.kill()
            wait_until(lambda: json.loads(seen.messages(topic)[-1].payload)["state"] == "offline", "the last will", 10)
            snapfeed.start()
            assert snapfeed.stop() == 0


def test_a_broker_that_is_away_and_one_that_is_silent(btrfs, tmp_path):
    with mosquitto(tmp_path) as broker, collector(broker, "snapfeed/#") as seen:
        way = Forwarder(broker.port)
        with (
            contextlib.closing(way),
            daemon(tmp_path, btrfs.path, broker=f"mqtt://127.0.0.1:{way.port}") as snapfeed,
        ):
            # away from the start: the daemon works, and keeps the diffs
            for number in range(3):
                (btrfs.path / f"file{number}").write_text("x")
                answer = snapfeed.snapshot()
            status = wait_until(lambda: snapfeed.status()["broker"]["error"] and snapfeed.status(), "it says so", 10)
            assert not status["broker"]["connected"]
            assert str(way.port) in status["broker"]["error"]
            shown = snapfeed.command("status").stdout
            assert "not connected" in shown
            assert snapfeed.partition()["backlog"] >= 3
            received = Received(seen, snapfeed.partition()["partition"])
            assert not received.reached(1)
            way.open()
            received.until(answer["seq"], 40)
            received.consumer.compare(btrfs.path)
            assert received.consumer.diffs[0]["baseline"]
            wait_until(lambda: snapfeed.partition()["backlog"] == 0, "nothing is left to be published", 10)

            # silent for a while: commands are answered, and nothing is lost
            broker.signal(signal.SIGSTOP)
            try:
                for number in range(3):
                    (btrfs.path / f"more{number}").write_text("x")
                    answer = snapfeed.snapshot()
            finally:
                broker.signal(signal.SIGCONT)
            received.until(answer["seq"], 40)
            received.consumer.compare(btrfs.path)
            assert snapfeed.stop() == 0


def test_a_broker_that_refuses_the_login(xfs, tmp_path):
    with mosquitto(tmp_path, users={"reader": "r", "edge7": "right"}) as broker:
        broker.options += ["-u", "reader", "-P", "r"]
        (tmp_path / "password").write_text("wrong\n")
        config = f'[broker]\nhost = "{HOST}"\nusername = "edge7"\npassword_file = "{tmp_path}/password"\n'
        with (
            collector(broker, "snapfeed/#") as seen,
            daemon(tmp_path, xfs.path, broker=broker.url, config=config) as snapfeed,
        ):
            (xfs.path / "file").write_text("x")
            answer = snapfeed.snapshot()
            error = wait_until(lambda: snapfeed.status()["broker"]["error"], "it says so", 10)
            assert any(word in error.lower() for word in ("refused", "not authori", "password")), error
            assert "wrong" not in error
            assert "wrong" not in snapfeed.output().replace(str(tmp_path), "")
            broker.set_user("edge7", "wrong")
            broker.signal(signal.SIGHUP)
            received = Received(seen, snapfeed.partition()["partition"])
            received.until(answer["seq"], 40)
            received.consumer.compare(xfs.path)
            assert snapfeed.status()["broker"]["error"] is None


def test_a_mount_point_that_is_not_there_at_the_start(xfs, tmp_path):
    with daemon(tmp_path, xfs.path, started=False) as snapfeed:
        xfs.umount()
        done = command("run", xfs.path, "--socket", snapfeed.socket, check=False)
        assert done.returncode == 1
        assert str(xfs.path) in done.stderr
        assert "Traceback" not in done.stderr


def test_two_daemons_for_one_partition(xfs, tmp_path):
    """The second says who is in its way and touches nothing; it goes on by itself when the first has ended."""
    (tmp_path / "second").mkdir()
    with mosquitto(tmp_path) as broker, collector(broker, "snapfeed/#") as seen:
        other = f'[broker]\nhost = "{HOST}2"\n'
        with (
            daemon(tmp_path, xfs.path, broker=broker.url) as first,
            daemon(tmp_path / "second", xfs.path, broker=broker.url, config=other) as second,
        ):
            found = wait_until(
                lambda: state_of(second, xfs) == "failed" and second.partition(xfs.path), "it says so", 5
            )
            assert "another snapfeed daemon" in found["reason"]
            received = Received(seen, first.partition(xfs.path)["partition"])
            for number in range(5):
                (xfs.path / f"file{number}").write_text("x")
                received.until(first.snapshot()["seq"])
                received.consumer.compare(xfs.path)
            head = received.consumer.head
            assert first.stop() == 0
            wait_until(lambda: state_of(second, xfs) == "watching", "it takes over", 35)
            assert second.partition(xfs.path)["epoch"] == head[0]
            (xfs.path / "after").write_text("x")
            assert second.snapshot()["seq"] > head[1]
