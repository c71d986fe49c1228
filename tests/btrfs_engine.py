"""The btrfs engine by hand, without the daemon: one snapshot at a time, each checked in every way there is."""

import contextlib
import ctypes
import os

from model import Model, apply
from oracle import walk
from workload import Worker

from comparer.compare import baseline, compare
from comparer.dirty import Dirty
from comparer.model import FileType, Quality
from snapshotter.backends.btrfs import BtrfsBackend
from snapshotter.backends.btrfs_ranges import FileRanges
from snapshotter.backends.btrfs_touched import searched

libc = ctypes.CDLL(None, use_errno=True)
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
BLOCK = 4096


@contextlib.contextmanager
def opened(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def fallocate(path, mode, offset, length):
    with open(path, "r+b") as file:
        if libc.fallocate(file.fileno(), mode, ctypes.c_long(offset), ctypes.c_long(length)):
            raise OSError(ctypes.get_errno(), "fallocate")


def write_at(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def inside(position, ranges):
    return any(r.offset <= position < r.offset + r.length for r in ranges)


class SafeWorker(Worker):
    """Random work whose symbolic links lead nowhere: what a write follows must not lie outside of the partition."""

    def symlink(self, _target, fresh, _anything):
        os.symlink(self.random.choice([b"nowhere/at/all", b"..", b"a", b"\xff\n"]), fresh)


class Engine:
    """One partition and one consumer; every snapshot is checked in every way there is."""

    def __init__(self, top):
        self.top = os.fsencode(top)
        self.backend = BtrfsBackend()
        self.model = Model()
        self.seq = 0
        self.head = None
        with opened(self.top) as fd:
            self.backend.prepare(fd)

    def capture(self, **options):
        self.seq += 1
        with opened(self.top) as fd:
            return self.backend.capture(fd, self.seq, self.head, Dirty(), Dirty, **options)

    def snapshot(self, *, search=False, contents=True, live=True):
        """Take a snapshot, apply its changes, look whether the model is what a walk finds; the changes."""
        capture = self.capture()
        assert search or self.backend.last_search is None
        if capture.old is None:
            changes = list(baseline(capture.new))
        else:
            changes = list(compare(capture.old, capture.new, capture.touched, capture.ranges))
            self.search(capture, changes)
        before = {node.ident: path for path, node in self.model.walk()} if self.model.root else {}
        apply(self.model, changes)
        entries = self.model.entries()
        tree = os.path.join(self.top, capture.snapshot)
        assert entries == walk(tree)
        if live:
            assert entries == walk(self.top)
        if contents and capture.old is not None:
            self.contents(capture, before, tree)
        with opened(self.top) as fd:
            if self.head is not None:
                self.backend.expire(fd, [self.head])
        self.head = self.seq
        return changes

    def search(self, capture, changes):
        """The trees alone give the same as the stream."""
        every = FileRanges(capture.old, capture.new)
        other = list(compare(capture.old, capture.new, searched(capture.old, capture.new), every))
        model = self.model.copy()
        apply(model, other)
        second = self.model.copy()
        apply(second, changes)
        assert model.entries() == second.entries()
        assert {c.ident: c.ranges for c in changes if c.ranges} == {c.ident: c.ranges for c in other if c.ranges}

    def contents(self, capture, before, tree):
        """Every byte that differs lies in the ranges; no file without ranges differs."""
        old = os.path.join(os.path.dirname(tree), b"%d" % self.head)
        for path, node in self.model.walk():
            if node.attr.type is not FileType.FILE or node.ident not in before:
                continue
            with open(os.path.join(old, before[node.ident]), "rb") as file:
                was = file.read()
            with open(os.path.join(tree, path), "rb") as file:
                now = file.read()
            found = capture.ranges(node.ident)
            if found is None:
                assert was == now, path
                continue
            assert found.quality is not Quality.UNKNOWN
            assert all(r.offset + r.length <= len(now) for r in found.written)
            gone = len(now) < len(was)
            assert not gone or inside(len(now), found.cleared)
            grown = range(len(was), len(now), 512)
            assert all(inside(at, found.written) or inside(at, found.cleared) for at in grown)
            common = min(len(was), len(now))
            for at in range(0, common, 512):
                some = next((i for i in range(at, min(at + 512, common)) if was[i] != now[i]), None)
                if some is not None:
                    assert inside(some, found.written) or (inside(some, found.cleared) and not now[some]), (
                        path,
                        at,
                        found,
                    )


def ops(changes):
    return [(str(c.op), c.path, c.from_path) for c in changes]
