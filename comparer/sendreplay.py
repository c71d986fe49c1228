"""Follows the paths of a send stream to say which objects it touches. Pure: the old state comes in as a function.

A stream speaks in paths as they are at that point of its replay, orphan names (`o<ino>-<gen>-<n>`) included. `Replay` keeps
the entries that differ from the old state, by (directory, name), so that a renamed directory costs nothing below it. What an
object *is* afterwards is not read from the stream: the new state is asked for it. Source: fs/btrfs/send.c.
"""

import re
from collections.abc import Callable

from .errors import DamageError
from .model import Ident, Range
from .sendstream import Attribute, Cmd, Command

_ORPHAN = re.compile(rb"o([0-9]+)-([0-9]+)-[0-9]+")  # gen_unique_name()
_CREATE = frozenset({Cmd.MKFILE, Cmd.MKDIR, Cmd.MKNOD, Cmd.MKFIFO, Cmd.MKSOCK, Cmd.SYMLINK})
_REMOVE = frozenset({Cmd.UNLINK, Cmd.RMDIR})
_NOTHING = frozenset({Cmd.SUBVOL, Cmd.SNAPSHOT, Cmd.END})
# commands that change content, and the attribute that holds the length of the change
_CONTENT = {Cmd.UPDATE_EXTENT: Attribute.SIZE, Cmd.CLONE: Attribute.CLONE_LEN}


class Replay:
    """Takes the commands in order; afterwards `touched` and `changed` say what the stream was about.

    `lookup(directory, name)` is the old state; `created(ino)` the identity of an inode in the new state, asked where the stream
    does not tell the generation. `touched`: every object that the stream names, and the directories of every entry that comes or
    goes. `changed`: of each file the ranges that the stream says were written or turned into a hole, in stream order.
    """

    def __init__(
        self, root: Ident, lookup: Callable[[Ident, bytes], Ident | None], created: Callable[[int], Ident | None]
    ) -> None:
        self.touched: set[Ident] = set()
        self.changed: dict[Ident, list[Range]] = {}
        self.commands = 0
        self._lookup = lookup
        self._created = created
        self._entries: dict[tuple[Ident, bytes], Ident | None] = {}
        self._directories: dict[bytes, Ident] = {b"": root}

    def apply(self, command: Command) -> None:
        """Follow one command. Raises DamageError if it names what neither state nor stream holds."""
        self.commands += 1
        kind = command.kind
        if kind in _NOTHING:
            return
        path = command.data(Attribute.PATH)
        if kind in _CREATE:
            self._create(path, command.u64(Attribute.INO))
        elif kind is Cmd.RENAME:
            self._rename(path, command.data(Attribute.PATH_TO))
        elif kind is Cmd.LINK:
            self._enter(path, self._object(command.data(Attribute.PATH_LINK)))
        elif kind in _REMOVE:
            self._leave(path)
        else:
            ident = self._object(path)
            self.touched.add(ident)
            if kind in _CONTENT:
                self._change(ident, command.u64(Attribute.FILE_OFFSET), command.u64(_CONTENT[kind]))
            elif kind is Cmd.WRITE:
                self._change(ident, command.u64(Attribute.FILE_OFFSET), len(command.data(Attribute.DATA)))
            elif kind is Cmd.ENCODED_WRITE:
                self._change(ident, command.u64(Attribute.FILE_OFFSET), command.u64(Attribute.UNENCODED_FILE_LEN))

    def _create(self, path: bytes, ino: int) -> None:
        _, name = self._entry(path)
        orphan = _ORPHAN.fullmatch(name)
        if orphan is not None and int(orphan[1]) == ino:
            self._enter(path, Ident(ino, int(orphan[2]) & 0xFFFFFFFF))
            return
        ident = self._created(ino)
        if ident is None:
            raise DamageError(f"send stream: creates inode {ino}, which the new state does not hold")
        self._enter(path, ident)

    def _rename(self, path: bytes, target: bytes) -> None:
        self._enter(target, self._leave(path))

    def _enter(self, path: bytes, ident: Ident) -> None:
        entry = self._entry(path)
        occupant = self._at(*entry)
        if occupant is not None:
            self.touched.add(occupant)
        self._entries[entry] = ident
        self.touched.add(ident)
        self.touched.add(entry[0])

    def _leave(self, path: bytes) -> Ident:
        entry = self._entry(path)
        ident = self._at(*entry)
        if ident is None:
            raise DamageError(f"send stream: names {path!r}, which does not exist at that point")
        self._entries[entry] = None
        self.touched.add(ident)
        self.touched.add(entry[0])
        if (
            path in self._directories
        ):  # whatever is remembered below it is remembered under a path that is none any more
            self._directories = {b"": self._directories[b""]}
        return ident

    def _change(self, ident: Ident, offset: int, length: int) -> None:
        self.changed.setdefault(ident, []).append(Range(offset, length))

    # ---- paths

    def _at(self, directory: Ident, name: bytes) -> Ident | None:
        key = (directory, name)
        if key in self._entries:
            return self._entries[key]
        return self._lookup(directory, name)

    def _entry(self, path: bytes) -> tuple[Ident, bytes]:
        """The directory and the name of a path's last component."""
        parent, _, name = path.rpartition(b"/")
        if not name:
            raise DamageError(f"send stream: {path!r} has no last component")
        return self._directory(parent), name

    def _object(self, path: bytes) -> Ident:
        if not path:
            return self._directories[b""]
        ident = self._directories.get(path)
        if ident is None:
            ident = self._at(*self._entry(path))
        if ident is None:
            raise DamageError(f"send stream: names {path!r}, which does not exist at that point")
        return ident

    def _directory(self, path: bytes) -> Ident:
        """A directory by path; every prefix on the way is remembered."""
        climbed: list[tuple[bytes, bytes]] = []
        at = path
        while (known := self._directories.get(at)) is None:
            parent, _, name = at.rpartition(b"/")
            climbed.append((at, name))
            at = parent
        for prefix, name in reversed(climbed):
            below = self._at(known, name)
            if below is None:
                raise DamageError(f"send stream: names {path!r}, of which {prefix!r} does not exist at that point")
            known = self._directories[prefix] = below
        return known
