"""A checksum of each page of a system file, kept in the file itself: SQLite has none, and reads what a disk made of it.

Which pages a visit changed stands in the write-ahead log (https://sqlite.org/fileformat2.html, 4: the WAL format). Before they
are copied to the file, one more transaction, which needs no fsync of its own, notes their checksums: so the file never holds
a page of which the checksum is not there yet. After a crash, pages in the log are covered by the log's own checksums, all
others by ours. Pages of the table of checksums have none: its rows have one each.

The first transaction of a visit says that the checksums are about to be incomplete. If they could not be completed (a full
disk), the next check makes them anew instead of taking the file for damaged.
"""

import itertools
import os
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from comparer.errors import DamageError

WHOLE, OPEN, NONE = b"whole", b"open!", b"none!"  # all of one length: to write one over another moves nothing
_ROW = 256  # pages
_BLOCK = 256  # pages read at a time
_U32 = struct.Struct("<I")
_SUMS = struct.Struct(f"<{_ROW}I")
_HEADER = struct.Struct(">8I")  # magic, version, page size, number of the checkpoint, salts, checksum
_FRAME = struct.Struct(">6I")  # page, pages of the file if it ends a transaction, salts, checksum
_MAGIC = 0x377F0682  # the lowest bit: words are big-endian in the log's checksums
_MAX = 0xFFFFFFFF
_INTERIOR = b"\x05"
_ROUNDS = 8


class _Frame(NamedTuple):
    page: int
    commits: bool
    offset: int  # of the page's content in the log
    sum: int


def _sum(content: bytes | memoryview) -> int:
    return zlib.crc32(content) or 1  # 0: there is none


