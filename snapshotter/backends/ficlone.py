"""Snapshots by reflink: one immutable clone for each file whose content changed (XFS and others with FICLONE).

`.snapfeed/clones/<seq>/<inode>.<generation>`: the content of a file as of snapshot `seq`, and of later ones until it changes.
One directory for each snapshot, so that what an unfinished one left behind is found by its number. The table says, for each file,
which clone holds its content; `spent_clone` when a clone that was replaced may go.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from comparer.dirty import Dirty
from comparer.extents import changed_ranges
from comparer.model import UNKNOWN_RANGES, Attr, ByteRanges, FileType, Ident, Quality
from snapshotter.linux.fiemap import extent_count, extents, ficlone
from snapshotter.linux.inode_flags import set_immutable
from snapshotter.linux.writeback import start_writeback
from snapshotter.live import LiveTree
from snapshotter.look import Outcome
from snapshotter.scan import WALK, Progress, Scan
from snapshotter.table import Overlay, Table, load_time

from .base import SYSTEM_DIR, Capture
from .metadata import MetadataBackend, content_may_differ, no_progress

CLONES = b"clones"
MAX_EXTENTS = 50_000  # cloning costs with extents, and the file's writers wait meanwhile
_GROUP = 64  # files that are open together
_TRIES = 3
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SKIP = (
    errno.ETXTBSY,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.ENXIO,
    errno.EAGAIN,
)  # swap files, DAX, immutable oddities

_PAGE = 1024  # rows of the table
_FILE = f"mode & {stat.S_IFMT(0o777777)} = {stat.S_IFREG}"
_FILES = f"SELECT ino, gen, nlink, ctime_ns, size FROM inode WHERE ino > ? AND {_FILE} ORDER BY ino LIMIT {_PAGE}"  # noqa: S608
_CLONED = f"UPDATE inode SET clone = ? WHERE ino BETWEEN ? AND ? AND {_FILE}"  # noqa: S608


class _Seen(NamedTuple):
    """What tells whether a file has stood still, out of its Attr."""

    nlink: int
    ctime_ns: int
    size: int


def clone_path(seq: int, ident: Ident) -> bytes:
    """Where the clone of an object made for snapshot `seq` lies, from the partition's root."""
    return b"%b/%b/%d/%d.%d" % (SYSTEM_DIR, CLONES, seq, *ident)


