"""The first baseline on XFS: all inodes by bulkstat, then every directory listed, in the order of their numbers.

No file is opened or looked at one by one, but for those with extended attributes, symbolic links and devices.
"""

import contextlib
import errno
import os
import stat
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import chain

from comparer.dirty import Dirty
from comparer.model import Ident

from . import scan
from .beside import Beside
from .fingerprints import RUN_BITS, Fingerprints
from .inode_set import InodeSet
from .linux import batch
from .linux.btrfs import syncfs
from .linux.statx import statx
from .linux.unshare import own_working_directory
from .linux.xfs import Records, Rows, bulkstat_runs, bulkstat_single
from .live import LiveTree, attributes, read_xattrs
from .mend import mend
from .scan import GUARD_NS, Progress, Scan
from .scan_xfs import available, differences, listing, system_inodes
from .table import Table, pack_xattrs

_G = 1_000_000_000
_LATEST = (1 << 63) // _G - 1  # seconds; later times need another form (table.store_time)
_PAGE = 1000  # rows
_AT_ONCE = 25  # rows in a statement: a third of the time of one is to begin and to end it
_POINT = "INSERT INTO entry VALUES (?, ?, ?)"
_POINT_MANY = _POINT + ", (?, ?, ?)" * (_AT_ONCE - 1)
_KIND = "mode & 61440"  # S_IFMT

_DIRECTORIES = 16  # that are listed together, and open as long
_Row = tuple[int, bytearray, int]  # the directory's inode number, a name in it, the number of what it points to


def _insert(rows: int, *, btime: bool) -> str:
    """Rows of the table `inode`; the parameters are the members of xfs.ROW."""
    birth = "?" if btime else "nullif(0, ? * 0)"
    row = f"(?, ?, ?, ?, ?, ?, ?, {birth}, ?, ?, ?)"
    columns = "ino, gen, mode, size, blocks, uid, gid, btime_ns, nlink, mtime_ns, ctime_ns"
    return f"INSERT INTO inode ({columns}) VALUES " + ", ".join([row] * rows)  # noqa: S608


def fill(tree: LiveTree, table: Table, progress: Progress) -> Dirty:
    """As scan.fill, with bulkstat if that is possible. Writes back what is not on the disk yet: bulkstat knows no other sizes.

    Returns what was seen in motion and has to be looked at. Raises OSError.
    """
    if not available(tree):
        return scan.fill(tree, table, progress)
    return _Fill(tree, table, progress).run()


class _Listing:
    """Some open directories, and what is in them."""

    def __init__(self) -> None:
        self.directories: list[tuple[int, list[_Row]]] = []
        self.count = 0

    def begin(self, fd: int) -> list[_Row]:
        """For the entries of a directory, which is closed with the others."""
        entries: list[_Row] = []
        self.directories.append((fd, entries))
        return entries

    def close(self) -> None:
        while self.directories:
            os.close(self.directories.pop()[0])


class _Listings:
    """The last few of them: no more are ever open."""

    def __init__(self) -> None:
        self._last: deque[_Listing] = deque(maxlen=4)

    def another(self) -> _Listing:
        self._last.append(_Listing())
        return self._last[-1]

    def close(self) -> None:
        for one in self._last:
            one.close()


