"""The table engine on real partitions: what it captures, replayed by a consumer that knows nothing else, is what a walk finds."""

import os
from dataclasses import replace

import pytest
from oracle import walk
from partitions import partition, tmpfs
from trees import Replica
from workload import Worker

from comparer.compare import baseline, compare
from comparer.dirty import Dirty
from comparer.model import Name
from snapshotter.backends.ficlone import FicloneBackend
from snapshotter.backends.metadata import MetadataBackend
from snapshotter.linux.handles import Codec, name_to_handle_at
from snapshotter.linux.identity import Identifier
from snapshotter.live import LiveTree
from snapshotter.scan import WALK
from snapshotter.systemfile import DiffRow, Settings, SnapshotRow, SystemFile
from snapshotter.table import Table

pytestmark = pytest.mark.usefixtures("both_ways")
SETTINGS = Settings("epoch", "uuid", "partition", 1 << 20, 60.0, 0)


class Engine:
    """The table engine by hand, without the daemon: one snapshot at a time."""

    def __init__(self, top, kind, by_handle=True, scan=WALK):
        self.top, self.kind, self.by_handle = os.fsencode(top), kind, by_handle
        self.scan = scan
        os.mkdir(self.top + b"/.snapfeed", 0o700)
        SystemFile.create(self.top + b"/.snapfeed/system.db", SETTINGS).close()
        self.replica = Replica()
        self.strict = kind == "ficlone"
        self.bytes = {}  # ident -> content as of the last snapshot

    def snapshot(self, dirty, more=Dirty):
        fd = os.open(self.top, os.O_RDONLY | os.O_DIRECTORY)
        tree = None
        try:
            identifier = Identifier(fd)
            codec = Codec(name_to_handle_at(fd)) if self.by_handle else None
            tree = LiveTree(fd, identifier.identify, codec)
            with SystemFile.open(self.top + b"/.snapfeed/system.db") as file, file.transaction():
                table = Table(file.db, tree.root)
                backend = (FicloneBackend if self.kind == "ficlone" else MetadataBackend)(tree, table, scan=self.scan)
                seq, head = file.next_seq(), file.head()
                capture = backend.capture(fd, seq, head, dirty, more)
                if capture.old is None:
                    changes = list(baseline(capture.new))
                    self.replica.idents[b""] = tree.root
                else:
                    changes = list(compare(capture.old, capture.new, capture.touched, capture.ranges))
                contents = {
                    c.path: (c.ident, capture.content(c.ident, c.path)) for c in changes if c.after and c.type == "file"
                }
                backend.commit(capture)
                row = SnapshotRow(seq, 0, "command", 0, len(changes), "metadata", None)
                file.add(row, DiffRow(seq, head, 0, "command", 0, "metadata", None, len(changes), 0, 1 << 17))
                if forgotten := file.forget(4):
                    backend.expire(fd, forgotten)
        finally:
            if tree is not None:
                tree.close()
            os.close(fd)
        for change in changes:
            self.replica.apply(change)
            if change.path == b"" or change.op == "create":
                self.replica.attrs[change.ident] = change.after
        now = self.replica.state()
        fresh = {}
        for path, (ident, content) in contents.items():
            if content is not None and path in now and now[path][0] == ident:
                with open(self.top + b"/" + path, "rb") as live, open(self.top + b"/" + content, "rb") as kept:
                    fresh[ident] = kept.read()
                    assert live.read() == fresh[ident], path
        # an object renamed by two names, or through a detour, says what changed with one of its changes
        told = {}
        for change in changes:
            if change.op in ("modify", "rename") and (change.ident not in told or change.ranges is not None):
                told[change.ident] = change
        for ident in told.keys() & fresh.keys() & self.bytes.keys():
            self.check_ranges(told[ident], fresh[ident])
        self.bytes.update(fresh)
        return changes

    def check_ranges(self, change, content):
        """Whoever copies only the changed ranges has the file."""
        if change.ranges is not None and change.ranges.quality == "unknown":
            assert not self.strict, change
            return
        copy = bytearray(self.bytes[change.ident][: len(content)].ljust(len(content), b"\xee"))
        for offset, length in change.ranges.cleared if change.ranges else ():
            copy[offset : offset + length] = bytes(max(0, min(length, len(copy) - offset)))
        for offset, length in change.ranges.written if change.ranges else ():
            copy[offset : offset + length] = content[offset : offset + length]
        assert bytes(copy) == content, change

    def check(self):
        expected = walk(self.top)
        got = self.replica.state()
        assert sorted(got) == sorted(expected)
        for path, found in expected.items():
            ident, attr = got[path]
            assert ident.ino == found["ino"], path
            for key in ("size", "mode", "uid", "gid", "nlink", "mtime_ns", "ctime_ns", "rdev", "target"):
                assert getattr(attr, key) == found[key], (path, key)
            assert attr.type == found["type"]
            assert dict(attr.xattrs) == {os.fsencode(n): v for n, v in found["xattrs"].items()}, path


def engines():
    return [
        ("xfs", "ficlone", True),
        ("ext4", "metadata", True),
        ("ext4", "metadata", False),
        ("tmpfs", "metadata", True),
    ]


@pytest.mark.kernel
@pytest.mark.parametrize(("fs", "kind", "by_handle"), engines())
def test_a_reconcile_finds_everything(fs, kind, by_handle, tmp_path):
    with tmpfs(tmp_path) if fs == "tmpfs" else partition(fs, tmp_path) as part:
        top = os.fsencode(part if fs == "tmpfs" else part.path)
        work = Worker(top, 1, reflink=fs == "xfs")
        for _ in range(60):
            work.step()
        engine = Engine(top, kind, by_handle)
        engine.snapshot(Dirty())
        engine.check()
        for _ in range(int(os.environ.get("ROUNDS", "25"))):
            for _ in range(work.random.randrange(1, 30)):
                work.step()
            engine.snapshot(Dirty(lost="test"))
            engine.check()


