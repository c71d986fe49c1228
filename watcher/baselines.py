"""A whole state as pages for one consumer: written to a spool beside the system file in short visits, then handed out by number.

How many pages there are is known only when the last one is made, and every page says it; hence the spool. The state is a copy of
the table (a reflink where there is one), or on btrfs the snapshot: writes and snapshots go on meanwhile.
"""

import contextlib
import os
import re
import sqlite3
import time
import uuid
import zlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any
from urllib.parse import quote

from comparer.compare import baseline
from comparer.errors import DamageError, OperatorError
from comparer.model import Attr, Change, FileType, Ident, Name, View
from feed.encode import encode_bytes
from feed.pages import Chunk, chunks
from snapshotter.backends.base import SYSTEM_DIR
from snapshotter.database import translated
from snapshotter.held import Held, copy_table, held
from snapshotter.systemfile import SnapshotRow
from snapshotter.table import Table
from snapshotter.visit import Visit

SLICE = 0.1  # seconds of one visit
_LEFTOVER = re.compile(rb"baseline-[A-Za-z0-9_-]{1,80}\.(db|table)\Z")


class _Now:
    """A view whose file is open during a visit only; what is iterated is read to its end before the visit ends."""

    def __init__(self) -> None:
        self.held: Held | None = None

    @property
    def _view(self) -> View:
        assert self.held is not None  # noqa: S101 - set for every step
        return self.held.view

    @property
    def root(self) -> Ident:
        return self._view.root

    def attr(self, ident: Ident) -> Attr | None:
        return self._view.attr(ident)

    def names(self, ident: Ident) -> Iterable[Name]:
        return list(self._view.names(ident))

    def child(self, parent: Ident, name: bytes) -> Ident | None:
        return self._view.child(parent, name)

    def children(self, parent: Ident) -> Iterable[tuple[bytes, Ident]]:
        return list(self._view.children(parent))

    def several(self) -> Collection[Ident]:
        return self._view.several() if isinstance(self._view, Table) else ()

    def encoded(self, change: Change) -> bytes:
        assert self.held is not None  # noqa: S101 - as above
        content = self.held.content(change.ident, change.path) if change.type is FileType.FILE else None
        return encode_bytes(change, content)


class Spool:
    """The baseline of one consumer. `begin`, `step` while it says True, then `page`; `remove` in any case.

    `limit` is the largest chunk in bytes. All methods get a visit, and raise OSError, DamageError, TransientError.
    """

    def __init__(self, consumer: str, limit: int) -> None:
        self.consumer = consumer
        self.name = f"{consumer}-{uuid.uuid4().hex[:12]}"
        self.pages = 0
        self.changes = 0
        self.row: SnapshotRow | None = None
        self._limit = limit
        self._now = _Now()
        self._chunks: Iterator[Chunk] = iter(())

    def _path(self, visit: Visit, kind: str) -> bytes:
        name = f"baseline-{self.name}.{kind}".encode()
        return os.path.join(os.path.dirname(visit.file.path), name)

    def begin(self, visit: Visit) -> SnapshotRow:
        """Fix the state: that of the head. Raises OperatorError if there is none yet."""
        rows = visit.file.snapshots()
        if not rows:
            raise OperatorError("there is no snapshot yet; ask again when there is")
        self.row = rows[-1]
        try:
            if visit.abilities.backend != "btrfs":
                copy_table(visit, self._path(visit, "table"))
            with self._open(visit) as db:
                db.execute("CREATE TABLE page (page INTEGER PRIMARY KEY, count INTEGER, body BLOB)")
        except BaseException:  # a disk that is full is not to be filled by us
            self.remove(visit)
            raise
        self._chunks = chunks(
            (self._now.encoded(change) for change in baseline(self._now, self._now.several)), self._limit
        )
        return self.row

    def step(self, visit: Visit) -> bool:
        """Work for a while; whether there is more to do."""
        assert self.row is not None  # noqa: S101 - `begin` was called
        copy = None if visit.abilities.backend == "btrfs" else self._path(visit, "table")
        end = time.monotonic() + SLICE
        with self._open(visit) as db, held(visit, self.row.seq, copy) as state:
            self._now.held = state
            try:
                for chunk in self._chunks:
                    self.pages += 1
                    self.changes += chunk.count
                    body = zlib.compress(chunk.data, 1)
                    db.execute("INSERT INTO page VALUES (?, ?, ?)", (self.pages, chunk.count, body))
                    if time.monotonic() >= end:
                        return True
            finally:
                self._now.held = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(visit, "table"))
        return False

    def page(self, visit: Visit, number: int) -> bytes:
        """The changes of a page."""
        with self._open(visit) as db:
            row: Any = db.execute("SELECT body FROM page WHERE page = ?", (number,)).fetchone()
        if row is None:
            raise DamageError(f"page {number} of the baseline for {self.consumer} is missing")
        return zlib.decompress(row[0])

    def remove(self, visit: Visit) -> None:
        for kind in ("db", "table"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(visit, kind))

    @contextlib.contextmanager
    def _open(self, visit: Visit) -> Iterator[sqlite3.Connection]:
        """A scratch file: what a crash leaves of it is removed, so nothing of it need be durable."""
        path = self._path(visit, "db")
        with translated(path):
            db = sqlite3.connect(f"file:{quote(path)}?mode=rwc", uri=True, isolation_level=None)
            try:
                for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = OFF", "synchronous = OFF"):
                    db.execute(f"PRAGMA {pragma}").fetchall()
                yield db
            finally:
                db.close()


def sweep_spools(visit: Visit) -> int:
    """Remove what a daemon that ended left of baselines; the number of files removed."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    directory = os.open(SYSTEM_DIR, flags, dir_fd=visit.root_fd)
    try:
        names = [name for name in map(os.fsencode, os.listdir(directory)) if _LEFTOVER.match(name)]
        for name in names:
            os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)
    return len(names)
