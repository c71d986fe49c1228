"""XFS by bulkstat: numbers against the header, records against lstat, the same tables and differences as a walk gives."""

import os
import random
import shutil
import stat
import time

import pytest
from partitions import require, wait_until
from test_kernel_numbers import compiled
from test_table_backends import SETTINGS, Engine
from workload import Worker

from comparer.dirty import Dirty
from comparer.model import Ident, Name
from snapshotter import fill_xfs, scan, scan_xfs
from snapshotter.fingerprints import RUN_BITS, Fingerprints
from snapshotter.inode_set import InodeSet
from snapshotter.linux import xfs
from snapshotter.linux.handles import Codec, name_to_handle_at
from snapshotter.linux.identity import Identifier
from snapshotter.live import LiveTree
from snapshotter.mend import mend
from snapshotter.systemfile import SystemFile
from snapshotter.table import Table

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("both_ways")]
HEADERS = ("xfs/xfs.h", "xfs/xfs_fs.h")


class Looker:
    """An adopted XFS with its table, looked at without an engine."""

    def __init__(self, top):
        self.top = os.fsencode(top)
        os.mkdir(self.top + b"/.snapfeed", 0o700)
        self.file = SystemFile.create(self.top + b"/.snapfeed/system.db", SETTINGS)
        self.fd = os.open(self.top, os.O_RDONLY | os.O_DIRECTORY)
        self.tree = LiveTree(self.fd, Identifier(self.fd).identify, Codec(name_to_handle_at(self.fd)))
        self.table = Table(self.file.db, self.tree.root)

    def close(self):
        self.tree.close()
        os.close(self.fd)
        self.file.close()

    def fill(self, how):
        with self.file.transaction():
            return how(self.tree, self.table, lambda _: None)

    def differences(self, how=scan_xfs.differences):
        with self.file.transaction():
            return how(self.tree, self.table, lambda _: None)

    def rows(self):
        inodes = {row[0]: row[1:] for row in self.file.db.execute("SELECT * FROM inode")}
        entries = set(self.file.db.execute("SELECT parent, name, ino FROM entry"))
        return inodes, entries

    def ident(self, path):
        return Identifier(self.fd).ident(self.fd, path)

    def fingerprints(self):
        return Fingerprints(self.file.db).all()


@pytest.fixture
def looker(xfs):
    made = Looker(xfs.path)
    yield made
    made.close()


def settle():
    """Past the guard for coarse time stamps."""
    time.sleep(2 * scan.GUARD_NS / 1e9)


# ---- the kernel's interface