@pytest.mark.kernel
def test_a_look_at_every_object_and_name_is_enough_without_a_walk(xfs):
    """The dirty set as events would give it: everything that was touched, nothing more."""
    top = os.fsencode(xfs.path)
    work = Worker(top, 2, reflink=True)
    engine = Engine(top, "ficlone")
    engine.snapshot(Dirty())
    for _ in range(25):
        known = engine.replica.state()
        for _ in range(work.random.randrange(1, 30)):
            work.step()
        dirty = Dirty(objects={ident for ident, _ in known.values()})
        for path in filter(None, known):
            dirty.names.add(Name(known[os.path.dirname(path)][0], os.path.basename(path)))
        fd = os.open(top, os.O_RDONLY)
        identifier = Identifier(fd)
        for path in filter(None, walk(top)):
            dirty.names.add(Name(identifier.ident(fd, os.path.dirname(path)), os.path.basename(path)))
        os.close(fd)
        dirty.written = set(dirty.objects)
        engine.snapshot(dirty)
        engine.check()


@pytest.mark.kernel
def test_what_mkfs_made_is_not_taken_for_who_has_its_inode_number_now(ext4):
    """ext4 opens a handle of generation 0 as whatever has the inode number: lost+found, removed and its number reused."""
    top = os.fsencode(ext4.path)
    engine = Engine(top, "metadata")
    engine.snapshot(Dirty())
    old, _ = engine.replica.state()[b"lost+found"]
    assert old.gen == 0
    os.rmdir(top + b"/lost+found")
    for number in range(20):
        with open(top + b"/new%d" % number, "wb"):
            pass
    assert old.ino in {e["ino"] for e in walk(top).values()}
    root = next(ident for path, (ident, _) in engine.replica.state().items() if path == b"")
    names = {Name(root, b"lost+found"), *(Name(root, b"new%d" % n) for n in range(20))}
    changes = engine.snapshot(Dirty(objects={old, root}, names=names))
    engine.check()
    assert [c.ident for c in changes if c.op == "delete"] == [old]


@pytest.mark.kernel
def test_without_handles_a_swap_comes_to_an_end(tmp_path):
    """Two objects that changed places, asked for by name only, must not ask for each other for ever; each has a second name."""
    with tmpfs(tmp_path) as made:
        top = os.fsencode(made)
        for name in (b"a", b"b"):
            with open(os.path.join(top, name), "wb") as file:
                file.write(name)
            os.link(os.path.join(top, name), os.path.join(top, name * 2))
        engine = Engine(top, "metadata", by_handle=False)
        engine.snapshot(Dirty())
        before = {path: ident for path, (ident, _) in engine.replica.state().items()}
        os.rename(top + b"/a", top + b"/t")
        os.rename(top + b"/b", top + b"/a")
        os.rename(top + b"/t", top + b"/b")
        names = {Name(before[b""], name) for name in (b"a", b"b", b"t")}
        engine.snapshot(Dirty(objects={before[b"a"], before[b"b"], before[b""]}, names=names))
        engine.check()


@pytest.mark.kernel
def test_a_file_that_goes_while_it_is_cloned_leaves_no_clone(xfs, one_by_one, monkeypatch):
    """Cloned, changed meanwhile, so cloned again: but it has no name any more, and nothing is recorded of its clone."""
    engine = Engine(xfs.path, "ficlone")
    engine.snapshot(Dirty())
    file, cloned, look_at = xfs.path / "file", [], LiveTree.look_at

    def changes(fd, *, on):
        cloned.append(on)
        if file.exists():
            file.chmod(0o600)

    def goes(tree, ident):
        """Opened while it had a name, looked at when it had none."""
        found = look_at(tree, ident)
        if cloned == [True] and file.exists() and found is not None and found.type == "file":
            file.unlink()
            return replace(found, nlink=0, ctime_ns=found.ctime_ns + 1)
        return found

    file.write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr("snapshotter.backends.clones.set_immutable", changes)
        patch.setattr(LiveTree, "look_at", goes)
        engine.snapshot(Dirty(lost="test"))
    assert (cloned, file.exists()) == ([True], False)
    assert list((xfs.path / ".snapfeed/clones").rglob("*")) == []
    engine.snapshot(Dirty(lost="test"))
    engine.check()


@pytest.mark.kernel
@pytest.mark.parametrize("failures", [1, 2, 5, 1000])
def test_a_handle_that_fails_while_the_name_leads_there(failures, xfs, one_by_one, monkeypatch):
    """As where what is above a directory is renamed all the time: tried again; what it holds is never taken for gone."""
    engine = Engine(xfs.path, "ficlone")
    (xfs.path / "d").mkdir()
    (xfs.path / "d/file").write_text("x")
    engine.snapshot(Dirty())
    known = engine.replica.state()
    ident, root, left, look_at = known[b"d"][0], known[b""][0], [failures], LiveTree.look_at

    def fails(tree, asked):
        if asked == ident and left[0]:
            left[0] -= 1
            return None
        return look_at(tree, asked)

    monkeypatch.setattr(LiveTree, "look_at", fails)
    (xfs.path / "d/file").write_text("changed")
    dirty = Dirty(objects={ident, known[b"d/file"][0]}, names={Name(root, b"d")})
    if failures < 1000:
        engine.snapshot(dirty)
    else:
        with pytest.raises(OSError, match="Stale file handle"):
            engine.snapshot(dirty)
        monkeypatch.undo()
        engine.snapshot(dirty)
    engine.check()
