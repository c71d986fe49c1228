"""What a replica knows: the tree it holds, how far it is, and the diff under way. SQLite, `DEST/.snapfeed-replica/state.db`.

The tree is a view (`comparer.model.View`), so that a baseline is compared with it like any other state. Strict: a change that
does not fit the tree raises DamageError before anything was done about it.

A diff under way is kept here whole, so that it is finished after a crash even if the feed never sends it again (it may come
squashed with others). Its steps are committed one by one without waiting for the disk (a killed process loses none of
them); the beginning of a diff waits for the disk, and its end comes after the files are on it.
"""

import contextlib
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from comparer.errors import DamageError, OperatorError
from comparer.model import Attr, Change, FileType, Ident, Name, Op
from feed.escape import printable

VERSION = 1
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE object (
    id TEXT PRIMARY KEY, type TEXT NOT NULL, size INTEGER NOT NULL, blocks INTEGER NOT NULL, mode INTEGER NOT NULL,
    uid INTEGER NOT NULL, gid INTEGER NOT NULL, nlink INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
    btime_ns INTEGER, rdev TEXT, xattrs BLOB, target BLOB,
    content BLOB,                      -- where the source keeps its content, as the feed said last
    stale INTEGER NOT NULL DEFAULT 0,  -- its content is not that of this state
    absent INTEGER NOT NULL DEFAULT 0, -- it could not be made here
    undressed INTEGER NOT NULL DEFAULT 0, -- a directory whose attributes are to be set again at the end of the diff
    flaw TEXT                          -- what of it could not be had here, for people
) WITHOUT ROWID;
CREATE INDEX object_stale ON object (id) WHERE stale;
CREATE INDEX object_undressed ON object (id) WHERE undressed;
CREATE INDEX object_flaw ON object (id) WHERE flaw IS NOT NULL;
CREATE TABLE name (parent TEXT NOT NULL, name BLOB NOT NULL, id TEXT NOT NULL, PRIMARY KEY (parent, name)) WITHOUT ROWID;
CREATE INDEX name_id ON name (id);
CREATE TABLE pending (number INTEGER PRIMARY KEY, count INTEGER NOT NULL, body BLOB NOT NULL);
"""
_COLUMNS = "type, size, blocks, mode, uid, gid, nlink, mtime_ns, ctime_ns, btime_ns, rdev, xattrs, target"
_BATCH = 1000  # changes in a row of `pending`


@dataclass(frozen=True, slots=True)
class Pending:
    """The diff under way: what it leads to, whether it was made of a baseline, changes done and in all."""

    epoch: str
    seq: int
    snapshot: str | None
    baseline: bool
    done: int
    count: int


@dataclass(frozen=True, slots=True)
class Known:
    """An object besides its attributes."""

    attr: Attr
    content: bytes | None
    stale: bool
    absent: bool


class ReplicaState:
    """Opened for as long as the replica is; nobody else may open it meanwhile (OperatorError)."""

    def __init__(self, directory_fd: int) -> None:
        path = f"/proc/self/fd/{directory_fd}/state.db"
        try:
            self.db = sqlite3.connect(path, isolation_level=None, timeout=0.5, check_same_thread=False)
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL", "temp_store=MEMORY"):
                self.db.execute(f"PRAGMA {pragma}")
            with self.transaction():
                if not self.db.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in _SCHEMA.split(";\n"):
                        self.db.execute(statement)
                    self["version"] = VERSION
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise OperatorError(
                    "another snapfeed replicate is at work in this directory; stop one of the two"
                ) from error
            raise DamageError(f".snapfeed-replica/state.db: {error}") from error
        except sqlite3.DatabaseError as error:
            raise DamageError(
                f".snapfeed-replica/state.db: {error}; begin again with an empty directory (the replica's is kept as it is)"
            ) from error
        if self["version"] != VERSION:
            raise OperatorError(
                f".snapfeed-replica/state.db is of version {self['version']}, not {VERSION}; use the snapfeed that made it"
            )

    def close(self) -> None:
        self.db.close()

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:
        """All or nothing. `durable`: on the disk when this returns."""
        if durable:
            self.db.execute("PRAGMA synchronous=FULL")
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        else:
            self.db.execute("COMMIT")
        finally:
            if durable:
                self.db.execute("PRAGMA synchronous=NORMAL")

    def __getitem__(self, key: str) -> Any:
        row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def __setitem__(self, key: str, value: Any) -> None:
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @property
    def position(self) -> tuple[str, int] | None:
        """(epoch, seq) of the last diff that was applied whole."""
        return None if self["epoch"] is None else (self["epoch"], self["seq"])

    # ---- the diff under way

    def begin(
        self, epoch: str, seq: int, snapshot: str | None, documents: Iterable[dict[str, Any]], *, baseline: bool
    ) -> None:
        """Keep a diff as the one under way; within a transaction."""
        batch: list[dict[str, Any]] = []
        number = count = 0

        def write() -> None:
            self.db.execute(
                "INSERT INTO pending VALUES (?, ?, ?)", (number, len(batch), zlib.compress(orjson.dumps(batch), 1))
            )

        for document in documents:
            batch.append(document)
            count += 1
            if len(batch) == _BATCH:
                write()
                number, batch = number + 1, []
        if batch:
            write()
        self["pending"] = orjson.dumps([epoch, seq, snapshot, baseline, count])
        self["done"] = 0

    def pending(self) -> Pending | None:
        head = self["pending"]
        if head is None:
            return None
        epoch, seq, snapshot, baseline, count = orjson.loads(head)
        return Pending(epoch, seq, snapshot, baseline, self["done"], count)

    def pending_documents(self, begin: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index, change) of the diff under way from `begin` on; may be read while `pending` and other tables are written."""
        first = 0
        for number, count in self.db.execute("SELECT number, count FROM pending ORDER BY number").fetchall():
            if first + count > begin:
                (body,) = self.db.execute("SELECT body FROM pending WHERE number = ?", (number,)).fetchone()
                for index, document in enumerate(orjson.loads(zlib.decompress(body)), first):
                    if index >= begin:
                        yield index, document
            first += count

    def finish(self, pending: Pending) -> None:
        """The diff under way was applied whole; within a transaction."""
        self.db.execute("DELETE FROM pending")
        self.db.execute("DELETE FROM meta WHERE key IN ('pending', 'done')")
        self["epoch"], self["seq"] = pending.epoch, pending.seq

    # ---- reading: a View

    @property
    def root(self) -> Ident:
        found = self["root"]
        if found is None:
            raise DamageError("the replica has no root yet: it begins with a baseline")
        return parse(found)

    def known(self, ident: Ident) -> Known | None:
        row = self.db.execute(
            f"SELECT {_COLUMNS}, content, stale, absent FROM object WHERE id = ?",  # noqa: S608 - a constant
            (str(ident),),
        ).fetchone()
        return None if row is None else Known(_attr(row), row[13], bool(row[14]), bool(row[15]))

    def attr(self, ident: Ident) -> Attr | None:
        found = self.known(ident)
        return None if found is None else found.attr

    def names(self, ident: Ident) -> list[Name]:
        rows = self.db.execute("SELECT parent, name FROM name WHERE id = ?", (str(ident),)).fetchall()
        return [Name(parse(parent), name) for parent, name in rows]

    def child(self, parent: Ident, name: bytes) -> Ident | None:
        row = self.db.execute("SELECT id FROM name WHERE parent = ? AND name = ?", (str(parent), name)).fetchone()
        return None if row is None else parse(row[0])

    def children(self, parent: Ident) -> list[tuple[bytes, Ident]]:
        rows = self.db.execute("SELECT name, id FROM name WHERE parent = ? ORDER BY name", (str(parent),)).fetchall()
        return [(name, parse(ident)) for name, ident in rows]

    def path(self, name: Name) -> bytes:
        parts = [name.name]
        at, root = name.parent, self.root
        while at != root:
            ((at, part),) = self.names(at)
            parts.append(part)
        return b"/".join(reversed(parts))

    def paths(self, ident: Ident) -> list[bytes]:
        """Every path of an object; of the root b""."""
        return [b""] if ident == self.root else sorted(self.path(name) for name in self.names(ident))

    def find(self, path: bytes) -> Ident | None:
        """What a path leads to."""
        at: Ident | None = self.root
        for part in path.split(b"/") if path else ():
            if at is None:
                return None
            at = self.child(at, part)
        return at

    def idents(self, where: str = "1") -> list[Ident]:
        """Of all objects, or of those for which a flag (`stale`, `undressed`, `flaw IS NOT NULL`) holds."""
        return [parse(row[0]) for row in self.db.execute(f"SELECT id FROM object WHERE {where}")]  # noqa: S608 - ours

    def count(self, where: str = "1") -> int:
        return int(self.db.execute(f"SELECT count(*) FROM object WHERE {where}").fetchone()[0])  # noqa: S608 - ours

    def flaw(self, ident: Ident) -> str | None:
        row = self.db.execute("SELECT flaw FROM object WHERE id = ?", (str(ident),)).fetchone()
        return None if row is None else row[0]

    def flaws(self) -> list[tuple[Ident, str]]:
        rows = self.db.execute("SELECT id, flaw FROM object WHERE flaw IS NOT NULL").fetchall()
        return [(parse(ident), flaw) for ident, flaw in rows]

    # ---- writing: within a transaction

    def mark(self, ident: Ident, **flags: int | str | None) -> None:
        """Set `stale`, `absent`, `undressed`, `flaw` of an object."""
        fields = ", ".join(f"{flag} = ?" for flag in flags)
        self.db.execute(f"UPDATE object SET {fields} WHERE id = ?", (*flags.values(), str(ident)))  # noqa: S608 - ours

    def set_content(self, ident: Ident, content: bytes | None) -> None:
        self.db.execute("UPDATE object SET content = ? WHERE id = ?", (content, str(ident)))

    def put(self, ident: Ident, attr: Attr) -> None:
        """Attributes of an object, new or known."""
        values = (
            attr.type.value, attr.size, attr.blocks, attr.mode, attr.uid, attr.gid, attr.nlink, attr.mtime_ns, attr.ctime_ns,
            attr.btime_ns, None if attr.rdev is None else str(attr.rdev), _pack(attr.xattrs), attr.target,
        )  # fmt: skip
        updates = ", ".join(f"{column} = excluded.{column}" for column in _COLUMNS.split(", "))
        self.db.execute(
            f"INSERT INTO object (id, {_COLUMNS}) VALUES ({', '.join('?' * 14)}) ON CONFLICT (id) DO UPDATE SET {updates}",  # noqa: S608 - ours
            (str(ident), *values),
        )

    def forget_root(self) -> None:
        """Nothing but the root is left, and another one takes its place."""
        self.db.execute("DELETE FROM meta WHERE key IN ('root', 'another_root')")
        self.db.execute("DELETE FROM object")

    def transition(self, change: Change) -> None:
        """One step of the tree. Raises DamageError, naming the path, if it does not fit what is there."""
        known = self.attr(change.ident)
        if change.path == b"":
            self._root_changes(change)
        else:
            if (change.op is Op.CREATE) != (known is None):
                raise wrong(change, "its id lives already" if known else "no such object is known")
            if known is not None and known.type is not change.type:
                raise wrong(change, f"it is a {known.type.value}, not a {change.type.value}")
            self._names_change(change)
        if change.op is Op.DELETE:
            self.db.execute("DELETE FROM object WHERE id = ?", (str(change.ident),))
        elif change.after is not None:
            after = change.after
            if known is not None and known.target != after.target:
                raise wrong(change, "a symbolic link cannot change its target")
            self.put(change.ident, after)

    def _root_changes(self, change: Change) -> None:
        if change.op is not Op.MODIFY or change.type is not FileType.DIR or change.after is None:
            raise wrong(change, "the root can only be modified, and is a directory")
        if self["root"] is None:
            self["root"] = str(change.ident)
        elif self["root"] != str(change.ident):
            raise wrong(change, "it is another root")

    def _names_change(self, change: Change) -> None:
        match change.op:
            case Op.CREATE:
                if change.after is None:
                    raise wrong(change, "it has no attributes")
                self._enter(change)
            case Op.LINK:
                self._expect(change, change.from_path)
                if change.type is FileType.DIR:
                    raise wrong(change, "a directory has one name")
                self._enter(change)
            case Op.RENAME:
                old = self._expect(change, change.from_path)
                self._leave(old)
                self._enter(change)
                if change.type is FileType.DIR:
                    self._refuse_circle(change)
            case Op.UNLINK | Op.DELETE:
                name = self._expect(change, change.path)
                if change.type is FileType.DIR and self._holds(change.ident):
                    raise wrong(change, "the directory is not empty")
                self._leave(name)
                if bool(self.names(change.ident)) != (change.op is Op.UNLINK):
                    raise wrong(change, "unlink is for a further name, delete for the last one")
            case Op.MODIFY:
                self._expect(change, change.path)

    def _holds(self, ident: Ident) -> bool:
        return self.db.execute("SELECT 1 FROM name WHERE parent = ?", (str(ident),)).fetchone() is not None

    def _expect(self, change: Change, path: bytes | None) -> Name:
        if path:
            directory, _, last = path.rpartition(b"/")
            parent = self.find(directory)
            if parent is not None and self.child(parent, last) == change.ident:
                return Name(parent, last)
        raise wrong(change, "that name is another object, or none")

    def _enter(self, change: Change) -> None:
        directory, _, last = change.path.rpartition(b"/")
        parent = self.find(directory)
        attr = None if parent is None else self.attr(parent)
        if parent is None or attr is None or attr.type is not FileType.DIR:
            raise wrong(change, "what it is in is no directory")
        if self.child(parent, last) is not None:
            raise wrong(change, "the name is taken")
        self.db.execute("INSERT INTO name VALUES (?, ?, ?)", (str(parent), last, str(change.ident)))
        self.mark(parent, undressed=1)

    def _leave(self, name: Name) -> None:
        self.db.execute("DELETE FROM name WHERE parent = ? AND name = ?", (str(name.parent), name.name))
        self.mark(name.parent, undressed=1)

    def _refuse_circle(self, change: Change) -> None:
        root = self.root
        (name,) = self.names(change.ident)
        at = name.parent
        while at != root:
            if at == change.ident:
                raise wrong(change, "a directory inside itself")
            ((at, _),) = self.names(at)


