"""Fingerprints of what bulkstat said of runs of inodes when that was last found to be what the metadata table says.

A reconcile whose records have the same fingerprint need not look into the table for that run. Triggers drop a run's fingerprint
with any change of the table to an inode in it, so one that is there is never older than the table.
"""

import sqlite3

RUN_BITS = 12  # a run: 4,096 inode numbers, some hundreds of which are in use
_COMPARED = (
    "gen, mode, size, uid, gid, nlink, mtime_ns, ctime_ns, btime_ns"  # not clone, xattrs, target: ctime covers those
)

_TABLE = "CREATE TABLE IF NOT EXISTS fingerprint (run INTEGER PRIMARY KEY, digest BLOB NOT NULL)"
_DROP = f"BEGIN DELETE FROM fingerprint WHERE run = %s.ino >> {RUN_BITS}; END"  # noqa: S608 - our own constants
_TRIGGERS = {
    "fingerprint_insert": f"AFTER INSERT ON inode {_DROP % 'new'}",
    "fingerprint_delete": f"AFTER DELETE ON inode {_DROP % 'old'}",
    "fingerprint_update": f"AFTER UPDATE OF {_COMPARED} ON inode {_DROP % 'new'}",
}


class Fingerprints:
    """The table `fingerprint` of a system file; inside a transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        db.execute(_TABLE)
        self.resume()

    def pause(self) -> None:
        """For filling the table: forget all, and let the triggers rest until `resume`."""
        for name in _TRIGGERS:
            self.db.execute(f"DROP TRIGGER IF EXISTS {name}")
        self.db.execute("DELETE FROM fingerprint")

    def resume(self) -> None:
        for name, what in _TRIGGERS.items():
            self.db.execute(f"CREATE TRIGGER IF NOT EXISTS {name} {what}")

    def all(self) -> dict[int, bytes]:
        """The fingerprint of each run; a run's number is that of its inodes without the lowest RUN_BITS bits."""
        return dict(self.db.execute("SELECT run, digest FROM fingerprint"))

    def put(self, run: int, digest: bytes) -> None:
        self.db.execute("INSERT OR REPLACE INTO fingerprint VALUES (?, ?)", (run, digest))
