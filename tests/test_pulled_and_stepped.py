"""A device pulled out, a clock that is set, two hosts with one name, many commands at once."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from broker_processes import collector, mosquitto
from daemon_process import HOST, daemon
from partitions import partition, require, run, wait_until
from test_lifecycle import Received, goes_on, state_of

pytestmark = pytest.mark.kernel
TEN_YEARS = 3653 * 86_400
FILE_SYSTEMS = ("xfs", "btrfs", "ext4")

# A process's own CLOCK_REALTIME, as many seconds off as the file says. What the kernel stamps files with stays as it is.
SHIFTED = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long *offset;
__attribute__((constructor)) static void begin(void) {
    int fd = open(getenv("CLOCK_OFFSET"), O_RDONLY | O_CLOEXEC);
    void *where = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, fd, 0);
    if (where == MAP_FAILED) abort();
    close(fd);
    offset = where;
}
int clock_gettime(clockid_t id, struct timespec *ts) {
    int failed = syscall(SYS_clock_gettime, id, ts);
    if (!failed && offset && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) ts->tv_sec += *offset;
    return failed;
}
int gettimeofday(struct timeval *tv, void *zone) {
    struct timespec ts;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &ts);
    tv->tv_sec = ts.tv_sec, tv->tv_usec = ts.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *where) {
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    if (where) *where = ts.tv_sec;
    return ts.tv_sec;
}
"""


class Clock:
    """The daemon's wall clock, to be set while it runs."""

    def __init__(self, directory):
        require(shutil.which("gcc") is not None, "gcc")
        source, library, self._offset = (directory / name for name in ("clock.c", "clock.so", "offset"))
        source.write_text(SHIFTED)
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True, timeout=60)
        self._offset.write_bytes(bytes(8))
        self.env = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(self._offset)}

    def set(self, seconds):
        with self._offset.open("r+b") as file:
            os.pwrite(file.fileno(), seconds.to_bytes(8, "little", signed=True), 0)


@pytest.mark.parametrize("fs", FILE_SYSTEMS if "SNAPFEED_RANDOM" in os.environ else FILE_SYSTEMS[:1])
def test_the_clock_is_set_by_ten_years_and_back(fs, tmp_path):
    clock = Clock(tmp_path)
    config = f'[broker]\nhost = "{HOST}"\n[journal]\nage = "1h"\n\n'
    with (
        partition(fs, tmp_path) as part,
        mosquitto(tmp_path) as broker,
        collector(broker, "snapfeed/#") as seen,
        daemon(tmp_path, part.path, broker=broker.url, env=clock.env, time="1s", config=config) as snapfeed,
    ):
        received = Received(seen, snapfeed.partition(part.path)["partition"])
        (part.path / "first").write_text("x")
        first = snapfeed.snapshot()["seq"]
        for number, seconds in enumerate((TEN_YEARS, -TEN_YEARS, 0, -TEN_YEARS, TEN_YEARS, 0)):
            clock.set(seconds)
            before = snapfeed.partition(part.path)["head"]
            (part.path / f"file{number}").write_text("x")
            (part.path / "first").write_text(f"{number}")
            # nobody asks: the time threshold is kept to by a clock that cannot be set
            seq = wait_until(lambda b=before: _newer(snapfeed, part, b), "the time threshold is met", 10)
            os.rename(part.path / f"file{number}", part.path / f"moved{number}")
            seq = max(seq, snapfeed.snapshot()["seq"])
            received.until(seq)
            received.consumer.compare(part.path)
        seqs = [diff["seq"] for diff in received.consumer.diffs]
        assert seqs == sorted(set(seqs))
        assert seqs[0] <= first
        pages = [json.loads(message.payload) for message in seen.messages(received.topic)]
        off = {round((int(page["time_ns"]) / 1e9 - time.time()) / TEN_YEARS) for page in pages}
        assert off == {-1, 0, 1}, "the daemon's clock was set, and people are told its time"
        assert "Traceback" not in snapfeed.output()
        assert state_of(snapfeed, part) == "watching"


