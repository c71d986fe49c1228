"""The metadata table: the last snapshot's state in the system file, as a view, and the overlay that becomes the next one."""

import sqlite3
import stat
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cachetools import LRUCache

from comparer.errors import DamageError
from comparer.model import Attr, Ident, Name, file_type

_LENGTHS = struct.Struct("<II")
_CACHED = 16_384  # objects; a generation or an attribute record each
_REMEMBERED = 4096  # objects, some 400 bytes each
_COLUMNS = "gen, mode, size, blocks, uid, gid, nlink, mtime_ns, ctime_ns, btime_ns, rdev, xattrs, target, clone"
_TYPE_BITS = {
    "file": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
}


_I64 = 1 << 63


def store_time(ns: int | None) -> int | bytes | None:
    """A time as SQLite can hold it: XFS and others have times after 2262, which do not fit 64 bits of nanoseconds."""
    if ns is None or -_I64 <= ns < _I64:
        return ns
    return ns.to_bytes(16, "little", signed=True)


def load_time(stored: int | bytes | None) -> int | None:
    return int.from_bytes(stored, "little", signed=True) if isinstance(stored, bytes) else stored


def pack_xattrs(xattrs: tuple[tuple[bytes, bytes], ...]) -> bytes | None:
    """Lengths and bytes of each pair; None for no xattrs."""
    if not xattrs:
        return None
    return b"".join(_LENGTHS.pack(len(name), len(value)) + name + value for name, value in xattrs)


def unpack_xattrs(packed: bytes | None) -> tuple[tuple[bytes, bytes], ...]:
    if not packed:
        return ()
    pairs, at = [], 0
    while at < len(packed):
        name, value = _LENGTHS.unpack_from(packed, at)
        at += _LENGTHS.size
        pairs.append((packed[at : at + name], packed[at + name : at + name + value]))
        at += name + value
    return tuple(pairs)


class _Row(NamedTuple):
    """An object in the table `inode`."""

    gen: int
    attr: Attr
    clone: int | None


