"""The reconcile on XFS: the inodes of the partition against those of the table, both in the order of their numbers.

Names need no look where a directory's change time is what the table says; only the others are listed. What is not the partition's
(the system directory: clones are inodes like all others) is known by being listed there, not by how it looks.
"""

import errno
import os
import stat
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from comparer.dirty import Dirty
from comparer.model import FileType, Ident, Name

from . import scan
from .backends.base import SYSTEM_DIR
from .fingerprints import RUN_BITS, Fingerprints
from .inode_set import InodeSet
from .linux.statx import statx
from .linux.xfs import REFUSED, Records, bulkstat_runs, bulkstat_single
from .live import LiveTree
from .scan import GUARD_NS, Progress
from .table import Table, load_time

_G = 1_000_000_000
_KNOWN = (
    "SELECT ino, gen, size, mode, nlink, uid, gid, mtime_ns, ctime_ns, btime_ns FROM inode WHERE ino >= ? AND ino < ?"
)
_END = 1 << 62


def available(tree: LiveTree) -> bool:
    """Whether bulkstat works here. Raises OSError for what the disk does."""
    try:
        return bulkstat_single(tree.root_fd, tree.root.ino) is not None
    except OSError as error:
        if error.errno in REFUSED:
            return False
        raise


def differences(tree: LiveTree, table: Table, progress: Progress) -> Dirty:
    """As scan.differences, with bulkstat if that is possible; inside a transaction. `objects` may hold some that do not differ.

    Raises OSError for what cannot be read.
    """
    if not available(tree):
        return scan.differences(tree, table, progress)
    return _Reconcile(tree, table).run(progress)


