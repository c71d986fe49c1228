"""Replicas that are refused something: by the source what is not the state's content, by the destination what it cannot hold."""

import contextlib
import errno
import os
import random
import subprocess
from dataclasses import replace

import pytest
from partitions import partition
from test_replica import Made, change, entries, following, open_replica
from trees import Tree, attr

from comparer.compare import baseline, compare
from comparer.errors import DamageError, OperatorError
from comparer.model import FileType, Ident, Name
from feed.encode import encode_change
from feed.replica_content import Source, closing
from feed.replica_verify import ContentCheck
from feed.subscriber import Diff
from watcher import command_replicate

LONG = b"x" * 200  # longer than names can be where `small` is asked for
LARGE = 1 << 20
DIR, FILE = FileType.DIR, FileType.FILE


def made_directory(path):
    path.mkdir(parents=True)
    return path


@pytest.fixture
def copy(tmp_path):
    return made_directory(tmp_path / "copy")


@pytest.fixture
def source(tmp_path):
    made_directory(tmp_path / "source" / ".snapfeed" / "head")
    return tmp_path / "source"


def facts(path) -> dict:
    found = path.stat()
    return {"size": str(found.st_size), "mtime_ns": str(found.st_mtime_ns), "ctime_ns": str(found.st_ctime_ns)}


# ---- content of another state


def test_a_tree_that_moved_on_is_not_this_state(source, copy):
    """`snapshot` names a tree that follows the partition: its file is of the same size, and of a later state."""
    live, head = source / "f", source / ".snapfeed" / "head" / "f"
    live.write_bytes(b"v1-content")
    told, ino = facts(live), live.stat().st_ino
    live.write_bytes(b"v2-content")
    os.utime(live, ns=(1, 5_000_000_000))
    os.link(live, head)
    diff = Made().baseline(change("create", "file", ino, b"f", content=b".snapfeed/clones/1/gone", **told))
    with open_replica(copy, source) as replica:
        done = replica.apply(Diff(replace(diff.envelope, snapshot=".snapfeed/head"), diff.documents))
        assert (done.stale, done.copied) == (1, 0)
        assert (copy / "f").read_bytes() == bytes(10)


def test_a_snapshots_tree_with_the_very_file_is_good(source, copy):
    live, head = source / "f", source / ".snapfeed" / "head" / "f"
    live.write_bytes(b"v1-content")
    os.link(live, head)
    told, ino = facts(live), live.stat().st_ino
    os.rename(live, source / "elsewhere")
    told = facts(head)
    diff = Made().baseline(change("create", "file", ino, b"f", content=b".snapfeed/clones/1/gone", **told))
    with open_replica(copy, source) as replica:
        done = replica.apply(Diff(replace(diff.envelope, snapshot=".snapfeed/head"), diff.documents))
        assert (done.stale, done.copied) == (0, 10)


# ---- content that is not the partition's


@pytest.mark.parametrize("snapshot", ["other", "../x", ".snapfeed", "", "/", ".snapfeed/../other", ".snapfeed-x/y"])
def test_a_snapshot_elsewhere_is_refused(snapshot, source, copy):
    made = Made()
    with open_replica(copy, source) as replica:
        replica.apply(made.baseline())
        diff = made.diff(change("create", "file", 3, b"f"))
        with pytest.raises(DamageError, match="snapshot"):
            replica.apply(Diff(replace(diff.envelope, snapshot=snapshot), diff.documents))
        assert replica.position == ("e1", 1)
        assert replica.resume() is None
        assert sorted(entries(copy)) == [b""]


