"""The life of one partition without a daemon's process: opened, snapshotted and published with the functions the daemon uses."""

import collections
import contextlib
import os
import random
import shutil
import time

from consumer import Consumer
from test_no_guess import ident
from workload import Worker

from comparer.dirty import Dirty
from comparer.errors import DamageError
from comparer.model import Name
from feed.outbox import Position
from feed.pages import Envelope
from snapshotter import witness
from snapshotter.adopt import adopt, quarantine
from snapshotter.partition import partition_at
from snapshotter.visit import Visit, is_damaged
from watcher.baselines import sweep_spools
from watcher.outbox import JournalOutbox
from watcher.work import Order, journal_of, sweep, take

FEW = 150  # entries, about: what the work on the tree is held to
ALL = 1 << 20  # bytes of a page of the feed


class Life:
    """One partition, opened as watcher.pipeline opens it, published as watcher.outbox does, to one strict consumer."""

    def __init__(self, part, seed):
        self.top = os.fsencode(part.path)
        self.random = random.Random(seed)
        self.work = Worker(self.top, seed, reflink=part.fs == "xfs")
        self.partition = partition_at(self.top)
        adopt(self.partition, time.time_ns())
        self.file = self.partition.system_file
        self.directory = os.path.dirname(self.file)
        self.consumer = Consumer()
        self.position = None
        self.abilities = None
        self.olds = collections.deque(maxlen=4)  # files as they were a while ago, with their write-ahead logs
        self.begin()
        self.live()

    # ---- as the daemon does

    def attach(self):
        """As Pipeline._attach: a look at the whole file, what an unfinished snapshot left, and then a look at everything."""
        with Visit(self.partition, check=True) as visit:
            visit.file.settings()
        with Visit(self.partition) as visit:
            sweep(visit), sweep_spools(visit)
            visit.file.consumers(), journal_of(visit.file), visit.file.backlog()
            self.abilities = visit.abilities
        self.position = None
        self.snapshot(Dirty(lost="not watched until now"))

    def begin(self):
        """As Pipeline.run: what is damaged is set aside, and then it begins anew. Returns the errors met."""
        errors = []
        while True:
            try:
                self.attach()
                self.publish()
            except DamageError as error:
                if not is_damaged(self.partition):
                    raise
                errors.append(error)
                assert len(errors) < 3, f"damaged again and again: {errors}"
                quarantine(self.partition, time.time_ns(), 1 << 20, 60.0)
                continue
            return errors

    def snapshot(self, dirty, during=lambda _: None):
        with Visit(self.partition, self.abilities) as visit:
            done = take(visit, Order("command", dirty, 0, time.time_ns(), 8, 1 << 17), Dirty, lambda _: None)
            during(visit.file)
        return done

    def publish(self):
        """What the outbox hands out goes to the consumer; the cursor is written."""
        with Visit(self.partition, self.abilities) as visit:
            file = visit.file
            epoch = file.settings().epoch
            envelope = Envelope("edge7", "data", "u", epoch, 0, None, 0, "", 0, "", None)
            outbox = JournalOutbox("data", "t", envelope, None)
            while True:
                start = self.position or Position(*file.acknowledged())
                pages = outbox._pages(file, start, ALL, 100)
                if not pages:
                    break
                self.consumer.feed(page.payload for page in pages)
                self.position = pages[-1].position
                file.acknowledge(*self.position)

    # ---- a life

    def step(self):
        for _ in range(self.random.randrange(1, 6)):
            self.work.step()
        dirs, others = self.work.paths()
        for path in others[FEW:]:
            with contextlib.suppress(OSError):
                os.unlink(path)
        for path in dirs[:0:-1][:-FEW]:
            shutil.rmtree(path, ignore_errors=True)

    def live(self):
        """Some work, some snapshots, most of them published."""
        for _ in range(self.random.randrange(1, 3)):
            self.step()
            self.snapshot(Dirty(lost="test"))
            if self.random.random() < 0.7:
                self.publish()
        if self.random.random() < 0.3:
            self.olds.append(self.read())

    def exact(self):
        """After one more snapshot, of which only hints tell, the consumer has what is there."""
        name, other = b"hint", b"hint too"
        if os.path.lexists(os.path.join(self.top, other)):
            name, other = other, name
        if not os.path.lexists(os.path.join(self.top, name)):
            with open(os.path.join(self.top, name), "wb"):
                pass
        root, moved = ident(self.top, ""), ident(self.top, name)
        os.rename(os.path.join(self.top, name), os.path.join(self.top, other))
        self.snapshot(Dirty(objects={root, moved}, names={Name(root, name), Name(root, other)}))
        self.publish()
        self.consumer.compare(self.top)

    # ---- its files

    def read(self):
        found = {}
        for suffix in (b"", b"-wal"):
            with contextlib.suppress(FileNotFoundError), open(self.file + suffix, "rb") as file:
                found[suffix] = file.read()
        return found

    def write(self, files):
        self.remove()
        for suffix, content in files.items():
            with open(self.file + suffix, "wb") as file:
                file.write(content)

    def remove(self):
        for suffix in (b"", b"-wal", b"-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.file + suffix)

    def killed(self, *, checkpointing=False):
        """The files as a kill after a snapshot's commit leaves them: everything still in the write-ahead log.

        `checkpointing`: when all is in the log that is there before it is copied to the file.
        """
        self.step()
        found = {}
        before = witness.read(self.directory)

        def now(file):
            if checkpointing or self.random.random() < 0.3:
                file._sums.seal()
            found.update(self.read())

        self.snapshot(Dirty(lost="test"), now)
        if self.random.random() < 0.3:
            witness.write(self.directory, before)  # before it was witnessed
        self.write(found)
        assert found.get(b"-wal"), "nothing was written"
        return found

    def asides(self):
        return sorted(os.path.join(self.directory, n) for n in os.listdir(self.directory) if n.startswith(b"damaged-"))
