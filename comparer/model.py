"""The values everything else speaks in: identities, attributes, names, changes, and the view of one state.

A *state* is a set of objects (inodes) with attributes, and a set of names (directory, name) -> object. A *view* is
read access to one state, whatever holds it: a metadata table, a btrfs snapshot, dictionaries in a test.
"""

import enum
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Ident(NamedTuple):
    """One object as long as it lives, whatever its names: inode number and inode generation."""

    ino: int
    gen: int

    def __str__(self) -> str:
        return f"{self.ino}.{self.gen}"


class Name(NamedTuple):
    """A directory entry: the directory that holds it, and its bytes (no `/`, no NUL)."""

    parent: Ident
    name: bytes


class FileType(enum.StrEnum):
    FILE = "file"
    DIR = "dir"
    SYMLINK = "symlink"
    FIFO = "fifo"
    SOCKET = "socket"
    CHAR = "char"
    BLOCK = "block"


_BY_MODE = {
    stat.S_IFREG: FileType.FILE,
    stat.S_IFDIR: FileType.DIR,
    stat.S_IFLNK: FileType.SYMLINK,
    stat.S_IFIFO: FileType.FIFO,
    stat.S_IFSOCK: FileType.SOCKET,
    stat.S_IFCHR: FileType.CHAR,
    stat.S_IFBLK: FileType.BLOCK,
}


def file_type(st_mode: int) -> FileType:
    """The type of an `st_mode`. Raises ValueError for a mode that is none of the seven."""
    try:
        return _BY_MODE[stat.S_IFMT(st_mode)]
    except KeyError:
        raise ValueError(f"mode {st_mode:#o} is of no known file type") from None


@dataclass(frozen=True, slots=True)
class Attr:
    """The attributes of one object.

    `size` and `blocks` are bytes (`blocks`: allocated; informational, it moves without ctime, so it never makes a
    change by itself); `mode` holds the permission bits only; times are nanoseconds since the epoch; `btime_ns` is None
    where the file system has none; `rdev` is None but for devices (`os.makedev` form); `xattrs` are sorted
    (name, value) pairs; `target` is a symlink's.
    """

    type: FileType
    size: int
    blocks: int
    mode: int
    uid: int
    gid: int
    nlink: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int | None = None
    rdev: int | None = None
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    target: bytes | None = None


class Op(enum.StrEnum):
    CREATE = "create"
    MODIFY = "modify"
    RENAME = "rename"
    LINK = "link"
    UNLINK = "unlink"
    DELETE = "delete"


class Quality(enum.StrEnum):
    """How good changed byte ranges are: exactly these; these and perhaps more; not known."""

    EXACT = "exact"
    SUPERSET = "superset"
    UNKNOWN = "unknown"


class Range(NamedTuple):
    """Bytes `offset` to `offset + length`."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ByteRanges:
    """What changed in a file's content: bytes written, and space cleared (truncated away or punched). Sorted, disjoint."""

    written: tuple[Range, ...] = ()
    cleared: tuple[Range, ...] = ()
    quality: Quality = Quality.EXACT

    def __bool__(self) -> bool:
        return bool(self.written or self.cleared or self.quality is not Quality.EXACT)


UNKNOWN_RANGES = ByteRanges(quality=Quality.UNKNOWN)


@dataclass(frozen=True, slots=True)
class Change:
    """One step of a diff; the fields are those of the feed (docs/feed.md). Paths are bytes from the root, no leading slash."""

    op: Op
    ident: Ident
    type: FileType
    path: bytes
    from_path: bytes | None = None
    changed: tuple[str, ...] = ()
    before: Attr | None = None
    after: Attr | None = None
    ranges: ByteRanges | None = None


class View(Protocol):
    """Read access to one state. Never the state of the moment: whoever builds a view fixes what it shows."""

    @property
    def root(self) -> Ident:
        """The partition's root directory."""

    def attr(self, ident: Ident) -> Attr | None:
        """The attributes of an object, None if this state does not hold it."""

    def names(self, ident: Ident) -> Iterable[Name]:
        """Every name of an object; none for the root and for an object this state does not hold."""

    def child(self, parent: Ident, name: bytes) -> Ident | None:
        """What a name points to, None if nothing."""

    def children(self, parent: Ident) -> Iterable[tuple[bytes, Ident]]:
        """Every (name, object) of a directory, in any order; none if this state does not hold it."""