def test_numbers_and_layout_are_those_of_the_header(tmp_path):
    require(shutil.which("gcc") is not None, "gcc")
    members = {
        "ino": "bs_ino", "size": "bs_size", "blocks": "bs_blocks", "mtime": "bs_mtime", "ctime": "bs_ctime",
        "btime": "bs_btime", "gen": "bs_gen", "uid": "bs_uid", "gid": "bs_gid", "mtime_nsec": "bs_mtime_nsec",
        "ctime_nsec": "bs_ctime_nsec", "btime_nsec": "bs_btime_nsec", "blksize": "bs_blksize", "rdev": "bs_rdev",
        "nlink": "bs_nlink", "forkoff": "bs_forkoff", "mode": "bs_mode",
    }  # fmt: skip
    assert tuple(members) == xfs.Bulkstat._fields
    record = {name: f"offsetof(struct xfs_bulkstat, {member})" for name, member in members.items()}
    sizes = ["sizeof(struct xfs_bulkstat)", "sizeof(struct xfs_bulk_ireq)"]
    try:
        theirs = compiled(tmp_path, HEADERS, ["XFS_IOC_BULKSTAT", *sizes, *record.values()])
    except AssertionError:
        require(condition=False, lacking="xfs/xfs_fs.h (xfslibs-dev)")
    assert theirs["XFS_IOC_BULKSTAT"] == xfs.XFS_IOC_BULKSTAT
    assert [theirs[s] for s in sizes] == [xfs._BULKSTAT.size, xfs._IREQ.size]
    for number, name in enumerate(xfs.Bulkstat._fields):
        value = 0x1234 + number
        packed = xfs._BULKSTAT.pack(*(value if n == name else 0 for n in xfs.Bulkstat._fields))
        width = (
            8
            if name in ("ino", "size", "blocks", "mtime", "ctime", "btime")
            else 2
            if name in ("forkoff", "mode")
            else 4
        )
        assert packed.index(value.to_bytes(width, "little")) == theirs[record[name]], name
    at = {name: theirs[text] for name, text in record.items()}
    words = [at[n] // 8 for n in ("ino", "size", "ctime", "gen", "ctime_nsec")]
    assert words == list(xfs._FINGER_WORDS)
    assert [at[n] // 4 for n in ("nlink",)] == list(xfs._FINGER_HALVES)
    assert (at["ctime"] // 8, at["forkoff"] // 2) == (xfs._CTIME, xfs._FORKOFF)


def test_records_say_what_lstat_says(xfs):
    from snapshotter.linux import xfs as ioctls

    top = os.fsencode(xfs.path)
    work = Worker(top, 3, reflink=True)
    for _ in range(200):
        work.step()
    os.sync()
    seen = {}
    paths = [top]
    for directory, names, files in os.walk(top):
        paths += [os.path.join(directory, name) for name in names + files]
    fd = os.open(top, os.O_RDONLY)
    for record in ioctls.bulkstat(fd, count=7):
        assert record[0] not in seen
        seen[record[0]] = ioctls.Bulkstat(*record)
    assert list(seen) == sorted(seen)
    found = {}
    for path in paths:
        st = os.lstat(path)
        found[st.st_ino] = path
        one = seen[st.st_ino]
        assert one == ioctls.bulkstat_single(fd, st.st_ino)
        assert (one.size, one.blocks * one.blksize, one.mode) == (st.st_size, st.st_blocks * 512, st.st_mode), path
        assert (one.nlink, one.uid, one.gid) == (st.st_nlink, st.st_uid, st.st_gid)
        assert one.mtime * 10**9 + one.mtime_nsec == st.st_mtime_ns
        assert one.ctime * 10**9 + one.ctime_nsec == st.st_ctime_ns
        if os.listxattr(path, follow_symlinks=False):
            assert one.forkoff
        if stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode):
            assert (one.rdev >> ioctls.MINOR_BITS, one.rdev % (1 << ioctls.MINOR_BITS)) == (
                os.major(st.st_rdev),
                os.minor(st.st_rdev),
            )
    assert set(found) == set(seen), "no inode but those with names: neither quota nor real-time files"
    assert ioctls.bulkstat_single(fd, 1 << 50) is None
    os.close(fd)


def test_runs_hold_every_record_once_whatever_the_batches(xfs):
    top = os.fsencode(xfs.path)
    for number in range(3000):
        os.close(os.open(b"%b/%d" % (top, number), os.O_CREAT | os.O_WRONLY))
    fd = os.open(top, os.O_RDONLY)
    from snapshotter.linux import xfs as ioctls

    expected = list(ioctls.bulkstat(fd))
    digests = None
    for count in (1, 63, 1000, 1024, 4096):
        got, found = [], {}
        for run_number, records in ioctls.bulkstat_runs(fd, RUN_BITS, count):
            part = list(records)
            assert {r[0] >> RUN_BITS for r in part} == {run_number}
            got += part
            assert run_number not in found
            found[run_number] = records.fingerprint()
        assert got == expected
        assert digests in (None, found)
        digests = found
    os.close(fd)


def test_the_system_file_s_own_writes_do_not_make_a_reconcile_list_the_clones(looker, monkeypatch):
    top = looker.top
    clones = top + b"/.snapfeed/clones"
    for directory in (clones, clones + b"/1", top + b"/d"):
        os.mkdir(directory)
    for number in range(100):
        for place in (b"d", b".snapfeed/clones/1"):
            os.close(os.open(b"%b/%b/%d" % (top, place, number), os.O_CREAT | os.O_WRONLY))
    os.sync()
    settle()
    looker.fill(fill_xfs.fill)
    settle()
    assert looker.differences() == Dirty()
    known = looker.fingerprints()
    for path in (looker.file.path, clones):
        os.utime(path)  # as each visit does
    settle()
    listed = []
    real = scan_xfs.listing

    def listing(fd, **more):
        listed.append(os.readlink(b"/proc/self/fd/%d" % fd))
        return real(fd, **more)

    monkeypatch.setattr(scan_xfs, "listing", listing)
    assert looker.differences() == Dirty()
    assert clones + b"/1" not in listed
    assert looker.fingerprints() == known
    # what was a clone's, and is the user's now
    os.rename(clones + b"/1/7", top + b"/new")
    assert looker.ident(b"new") in looker.differences().objects


# ---- the first baseline


def test_filling_by_bulkstat_and_by_a_walk_make_the_same_table(looker):
    work = Worker(looker.top, 5, reflink=True)
    for number in range(500):
        work.step()
        if number % 5 == 0:
            with open(b"%b/extra-%d" % (looker.top, number), "wb") as file:
                file.write(work.data())
    os.setxattr(looker.top, b"trusted.root", b"\0x")
    settle()
    looker.fill(fill_xfs.fill)
    fast = looker.rows()
    assert looker.fingerprints()
    looker.fill(scan.fill)
    slow = looker.rows()
    assert len(slow[0]) > 30
    assert any(row[-3] for row in slow[0].values()), "some have extended attributes"
    assert any(row[-2] for row in slow[0].values()), "some are symbolic links"
    assert fast == slow


def test_a_recent_change_is_looked_at_again(looker):
    os.mkdir(looker.top + b"/d")
    settle()
    with open(looker.top + b"/d/f", "wb") as file:
        file.write(b"x")
        dirty = looker.fill(fill_xfs.fill)
    assert {looker.ident(b"d"), looker.ident(b"d/f")} <= dirty.objects


def test_a_time_after_2262_is_kept(looker):
    path = looker.top + b"/far"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.utime(path, ns=(0, 13_000_000_000_000_000_001))
    settle()
    for how in (scan.fill, fill_xfs.fill):
        dirty = looker.fill(how)
        ident = looker.ident(b"far")
        if how is scan.fill:
            assert looker.table.attr(ident).mtime_ns == 13_000_000_000_000_000_001
            settle()
            assert ident not in looker.differences().objects
        else:
            assert ident in dirty.objects


# ---- the reconcile


def test_nothing_differs_on_a_quiet_tree_and_then_nothing_is_compared(looker, monkeypatch):
    work = Worker(looker.top, 6, reflink=True)
    for _ in range(100):
        work.step()
    os.sync()
    settle()
    looker.fill(scan.fill)
    looker.file.db.execute("DELETE FROM again")
    assert not looker.fingerprints()
    dirty = looker.differences()
    assert not dirty.objects | dirty.names
    compared = []
    real = scan_xfs._Reconcile._compare
    monkeypatch.setattr(
        scan_xfs._Reconcile, "_compare", lambda self, run, *rest: (compared.append(run), real(self, run, *rest))
    )
    dirty = looker.differences()
    assert not dirty.objects | dirty.names
    system = {
        os.lstat(os.path.join(directory, name)).st_ino >> RUN_BITS
        for directory, names, files in os.walk(looker.top + b"/.snapfeed")
        for name in [b".", *names, *files]
    }
    assert set(compared) <= system, "only the run that holds the system file"


def test_clones_cost_a_listing_and_strangers_are_new(looker):
    os.makedirs(looker.top + b"/.snapfeed/clones/1")
    for number in range(50):
        os.close(os.open(b"%b/.snapfeed/clones/1/%d.0" % (looker.top, number), os.O_CREAT | os.O_WRONLY, 0o400))
    settle()
    looker.fill(scan.fill)
    dirty = looker.differences()
    assert not dirty.objects | dirty.names
    os.close(os.open(looker.top + b"/new", os.O_CREAT | os.O_WRONLY))
    dirty = looker.differences()
    assert dirty.objects == {looker.ident(b"new"), looker.tree.root}
    assert dirty.names == {Name(looker.tree.root, b"new")}


def test_an_inode_without_a_name_is_no_difference(looker):
    path = looker.top + b"/open"
    settle()
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    os.unlink(path)
    settle()
    looker.fill(fill_xfs.fill)
    assert os.fstat(fd).st_ino not in looker.rows()[0]
    dirty = looker.differences()
    assert not dirty.objects | dirty.names
    os.close(fd)


def test_what_the_last_snapshot_wants_looked_at_again_is_listed(looker):
    os.mkdir(looker.top + b"/d")
    settle()
    looker.fill(scan.fill)
    directory = looker.ident(b"d")
    looker.file.db.execute("INSERT INTO again VALUES (?, ?, NULL)", directory)
    # a name that came in the same tick as the last look: the change time does not tell
    looker.file.db.execute("INSERT INTO entry VALUES (?, ?, ?)", (directory.ino, b"ghost", looker.tree.root.ino))
    dirty = looker.differences()
    assert dirty.names == {Name(directory, b"ghost")}


def test_every_kind_of_change_is_found(looker):
    for name in (b"content", b"mode", b"owner", b"gone", b"linked", b"moved", b"xattr"):
        with open(looker.top + b"/" + name, "wb") as file:
            file.write(b"x")
    os.mkdir(looker.top + b"/d")
    os.sync()
    settle()
    looker.fill(fill_xfs.fill)
    looker.differences()
    before = {name: looker.ident(name) for name in os.listdir(looker.top) if name != b".snapfeed"}
    with open(looker.top + b"/content", "r+b") as file:
        file.write(b"y")
    os.chmod(looker.top + b"/mode", 0o600)
    os.chown(looker.top + b"/owner", 7, 7)
    os.unlink(looker.top + b"/gone")
    os.link(looker.top + b"/linked", looker.top + b"/d/other")
    os.rename(looker.top + b"/moved", looker.top + b"/d/moved")
    os.setxattr(looker.top + b"/xattr", b"user.a", b"1")
    dirty = looker.differences()
    assert set(before.values()) <= dirty.objects
    root, d = looker.tree.root, before[b"d"]
    assert dirty.names == {Name(root, b"gone"), Name(root, b"moved"), Name(d, b"other"), Name(d, b"moved")}


def test_a_reused_inode_number_is_two_objects(looker):
    paths = [b"%b/f%d" % (looker.top, number) for number in range(64)]
    for path in paths:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    settle()
    looker.fill(scan.fill)
    old = {ident.ino: ident for ident in (looker.ident(os.path.basename(path)) for path in paths)}
    for path in paths:
        os.unlink(path)

    def reused():  # the numbers are free again when the kernel gets round to it
        os.close(os.open(looker.top + b"/again", os.O_CREAT | os.O_WRONLY))
        new = looker.ident(b"again")
        if new.ino in old:
            return new
        os.rename(looker.top + b"/again", b"%b/other-%d" % (looker.top, new.ino))
        return None

    new = wait_until(reused, "an inode number is used again")
    assert old[new.ino].gen != new.gen
    assert {old[new.ino], new} <= looker.differences().objects


def test_without_bulkstat_it_walks(looker, monkeypatch):
    os.close(os.open(looker.top + b"/f", os.O_CREAT | os.O_WRONLY))

    def refused(*_):
        raise OSError(25, "Inappropriate ioctl for device")

    monkeypatch.setattr(scan_xfs, "bulkstat_single", refused)
    looker.fill(fill_xfs.fill)
    os.close(os.open(looker.top + b"/g", os.O_CREAT | os.O_WRONLY))
    dirty = looker.differences()
    assert dirty.names == {Name(looker.tree.root, b"g")}


def test_a_change_to_the_table_drops_the_fingerprint(looker):
    os.close(os.open(looker.top + b"/f", os.O_CREAT | os.O_WRONLY))
    settle()
    looker.fill(fill_xfs.fill)
    ident = looker.ident(b"f")
    db = looker.file.db
    attr = looker.table.attr(ident)
    for change in (
        lambda: db.execute("UPDATE inode SET uid = 5 WHERE ino = ?", (ident.ino,)),
        lambda: looker.table.put(ident, attr, None),
        lambda: looker.table.drop(ident),
    ):
        Fingerprints(db).put(ident.ino >> RUN_BITS, b"x")
        change()
        assert ident.ino >> RUN_BITS not in looker.fingerprints()
    Fingerprints(db).put(ident.ino >> RUN_BITS, b"x")
    looker.table.put(ident, attr, None)
    Fingerprints(db).put(ident.ino >> RUN_BITS, b"x")
    looker.table.set_clone(ident, 4)
    assert ident.ino >> RUN_BITS in looker.fingerprints()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_reconcile_by_bulkstat_finds_everything(xfs, seed):
    """The engine of test_table_backends, with bulkstat for its baseline and its reconciles."""
    top = os.fsencode(xfs.path)
    work = Worker(top, seed, reflink=True)
    for _ in range(60):
        work.step()
    engine = Engine(top, "ficlone", scan=fill_xfs.BULKSTAT)
    engine.check_ranges = lambda *_: None  # has its own tests
    engine.snapshot(Dirty())
    engine.check()
    for _ in range(int(os.environ.get("ROUNDS", "25"))):
        for _ in range(work.random.randrange(1, 30)):
            work.step()
        engine.snapshot(Dirty(lost="test"))
        engine.check()


# ---- parts


def test_inode_set():
    chance = random.Random(1)
    numbers, ours = set(), InodeSet()
    for _ in range(3000):
        ino = chance.randrange(5000) + chance.choice([0, 1 << 40])
        if chance.random() < 0.6:
            numbers.add(ino)
            ours.add(ino)
        else:
            numbers.discard(ino)
            ours.discard(ino)
    assert set(ours) == numbers
    assert all((ino in ours) == (ino in numbers) for ino in range(5000))
    for ino in numbers:
        ours.discard(ino)
    assert not ours


def test_mending_makes_a_tree(looker):
    for path in (b"a", b"a/b", b"c", b"c/d", b"e"):
        os.mkdir(looker.top + b"/" + path)
    for path in (b"f", b"a/g", b"c/d/h"):
        os.close(os.open(looker.top + b"/" + path, os.O_CREAT | os.O_WRONLY))
    settle()
    looker.fill(scan.fill)
    db, root = looker.file.db, looker.tree.root
    before = looker.rows()
    assert not mend(db, root).names
    assert looker.rows() == before
    ident = {path: looker.ident(path) for path in (b"a", b"a/b", b"c", b"c/d", b"e", b"f", b"a/g", b"c/d/h")}
    # a seen inside its own child; e seen twice; f gone; a stranger without a name
    db.execute("DELETE FROM entry WHERE name = ?", (b"a",))
    db.execute("INSERT INTO entry VALUES (?, ?, ?)", (ident[b"a/b"].ino, b"loop", ident[b"a"].ino))
    db.execute("INSERT INTO entry VALUES (?, ?, ?)", (ident[b"c"].ino, b"e2", ident[b"e"].ino))
    db.execute("DELETE FROM inode WHERE ino = ?", (ident[b"f"].ino,))
    columns = "gen, mode, size, blocks, uid, gid, 1, 0, 0, 0, NULL, NULL, NULL, NULL"
    db.execute(f"INSERT INTO inode SELECT 1 << 40, {columns} FROM inode WHERE ino = ?", (ident[b"a/g"].ino,))
    dirty = mend(db, root)
    inodes, entries = looker.rows()
    kept = {root.ino, *(ident[p].ino for p in (b"c", b"c/d", b"c/d/h", b"e"))}
    assert set(inodes) == kept
    assert {child for _, _, child in entries} == kept - {root.ino}
    assert all(parent in kept for parent, _, _ in entries)
    assert Name(root, b"f") in dirty.names
    assert (Name(root, b"e") in dirty.names) != (Name(ident[b"c"], b"e2") in dirty.names)
    assert not mend(db, root).names
    assert isinstance(dirty.names.pop().parent, Ident)
