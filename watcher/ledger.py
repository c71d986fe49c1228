"""Commands that were carried out, on the disk: a repeated one is answered and not done again, also by the next daemon.

One small SQLite file in the daemon's state directory. A command is noted before it is carried out, so that a daemon that dies
meanwhile does not do it twice; what it did is then not known, and said so.
"""

import contextlib
import logging
import os
import sqlite3
import threading

from comparer.errors import TransientError
from feed.commands import Command

log = logging.getLogger(__name__)
NAME = "commands.db"
_MOST = 100_000  # commands


class Ledger:
    """`begin` before, `finish` after; one commit each, in whatever thread; one waits for the other.

    (Two threads that want the same statement get one and the same from sqlite3, and what one of them binds fails.)
    Until `open`, or if that fails, in memory; `trouble` says why.
    """

    def __init__(self) -> None:
        self.trouble: str | None = None
        self._db = _prepared(":memory:")
        self._alone = threading.Lock()

    def open(self, directory: str) -> None:
        """Remember in a file in `directory`, which is made if it is not there."""
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            path = os.path.join(directory, NAME)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            try:
                self._db = _prepared(path)
            except sqlite3.DatabaseError as error:  # damaged: kept aside, it is only a memory
                os.replace(path, path + ".damaged")
                self.trouble = f"{path!r}: {error}; kept aside"
                log.error("%s", self.trouble)  # noqa: TRY400 - no trace for damage
                self._db = _prepared(path)
        except (OSError, sqlite3.Error) as error:
            self.trouble = f"commands are remembered until the daemon ends only: {directory!r}: {error}"
            log.warning("%s", self.trouble)

    def close(self) -> None:
        self._db.close()

    def earlier(self, command: Command) -> tuple[bool, bytes | None]:
        """Whether it was begun before, and what was answered then; no answer: a daemon ended meanwhile."""
        try:
            with self._alone:
                row = self._db.execute("SELECT reply FROM command WHERE verb = ? AND id = ?", _key(command)).fetchone()
        except sqlite3.Error as error:
            raise TransientError(
                f"whether the command was carried out cannot be told ({error}), so it is not"
            ) from error
        return (False, None) if row is None else (True, row[0])

    def begin(self, command: Command) -> None:
        """Raises TransientError if it cannot be noted: it must not be carried out then."""
        try:
            with self._alone:
                self._db.execute("INSERT INTO command (verb, id) VALUES (?, ?)", _key(command))
        except sqlite3.Error as error:
            raise TransientError(f"the command cannot be remembered ({error}), so it is not carried out") from error

    def finish(self, command: Command, reply: bytes) -> None:
        with contextlib.suppress(sqlite3.Error), self._alone:
            self._db.execute("UPDATE command SET reply = ? WHERE verb = ? AND id = ?", (reply, *_key(command)))
            # by number and not by age: a clock that is set must not make us forget
            self._db.execute("DELETE FROM command WHERE number <= (SELECT max(number) FROM command) - ?", (_MOST,))

    def forget(self, command: Command) -> None:
        """It was refused before it did anything: the same id may try again."""
        with contextlib.suppress(sqlite3.Error), self._alone:
            self._db.execute("DELETE FROM command WHERE verb = ? AND id = ?", _key(command))


def _key(command: Command) -> tuple[str, str]:
    return command.verb, command.id


def _prepared(path: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, timeout=1.0, check_same_thread=False)
    for text in (
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = FULL",
        "CREATE TABLE IF NOT EXISTS command (number INTEGER PRIMARY KEY, verb TEXT, id TEXT, reply BLOB, UNIQUE (verb, id))",
    ):
        db.execute(text).fetchall()
    return db