@pytest.mark.kernel
@pytest.mark.parametrize("fs", ["btrfs", "ext4"])
def test_nothing_that_is_mounted_below_the_source_is_read(fs, tmp_path, copy):
    """Another file system, or this one a second time; a snapshot of btrfs is none of both. Nor a nested subvolume."""

    def here(*command):
        subprocess.run(command, check=True, capture_output=True)

    with partition(fs, tmp_path) as part, contextlib.ExitStack() as stack:
        top = part.path
        for name in (".snapfeed/clones/1", ".snapfeed/bound", "other", "bound", "secret"):
            made_directory(top / name)
        (top / "secret" / "f").write_bytes(b"secret!")
        for name in (".snapfeed/clones/1", "other"):
            here("mount", "-t", "tmpfs", "none", top / name)
            stack.callback(here, "umount", top / name)
            (top / name / "f").write_bytes(b"secret!")
        for name in (".snapfeed/bound", "bound"):
            here("mount", "--bind", top / "secret", top / name)
            stack.callback(here, "umount", top / name)
        good = b".snapfeed/good"
        if fs == "btrfs":
            here("btrfs", "subvolume", "create", top / "nested")
            (top / "nested" / "f").write_bytes(b"secret!")
            made_directory(top / ".snapfeed" / "snapshots")
            here("btrfs", "subvolume", "snapshot", "-r", top / "nested", top / ".snapfeed" / "snapshots" / "7")
            good = b".snapfeed/snapshots/7/f"
        else:
            (top / ".snapfeed" / "good").write_bytes(b"secret!")
        made, files = Made(), []
        for number, place in enumerate([b".snapfeed/clones/1/f", b".snapfeed/bound/f"]):
            files.append(change("create", "file", 100 + number, b"kept%d" % number, size="7", content=place))
        with open_replica(copy, top) as replica:
            done = replica.apply(made.baseline(*files, change("create", "file", 9, b"fine", size="7", content=good)))
            assert (copy / "fine").read_bytes() == b"secret!"
            assert (done.copied, done.stale) == (7, 2)
            for number in range(2):
                assert (copy / f"kept{number}").read_bytes() == bytes(7)
        there = Source(os.fsencode(top))
        stack.callback(there.close)
        for place in (b".snapfeed/clones/1/f", b".snapfeed/bound/f"):
            assert there.kept(place, attr(FILE, size=7)) is None
            assert "another file system" in there.trouble
        for name in ("secret", "other", "bound", *(["nested"] if fs == "btrfs" else [])):
            os.setxattr(top / name / "f", "user.x", b"y") if name != "other" else None
            found = (top / name / "f").stat()
            told = attr(FILE, size=7, mtime_ns=found.st_mtime_ns, ctime_ns=found.st_ctime_ns)
            path, ident = f"{name}/f".encode(), Ident(found.st_ino, 0)
            with closing(there.live(path, ident, told)) as fd:
                assert (fd is not None) == (name == "secret"), name
            assert (there.xattrs(path, ident, told) is not None) == (name == "secret"), name


# ---- what the destination cannot hold


def test_a_file_that_is_too_large_stops_nothing(copy, monkeypatch, capsys):
    made = Made()
    with small(monkeypatch), open_replica(copy) as replica:
        diffs = [
            made.baseline(change("create", "file", 3, b"grows", size="9")),
            made.diff(change("create", "file", 4, b"large", size=str(LARGE + 1)), change("create", "file", 5, b"ok")),
            made.diff(change("modify", "file", 3, b"grows", changed=["size", "data"], size=str(LARGE + 1))),
            made.diff(change("modify", "file", 3, b"grows", changed=["mode"], size=str(LARGE + 1), mode=0o600)),
        ]
        assert following(copy, replica, diffs, once=("e1", 4)) == [1, 2, 3, 4]
        assert sorted(entries(copy)) == [b"", b"grows", b"ok"]
        assert (copy / "grows").stat().st_size == 9, "what there was stays"
        assert replica.flaws == 2
        found = {(d.what, d.path): d.detail for d in replica.verify()}
        assert found["flaw", b"large"] == "this file cannot be made here: File too large"
        assert found["flaw", b"grows"] == "it cannot be here as it is there: File too large"
        capsys.readouterr()
        assert command_replicate._verdict(replica) == 1
        assert "2 objects could not be made as they are" in capsys.readouterr().err
        assert replica.repair() > 0  # says so again, and raises nothing
        replica.apply(made.diff(change("modify", "file", 4, b"large", changed=["size", "data"], size="5")))
        assert (copy / "large").stat().st_size == 5
        replica.apply(made.diff(change("delete", "file", 3, b"grows")))
        assert (replica.flaws, list(replica.verify())[1:]) == (0, [])  # the rest: without a source content is stale


@pytest.mark.kernel
def test_a_real_file_system_that_cannot_hold_a_file(tmp_path, source):
    with partition("ext4", tmp_path) as part:
        copy, made = made_directory(part.path / "copy"), Made()
        with open_replica(copy, source) as replica:
            replica.apply(made.baseline())
            done = replica.apply(made.diff(change("create", "file", 78, b"sparse", size=str(1 << 50))))
            assert (done.flaws, done.stale) == (1, 0)
            assert replica.apply(made.diff(change("create", "file", 79, b"ok"))).flaws == 1
            assert sorted(entries(copy)) == [b"", b"ok"]


@pytest.mark.parametrize("call", ["chown", "chmod", "utime"])
def test_attributes_that_cannot_be_are_flaws(call, copy, monkeypatch):
    made = Made()

    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with open_replica(copy) as replica:
        monkeypatch.setattr(replica.tree, "root", True)
        monkeypatch.setattr(os, call, refuse)
        file = change("create", "file", 3, b"f", uid=12345, mode=0o640)
        done = replica.apply(made.baseline(file, change("create", "dir", 4, b"d", uid=12345)))
        monkeypatch.undo()
        assert done.flaws >= 2
        assert (copy / "f").exists()
        assert {d.path for d in replica.verify() if d.what == "flaw"} >= {b"f", b"d"}


