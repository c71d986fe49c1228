"""The snapshot system file: one SQLite database per partition, in `.snapfeed/system.db`.

One connection, held only while something is done (an open file keeps a mount busy), by one process (exclusive lock). Write-ahead
log with synchronous=FULL: a commit is one fsync, and survives a power cut. What the file holds is in schema/*.sql.
"""

import contextlib
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from comparer.errors import DamageError, OperatorError

from .database import Database, connect, translated
from .pagesums import PageSums

SYSTEM_FILE = b"system.db"
_DEFLATE_FROM = 1024  # bytes; smaller bodies gain nothing


class Settings(NamedTuple):
    """What is given when a partition is formatted or adopted. `kind` is `partition` or `directory`."""

    epoch: str
    uuid: str
    kind: str
    io_threshold: int  # bytes
    time_threshold: float  # seconds
    created_ns: int


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """One snapshot as recorded; `path` from the partition's root if it has a tree of its own."""

    seq: int
    time_ns: int
    trigger: str
    volume: int
    changes: int
    consistency: str
    path: bytes | None


class JournalRow(NamedTuple):
    """A diff in the journal, in short."""

    seq: int
    parent: int | None
    time_ns: int
    changes: int
    bytes: int


class ConsumerRow(NamedTuple):
    """A consumer: its name, from which snapshot on they are kept for it, whether it has that one, and when it was heard of."""

    name: str
    seq: int
    has: bool
    time_ns: int


@dataclass(frozen=True, slots=True)
class DiffRow:
    """One diff in the journal, without its pages. `parent` None: a baseline. `page_limit`: bytes its pages were made for.

    `bytes` is what its pages take as stored; whoever adds a diff need not say it.
    """

    seq: int
    parent: int | None
    time_ns: int
    trigger: str
    volume: int
    consistency: str
    path: bytes | None
    changes: int
    pages: int
    page_limit: int
    bytes: int = 0