class _Fill:
    def __init__(self, tree: LiveTree, table: Table, progress: Progress) -> None:
        self.tree = tree
        self.table = table
        self.db = table.db
        self.progress = progress
        self.again = Dirty()
        self.without = InodeSet()  # inodes that have no room for extended attributes
        self.fingerprints = Fingerprints(table.db)
        self.has_btime = statx(tree.root_fd).btime_ns is not None

    def run(self) -> Dirty:
        self.table.clear()
        self.fingerprints.pause()
        self.db.execute("DROP INDEX IF EXISTS entry_of")
        self._inodes()
        self._names()
        self.db.execute("CREATE INDEX entry_of ON entry (ino)")
        self.fingerprints.resume()
        self._special()
        self._root()
        self.again.merge(mend(self.db, self.tree.root))
        return self.again

    # ---- inodes

    def _inodes(self) -> None:
        since = time.clock_gettime_ns(time.CLOCK_REALTIME) - GUARD_NS
        syncfs(self.tree.root_fd)
        one, many = (_insert(rows, btime=self.has_btime) for rows in (1, _AT_ONCE))
        for run, records in bulkstat_runs(self.tree.root_fd, RUN_BITS):
            rows = records.rows()
            whole = records.count - records.count % _AT_ONCE
            self.db.executemany(many, rows.several(0, whole, _AT_ONCE))
            self.db.executemany(one, rows.several(whole, records.count - whole, 1))
            if not self._odd(records, rows, since):
                self.fingerprints.put(run, records.fingerprint())
            self.without.update(records.without_attributes())

    def _odd(self, records: Records, rows: Rows, since: int) -> bool:
        """Whether some changed too recently, or at a time that SQL cannot compute; those are to be looked at."""
        if rows.newest < since // _G and rows.latest <= _LATEST:
            return False
        odd = {
            Ident(ino, gen)
            for ino, _, _, mtime, ctime, btime, gen, _, _, _, ctime_n, *_ in records
            if ctime * _G + ctime_n >= since or max(mtime, ctime, btime) > _LATEST
        }
        self.again.objects |= odd
        return bool(odd)

    # ---- names

    def _names(self) -> None:
        """List every directory; the system directory, and what is in it, is none of the partition's.

        Some directories at a time: while a second thread asks which entries have extended attributes, the next ones are listed.
        (Not where Python does that: both would wait for each other.)
        """
        own = ((ino,) for ino, _ in system_inodes(self.tree.root_fd))
        self.db.executemany("DELETE FROM inode WHERE ino = ?", own)
        rows: list[_Row] = []
        seen = 0
        with contextlib.closing(_Listings()) as all_open, Beside(wanted=batch.available()) as asker:
            under_way: deque[tuple[_Listing, Future[list[int]]]] = deque()
            for some in self._listings(all_open):
                under_way.append((some, asker.submit(self._with_xattrs, some)))
                if len(under_way) > 1:
                    rows = self._store(rows, *under_way.popleft())
                seen += some.count
                self.progress(seen)
            while under_way:
                rows = self._store(rows, *under_way.popleft())
        self._point(rows)

    def _listings(self, all_open: "_Listings") -> Iterator["_Listing"]:
        """All directories and what is in them, some at a time; they are open until they are closed, or all are."""
        some = all_open.another()
        for ident in self._select("SELECT ino, gen FROM inode", "= 16384"):
            fd = self.tree.open_directory(ident)
            if fd is None:
                self._gone(ident)
                continue
            entries = some.begin(fd)
            entries += self._listed(ident, fd)
            entries.sort()
            some.count += len(entries)
            if some.count >= _PAGE or len(some.directories) >= _DIRECTORIES:
                yield some
                some = all_open.another()
        yield some

    def _store(self, rows: list[_Row], some: "_Listing", having: "Future[list[int]]") -> list[_Row]:
        """Store what is in some directories, after `rows`; those that remain for the next time are returned."""
        for ino in having.result():
            self._read_xattrs(ino)
        for _, entries in some.directories:
            rows += entries
        some.close()
        whole = len(rows) - len(rows) % _AT_ONCE
        self._point(rows[:whole])
        return rows[whole:]

    def _listed(self, directory: Ident, fd: int) -> list[_Row]:
        # sqlite3 looks for an adapter for each bytes object, and for none for a bytearray
        if directory == self.tree.root:
            return [(directory.ino, bytearray(name), ino) for name, ino, _ in listing(fd, at_root=True)]
        with os.scandir(b"/proc/self/fd/%d" % fd) as entries:
            return [(directory.ino, bytearray(entry.name), entry.inode()) for entry in entries]

    def _point(self, rows: list[_Row]) -> None:
        whole = len(rows) - len(rows) % _AT_ONCE
        values = list(chain.from_iterable(rows[:whole]))
        size = 3 * _AT_ONCE
        self.db.executemany(_POINT_MANY, (values[at : at + size] for at in range(0, len(values), size)))
        self.db.executemany(_POINT, rows[whole:])

    def _select(self, select: str, kind: str) -> Iterator[Ident]:
        """Inodes whose type bits are `kind`, a page at a time: the table may be changed meanwhile."""
        after = -1
        while True:
            rows = self.db.execute(
                f"{select} WHERE ino > ? AND {_KIND} {kind} ORDER BY ino LIMIT {_PAGE}", (after,)
            ).fetchall()
            for row in rows:
                yield Ident(*row)
            if len(rows) < _PAGE:
                return
            after = rows[-1][0]

    def _gone(self, ident: Ident) -> None:
        """An inode that cannot be opened: gone since bulkstat saw it, or unreadable."""
        record = bulkstat_single(self.tree.root_fd, ident.ino)
        if record is not None and record.gen == ident.gen and record.nlink:
            raise OSError(errno.ESTALE, f"inode {ident.ino} is there, but cannot be opened")
        self.again.objects.add(ident)

    # ---- what bulkstat does not say

    def _with_xattrs(self, some: "_Listing") -> list[int]:
        """The inodes that have extended attributes among the entries of directories. In a thread of its own."""
        found = []
        with own_working_directory() as may_move:
            for fd, entries in some.directories:
                asked = [entry for entry in entries if entry[2] not in self.without] if self.without else entries
                directory = b"" if may_move else b"/proc/self/fd/%d/" % fd
                if may_move and asked:
                    os.chdir(fd)
                    if batch.available():
                        answers = batch.have_xattrs([name for _, name, _ in asked])
                        asked = (
                            [entry for entry, answer in zip(asked, answers, strict=True) if answer]
                            if any(answers)
                            else []
                        )
                for _, name, ino in asked:
                    try:
                        if os.listxattr(directory + name, follow_symlinks=False):
                            found.append(ino)
                    except FileNotFoundError:
                        pass  # the event that took it away leads to a look
        return found

    def _read_xattrs(self, ino: int) -> None:
        ident = self.table.current(ino)
        fd = self.tree.open_object(ident) if ident is not None else None
        if fd is None:
            return
        try:
            packed = pack_xattrs(read_xattrs(b"/proc/self/fd/%d" % fd))
        finally:
            os.close(fd)
        self.db.execute("UPDATE inode SET xattrs = ? WHERE ino = ?", (packed, ino))

    def _special(self) -> None:
        """Targets of symbolic links, numbers of devices."""
        for ident in self._select("SELECT ino, gen FROM inode", f"IN ({stat.S_IFLNK}, {stat.S_IFCHR}, {stat.S_IFBLK})"):
            fd = self.tree.open_object(ident)
            if fd is None:
                self._gone(ident)
                continue
            try:
                attr = attributes(fd, statx(fd))
            finally:
                os.close(fd)
            self.db.execute("UPDATE inode SET rdev = ?, target = ? WHERE ino = ?", (attr.rdev, attr.target, ident.ino))

    def _root(self) -> None:
        self.db.execute(
            "UPDATE inode SET xattrs = ? WHERE ino = ?",
            (pack_xattrs(self.tree.look_at_root().xattrs), self.tree.root.ino),
        )


BULKSTAT = Scan(fill, differences)