class _Reconcile:
    def __init__(self, tree: LiveTree, table: Table) -> None:
        self.tree = tree
        self.table = table
        self.dirty = Dirty()
        self.directories: set[Ident] = set()  # to be listed
        self.fingerprints = Fingerprints(table.db)
        self.has_btime = statx(tree.root_fd).btime_ns is not None
        self._strange = InodeSet()  # not in the table
        self._unsure: dict[int, bytes] = {}  # fingerprints of runs that differ at most in strange inodes

    def run(self, progress: Progress) -> Dirty:
        known = self.fingerprints.all()
        seen = reported = expected = 0
        busy = self._busy()
        for run, found in bulkstat_runs(self.tree.root_fd, RUN_BITS):
            if run > expected:
                self._vanished(expected, run)
            expected = run + 1
            records = found.without(busy[run]) if run in busy else found
            digest = records.fingerprint()
            if known.get(run) != digest:
                self._compare(run, records, digest)
            seen += records.count
            if seen - reported >= scan.REPORT_EVERY:
                progress(seen)
                reported = seen
        self._vanished(expected, _END >> RUN_BITS)
        self._settle_strange()
        again = {ident for ident, name in self.table.again() if name is None}
        for ident in self.directories | again:
            self._list(ident)
        progress(seen)
        return self.dirty

    # ---- inodes

    def _busy(self) -> dict[int, set[int]]:
        """By run: the inodes of the system file and of its directories, which change all the time.

        Left out, so that their runs have the same fingerprint as the last time: else everything in the system directory, a
        million clones, would have to be listed to tell them from what is new. Whoever gets one of their numbers meanwhile
        makes an event.
        """
        busy: dict[int, set[int]] = defaultdict(set)
        for ino, _ in system_inodes(self.tree.root_fd, depth=2):
            busy[ino >> RUN_BITS].add(ino)
        return busy

    def _compare(self, run: int, records: Records, digest: bytes) -> None:
        since = time.clock_gettime_ns(time.CLOCK_REALTIME) - GUARD_NS
        rows = {row[0]: row[1:] for row in self._rows(run, run + 1)}
        same, strange = True, False
        for (
            ino,
            size,
            _,
            mtime,
            ctime,
            btime,
            gen,
            uid,
            gid,
            mtime_n,
            ctime_n,
            btime_n,
            _,
            _,
            nlink,
            _,
            mode,
        ) in records:
            row = rows.pop(ino, None)
            ctime_ns = ctime * _G + ctime_n
            if row is None:
                if nlink:
                    self._strange.add(ino)
                    strange = True
                continue
            now = (
                gen, size, mode, nlink, uid, gid, mtime * _G + mtime_n, ctime_ns,
                btime * _G + btime_n if self.has_btime else None,
            )  # fmt: skip
            if row == now and ctime_ns < since:
                continue
            same = False
            self.dirty.objects.add(Ident(ino, row[0]))
            self.dirty.objects.add(Ident(ino, gen))
            if row[0] == gen and stat.S_ISDIR(mode):
                self.directories.add(Ident(ino, gen))
        for ino, row in rows.items():
            same = False
            self.dirty.objects.add(Ident(ino, row[0]))
        if same and not strange:
            self.fingerprints.put(run, digest)
        elif same:
            self._unsure[run] = digest

    def _rows(self, first_run: int, end_run: int) -> Iterator[tuple[Any, ...]]:
        """ino, gen, size, mode, nlink, uid, gid, mtime_ns, ctime_ns, btime_ns of the table's inodes in some runs."""
        for row in self.table.db.execute(_KNOWN, (first_run << RUN_BITS, end_run << RUN_BITS)):
            yield (*row[:7], *map(load_time, row[7:]))

    def _vanished(self, first_run: int, end_run: int) -> None:
        """Runs without any inode."""
        for row in self._rows(first_run, end_run):
            self.dirty.objects.add(Ident(row[0], row[1]))

    def _settle_strange(self) -> None:
        """What is not in the table is the system directory's, or new."""
        if self._strange:
            for ino, _ in system_inodes(self.tree.root_fd):
                self._strange.discard(ino)
        for ino in self._strange:
            self._unsure.pop(ino >> RUN_BITS, None)
            record = bulkstat_single(self.tree.root_fd, ino)
            if record is not None and record.nlink:
                self.dirty.objects.add(Ident(ino, record.gen))
        for run, digest in self._unsure.items():
            self.fingerprints.put(run, digest)

    # ---- names

    def _list(self, directory: Ident) -> None:
        """Compare a directory's names, and the inode numbers they have, with the table's."""
        attr = self.table.attr(directory)
        if attr is None or attr.type is not FileType.DIR:
            return
        fd = self.tree.open_directory(directory)
        if fd is None:
            self.dirty.objects.add(directory)
            return
        try:
            known = dict(self.table.db.execute("SELECT name, ino FROM entry WHERE parent = ?", (directory.ino,)))
            for name, ino, _ in listing(fd, at_root=directory == self.tree.root):
                if known.pop(name, None) != ino:
                    self.dirty.names.add(Name(directory, name))
            self.dirty.names.update(Name(directory, name) for name in known)
        finally:
            os.close(fd)


def listing(fd: int, *, at_root: bool = False) -> Iterator[tuple[bytes, int, bool]]:
    """(name, inode number, whether a directory) of each entry of an open directory, but for the system directory."""
    with os.scandir(b"/proc/self/fd/%d" % fd) as entries:
        for entry in entries:
            if not (at_root and entry.name == SYSTEM_DIR):
                yield entry.name, entry.inode(), entry.is_dir(follow_symlinks=False)


def system_inodes(root_fd: int, depth: int | None = None) -> Iterator[tuple[int, bool]]:
    """(number, whether a directory) of every inode with a name in the system directory, and of itself. Raises OSError.

    Only names are read, nothing is looked at. `depth`: directories are listed up to that many levels down.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        top = os.open(SYSTEM_DIR, flags, dir_fd=root_fd)
    except FileNotFoundError:
        return
    try:
        yield os.fstat(top).st_ino, True
        stack = [b"."]
        while stack:
            path = stack.pop()
            below = os.open(path, flags, dir_fd=top)
            try:
                for name, ino, is_dir in listing(below):
                    yield ino, is_dir
                    if is_dir and (depth is None or path.count(b"/") + 1 < depth):
                        stack.append(path + b"/" + name)
            finally:
                os.close(below)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise OSError(error.errno, "the system directory is nested too deeply") from error
        raise
    finally:
        os.close(top)
