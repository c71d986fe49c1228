"""Snapshots by reflink: one immutable clone for each file whose content changed (XFS and others with FICLONE).

Where they lie: clones.py. The table says, for each file, which clone holds its content; `spent_clone` when a clone that was
replaced may go.
"""

import contextlib
import stat
from collections.abc import Callable, Collection, Iterable, Iterator

from comparer.dirty import Dirty
from comparer.extents import Extent, changed_ranges
from comparer.model import UNKNOWN_RANGES, ByteRanges, FileType, Ident, Quality
from snapshotter.live import LiveTree
from snapshotter.look import Outcome
from snapshotter.scan import WALK, Progress, Scan
from snapshotter.table import Overlay, Table, load_time

from .base import Capture
from .clones import MAX_EXTENTS, PAGE, Clones, Seen, Wanted, clone_path, nothing
from .metadata import MetadataBackend, content_may_differ, no_progress

_FILE = f"mode & {stat.S_IFMT(0o777777)} = {stat.S_IFREG}"
_FILES = f"SELECT ino, gen, nlink, ctime_ns, size FROM inode WHERE ino > ? AND {_FILE} ORDER BY ino LIMIT {PAGE}"  # noqa: S608
_CLONED = f"UPDATE inode SET clone = ? WHERE ino BETWEEN ? AND ? AND {_FILE}"  # noqa: S608


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
        leave_out: Callable[[int], None] = nothing,
    ) -> None:
        super().__init__(tree, table, progress, scan=scan)
        self.clones = Clones(tree, max_extents, leave_out)
        self._made: dict[Ident, int | None] = {}  # this capture's clones; None: no content is kept
        self._maps: dict[
            Ident, tuple[list[Extent], list[Extent]]
        ] = {}  # the last clone's and this one's, if known already
        self._everything: int | None = None  # of a baseline: all files were cloned for this snapshot,
        self._without: set[Ident] = set()  # but for these

    # ---- taking clones

    def _take_content(self, seq: int, outcome: Outcome, dirty: Dirty) -> None:
        wanted = []
        for ident, after in outcome.view.attrs.items():
            if after is None or after.type is not FileType.FILE:
                continue
            before, old = self.table.attr(ident), self.table.clone(ident)
            if before is None or old is None or content_may_differ(ident, before, after, dirty):
                wanted.append(Wanted(ident, after, old))
        taken = self.clones.take(seq, wanted)
        if wanted and not taken.made:
            self._forget(seq)
        outcome.view.attrs.update(taken.moved)
        outcome.again.objects.update(taken.restless)
        self._made.update(dict.fromkeys(taken.made, seq))
        self._made.update(dict.fromkeys(taken.without, None))
        self._maps = taken.maps

    def _take_everything(self, seq: int, outcome: Outcome) -> None:
        """A page of the table at a time: neither it nor what was cloned is ever in memory as a whole."""
        done = any_made = 0
        for page, taken in self.clones.take_pages(seq, self._pages()):
            outcome.again.objects.update(taken.restless)
            for ident, attr in taken.moved.items():
                self.table.put(ident, attr, None)
            self.table.db.execute(_CLONED, (seq, page[0].ident.ino, page[-1].ident.ino))
            for ident in taken.without:
                self.table.set_clone(ident, None)
            self._without.update(taken.without)
            any_made += len(taken.made)
            done += len(page)
            self.progress(done)
        if not any_made:
            self._forget(seq)
        self._everything = seq

    def _forget(self, seq: int) -> None:
        with contextlib.suppress(OSError):  # there are clones in it
            self.clones.forget(seq)

    def _pages(self) -> Iterator[list[Wanted]]:
        """All files of the table, by their inode numbers."""
        after = -1
        while rows := self.table.db.execute(_FILES, (after,)).fetchall():
            yield [
                Wanted(Ident(ino, gen), Seen(nlink, load_time(ctime) or 0, size))
                for ino, gen, nlink, ctime, size in rows
            ]
            after = rows[-1][0]

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
        maps = self._maps.get(ident) or self.clones.maps(ident, old, new)
        if maps is None:
            return UNKNOWN_RANGES
        found = changed_ranges(maps[0], before.size, maps[1], after.size)
        if found and before.mtime_ns == after.mtime_ns and found.quality is Quality.EXACT:
            # nobody wrote: the blocks were moved (defragmentation, deduplication)
            return ByteRanges(found.written, found.cleared, Quality.SUPERSET)
        return found

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
        self.clones.remove_all(capture.seq)

    def sweep(self, root_fd: int, kept: Collection[int]) -> int:  # noqa: ARG002
        """`kept` are the snapshots of the journal; a clone may be older, so it is the numbers above the head that are litter."""
        head = max(kept, default=0)
        removed = 0
        for seq in self.clones.present():
            if seq > head:
                removed += self.clones.remove_all(seq)
            else:
                self._forget(seq)
        return removed

    def expire(self, root_fd: int, seqs: Iterable[int]) -> None:  # noqa: ARG002
        """Remove the clones that no kept snapshot uses: replaced at `until`, and `until` is not after the oldest kept one."""
        oldest = max(seqs, default=0) + 1
        rows = self.table.db.execute("SELECT seq, ino, gen FROM spent_clone WHERE until <= ?", (oldest,)).fetchall()
        if not rows:
            return
        for seq in sorted({row[0] for row in rows}):
            self.clones.remove(seq, (Ident(*ident) for row_seq, *ident in rows if row_seq == seq))
        self.clones.sync()
        self.table.db.execute("DELETE FROM spent_clone WHERE until <= ?", (oldest,))
