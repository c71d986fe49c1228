"""`snapfeed verify`: it sees what is wrong, tells it from what changed meanwhile, and is quiet where all is well."""

import contextlib
import json
import os
import threading
import time

import pytest
from daemon_process import adopt, daemon, snapfeed
from partitions import tmpfs
from workload import Worker

from comparer.dirty import Dirty
from comparer.errors import DamageError
from snapshotter.held import held
from snapshotter.partition import partition_at
from snapshotter.scan import GUARD_NS
from snapshotter.verify import nameless, verify
from snapshotter.visit import Visit
from watcher.work import Order, take

pytestmark = pytest.mark.kernel
HOSTILE = b"new\nline\x1b[31m"


def populate(top, steps=150):
    work = Worker(os.fsencode(top), 11, reflink=False)
    for _ in range(steps):
        work.step()
    os.makedirs(f"{top}/d/e")
    for path in ("d/f", "d/e/g", "h"):
        with open(f"{top}/{path}", "w") as file:
            file.write(path)
    os.symlink("d/f", f"{top}/s")
    os.setxattr(f"{top}/h", "user.a", b"1")


class Verifier:
    """A partition with one snapshot, and what verify says of it."""

    def __init__(self, part):
        adopt(part.path)
        populate(part.path)
        self.top = part.path
        self.partition = partition_at(os.fsencode(part.path))
        time.sleep(2 * GUARD_NS / 1e9)
        self.taken = time.time_ns()
        with Visit(self.partition) as visit:
            take(visit, Order("command", Dirty(), 0, self.taken, 4, 1 << 17), Dirty, lambda _: None)

    def found(self, taken=None):
        with Visit(self.partition) as visit, held(visit, visit.file.head()) as (view, _):
            entries = []
            since = self.taken if taken is None else taken
            return list(verify(visit.tree, view, since, entries.append, nameless(view)))

    def change(self, statement, *values):
        with Visit(self.partition) as visit, visit.file.transaction():
            assert visit.file.db.execute(statement, values).rowcount == 1

    def ino(self, path):
        return os.lstat(f"{self.top}/{path}").st_ino


@pytest.fixture
def verifier(part):
    return Verifier(part)


def test_a_snapshot_agrees_with_a_quiet_partition(verifier):
    assert verifier.found() == []


def test_what_changed_after_the_snapshot_is_told_apart(verifier):
    top = verifier.top
    with open(f"{top}/h", "a") as file:
        file.write("more")
    os.unlink(f"{top}/d/f")
    os.rename(f"{top}/d/e", f"{top}/moved")
    os.mkdir(f"{top}/fresh")
    (top / "fresh/x").write_text("x")
    os.unlink(f"{top}/s")
    os.symlink("elsewhere", f"{top}/s")
    found = verifier.found()
    assert all(f.meanwhile for f in found)
    told = {(f.path, f.what) for f in found}
    assert {
        (b"h", "attributes"),
        (b"d/f", "missing"),
        (b"d/e", "missing"),
        (b"moved", "extra"),
        (b"fresh/x", "extra"),
    } < told
    assert (b"s", "other") in told
    assert not any(path.startswith(b"moved/") for path, _ in told), "what a moved directory holds did not change"
    # had they been there when the snapshot was taken, they would have been real
    late = verifier.found(taken=time.time_ns() + 10**9)
    assert {(f.path, f.what) for f in late if not f.meanwhile} == told


def test_a_wrong_table_is_seen(ext4):
    verifier = Verifier(ext4)
    h, f, g, d = (verifier.ino(p) for p in ("h", "d/f", "d/e/g", "d"))
    verifier.change("UPDATE inode SET size = size + 1 WHERE ino = ?", h)
    verifier.change("UPDATE inode SET xattrs = NULL, mode = mode | 64 WHERE ino = ?", f)
    verifier.change("UPDATE inode SET target = ? WHERE ino = ?", HOSTILE, verifier.ino("s"))
    verifier.change("DELETE FROM entry WHERE ino = ?", g)
    verifier.change("INSERT INTO entry VALUES (?, ?, ?)", d, HOSTILE, h)
    found = verifier.found()
    assert not any(one.meanwhile for one in found)
    told = {(one.path, one.what) for one in found}
    assert told == {
        (b"h", "attributes"), (b"d/f", "attributes"), (b"s", "attributes"), (b"d/e/g", "extra"),
        (b"d/" + HOSTILE, "missing"), (b"", "nameless"),
    }  # fmt: skip
    assert all(one.detail.isprintable() for one in found)


