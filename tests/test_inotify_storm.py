"""Four writers at once, and no hole: every directory is watched where it is, and what was taken leads to all that changed.

SNAPFEED_STORMS=n: that many storms, of other seeds. A failure names its seed; the scheduler has a say, so it may take many.
"""

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from partitions import tmpfs
from workload import AT_FDCWD, RENAME_EXCHANGE, libc

from comparer.model import FileType, Ident, Name
from snapshotter.linux.handles import Codec, name_to_handle_at
from snapshotter.linux.identity import Identifier
from snapshotter.live import LiveTree
from watcher.sources.inotify import InotifySource

pytestmark = pytest.mark.kernel

WRITERS, SECONDS = 4, 0.7
STORMS = int(os.environ.get("SNAPFEED_STORMS", "2"))
HAMMER = Path(__file__).parent / "hammer.py"
WITHOUT_LINKS = """
import runpy, sys, workload
workload.OPERATIONS[:] = [operation for operation in workload.OPERATIONS if operation[1] != "link"]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Follower:
    """Looks, by handle, where it is told to and nowhere else."""

    def __init__(self, root: Path) -> None:
        self.fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        self.tree = LiveTree(self.fd, Identifier(self.fd).identify, Codec(name_to_handle_at(self.fd)))
        self.changed: dict[Ident, int] = {}
        self.entries: dict[Ident, dict[bytes, Ident]] = {}
        self.losses: list[str] = []
        self.all()

    def close(self) -> None:
        self.tree.close()
        os.close(self.fd)

    def all(self) -> None:
        self.changed, self.entries = {}, {}
        self.at(self.tree.root)
        self.list(self.tree.root)
        self.tree.close()

    def follow(self, dirty) -> None:
        if dirty.lost is not None:
            self.losses.append(dirty.lost)
            self.all()
            return
        for ident in dirty.objects:
            self.at(ident)
        for name in dirty.names:
            self.name(name)
        for ident in dirty.written:  # a directory: what is in it is not told by names alone
            if ident in self.entries:
                self.list(ident)
        self.tree.close()  # an open directory would not be deleted

    def at(self, ident: Ident) -> None:
        attr = self.tree.look_at(ident) if ident != self.tree.root else self.tree.look_at_root()
        if attr is None:
            self.changed.pop(ident, None)
            self.entries.pop(ident, None)
        else:
            self.changed[ident] = attr.ctime_ns

    def name(self, name: Name) -> None:
        before = self.entries.get(name.parent, {}).pop(name.name, None)
        if before is not None:
            self.at(before)
        fd = self.tree.directory(name.parent, lambda _: None)
        found = None if fd is None else self.tree.look(fd, name.name)
        if found is None:
            return
        self.changed[found.ident] = found.attr.ctime_ns
        self.entries.setdefault(name.parent, {})[name.name] = found.ident
        if found.attr.type is FileType.DIR and found.ident not in self.entries:
            self.list(found.ident)

    def list(self, directory: Ident) -> None:
        self.entries[directory] = {}
        fd = self.tree.directory(directory, lambda _: None)
        with contextlib.suppress(FileNotFoundError):
            for name, _ in [] if fd is None else list(self.tree.list(fd)):
                self.name(Name(directory, name))

    def state(self) -> dict[bytes, tuple[Ident, int | None]]:
        state = {b"": (self.tree.root, self.changed.get(self.tree.root))}
        stack = [(b"", self.tree.root)]
        while stack:
            path, directory = stack.pop()
            for name, ident in self.entries.get(directory, {}).items():
                below = os.path.join(path, name)
                assert below.count(b"/") < 200, "a directory in itself"
                state[below] = ident, self.changed.get(ident)
                stack.append((below, ident))
        return state


def walk(root: Path) -> dict[bytes, tuple[Ident, int]]:
    top = os.fsencode(root)
    fd = os.open(top, os.O_PATH)
    try:
        identifier = Identifier(fd)
        found = {}
        for directory, names, files in os.walk(top):
            for full in [directory, *(os.path.join(directory, name) for name in [*names, *files])]:
                path = b"" if full == top else os.path.relpath(full, top)
                found[path] = identifier.ident(fd, path), os.lstat(full).st_ctime_ns
        return found
    finally:
        os.close(fd)


def watched(source) -> dict[bytes, Ident]:
    """Where the source has its watches; they are those that the kernel has."""
    tree = source._watched.tree
    with open(f"/proc/self/fdinfo/{source._watched.watches.get_fd()}") as info:
        live = {int(line.split()[1].removeprefix("wd:"), 16) for line in info if line.startswith("inotify ")}
    assert live == tree.by_wd.keys()
    assert not tree.homeless
    return {b"/".join(tree.path(directory)): directory.ident for directory in tree.by_wd.values()}


def directories(root: Path, there) -> set[bytes]:
    paths = {path: os.path.join(os.fsencode(root), path) for path in there}
    return {path for path, full in paths.items() if os.path.isdir(full) and not os.path.islink(full)}


@contextlib.contextmanager
def writers(root: Path, seed: int, *, links: bool):
    command = [sys.executable, *([] if links else ["-c", WITHOUT_LINKS]), str(HAMMER), str(root)]
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(HAMMER.parent)}
    running = [
        subprocess.Popen([*command, str(seed * WRITERS + i)], stdin=pipe, stdout=pipe, env=environment)
        for i in range(WRITERS)
    ]
    try:
        yield running
    finally:
        for writer in running:
            writer.kill()
            writer.communicate()


async def storm(root: Path, seed: int, *, links: bool) -> None:
    """Raises AssertionError for a hole."""
    chance = random.Random(seed)
    source = InotifySource(root)
    follower = Follower(root)
    try:
        source.start(lambda: None)
        follower.all()
        with writers(root, seed, links=links) as running:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                await asyncio.sleep(chance.choice([0, 0, 0.01, 0.1]) * chance.random())
                follower.follow(source.take())
            steps = sum(int(writer.communicate(b"stop\n", timeout=60)[0]) for writer in running)
        assert steps > 20
        for _ in range(3):
            follower.follow(source.take())
        there = walk(root)
        assert watched(source) == {path: there[path][0] for path in directories(root, there)}
        assert differing(follower.state(), there, links=links) == {}, follower.losses
        assert not source.pending
    finally:
        source.close()
        follower.close()


def differing(told, there, *, links: bool):
    """Path: what is told and what is there, where they differ.

    `links`: not by the change time: a hard link may have come and gone between two looks.
    """
    pairs = {path: (told.get(path), there.get(path)) for path in told.keys() | there.keys()}
    return {
        path: (here, now)
        for path, (here, now) in pairs.items()
        if here != now and not (links and here and now and here[0] == now[0] and here[1] is not None)
    }


@pytest.mark.parametrize("links", [False, True], ids=["exact", "links"])
@pytest.mark.parametrize("seed", range(STORMS))
def test_a_storm(seed, links, tmp_path):
    with tmpfs(tmp_path) as root:
        asyncio.run(storm(root, seed, links=links))


@contextlib.contextmanager
def watching(root: Path):
    """A started source in a loop that does not run: events are read when the test says so."""

    async def start(source):
        source.start(lambda: None)

    source = InotifySource(root)
    with asyncio.Runner() as runner:
        try:
            runner.run(start(source))
            yield source
        finally:
            source.close()


def ident(path: Path) -> Ident:
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        return Identifier(fd).ident(fd, os.fsencode(path.name))
    finally:
        os.close(fd)


def exchange(one: Path, other: Path) -> None:
    assert libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def test_two_directories_exchanged_stay_watched(tmp_path):
    with tmpfs(tmp_path) as root:
        (root / "a" / "x" / "in_x").mkdir(parents=True)
        (root / "b" / "y" / "in_y").mkdir(parents=True)
        with watching(root) as source:
            exchange(root / "a" / "x", root / "b" / "y")
            for _ in range(3):
                assert source.take().lost is None
            there = walk(root)
            assert watched(source) == {path: there[path][0] for path in there}
            (root / "b" / "y" / "in_x" / "file").touch()
            dirty = source.take()
            assert dirty.names == {Name(ident(root / "b" / "y" / "in_x"), b"file")}
            assert dirty.lost is None


def test_a_directory_that_is_new_is_to_be_listed(tmp_path):
    """Who took before it was watched may have found what is not there any more."""
    with tmpfs(tmp_path) as root, watching(root) as source:
        (root / "new" / "below").mkdir(parents=True)
        dirty = source.take()
        new = {ident(root / "new"), ident(root / "new" / "below")}
        assert new <= dirty.written & dirty.objects
        (root / "new").rename(root / "renamed")
        dirty = source.take()
        assert not dirty.written
        assert dirty.lost is None


def test_a_hard_link_that_was_seen_and_is_gone(tmp_path):
    with tmpfs(tmp_path) as root:
        (root / "d").mkdir()
        (root / "d" / "file").touch()
        with watching(root) as source:
            (root / "link").hardlink_to(root / "d" / "file")
            source._batch()
            (root / "link").unlink()
            assert ident(root / "d" / "file") in source.take().objects