class PageSums:
    """The checksums of one open system file. Everything raises DamageError, OSError and sqlite3's errors.

    `leftover`: there was a write-ahead log when the file was opened.
    """

    def __init__(self, db: sqlite3.Connection, path: bytes, *, leftover: bool) -> None:
        self.db = db
        self.path = path
        self.state = NONE
        self._size: int = db.execute("PRAGMA page_size").fetchone()[0]
        self._leftover = leftover
        self._unsure = leftover  # whether the log may hold what looks like a commit and is none
        self._salts: list[int] = []  # of the log, which change with each new one
        self._done = 0  # frames of the log that are accounted for
        self._places: dict[int, int] = {}  # where in the log the last content of a page is
        self._fd: int | None = None

    def close(self) -> None:
        """After the connection: closing a descriptor takes the process's locks away (fcntl(2), F_SETLK)."""
        if self._fd is not None:
            os.close(self._fd)

    def begin(self) -> None:
        """Read whether the checksums are complete."""
        row = self.db.execute("SELECT sums FROM page_sum WHERE first = -1").fetchone()
        if row is None or row[0] not in (WHOLE, OPEN, NONE):
            raise self._damage("its page checksums are not there")
        self.state = row[0]
        if self.state == OPEN and not self._leftover:
            self.state = NONE  # they could not be completed

    def created(self) -> None:
        """A new file: all its pages are in the log."""
        self.state = OPEN

    def writing(self) -> None:
        """At the beginning of each transaction."""
        if self.state == WHOLE:
            self._mark(OPEN)

    def wrote(self, *, committed: bool) -> None:
        """At the end of each transaction."""
        if committed and self.state == WHOLE:
            self.state = OPEN
        if not committed:
            self._unsure = True

    def _mark(self, state: bytes) -> None:
        self.db.execute("UPDATE page_sum SET sums = ? WHERE first = -1", (state,))

    # ---- completing them

    def pending(self) -> int:
        """Bytes in the log."""
        try:
            return os.stat(self.path + b"-wal").st_size
        except FileNotFoundError:
            return 0

    def seal(self) -> None:
        """Note the checksums of the pages in the log; before any of them is copied to the file."""
        if self.state == NONE or self.pending() < _HEADER.size + _FRAME.size + self._size:
            return
        if self.state == WHOLE and not self._unsure:
            return
        self.db.execute("PRAGMA synchronous = NORMAL")
        try:
            if self._unsure:  # what was written and not committed is overwritten, and thereby no part of the log
                self._write({}, OPEN)
            for _ in range(_ROUNDS):
                rows, grows = self._changed(self._fresh())
                if not rows and self.state == WHOLE:
                    self._unsure = False
                    return
                self._write(rows, OPEN if grows else WHOLE)  # a table that grows changes pages that are not its own
            self._write({}, NONE)
        finally:
            self.db.execute("PRAGMA synchronous = FULL")

    def checkpointed(self) -> None:
        """The log was copied to the file, and is empty."""
        self._leftover = self._unsure = False
        self._salts = []

    def _write(self, rows: dict[int, list[int]], state: bytes) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            self.db.executemany(
                "INSERT OR REPLACE INTO page_sum VALUES (?, ?)", [(n, _pack(n, sums)) for n, sums in rows.items()]
            )
            self._mark(state)
            self.db.execute("COMMIT")
        except BaseException:
            self._unsure = True
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise
        self.state = state

    def _changed(self, fresh: dict[int, int]) -> tuple[dict[int, list[int]], bool]:
        """Rows in which the checksums of some pages, and of those that are no more, are not what they are now; if one is new."""
        rows: dict[int, list[int]] = {}
        grows = False
        if fresh:
            own = self._own()
            fresh = {page: 0 if page in own else found for page, found in fresh.items()}
        pages = self.db.execute("PRAGMA page_count").fetchone()[0]
        for number, group in itertools.groupby(sorted(fresh), lambda page: (page - 1) // _ROW):
            known = self._row(number)
            grows = grows or known is None
            before = known or [0] * _ROW
            after = before.copy()
            for page in group:
                after[(page - 1) % _ROW] = fresh[page] if page <= pages else 0
            if after != before:
                rows[number] = after
        last = (pages - 1) // _ROW  # a page that comes again may come without content
        for (number,) in self.db.execute("SELECT first FROM page_sum WHERE first >= ?", (last,)).fetchall():
            after = rows.get(number) or self._row(number) or []
            kept = max(0, pages - number * _ROW)
            if any(after[kept:]):
                rows[number] = [*after[:kept], *[0] * (_ROW - kept)]
        return rows, grows

    def _row(self, number: int) -> list[int] | None:
        row = self.db.execute("SELECT sums FROM page_sum WHERE first = ?", (number,)).fetchone()
        return None if row is None else self._unpack(number, row[0])

    def _unpack(self, number: int, stored: object) -> list[int]:
        if not isinstance(stored, bytes) or len(stored) != _U32.size + _SUMS.size:
            raise self._damage("a row of page checksums is not one")
        if _U32.unpack_from(stored)[0] != zlib.crc32(stored[_U32.size :], number):
            raise self._damage("a row of page checksums is not what was written")
        return list(_SUMS.unpack_from(stored, _U32.size))

    def _own(self) -> set[int]:
        """The pages of the table of checksums: a tree of table b-tree pages (file format, 1.6)."""
        root = self.db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'page_sum'").fetchone()[0]
        found, stack = {root}, [root]
        while stack:
            page = self._content(stack.pop())
            if page[:1] != _INTERIOR:
                continue
            try:
                (cells,) = struct.unpack_from(">H", page, 3)
                places = struct.unpack_from(f">{cells}H", page, 12)
                below = [struct.unpack_from(">I", page, at)[0] for at in (8, *places)]
            except struct.error:
                below = [root]
            if found.intersection(below):
                raise self._damage("its page checksums are no tree")
            found.update(below)
            stack += below
        return found

    def _content(self, page: int) -> bytes:
        at = self._places.get(page)
        if at is None:
            return os.pread(self._file(), self._size, (page - 1) * self._size)
        with open(self.path + b"-wal", "rb") as log:
            return os.pread(log.fileno(), self._size, at)

    def _file(self) -> int:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return self._fd

    # ---- the log

    def _fresh(self) -> dict[int, int]:
        """The checksums of the pages committed to the log since the last call."""
        found: dict[int, int] = {}
        pending: list[_Frame] = []
        with open(self.path + b"-wal", "rb") as log:
            for frame in self._frames(log.fileno()):
                pending.append(frame)
                if frame.commits:
                    found.update((f.page, f.sum) for f in pending)
                    self._places.update((f.page, f.offset) for f in pending)
                    self._done = (frame.offset + self._size - _HEADER.size) // (_FRAME.size + self._size)
                    pending.clear()
        return found

    def _frames(self, log: int) -> Iterator[_Frame]:
        """The frames that are not accounted for yet, as far as they belong to this log."""
        header = os.pread(log, _HEADER.size, 0)
        if len(header) < _HEADER.size:
            return
        magic, _, size, _, *salts, one, two = _HEADER.unpack(header)
        order = ">" if magic & 1 else "<"
        if (
            magic & ~1 != _MAGIC
            or size != self._size
            or _chain(0, 0, struct.unpack(f"{order}6I", header[:24])) != (one, two)
        ):
            return  # not a log; SQLite begins a new one
        if salts != self._salts:
            self._salts, self._done = salts, 0
            self._places.clear()
        step = _FRAME.size + self._size
        at = _HEADER.size + self._done * step
        if self._done:
            one, two = _FRAME.unpack(os.pread(log, _FRAME.size, at - step))[4:]
        head, words = struct.Struct(f"{order}2I"), struct.Struct(f"{order}{self._size // 4}I")
        while block := os.pread(log, step * _BLOCK, at):
            for start in range(0, len(block) - step + 1, step):
                page, commits, *seen, first, second = _FRAME.unpack_from(block, start)
                if seen != salts or page == 0:
                    return
                if self._unsure:
                    one, two = _chain(one, two, head.unpack_from(block, start))
                    one, two = _chain(one, two, words.unpack_from(block, start + _FRAME.size))
                    if (one, two) != (first, second):
                        return
                content = memoryview(block)[start + _FRAME.size : start + step]
                yield _Frame(page, commits != 0, at + start + _FRAME.size, _sum(content))
            if len(block) < step * _BLOCK:
                return
            at += len(block)

    # ---- checking them

    def verify(self) -> None:
        """Read the whole file: each page must be what was written, or be in the log. Raises DamageError."""
        if self.state == NONE:
            return
        logged = set(self._fresh()) if self._leftover and self.pending() else set()
        self._salts = []  # they are still to be accounted for
        pages = self.db.execute("PRAGMA page_count").fetchone()[0]
        known: dict[int, list[int]] = {}
        for number, stored in self.db.execute("SELECT first, sums FROM page_sum WHERE first >= 0"):
            known[number] = self._unpack(number, stored)
        for page, found in self._read(min(pages, (max(known, default=-1) + 1) * _ROW)):
            expected = known.get((page - 1) // _ROW)
            if expected is None:
                continue
            wanted = expected[(page - 1) % _ROW]
            if wanted and wanted != found and page not in logged:
                raise self._damage(f"page {page} is not what was written")

    def renew(self) -> None:
        """Make all checksums anew if they are not complete; from a file that was found to be sound."""
        if self.state != NONE:
            return
        self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self.checkpointed()
        pages = self.db.execute("PRAGMA page_count").fetchone()[0]
        own = self._own()
        rows: dict[int, list[int]] = {}
        for page, found in self._read(pages):
            rows.setdefault((page - 1) // _ROW, [0] * _ROW)[(page - 1) % _ROW] = 0 if page in own else found
        self.db.execute("DELETE FROM page_sum WHERE first > ?", (max(rows, default=0),))
        self._write(rows, OPEN)

    def _read(self, pages: int) -> Iterator[tuple[int, int]]:
        """(page, its checksum as the file has it)."""
        for first in range(1, pages + 1, _BLOCK):
            block = memoryview(os.pread(self._file(), self._size * _BLOCK, (first - 1) * self._size))
            for number in range(min(_BLOCK, pages + 1 - first)):
                yield first + number, _sum(block[number * self._size : (number + 1) * self._size])

    def _damage(self, what: str) -> DamageError:
        return DamageError(f"{os.fsdecode(self.path)!r}: damaged system file: {what}")


def _pack(number: int, sums: list[int]) -> bytes:
    body = _SUMS.pack(*sums)
    return _U32.pack(zlib.crc32(body, number)) + body


def _chain(one: int, two: int, words: Iterable[int]) -> tuple[int, int]:
    """The log's own checksum (file format, 4.2) over some more words."""
    pairs = iter(words)
    for first, second in zip(pairs, pairs, strict=True):
        one = (one + first + two) & _MAX
        two = (two + second + one) & _MAX
    return one, two