class Table:
    """The state in the tables `inode` and `entry`; a view (comparer.model.View) and the place to change it."""

    def __init__(self, db: sqlite3.Connection, root: Ident) -> None:
        self.db = db
        self._root = root
        self._gens: LRUCache[int, int] = LRUCache(_CACHED)
        self._rows: LRUCache[int, _Row] | None = None
        self._names: LRUCache[int, list[Name]] | None = None  # by inode number

    @property
    def root(self) -> Ident:
        return self._root

    # ---- the view

    def attr(self, ident: Ident) -> Attr | None:
        row = self._row(ident.ino)
        return row.attr if row is not None and row.gen == ident.gen else None

    def _row(self, ino: int) -> _Row | None:
        found = self._rows.get(ino) if self._rows is not None else None
        if found is not None:
            return found
        row = self.db.execute(f"SELECT {_COLUMNS} FROM inode WHERE ino = ?", (ino,)).fetchone()  # noqa: S608
        if row is None:
            return None
        gen, mode, size, blocks, uid, gid, nlink, mtime, ctime, btime, rdev, xattrs, target, clone = row
        if type(mtime) is bytes or type(ctime) is bytes or type(btime) is bytes:
            mtime, ctime, btime = load_time(mtime), load_time(ctime), load_time(btime)
        kind, permissions = file_type(mode), stat.S_IMODE(mode)
        attr = Attr(
            kind, size, blocks, permissions, uid, gid, nlink, mtime, ctime, btime, rdev, unpack_xattrs(xattrs), target
        )
        found = _Row(gen, attr, clone)
        if self._rows is not None:
            self._rows[ino] = found
        return found

    def remember(self) -> None:
        """From now on what was asked for stays in memory: all that changes the table must do so by `put` and the like."""
        self._rows, self._names = LRUCache(_REMEMBERED), LRUCache(_REMEMBERED)

    def several(self) -> list[Ident]:
        """What has more than one name here, and one by its link count: seen at both ends of a rename, each at its time."""
        rows = self.db.execute(
            "SELECT ino, gen FROM (SELECT ino FROM entry GROUP BY ino HAVING COUNT(*) > 1) JOIN inode USING (ino) WHERE nlink < 2"
        )
        return [Ident(*row) for row in rows.fetchall()]

    def current(self, ino: int) -> Ident | None:
        """The object that has this inode number in the state."""
        if self._rows is not None:  # its attributes will be asked for
            row = self._row(ino)
            return None if row is None else Ident(ino, row.gen)
        gen = self._gen(ino)
        return None if gen is None else Ident(ino, gen)

    def _gen(self, ino: int) -> int | None:
        row = self._rows.get(ino) if self._rows is not None else None
        if row is not None:
            return row.gen
        gen = self._gens.get(ino)
        if gen is None:
            row = self.db.execute("SELECT gen FROM inode WHERE ino = ?", (ino,)).fetchone()
            if row is None:
                return None
            gen = self._gens[ino] = row[0]
        return gen

    def names(self, ident: Ident) -> Iterable[Name]:
        if self._gen(ident.ino) != ident.gen:
            return []
        found = self._names.get(ident.ino) if self._names is not None else None
        if found is None:
            rows = self.db.execute("SELECT parent, name FROM entry WHERE ino = ?", (ident.ino,)).fetchall()
            found = [Name(self._known(parent), name) for parent, name in rows]
            if self._names is not None:
                self._names[ident.ino] = found
        return found

    def child(self, parent: Ident, name: bytes) -> Ident | None:
        if self._gen(parent.ino) != parent.gen:
            return None
        row = self.db.execute("SELECT ino FROM entry WHERE parent = ? AND name = ?", (parent.ino, name)).fetchone()
        return self._known(row[0]) if row else None

    def children(self, parent: Ident) -> Iterable[tuple[bytes, Ident]]:
        if self._gen(parent.ino) != parent.gen:
            return []
        rows = self.db.execute("SELECT name, ino FROM entry WHERE parent = ?", (parent.ino,)).fetchall()
        return [(name, self._known(ino)) for name, ino in rows]

    def _known(self, ino: int) -> Ident:
        gen = self._gen(ino)
        if gen is None:
            raise DamageError(f"damaged system file: no inode {ino}, which a name points to")
        return Ident(ino, gen)

    def clone(self, ident: Ident) -> int | None:
        """The snapshot that holds the content of a file, None if none does."""
        row = self._row(ident.ino)
        return row.clone if row is not None and row.gen == ident.gen else None

    def again(self) -> Iterator[tuple[Ident, bytes | None]]:
        """What the last snapshot wanted to be looked at again: objects (name None) and entries of a directory."""
        for ino, gen, name in self.db.execute("SELECT ino, gen, name FROM again").fetchall():
            yield Ident(ino, gen), name

    # ---- changing it

    def _forget(self, ino: int) -> None:
        self._gens.pop(ino, None)
        if self._rows is not None:
            self._rows.pop(ino, None)

    def _forget_names(self) -> None:
        if self._names:
            self._names.clear()

    def put(self, ident: Ident, attr: Attr, clone: int | None) -> None:
        self._forget(ident.ino)
        mode = attr.mode | _TYPE_BITS[attr.type]
        self.db.execute(
            "INSERT OR REPLACE INTO inode VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *ident, mode, attr.size, attr.blocks, attr.uid, attr.gid, attr.nlink,
                store_time(attr.mtime_ns), store_time(attr.ctime_ns), store_time(attr.btime_ns),
                attr.rdev, pack_xattrs(attr.xattrs), attr.target, clone,
            ),
        )  # fmt: skip

    def set_clone(self, ident: Ident, clone: int | None) -> None:
        self._forget(ident.ino)
        self.db.execute("UPDATE inode SET clone = ? WHERE ino = ? AND gen = ?", (clone, *ident))

    def drop(self, ident: Ident) -> None:
        self._forget(ident.ino)
        self.db.execute("DELETE FROM inode WHERE ino = ? AND gen = ?", ident)

    def point(self, name: Name, ident: Ident) -> None:
        self._forget_names()
        self.db.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", (name.parent.ino, name.name, ident.ino))

    def unpoint(self, name: Name) -> None:
        self._forget_names()
        self.db.execute("DELETE FROM entry WHERE parent = ? AND name = ?", (name.parent.ino, name.name))

    def set_again(self, objects: Iterable[Ident], names: Iterable[Name]) -> None:
        self.db.execute("DELETE FROM again")
        self.db.executemany("INSERT OR IGNORE INTO again VALUES (?, ?, NULL)", objects)
        self.db.executemany("INSERT OR IGNORE INTO again VALUES (?, ?, ?)", [(*n.parent, n.name) for n in names])

    def clear(self) -> None:
        self._gens.clear()
        if self._rows is not None:
            self._rows.clear()
        self._forget_names()
        for table in ("inode", "entry", "again"):
            self.db.execute(f"DELETE FROM {table}")  # noqa: S608 - the three names above


class Overlay:
    """A state that is another one but for some objects and entries; a view itself. None means gone."""

    def __init__(self, below: Table, attrs: dict[Ident, Attr | None], entries: dict[Name, Ident | None]) -> None:
        self.below = below
        self.attrs = attrs
        self.entries = entries
        self._added: dict[Ident, set[Name]] = defaultdict(set)
        self._by_parent: dict[Ident, dict[bytes, Ident | None]] = defaultdict(dict)
        for name, ident in entries.items():
            self._by_parent[name.parent][name.name] = ident
            if ident is not None:
                self._added[ident].add(name)

    @property
    def root(self) -> Ident:
        return self.below.root

    def attr(self, ident: Ident) -> Attr | None:
        if ident in self.attrs:
            return self.attrs[ident]
        return self.below.attr(ident)

    def names(self, ident: Ident) -> Iterable[Name]:
        if self.attrs.get(ident, ident) is None:
            return []
        kept = [n for n in self.below.names(ident) if n not in self.entries]
        return [*kept, *self._added.get(ident, ())]

    def child(self, parent: Ident, name: bytes) -> Ident | None:
        key = Name(parent, name)
        if key in self.entries:
            return self.entries[key]
        return self.below.child(parent, name)

    def children(self, parent: Ident) -> Iterable[tuple[bytes, Ident]]:
        changed = self._by_parent.get(parent, {})
        kept = [(n, i) for n, i in self.below.children(parent) if n not in changed]
        return kept + [(n, i) for n, i in changed.items() if i is not None]
