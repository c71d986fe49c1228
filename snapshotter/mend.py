"""A metadata table of looks at different moments made a tree again: what does not fit is left out, and is to be looked at."""

import sqlite3
from collections.abc import Iterable

from comparer.dirty import Dirty
from comparer.model import Ident, Name

_DIR = "mode & 61440 = 16384"
_NOTHING = """
SELECT DISTINCT ino FROM entry INDEXED BY entry_of WHERE ino NOT IN (SELECT ino FROM inode)
"""
_REACHED = """
WITH RECURSIVE reached(ino) AS (VALUES (?) UNION SELECT place.ino FROM reached JOIN place ON place.parent = reached.ino)
SELECT ino FROM place WHERE ino NOT IN (SELECT ino FROM reached)
"""
_NAMED = "SELECT count(*) FROM (SELECT DISTINCT ino FROM entry INDEXED BY entry_of) WHERE ino != ?"
_ALL = "SELECT count(*) FROM inode WHERE ino != ?"
_DELETE = "DELETE FROM inode WHERE ino != ? AND NOT EXISTS (SELECT 1 FROM entry WHERE entry.ino = inode.ino)"


def mend(db: sqlite3.Connection, root: Ident) -> Dirty:
    """Every name leads to an object, every object but the root has a name, every directory one, all hang on the root.

    Returns the names that were dropped from directories that stay: what is there now is to be looked at. From a table that is a
    tree already, nothing is dropped but objects without a name.
    """
    dropped = _Dropped(db)
    for (ino,) in db.execute(_NOTHING).fetchall():
        dropped.names(db.execute("SELECT parent, name FROM entry WHERE ino = ?", (ino,)))
    db.execute("CREATE TEMP TABLE place (ino INTEGER PRIMARY KEY, parent INTEGER NOT NULL)")
    try:
        _one_place_each(db, dropped)
        db.execute("CREATE INDEX temp.place_of ON place (parent)")
        for (ino,) in db.execute(_REACHED, (root.ino,)).fetchall():
            if ino != root.ino:
                dropped.directory(ino)
    finally:
        db.execute("DROP TABLE temp.place")
    # every name leads to an object now: as many with a name as there are means that all have one
    if db.execute(_NAMED, (root.ino,)).fetchone() != db.execute(_ALL, (root.ino,)).fetchone():
        db.execute(_DELETE, (root.ino,))
    return dropped.dirty(db)


def _one_place_each(db: sqlite3.Connection, dropped: "_Dropped") -> None:
    """Fill `place`; a directory that moved meanwhile was seen under several names, one of which will do for now."""
    places = f"SELECT inode.ino, parent, name FROM inode CROSS JOIN entry ON entry.ino = inode.ino WHERE {_DIR}"  # noqa: S608
    db.execute(f"INSERT OR IGNORE INTO place SELECT ino, parent FROM ({places})")  # noqa: S608
    count = db.execute(f"SELECT count(*) FROM ({places})").fetchone()[0]  # noqa: S608
    if count != db.execute("SELECT count(*) FROM place").fetchone()[0]:
        kept: set[int] = set()
        for ino, parent, name in db.execute(places).fetchall():
            here = db.execute("SELECT parent FROM place WHERE ino = ?", (ino,)).fetchone()[0]
            if here == parent and ino not in kept:
                kept.add(ino)
            else:
                dropped.names([(parent, name)])
    # a directory without any name hangs nowhere
    db.execute(
        f"INSERT INTO place SELECT ino, -1 FROM inode WHERE {_DIR} AND ino NOT IN (SELECT ino FROM place)"  # noqa: S608
    )


class _Dropped:
    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self._names: list[tuple[int, bytes]] = []

    def names(self, rows: Iterable[tuple[int, bytes]]) -> None:
        found = list(rows)
        self._names += found
        self.db.executemany("DELETE FROM entry WHERE parent = ? AND name = ?", found)

    def directory(self, ino: int) -> None:
        """A directory that hangs nowhere, and the names in it."""
        self.names(self.db.execute("SELECT parent, name FROM entry WHERE ino = ?", (ino,)))
        self.db.execute("DELETE FROM entry WHERE parent = ?", (ino,))
        self.db.execute("DELETE FROM inode WHERE ino = ?", (ino,))

    def dirty(self, db: sqlite3.Connection) -> Dirty:
        found = Dirty()
        for parent, name in self._names:
            row = db.execute("SELECT gen FROM inode WHERE ino = ?", (parent,)).fetchone()
            if row is not None:
                found.names.add(Name(Ident(parent, row[0]), name))
        return found