def wrong(change: Change, why: str) -> DamageError:
    return DamageError(f"{change.op.value} {printable(change.path)}: {why}")


def parse(text: str) -> Ident:
    ino, _, gen = text.partition(".")
    return Ident(int(ino), int(gen))


def _pack(xattrs: tuple[tuple[bytes, bytes], ...]) -> bytes | None:
    return orjson.dumps([[name.hex(), value.hex()] for name, value in xattrs]) if xattrs else None


def _attr(row: tuple[Any, ...]) -> Attr:
    xattrs = () if row[11] is None else tuple((bytes.fromhex(n), bytes.fromhex(v)) for n, v in orjson.loads(row[11]))
    size, blocks, mode, uid, gid, nlink, mtime_ns, ctime_ns, btime_ns = row[1:10]
    rdev = None if row[10] is None else int(row[10])
    times = (mtime_ns, ctime_ns, btime_ns)
    return Attr(FileType(row[0]), size, blocks, mode, uid, gid, nlink, *times, rdev, xattrs, row[12])


def open_state(directory_fd: int) -> ReplicaState:
    """The state in an open directory, made if there is none. Raises OperatorError (in use, too new) and DamageError."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(b"state.db", dir_fd=directory_fd, follow_symlinks=False)
        if found.st_nlink != 1 or (found.st_mode & 0o170000) != 0o100000:
            raise DamageError(".snapfeed-replica/state.db is not the file that a replica made; remove it")
    return ReplicaState(directory_fd)
