"""The SQLite database in a system file: opened by one process, checked, brought to our schema, written in transactions.

Its errors are ours: damage, a passing trouble of the disk, a lock somebody else holds. What it holds is for systemfile.py to say.
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self
from urllib.parse import quote

from comparer.errors import DamageError, OperatorError, TransientError

from .pagesums import PageSums

VERSION = 3
_SCHEMA = {n: (Path(__file__).parent / "schema" / f"{n:03}.sql").read_text() for n in range(1, VERSION + 1)}
_LOG = 4 << 20  # bytes of the write-ahead log from which it is copied to the file in the middle of a visit


@contextlib.contextmanager
def translated(path: bytes, *, opening: bool = False) -> Iterator[None]:
    """SQLite's errors as ours: damage, a passing trouble of the disk, or a lock somebody else holds.

    `opening`: what SQLite does not understand is not our SQL, but what it finds in the file.
    """
    name = os.fsdecode(path)
    try:
        yield
    except UnicodeDecodeError as error:  # a name in the schema, in SQLite's message about it
        raise DamageError(f"{name!r}: damaged system file: its text is not UTF-8") from error
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", None)
        primary = code & 0xFF if code is not None else None
        if primary == sqlite3.SQLITE_CORRUPT:
            _read_all(path, error)
        if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA):
            raise DamageError(f"{name!r}: damaged system file: {error}") from error
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise OperatorError(
                f"{name!r} is in use by another process: one snapfeed daemon per partition; stop the other"
            ) from error
        if primary in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY):
            raise TransientError(f"{name!r}: {error}") from error
        if isinstance(error, sqlite3.OperationalError) and "no such table" in str(error):
            raise DamageError(f"{name!r}: damaged system file: {error}") from error
        if opening and primary in (None, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_CONSTRAINT):
            raise DamageError(f"{name!r}: damaged system file: {error}") from error
        raise


def _read_all(path: bytes, cause: Exception) -> None:
    """SQLite says "malformed" also where the disk does not give it a page (os_unix.c: EIO): raises TransientError then."""
    for suffix in (b"", b"-wal"):
        try:
            with open(path + suffix, "rb") as file:
                at = 0
                while block := os.pread(file.fileno(), 1 << 20, at):
                    at += len(block)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise TransientError(f"{os.fsdecode(path)!r}: {error.strerror}") from cause


@contextlib.contextmanager
def _kept(log: bytes) -> Iterator[None]:
    """While a damaged file is closed: SQLite would copy the log to it, remove it, and so hide that all else is damaged."""
    other = log + b".kept"
    with contextlib.suppress(OSError):
        os.link(log, other, follow_symlinks=False)
    yield
    with contextlib.suppress(OSError):
        os.rename(other, log)
        os.unlink(other)  # it is still there if both were one file


class Database:
    """An open database. Not shared between threads. Everything may raise DamageError or TransientError."""

    def __init__(self, connection: sqlite3.Connection, path: bytes) -> None:
        self.db = connection
        self.path = path
        self._sums: PageSums | None = None

    @classmethod
    def open(cls, path: bytes, *, check: bool = False, opened_is: Callable[[], None] = lambda: None) -> Self:
        """Open one that exists. `check` reads it all and raises DamageError unless it is sound.

        `opened_is` is called when the file is open and nothing of it was read or written; what it raises closes it.

        Raises OperatorError if it was written by a newer snapfeed, TransientError if it cannot be opened.
        """
        with translated(path, opening=True):
            leftover = os.path.exists(path + b"-wal")
            opened = cls(connect(path, "rw"), path)
            sums: PageSums | None = None
            try:
                opened_is()
                opened._prepare()
                version = opened.db.execute("PRAGMA user_version").fetchone()[0]
                if version > VERSION:
                    opened._doubt(leftover=leftover)
                    raise OperatorError(
                        f"{os.fsdecode(path)!r} has schema version {version}, known here is up to {VERSION}: update snapfeed"
                    )
                if version < 1:
                    raise DamageError(f"{os.fsdecode(path)!r}: not a snapfeed system file")
                opened._migrate(version)
                sums = PageSums(opened.db, path, leftover=leftover)
                sums.begin()
                if check:
                    sums.verify()
                    opened._check()
                    sums.renew()
                opened._check_content()
            except BaseException:
                with _kept(path + b"-wal"):
                    opened.db.close()
                if sums is not None:
                    sums.close()
                raise
        opened._sums = sums
        return opened

    def _doubt(self, *, leftover: bool) -> None:
        """Before a file is left alone as one of a newer snapfeed: raises DamageError if it is one of ours, and damaged."""
        sums = PageSums(self.db, self.path, leftover=leftover)
        try:
            try:
                sums.begin()
            except sqlite3.OperationalError:  # no checksums, or not as we know them
                self._check()
            else:
                sums.verify()
        finally:
            with _kept(self.path + b"-wal"):
                self.db.close()
            sums.close()

    def close(self) -> None:
        """Raises DamageError."""
        sums, self._sums = self._sums, None
        try:
            if sums is not None:
                # what cannot be noted now is found missing by the next check, which makes it anew
                with contextlib.suppress(TransientError, OperatorError, OSError), translated(self.path):
                    sums.seal()
        finally:
            self.db.close()
            if sums is not None:
                sums.close()

    def checkpoint(self) -> None:
        """Copy the write-ahead log to the file, and empty it."""
        with translated(self.path):
            if self._sums is not None:
                self._sums.seal()
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            if self._sums is not None and not self._sums.pending():
                self._sums.checkpointed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL", "cache_size = -8000"):
            self.db.execute(f"PRAGMA {pragma}")
        self.db.execute("PRAGMA wal_autocheckpoint = 0")  # not before the checksums: see pagesums.py

    def _migrate(self, version: int) -> None:
        for number in range(version + 1, VERSION + 1):
            self.db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA[number]}; PRAGMA user_version = {number}; COMMIT")

    def _check(self) -> None:
        found = [row[0] for row in self.db.execute("PRAGMA integrity_check(3)")]
        if found != ["ok"]:
            raise DamageError(f"{os.fsdecode(self.path)!r}: damaged system file: {'; '.join(map(str, found))}")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, durable when it ends."""
        with translated(self.path):
            self.db.execute("BEGIN IMMEDIATE")
            try:
                if self._sums is not None:
                    self._sums.writing()
                yield
                self.db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self.db.execute("ROLLBACK")
                if self._sums is not None:
                    self._sums.wrote(committed=False)
                raise
        if self._sums is not None:
            self._sums.wrote(committed=True)
            with contextlib.suppress(TransientError, OperatorError, OSError):  # it is committed, whatever comes
                if self._sums.pending() > _LOG:
                    self.checkpoint()

    def _check_content(self) -> None:
        """Raises DamageError if what every file must hold is not there."""


def connect(path: bytes, mode: str) -> sqlite3.Connection:
    uri = f"file:{quote(path)}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=2.0, isolation_level=None, cached_statements=64)