class FicloneBackend(MetadataBackend):
    kind = "ficlone"
    consistency = "per-file"

    def __init__(
        self,
        tree: LiveTree,
        table: Table,
        progress: Progress = no_progress,
        max_extents: int = MAX_EXTENTS,
        *,
        scan: Scan = WALK,
    ) -> None:
        super().__init__(tree, table, progress, scan=scan)
        self.max_extents = max_extents
        self.skipped: list[Ident] = []
        self._made: dict[Ident, int | None] = {}  # this capture's clones; None: no content is kept
        self._everything: int | None = None  # of a baseline: all files were cloned for this snapshot,
        self._without: set[Ident] = set()  # but for these
        self._clones_fd: int | None = None

    # ---- taking clones

    def _take_content(self, seq: int, outcome: Outcome, dirty: Dirty) -> None:
        wanted = []
        for ident, after in outcome.view.attrs.items():
            if after is None or after.type is not FileType.FILE:
                continue
            before = self.table.attr(ident)
            if before is None or self.table.clone(ident) is None or content_may_differ(ident, before, after, dirty):
                wanted.append(ident)
        outcome.view.attrs.update(self._take(seq, [(i, outcome.view.attrs[i]) for i in wanted], outcome.again))

    def _take_everything(self, seq: int, outcome: Outcome) -> None:
        """A page of the table at a time: neither it nor what was cloned is ever in memory as a whole."""
        after, done, full = -1, 0, True
        while full:
            rows = self.table.db.execute(_FILES, (after,)).fetchall()
            full = len(rows) == _PAGE
            if not rows:
                break
            wanted = [
                (Ident(ino, gen), _Seen(nlink, load_time(ctime) or 0, size)) for ino, gen, nlink, ctime, size in rows
            ]
            moved = self._take(seq, wanted, outcome.again)
            for ident, attr in moved.items():
                self.table.put(ident, attr, None)
            first, after = rows[0][0], rows[-1][0]
            self.table.db.execute(_CLONED, (seq, first, after))
            without = [ident for ident, clone in self._made.items() if clone is None]
            for ident in without:
                self.table.set_clone(ident, None)
            self._without.update(without)
            self._made.clear()
            done += len(rows)
            self.progress(done)
        self._everything = seq

    def _take(self, seq: int, wanted: Iterable[tuple[Ident, "Attr | _Seen | None"]], again: Dirty) -> dict[Ident, Attr]:
        """Clone files; returns the attributes of those that changed since they were looked at.

        FICLONE waits until the file's dirty pages are written. That is begun for a group of files before the first is cloned:
        the disk gets them together, and we wait once instead of for each.
        """
        moved: dict[Ident, Attr] = {}
        directory = None
        files = iter(wanted)
        try:
            while group := list(islice(files, _GROUP)):
                if directory is None:
                    directory = self._directory(seq, make=True)
                    assert directory is not None  # noqa: S101 - just made
                with contextlib.ExitStack() as stack:
                    sources = [self._open(ident, attr, stack) for ident, attr in group]
                    for (ident, attr), source in zip(group, sources, strict=True):
                        assert attr is not None  # noqa: S101 - only what lives is wanted
                        taken, still = self._clone(directory, ident, attr, source)
                        if taken is not attr and isinstance(taken, Attr):
                            moved[ident] = taken
                        self._made[ident] = seq if still is not None else None
                        if still is None:
                            self._remove(directory, b"%d.%d" % ident)  # of an earlier try: nobody would remove it ever
                        if still is False:
                            again.objects.add(ident)
        finally:
            if directory is not None:
                os.close(directory)
        if directory is not None and not any(self._made.values()):
            with contextlib.suppress(OSError):  # there are some of an earlier page
                self._forget(seq)
        return moved

    def _open(self, ident: Ident, attr: "Attr | _Seen | None", stack: contextlib.ExitStack) -> int | None:
        """A file to be cloned, open until the stack is unwound, its dirty pages on their way; None if it is gone."""
        source = self.tree.open_file(ident) if attr is not None and attr.nlink else None
        if source is not None:
            stack.callback(os.close, source)
            start_writeback(source)
        return source

    def _clone(
        self, directory: int, ident: Ident, attr: "Attr | _Seen", source: int | None
    ) -> tuple["Attr | _Seen", bool | None]:
        """Clone one file. Returns its attributes at that moment, and whether they stood still (None: no clone was made).

        Content and attributes are of one moment: if the file changes while it is cloned, again. Of one that never stands still
        the size is that of its clone, the rest what was seen right after.
        """
        label = b"%d.%d" % ident
        for _ in range(_TRIES):
            if source is None or not attr.nlink:
                return attr, None  # gone since it was looked at: the next snapshot says so
            try:
                if not self._fits(source, ident):
                    return attr, None
                self._make(directory, label, source)
            except OSError as error:
                if error.errno in _SKIP:
                    self.skipped.append(ident)
                    return attr, None
                raise
            now = os.fstat(source)
            if (now.st_ctime_ns, now.st_size) == (attr.ctime_ns, attr.size):
                return attr, True
            after = self.tree.look_at(ident)
            if after is None:
                return attr, False
            attr = after
        assert isinstance(attr, Attr)  # noqa: S101 - it was looked at again
        size = os.stat(label, dir_fd=directory, follow_symlinks=False).st_size
        return replace(attr, size=size), False

    def _fits(self, source: int, ident: Ident) -> bool:
        if not stat.S_ISREG(os.fstat(source).st_mode):
            return False
        if extent_count(source) > self.max_extents:
            self.skipped.append(ident)
            return False
        return True

    def _make(self, directory: int, label: bytes, source: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            clone = os.open(label, flags, 0o400, dir_fd=directory)
        except FileExistsError:
            self._remove(directory, label)
            clone = os.open(label, flags, 0o400, dir_fd=directory)
        try:
            ficlone(source, clone)
            with contextlib.suppress(OSError):  # no such attribute here: the mode and the directory's protect it
                set_immutable(clone, on=True)
        except OSError:
            self._remove(directory, label)
            raise
        finally:
            os.close(clone)

    def _remove(self, directory: int, label: bytes) -> None:
        try:
            os.unlink(label, dir_fd=directory)
        except FileNotFoundError:
            return
        except PermissionError:
            fd = os.open(label, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
            try:
                set_immutable(fd, on=False)
            finally:
                os.close(fd)
            os.unlink(label, dir_fd=directory)

    def _directory(self, seq: int, *, make: bool = False) -> int | None:
        """`.snapfeed/clones/<seq>`; None if it does not exist."""
        return self._below(CLONES, b"%d" % seq, make=make)

    def _below(self, *names: bytes, make: bool = False) -> int | None:
        """A directory below the system directory; None if it does not exist."""
        system = self.tree.system_directory()
        if make:
            for depth in range(1, len(names) + 1):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(b"/".join(names[:depth]), 0o700, dir_fd=system)
        try:
            return os.open(b"/".join(names), _DIRECTORY, dir_fd=system)
        except FileNotFoundError:
            return None

    def _forget(self, seq: int) -> None:
        """Remove the directory of a snapshot's clones. Raises OSError: ENOTEMPTY."""
        clones = self._below(CLONES)
        if clones is not None:
            try:
                os.rmdir(b"%d" % seq, dir_fd=clones)
            finally:
                os.close(clones)

    # ---- what the snapshot says of content

    def _clone_of(self, ident: Ident) -> int | None:
        if ident in self._made:
            return self._made[ident]
        if self._everything is not None:
            return None if ident in self._without else self._everything
        return self.table.clone(ident)

    def _content_of(self, view: Overlay | Table) -> Callable[[Ident, bytes], bytes | None]:
        def content(ident: Ident, _path: bytes) -> bytes | None:
            seq = self._clone_of(ident)
            return None if seq is None else clone_path(seq, ident)

        del view
        return content

    def _ranges(self, ident: Ident, view: Overlay, dirty: Dirty) -> ByteRanges | None:
        before, after = self.table.attr(ident), view.attr(ident)
        if before is None or after is None or after.type is not FileType.FILE:
            return None
        if ident not in self._made:
            return None
        old, new = self.table.clone(ident), self._made[ident]
        if old is None or new is None:
            return UNKNOWN_RANGES if content_may_differ(ident, before, after, dirty) else None
        found = self._compare_clones(ident, old, before.size, new, after.size)
        if found and before.mtime_ns == after.mtime_ns and found.quality is Quality.EXACT:
            # nobody wrote: the blocks were moved (defragmentation, deduplication)
            return ByteRanges(found.written, found.cleared, Quality.SUPERSET)
        return found

    def _compare_clones(self, ident: Ident, old: int, old_size: int, new: int, new_size: int) -> ByteRanges:
        fds = []
        system = self.tree.system_directory()
        try:
            for seq in (old, new):
                path = b"%b/%d/%d.%d" % (CLONES, seq, *ident)
                fds.append(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=system))
            return changed_ranges(extents(fds[0]), old_size, extents(fds[1]), new_size)
        except FileNotFoundError:
            return UNKNOWN_RANGES
        finally:
            for fd in fds:
                os.close(fd)

    # ---- the end of clones

    def commit(self, capture: Capture) -> None:
        if isinstance(capture.new, Overlay):
            for ident, attr in capture.new.attrs.items():
                old = self.table.clone(ident)
                if old is not None and (attr is None or self._made.get(ident, old) != old):
                    self.table.db.execute(
                        "INSERT OR IGNORE INTO spent_clone VALUES (?, ?, ?, ?)", (capture.seq, old, *ident)
                    )
        super().commit(capture)

    def discard(self, root_fd: int, capture: Capture) -> None:  # noqa: ARG002
        self._remove_all(capture.seq)

    def sweep(self, root_fd: int, kept: Collection[int]) -> int:  # noqa: ARG002
        """`kept` are the snapshots of the journal; a clone may be older, so it is the numbers above the head that are litter."""
        head = max(kept, default=0)
        removed = 0
        for seq in self._present():
            if seq > head:
                removed += self._remove_all(seq)
            else:
                with contextlib.suppress(OSError):  # there are clones in it
                    self._forget(seq)
        return removed

    def _present(self) -> list[int]:
        fd = self._below(CLONES)
        if fd is None:
            return []
        try:
            return [int(name) for name in os.listdir(fd) if name.isdecimal()]
        finally:
            os.close(fd)

    def _remove_all(self, seq: int) -> int:
        directory = self._directory(seq)
        if directory is None:
            return 0
        try:
            names = os.listdir(directory)
            for name in names:
                self._remove(directory, os.fsencode(name))
        finally:
            os.close(directory)
        self._forget(seq)
        return len(names)

    def _sync(self) -> None:
        """What was removed stays so after a power cut: whoever forgets that it had to be removed may do so now."""
        clones = self._below(CLONES)
        if clones is not None:
            try:
                os.fsync(clones)
            finally:
                os.close(clones)

    def expire(self, root_fd: int, seqs: Iterable[int]) -> None:  # noqa: ARG002
        """Remove the clones that no kept snapshot uses: replaced at `until`, and `until` is not after the oldest kept one."""
        oldest = max(seqs, default=0) + 1
        rows = self.table.db.execute("SELECT seq, ino, gen FROM spent_clone WHERE until <= ?", (oldest,)).fetchall()
        if not rows:
            return
        for seq in sorted({row[0] for row in rows}):
            directory = self._directory(seq)
            if directory is None:
                continue
            try:
                for row_seq, ino, gen in rows:
                    if row_seq == seq:
                        self._remove(directory, b"%d.%d" % (ino, gen))
            finally:
                os.close(directory)
            with contextlib.suppress(OSError):  # others are still in use
                self._forget(seq)
        self._sync()
        self.table.db.execute("DELETE FROM spent_clone WHERE until <= ?", (oldest,))