def test_a_name_that_leads_nowhere_is_damage(ext4):
    verifier = Verifier(ext4)
    verifier.change("DELETE FROM inode WHERE ino = ?", verifier.ino("h"))
    with pytest.raises(DamageError, match="no inode"):
        verifier.found()


def test_a_name_of_another_object(ext4):
    verifier = Verifier(ext4)
    verifier.change("UPDATE entry SET ino = ? WHERE ino = ?", verifier.ino("h"), verifier.ino("d/f"))
    told = {(one.path, one.what, one.meanwhile) for one in verifier.found()}
    assert told == {(b"d/f", "other", False), (b"", "nameless", False)}


def test_an_unreadable_directory_is_an_error_not_a_disagreement(verifier, monkeypatch):
    from snapshotter.live import LiveTree

    real = LiveTree.list

    def fails(self, dirfd):
        if os.fstat(dirfd).st_ino == verifier.ino("d"):
            raise OSError(5, "Input/output error")
        return real(self, dirfd)

    monkeypatch.setattr(LiveTree, "list", fails)
    with pytest.raises(OSError, match="Input/output"):
        verifier.found()


# ---- the command


def test_the_command_without_a_daemon(part):
    adopt(part.path)
    populate(part.path)
    done = snapfeed("verify", part.path, "--socket", "/nonexistent/socket")
    assert "no disagreement" in done.stdout
    assert done.stderr == ""


def test_the_command_finds_what_a_reconcile_cannot(tmp_path):
    """Extended attributes that the table has wrong: no change time tells, so only a full look does."""
    with tmpfs(tmp_path) as top:
        adopt(top)
        os.mkdir(top / "d")
        name = os.fsencode(top) + b"/d/" + HOSTILE
        with open(name, "w") as file:
            file.write("x")
        none = ("--socket", "/nonexistent/socket")
        time.sleep(2 * GUARD_NS / 1e9)
        snapfeed("verify", top, *none)
        snapfeed("verify", top, *none)  # nothing is to be looked at again any more
        with Visit(partition_at(os.fsencode(top))) as visit, visit.file.transaction():
            visit.file.db.execute("UPDATE inode SET xattrs = ? WHERE ino = ?", (b"\0" * 8, os.lstat(name).st_ino))
        done = snapfeed("verify", top, *none, check=False)
        assert done.returncode == 1
        assert "1 disagreement" in done.stdout
        assert all(line.isprintable() for line in done.stdout.splitlines())
        assert r"$'d/new\nline\e[31m'" in done.stdout
        lines = [json.loads(line) for line in snapfeed("verify", top, *none, "--json", check=False).stdout.splitlines()]
        assert [line.get("what") for line in lines] == ["attributes", None]
        assert lines[-1]["disagreements"] == 1


def test_the_command_with_a_daemon_and_writers(part, tmp_path):
    populate(part.path)
    with daemon(tmp_path, part.path) as running:
        stop = threading.Event()

        def write(seed):
            work = Worker(os.fsencode(part.path), seed)
            while not stop.is_set():
                with_luck(work)

        def with_luck(work):
            with contextlib.suppress(OSError):  # another writer was quicker
                work.step()

        writers = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
        for writer in writers:
            writer.start()
        try:
            results = [running.command("verify", part.path, check=False) for _ in range(3)]
        finally:
            stop.set()
            for writer in writers:
                writer.join()
        for done in results:
            assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert "no disagreement" in running.command("verify", part.path).stdout
        facts = running.facts("verify", part.path)
        assert facts[-1]["disagreements"] == facts[-1]["meanwhile"] == 0


def test_the_command_names_what_it_does_not_know(tmp_path):
    done = snapfeed("verify", tmp_path, "--socket", "/nonexistent/socket", check=False)
    assert done.returncode == 1
    assert "not adopted" in done.stderr
