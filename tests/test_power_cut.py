"""The power fails under load: the disk as it is at some instant is a clone of its image, which is then mounted and started.

What consumers had of it by then must be in it, and what its daemon says from then on must go on from there, exactly. The clones
are of whole images on a file system with reflink: FICLONE keeps writes out meanwhile, so each is of one moment.

SNAPFEED_IMAGES: how many of each file system. SNAPFEED_SEED: of the moments. SNAPFEED_REPORT: as in kill_points.py.
"""

import contextlib
import os
import random
import shutil
import sqlite3
import threading
import time

import pytest
from consumer import Consumer
from daemon_process import Daemon
from kill_points import READY, change, report, scene
from partitions import partition, run, wait_until

IMAGES = int(os.environ.get("SNAPFEED_IMAGES", "3"))
SEED = int(os.environ.get("SNAPFEED_SEED", "1"))
AT_A_TIME = 25
KEEP_TWO = '[broker]\nhost = "testhost"\nmax_packet = 8192\n[defaults]\nkeep = 2\n'


@pytest.mark.kernel
@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4"])
def test_a_power_cut_under_load(fs, tmp_path):
    moments, done, ready, started = random.Random(f"{fs} {SEED}"), 0, [], time.monotonic()
    counts = {"with_unfinished_log": 0, "with_backlog": 0, "with_leftovers": 0}
    while done < IMAGES:
        count = min(AT_A_TIME, IMAGES - done)
        here = tmp_path / str(done)
        here.mkdir()
        with (
            partition("xfs", here, "4G") as below,
            partition(fs, below.path, "320M") as part,
            scene(part.path, here, kind=Daemon, config=KEEP_TWO) as it,
        ):
            pages = []
            it.heard = pages.append
            cuts = cut(it, part, count, moments, pages)
            part.umount()
            for image, known in cuts:
                verify(it, part, image, pages, known, counts)
                ready.append(it.snapfeed.ready)
                image.unlink()
        done += count
    seconds = round(time.monotonic() - started, 1)
    worst = round(max(ready), 3)
    report({"scenario": f"power cut {fs}", "images": done, **counts, "worst_ready_s": worst, "seconds": seconds})
    assert max(ready) < READY


def cut(it, part, count, moments, pages):
    """Images cut while files change and snapshots are taken, each with the number of pages that had arrived before."""
    it.snapfeed.start()
    stop, trouble = threading.Event(), []

    def forever(step):
        def loop():
            number = 0
            try:
                while not stop.wait(0.01):
                    step(number)
                    number += 1
            except BaseException as error:  # noqa: BLE001 - told below
                trouble.append(error)

        thread = threading.Thread(target=loop)
        thread.start()
        return thread

    threads = [forever(lambda number: change(it.top, number)), forever(lambda _: it.snapfeed.snapshot())]
    cuts = []
    try:
        wait_until(lambda: it.take() and pages, "the first page")
        for number in range(count):
            stop.wait(moments.uniform(0.02, 0.4))
            it.take()
            known, image = len(pages), part.image.with_name(f"cut{number}.img")
            run("cp", "--reflink=always", part.image, image)
            cuts.append((image, known))
            assert not trouble, trouble
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    it.snapfeed.stop()
    it.take()
    return cuts


def verify(it, part, image, pages, known, counts):
    """Mounted and started, it goes on from what a consumer had when it was cut."""
    run("mount", "-o", "loop", image, part.path)
    try:
        head, cursor, epoch = looked_at(part.path / ".snapfeed", image.parent, counts)
        consumer = Consumer()
        for number, page in enumerate(pages):
            # what the broker had acknowledged before the cut has arrived, if a moment later
            if number < known or (page["seq"], page["page"]) <= cursor:
                consumer.take(page)
        assert (consumer.head or (0, 0))[1] <= head, "it was published and is not in the image"
        it.consumer, it.heard = consumer, consumer.take
        it._envelopes.clear()
        it.snapfeed.start()
        it.judge()
        assert consumer.head[0] == epoch
        assert sum(bool(diff.get("baseline")) for diff in consumer.diffs) == 1
    finally:
        it.snapfeed.kill()
        part.umount()
        if part.fs == "btrfs":
            run("btrfs", "device", "scan", "--forget", check=False)  # it would not take an older image of the same disk


def looked_at(system, scratch, counts):
    """(head, cursor, epoch) of an image; what makes it an interesting one is counted."""
    log = system / "system.db-wal"
    counts["with_unfinished_log"] += log.exists()
    shutil.copy(system / "system.db", scratch / "system.db")  # SQLite would recover it, which is the daemon's to do
    scratch.joinpath("system.db-wal").write_bytes(log.read_bytes() if log.exists() else b"")
    with contextlib.closing(sqlite3.connect(scratch / "system.db")) as db:
        meta = dict(db.execute("SELECT * FROM meta"))
        diffs = dict(db.execute("SELECT seq, pages FROM diff"))
    head, cursor = max(diffs, default=0), (meta["acknowledged_seq"], meta["acknowledged_page"])
    counts["with_backlog"] += cursor < (head, diffs.get(head, 0))
    made = [
        int(name) for kind in ("clones", "snapshots") if (system / kind).exists() for name in os.listdir(system / kind)
    ]
    counts["with_leftovers"] += max(made, default=0) > head
    return head, cursor, meta["epoch"]