class SystemFile(Database):
    """An open system file. Not shared between threads. Everything may raise DamageError or TransientError."""

    @classmethod
    def create(cls, path: bytes, settings: Settings) -> Self:
        """Make a new system file; raises OperatorError if there is one."""
        if os.path.lexists(path):
            raise OperatorError(f"{os.fsdecode(path)!r} exists already: the partition is adopted")
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        made: Self | None = None
        try:
            with translated(path):
                made = cls(connect(path, "rw"), path)
                made.db.execute("PRAGMA auto_vacuum = INCREMENTAL")
                made._prepare()
                made._migrate(0)
                made._sums = PageSums(made.db, path, leftover=False)
                made._sums.created()
                with made.transaction():
                    values = {**settings._asdict(), "next_seq": 1, "acknowledged_seq": 0, "acknowledged_page": 0}
                    values["offered"] = 0
                    made.db.executemany("INSERT INTO meta VALUES (?, ?)", values.items())
        except BaseException:  # half of one is worse than none
            if made is not None:
                made.close()
            for suffix in (b"", b"-wal", b"-journal"):
                with contextlib.suppress(OSError):
                    os.unlink(path + suffix)
            raise
        return made

    def _check_content(self) -> None:
        self.settings()

    # ---- settings

    def _meta(self, key: str) -> Any:
        row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise DamageError(f"{os.fsdecode(self.path)!r}: damaged system file: no {key}")
        return row[0]

    def _set_meta(self, key: str, value: Any) -> None:
        self.db.execute("UPDATE meta SET value = ? WHERE key = ?", (value, key))

    def settings(self) -> Settings:
        with translated(self.path):
            return Settings(*(self._meta(name) for name in Settings._fields))

    def set_thresholds(self, io_threshold: int | None, time_threshold: float | None) -> None:
        """Bytes and seconds; None leaves one as it is."""
        with self.transaction():
            for key, value in (("io_threshold", io_threshold), ("time_threshold", time_threshold)):
                if value is not None:
                    self._set_meta(key, value)

    # ---- snapshots

    def next_seq(self) -> int:
        return int(self._meta("next_seq"))

    def head(self) -> int | None:
        """The newest snapshot's number."""
        with translated(self.path):
            return self.db.execute("SELECT max(seq) FROM snapshot").fetchone()[0]  # type: ignore[no-any-return]

    def snapshots(self) -> list[SnapshotRow]:
        """Those that are kept, oldest first."""
        with translated(self.path):
            return [SnapshotRow(*row) for row in self.db.execute("SELECT * FROM snapshot ORDER BY seq")]

    def add(self, snapshot: SnapshotRow, diff: DiffRow) -> None:
        """Record a snapshot and its diff (pages are added before, with `add_page`); inside a transaction."""
        self.db.execute("INSERT INTO snapshot VALUES (?, ?, ?, ?, ?, ?, ?)", _values(snapshot))
        self._add_diff(diff)
        self._set_meta("next_seq", snapshot.seq + 1)

    def _add_diff(self, diff: DiffRow) -> None:
        size = self.db.execute("SELECT coalesce(sum(length(body)), 0) FROM page WHERE seq = ?", (diff.seq,)).fetchone()[
            0
        ]
        values = (*_values(diff)[:-1], size)
        self.db.execute("INSERT INTO diff VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def forget(self, keep: int, needed: int | None = None) -> list[int]:
        """Forget all but the newest `keep` snapshots and those from number `needed` on; returns the numbers forgotten."""
        seqs = [
            row[0]
            for row in self.db.execute("SELECT seq FROM snapshot ORDER BY seq DESC LIMIT -1 OFFSET ?", (keep,))
            if needed is None or row[0] < needed
        ]
        if seqs:
            self.db.execute("DELETE FROM snapshot WHERE seq <= ?", (max(seqs),))
        return seqs

    # ---- the journal

    def add_page(self, seq: int, page: int, count: int, body: bytes) -> None:
        """`body`: the page's `count` changes as JSON objects joined by commas."""
        deflated = len(body) >= _DEFLATE_FROM
        stored = zlib.compress(body, 1) if deflated else body
        self.db.execute("INSERT INTO page VALUES (?, ?, ?, ?, ?)", (seq, page, count, deflated, stored))

    def drop_diffs(self, last: int) -> None:
        """Drop the diffs up to number `last` from the journal; inside a transaction."""
        self.db.execute("DELETE FROM page WHERE seq <= ?", (last,))
        self.db.execute("DELETE FROM diff WHERE seq <= ?", (last,))
        self.db.execute("PRAGMA incremental_vacuum(64)").fetchall()

    def merge_diffs(self, first: int, merged: DiffRow, pages: Iterable[tuple[int, bytes]]) -> None:
        """Put one diff in the place of those from number `first` to its own; all or nothing, durable when it returns.

        `pages`, (number of changes, body) each, may read the diffs they replace.
        """
        with self.transaction():
            self.db.execute("CREATE TEMP TABLE IF NOT EXISTS merging (page INTEGER PRIMARY KEY, count, body)")
            self.db.execute("DELETE FROM temp.merging")
            self.db.executemany("INSERT INTO temp.merging (count, body) VALUES (?, ?)", pages)
            found = self.db.execute("SELECT count(*), total(count) FROM temp.merging").fetchone()
            for table in ("page", "diff"):
                self.db.execute(f"DELETE FROM {table} WHERE seq BETWEEN ? AND ?", (first, merged.seq))  # noqa: S608
            for page, count, body in self.db.execute("SELECT page, count, body FROM temp.merging ORDER BY page"):
                self.add_page(merged.seq, page, count, body)
            if not found[0]:  # nothing is left of them; a diff without pages would never be published
                self.add_page(merged.seq, 1, 0, b"")
            self._add_diff(replace(merged, changes=int(found[1]), pages=max(1, found[0])))
            self.db.execute("DELETE FROM temp.merging")
            self.db.execute("PRAGMA incremental_vacuum(1024)").fetchall()

    def page_count(self, seq: int) -> int:
        return int(self.db.execute("SELECT count(*) FROM page WHERE seq = ?", (seq,)).fetchone()[0])

    def diff(self, seq: int) -> DiffRow | None:
        with translated(self.path):
            row = self.db.execute("SELECT * FROM diff WHERE seq = ?", (seq,)).fetchone()
            return DiffRow(*row) if row else None

    def next_diff(self, seq: int) -> DiffRow | None:
        """The first diff in the journal with a number of at least `seq`."""
        with translated(self.path):
            row = self.db.execute("SELECT * FROM diff WHERE seq >= ? ORDER BY seq LIMIT 1", (seq,)).fetchone()
            return DiffRow(*row) if row else None

    def page(self, seq: int, page: int) -> tuple[int, bytes]:
        """(number of changes, body). Raises DamageError if it is missing or cannot be inflated."""
        with translated(self.path):
            row = self.db.execute(
                "SELECT count, deflated, body FROM page WHERE seq = ? AND page = ?", (seq, page)
            ).fetchone()
        if row is None:
            raise DamageError(f"{os.fsdecode(self.path)!r}: damaged system file: page {page} of diff {seq} is missing")
        count, deflated, body = row
        try:
            return count, zlib.decompress(body) if deflated else body
        except zlib.error as error:
            raise DamageError(
                f"{os.fsdecode(self.path)!r}: damaged system file: page {page} of diff {seq}: {error}"
            ) from error

    def replace_pages(self, seq: int, pages: Iterable[tuple[int, bytes]], page_limit: int) -> None:
        """Cut a diff into other pages (a broker takes less than was thought); `pages` may read the old ones as it goes.

        The pages acknowledged of the old ones say nothing of the new ones: if the cursor stands in this diff, it goes back to
        before its first page, or after its last if all of it was acknowledged.
        """
        with self.transaction():
            before = self.page_count(seq)
            number = 0
            for number, (count, body) in enumerate(pages, 1):
                self.add_page(seq, -number, count, body)
            self.db.execute("DELETE FROM page WHERE seq = ? AND page > 0", (seq,))
            self.db.execute("UPDATE page SET page = -page WHERE seq = ?", (seq,))
            self.db.execute(
                "UPDATE diff SET pages = ?, page_limit = ?,"
                " bytes = (SELECT coalesce(sum(length(body)), 0) FROM page WHERE page.seq = diff.seq) WHERE seq = ?",
                (number, page_limit, seq),
            )
            if self._meta("acknowledged_seq") == seq:
                self._set_meta("acknowledged_page", number if self._meta("acknowledged_page") >= before else 0)

    def acknowledged(self) -> tuple[int, int]:
        """(seq, page) up to which everything has a good PUBACK; (0, 0) before the first."""
        with translated(self.path):
            return int(self._meta("acknowledged_seq")), int(self._meta("acknowledged_page"))

    def acknowledge(self, seq: int, page: int) -> None:
        with self.transaction():
            self._set_meta("acknowledged_seq", seq)
            self._set_meta("acknowledged_page", page)

    def published(self) -> int:
        """The last diff of which every page has a good PUBACK, or 0."""
        seq, page = self.acknowledged()
        row = self.diff(seq)
        return seq if row is None or page >= row.pages else seq - 1

    def offered(self) -> int:
        """Diffs up to this one may have been seen by somebody, though not acknowledged: they stay as they are."""
        with translated(self.path):
            return int(self._meta("offered"))

    def offer(self, seq: int) -> None:
        """Before a diff is handed to a publisher. Durable when it returns, or when the transaction ends that one is in."""
        if self.db.in_transaction:
            self._set_meta("offered", seq)
            return
        with self.transaction():
            self._set_meta("offered", seq)

    def journal(self, after: int = 0, most: int = -1) -> list[JournalRow]:
        """The diffs in the journal with a number above `after`, oldest first, at most `most` of them."""
        with translated(self.path):
            rows = self.db.execute(
                "SELECT seq, parent, time_ns, changes, bytes FROM diff WHERE seq > ? ORDER BY seq LIMIT ?",
                (after, most),
            )
            return [JournalRow(*row) for row in rows]

    def journal_bytes(self) -> int:
        """What all diffs in the journal take."""
        with translated(self.path):
            return int(self._meta("journal_bytes"))

    def backlog(self) -> int:
        """Diffs not yet acknowledged in full."""
        with translated(self.path):
            row = self.db.execute(
                "SELECT count(*) FROM diff WHERE seq > :seq OR (seq = :seq AND pages > :page)",
                {"seq": self._meta("acknowledged_seq"), "page": self._meta("acknowledged_page")},
            ).fetchone()
            return int(row[0])

    # ---- consumers

    def consumers(self) -> list[ConsumerRow]:
        with translated(self.path):
            rows = self.db.execute("SELECT name, seq, has, time_ns FROM consumer ORDER BY name")
            return [ConsumerRow(name, seq, bool(has), time_ns) for name, seq, has, time_ns in rows]

    def set_consumers(self, rows: list[ConsumerRow]) -> None:
        """Note consumers, in the place of what was known of those of the same name."""
        with self.transaction():
            self.db.executemany("INSERT OR REPLACE INTO consumer VALUES (?, ?, ?, ?)", rows)

    def drop_consumer(self, name: str) -> bool:
        """Forget a consumer; whether there was one."""
        with self.transaction():
            return self.db.execute("DELETE FROM consumer WHERE name = ?", (name,)).rowcount > 0


def _values(row: SnapshotRow | DiffRow) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in row.__slots__)