def test_an_adopted_destination_keeps_its_system_directory(tmp_path, copy):
    """Adopted before: refused. Adopted afterwards, as for a feed of the replica: left alone."""
    kept = made_directory(copy / ".snapfeed" / "clones") / "1"
    kept.write_bytes(b"the feed's own")
    with pytest.raises(OperatorError, match="adopted"):
        open_replica(copy)
    os.rename(copy / ".snapfeed", tmp_path / "aside")
    made = Made()
    with open_replica(copy) as replica:
        replica.apply(made.baseline(change("create", "file", 3, b"f")))
        os.rename(tmp_path / "aside", copy / ".snapfeed")
        replica.repair()
        replica.apply(made.baseline(change("create", "file", 3, b"f")))
        assert kept.read_bytes() == b"the feed's own"
        assert {d.what for d in replica.verify()} <= {"stale"}


# ---- any tree, on a file system that cannot hold it


@contextlib.contextmanager
def small(monkeypatch):
    """No names longer than 100 bytes, no more than three names for a file, no file larger than 1 MiB."""
    with monkeypatch.context() as patched:

        def limited(call):
            real = getattr(os, call)

            def limiting(*args, **options):
                if any(isinstance(a, bytes) and len(a.rpartition(b"/")[2]) > 100 for a in args):
                    raise OSError(errno.ENAMETOOLONG, "File name too long")
                if call == "link" and os.stat(args[0], dir_fd=options["src_dir_fd"]).st_nlink >= 3:
                    raise OSError(errno.EMLINK, "Too many links")
                if call == "ftruncate" and args[1] > LARGE:
                    raise OSError(errno.EFBIG, "File too large")
                return real(*args, **options)

            patched.setattr(os, call, limiting)

        for call in "mkdir rename link mknod stat open unlink rmdir chown utime ftruncate".split():
            limited(call)
        yield


def worked(tree, chance):
    """A few random operations; names, sizes and links beyond the limits among them."""
    for _ in range(chance.randrange(1, 12)):
        directory = chance.choice(tree.dirs())
        name = Name(directory, chance.choice([b"a", b"b", b"c", b"d", LONG, LONG + b"2"]))
        others = [i for i, a in tree.objects.items() if a.type is not DIR]
        match chance.randrange(6):
            case 0 | 1 if name not in tree.entries:
                tree.create(directory, name.name, chance.choice([DIR, DIR, FILE]))
            case 2 if name not in tree.entries and others:
                tree.link(chance.choice(others), name)
            case 3 if name in tree.entries:
                tree.remove(name)
            case 4 if tree.entries and name not in tree.entries:
                old = chance.choice(list(tree.entries))
                if tree.objects[tree.entries[old]].type is not DIR or directory not in tree.below(tree.entries[old]):
                    tree.rename(old, name)
            case 5 if others:
                one, size = chance.choice(others), chance.choice([0, 5, LARGE + 1])
                tree.objects[one] = replace(tree.objects[one], size=size, mtime_ns=tree.objects[one].mtime_ns + 1)


def documents(before, after):
    return [encode_change(c) for c in compare(before, after, sorted({*before.objects, *after.objects}))]


def names(directory):
    return {p for p in entries(directory) if p}


@pytest.mark.parametrize("seed", range(60))
def test_what_can_be_held_is_there_and_the_rest_when_it_can_be(seed, copy, monkeypatch):
    chance, made, tree = random.Random(seed), Made(), Tree()
    with open_replica(copy) as replica:
        replica.apply(made._diff([encode_change(one) for one in baseline(tree)], baseline=True))
        with small(monkeypatch):
            for _ in range(12):
                before = tree.copy()
                worked(tree, chance)
                assert replica.apply(made.diff(*documents(before, tree))) is not None
                fits = {}
                for path, (ident, _) in tree.by_path().items():
                    if path and not any(len(part) > 100 for part in path.split(b"/")):
                        fits.setdefault(ident, set()).add(path)
                there = names(copy)
                for ident, paths in fits.items():
                    kind, size = tree.objects[ident].type, tree.objects[ident].size
                    if kind is DIR:
                        assert paths <= there
                    elif size <= LARGE:
                        assert len(paths & there) == min(3, len(paths)), paths
                assert there <= set().union(*fits.values())
                lacking = set(tree.by_path()) - {b""} - there
                assert (replica.flaws > 0) >= bool(lacking)
                if chance.random() < 0.2:
                    replica.repair()
                    assert {d.what for d in replica.verify()} <= {"flaw", "stale", "missing", "attributes"}
        replica.apply(made.diff())  # the limits are gone
        assert replica.flaws == 0
        assert names(copy) == set(tree.by_path()) - {b""}
        replica.repair()
        assert [d for d in replica.verify(ContentCheck()) if d.what != "stale"] == []