@pytest.mark.parametrize("fs", FILE_SYSTEMS)
def test_a_device_is_pulled_out_and_put_in_again(fs, tmp_path):
    with (
        partition(fs, tmp_path) as part,
        mosquitto(tmp_path) as broker,
        collector(broker, "snapfeed/#") as seen,
        daemon(tmp_path, part.path, broker=broker.url) as snapfeed,
    ):
        for number in range(50):
            (part.path / f"file{number}").write_text("x")
        seq = snapfeed.snapshot()["seq"]
        received = Received(seen, snapfeed.partition(part.path)["partition"])
        received.until(seq)
        wait_until(lambda: snapfeed.published(seq), "it is acknowledged")
        kept = tmp_path / "kept.img"
        run("fsfreeze", "-f", part.path)
        run("cp", "--sparse=always", part.image, kept)
        run("fsfreeze", "-u", part.path)

        os.truncate(part.image, 0)  # nothing can be read or written any more
        run("sh", "-c", "echo 3 > /proc/sys/vm/drop_caches")
        with contextlib.suppress(OSError):
            for number in range(50):
                (part.path / f"lost{number}").write_bytes(os.urandom(1 << 16))
        done = snapfeed.command("snapshot", part.path, check=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        state = wait_until(lambda: _trouble(snapfeed, part), "status says so", 5)
        assert state["reason"]

        wait_until(lambda: run("umount", part.path, check=False).returncode == 0, "we do not hold it", 20)
        wait_until(lambda: state_of(snapfeed, part) == "unmounted", "it is seen", 10)
        with kept.open("rb") as source, part.image.open("r+b") as image:
            shutil.copyfileobj(source, image, 1 << 20)
        run("losetup", "-c", part.device)
        run("blockdev", "--flushbufs", part.device)
        part.mount()
        goes_on(snapfeed, part, received)
        assert not [c for d in received.consumer.diffs for c in d["changes"] if c["op"] in ("delete", "unlink")]
        assert "Traceback" not in snapfeed.output()


def test_two_hosts_with_one_name(tmp_path):
    """They have the same client identifier: the broker throws out one for the other, and this one does not say why."""
    (tmp_path / "second").mkdir()
    with (
        partition("xfs", tmp_path, mkfs=("-L", "one")) as one,
        partition("xfs", tmp_path / "second", mkfs=("-L", "two")) as two,
        mosquitto(tmp_path) as broker,
        collector(broker, "snapfeed/#") as seen,
        daemon(tmp_path, one.path, broker=broker.url) as first,
        daemon(tmp_path / "second", two.path, broker=broker.url) as second,
    ):
        hosts = ((first, one), (second, two))
        for snapfeed, _ in hosts:
            wait_until(
                lambda s=snapfeed: "second daemon with the same [broker] host" in s.output(),
                "it says what it may be",
                60,
            )
        received = [Received(seen, snapfeed.partition()["partition"]) for snapfeed, _ in hosts]
        for number in range(5):
            for snapfeed, part in hosts:
                (part.path / f"file{number}").write_text("x")
                snapfeed.snapshot()
        assert second.stop() == 0  # its host gets a name of its own
        received[0].until(first.partition()["head"], 60)
        received[0].consumer.compare(one.path)
        assert first.stop() == 0
        second.start()
        received[1].until(second.partition()["head"], 60)
        received[1].consumer.compare(two.path)
        assert not [s for s, _ in hosts if "Traceback" in s.output()]


def test_many_commands_at_once(tmp_path):
    """Each is answered, none is done twice, and the feed is exact: one partition has one thread for what changes it."""
    with (
        partition("xfs", tmp_path) as part,
        mosquitto(tmp_path) as broker,
        collector(broker, "snapfeed/#") as seen,
        daemon(tmp_path, part.path, broker=broker.url) as snapfeed,
    ):
        label = snapfeed.partition()["partition"]

        def ask(number):
            (part.path / f"file{number}").write_text("x")
            verb = ("snapshot", "reconcile", "thresholds", "verify")[number % 4]
            fields = {"io_threshold": "1GiB"} if verb == "thresholds" else {}
            return verb, snapfeed.ask(verb, partition=label, **fields)

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, range(64)))
        assert all(found for _, found in answers)
        assert all(found[-1]["disagreements"] == 0 for verb, found in answers if verb == "verify"), answers
        seq = snapfeed.snapshot()["seq"]
        received = Received(seen, label)
        received.until(seq)
        received.consumer.compare(part.path)
        made = [diff["seq"] for diff in received.consumer.diffs]
        assert made == list(range(made[0], seq + 1))
        assert "Traceback" not in snapfeed.output()


def _newer(snapfeed, part, seq):
    head = snapfeed.partition(part.path)["head"]
    return head if head > (seq or 0) else None


def _trouble(snapfeed, part):
    found = snapfeed.partition(part.path)
    return found if found["state"] != "watching" else None
