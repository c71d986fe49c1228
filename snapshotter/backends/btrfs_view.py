"""The state that a read-only btrfs snapshot holds, looked up in its tree. Item layouts: include/uapi/linux/btrfs_tree.h.

One object is one tree search over adjacent items: its inode item, its names, its extended attributes. Nothing is opened but the
snapshot's root, and no path is looked up, so neither depth nor length of paths matters.
"""

import os
import stat
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cachetools import LRUCache

from comparer.crc32c import crc32c
from comparer.errors import DamageError
from comparer.model import Attr, FileType, Ident, Name, file_type
from snapshotter.linux import btrfs
from snapshotter.linux.btrfs import U64_MAX, Item, Key

from .base import SYSTEM_DIR

CACHED_OBJECTS = 8192  # about 1 KB each

_TIMES = "qI" * 4  # atime ctime mtime otime: struct btrfs_timespec {sec, nsec}
# generation transid size nbytes block_group | nlink uid gid mode | rdev flags sequence reserved | times
_INODE_ITEM = struct.Struct("<QQQQ8xIIIIQ8x8x32x" + _TIMES)
_INODE_REF = struct.Struct("<QH")  # index name_len
_INODE_EXTREF = struct.Struct("<QQH")  # parent_objectid index name_len
_DIR_ITEM = struct.Struct("<QBQQHHB")  # location (objectid type offset) transid data_len name_len type
_ROOT_REF = struct.Struct("<QQH")  # dirid sequence name_len
_EXTENT_HEAD = struct.Struct("<QQBBHB")  # generation ram_bytes compression encryption other_encoding type
_NAME_SEED = 0xFFFFFFFE  # btrfs_name_hash(): (u32)~1
_MINORBITS = 20  # the kernel's dev_t, as btrfs stores it
_G = 1_000_000_000


class _Record(NamedTuple):
    """What one tree search told about an inode."""

    ident: Ident
    transid: int  # of the inode's last change
    attr: Attr
    refs: tuple[tuple[int, bytes], ...]  # (inode number of the directory, name)


class SubvolumeView:
    """A `comparer.model.View` of a read-only subvolume. Used by one thread at a time.

    Left out: nested subvolumes (whose entries remain in a snapshot as empty directories), the system directory in the root, and
    inodes without a name (deleted while open). Lookups raise OSError (EIO, ...) where the tree cannot be read, and DamageError
    where it makes no sense. The descriptor is closed with the view, at the latest when it is garbage.
    """

    def __init__(self, fd: int) -> None:
        """Take over `fd`, the root directory of the subvolume."""
        self.fd = fd
        self._buffer = btrfs.search_buffer()
        self._records: LRUCache[int, _Record | None] = LRUCache(CACHED_OBJECTS)
        self.info = btrfs.get_subvol_info(fd)
        self._sectorsize = btrfs.fs_info(fd).sectorsize
        root = self._record(btrfs.BTRFS_FIRST_FREE_OBJECTID)
        if root is None:
            raise DamageError(f"subvolume {self.info.treeid} has no root directory")
        self._root = root.ident

    @classmethod
    def open(cls, directory_fd: int, name: bytes) -> "SubvolumeView":
        """The view of the subvolume `name` in `directory_fd`. Raises OSError: ENOENT, ENOTDIR, EPERM."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=directory_fd)
        try:
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Give the descriptor back; lookups that are not cached then raise OSError (EBADF)."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_root", None) is not None:
            self.close()

    # ---- comparer.model.View

    @property
    def root(self) -> Ident:
        return self._root

    def attr(self, ident: Ident) -> Attr | None:
        record = self._held(ident)
        return record.attr if record else None

    def names(self, ident: Ident) -> Iterable[Name]:
        record = self._held(ident)
        if record is None or ident == self._root:
            return []
        found = []
        for parent, name in record.refs:
            directory = self._record(parent)
            if directory is None:
                raise DamageError(
                    f"inode {ident.ino} has the name {name!r} in directory {parent}, which does not exist"
                )
            found.append(Name(directory.ident, name))
        return found

    def child(self, parent: Ident, name: bytes) -> Ident | None:
        if self._held(parent) is None or (parent == self._root and name == SYSTEM_DIR):
            return None
        key = Key(parent.ino, btrfs.BTRFS_DIR_ITEM_KEY, crc32c(_NAME_SEED, name))
        for item in self._search(key, key):
            for ino, entry in _entries(item.data):
                if entry == name:
                    return self.ident(ino)
        return None

    def children(self, parent: Ident) -> Iterator[tuple[bytes, Ident]]:
        if self._held(parent) is None:
            return
        first = Key(parent.ino, btrfs.BTRFS_DIR_INDEX_KEY, 0)
        for item in self._search(first, first._replace(offset=U64_MAX)):
            for ino, name in _entries(item.data):
                if parent == self._root and name == SYSTEM_DIR:
                    continue
                ident = self.ident(ino)
                if ident is None:
                    raise DamageError(
                        f"name {name!r} in directory {parent.ino} points to inode {ino}, which does not exist"
                    )
                yield name, ident

    # ---- what else the btrfs backend asks

    def ident(self, ino: int) -> Ident | None:
        """The object with inode number `ino`, None if there is none or it has no name."""
        record = self._record(ino)
        return record.ident if record else None

    def transid(self, ident: Ident) -> int | None:
        """The transaction of an object's last change (of anything but reading), None if this state does not hold it."""
        record = self._held(ident)
        return record.transid if record else None

    def path(self, directory: Ident) -> bytes | None:
        """The path of a directory from the root, empty for the root; None if this state does not hold it."""
        parts: list[bytes] = []
        while directory != self._root:
            name = next(iter(self.names(directory)), None)
            if name is None:
                return None
            directory = name.parent
            parts.append(name.name)
        return b"/".join(reversed(parts))

    def changed_since(self, transid: int) -> Iterator[int]:
        """The inode numbers of which an item lies in a tree block written in `transid` or later: a superset of those changed."""
        previous = -1
        first = Key(btrfs.BTRFS_FIRST_FREE_OBJECTID, 0, 0)
        last = Key(U64_MAX - 255, 255, U64_MAX)  # BTRFS_LAST_FREE_OBJECTID
        for item in btrfs.tree_search_v2(self.fd, first, last, min_transid=transid):
            if item.objectid != previous:
                previous = item.objectid
                yield previous

    def extent_items(self, ino: int, start: int, end: int) -> Iterator[Item]:
        """The EXTENT_DATA items of a file that begin in `start` <= offset < `end`."""
        first = Key(ino, btrfs.BTRFS_EXTENT_DATA_KEY, start)
        return self._search(first, first._replace(offset=end - 1))

    def _search(self, first: Key, last: Key) -> Iterator[Item]:
        return btrfs.tree_search_v2(self.fd, first, last, buffer=self._buffer)

    def _held(self, ident: Ident) -> _Record | None:
        record = self._record(ident.ino)
        return record if record is not None and record.ident == ident else None

    def _record(self, ino: int) -> _Record | None:
        try:
            return self._records[ino]
        except KeyError:
            pass
        record = self._records[ino] = self._load(ino)
        return record

    def _load(self, ino: int) -> _Record | None:
        last = Key(ino, btrfs.BTRFS_XATTR_ITEM_KEY, U64_MAX)
        items = self._search(Key(ino, btrfs.BTRFS_INODE_ITEM_KEY, 0), last)
        head = next(items, None)
        if head is None or head.type != btrfs.BTRFS_INODE_ITEM_KEY:
            return None
        gen, transid, size, nbytes, nlink, uid, gid, mode, rdev, *times = _INODE_ITEM.unpack_from(head.data)
        if not nlink:
            return None
        refs: list[tuple[int, bytes]] = []
        xattrs: list[tuple[bytes, bytes]] = []
        for item in items:
            if item.type == btrfs.BTRFS_INODE_REF_KEY:
                refs += [(item.offset, name) for name in _inode_refs(item.data)]
            elif item.type == btrfs.BTRFS_INODE_EXTREF_KEY:
                refs += _inode_extrefs(item.data)
            elif item.type == btrfs.BTRFS_XATTR_ITEM_KEY:
                xattrs += [(name, value) for _, _, name, value in _dir_items(item.data)]
        _, _, csec, cnsec, msec, mnsec, osec, onsec = times
        kind = file_type(mode)
        attr = Attr(
            kind,
            size,
            -(-nbytes // self._sectorsize) * self._sectorsize,  # as btrfs_getattr() rounds
            stat.S_IMODE(mode),
            uid,
            gid,
            nlink,
            msec * _G + mnsec,
            csec * _G + cnsec,
            osec * _G + onsec,
            os.makedev(rdev >> _MINORBITS, rdev & ((1 << _MINORBITS) - 1)) if kind in _DEVICES else None,
            tuple(sorted(xattrs)),
            self._target(ino) if kind is FileType.SYMLINK else None,
        )
        return _Record(Ident(ino, gen & 0xFFFFFFFF), transid, attr, tuple(refs))

    def _target(self, ino: int) -> bytes:
        """A symlink's target: always one inline extent, never compressed (btrfs_symlink())."""
        for item in self.extent_items(ino, 0, 1):
            _, size, *_ = _EXTENT_HEAD.unpack_from(item.data)
            return item.data[_EXTENT_HEAD.size : _EXTENT_HEAD.size + size]
        raise DamageError(f"symbolic link {ino} has no target")


_DEVICES = frozenset({FileType.CHAR, FileType.BLOCK})


def _dir_items(data: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    """Several struct btrfs_dir_item in a row where hashes collide: (location's objectid, its type, name, data)."""
    at = 0
    while at < len(data):
        objectid, kind, _, _, data_len, name_len, _ = _DIR_ITEM.unpack_from(data, at)
        at += _DIR_ITEM.size
        yield objectid, kind, data[at : at + name_len], data[at + name_len : at + name_len + data_len]
        at += name_len + data_len


def _entries(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The (inode number, name) in a directory item; names of nested subvolumes are left out."""
    for objectid, kind, name, _ in _dir_items(data):
        if kind == btrfs.BTRFS_INODE_ITEM_KEY:
            yield objectid, name


def _inode_refs(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        _, size = _INODE_REF.unpack_from(data, at)
        at += _INODE_REF.size
        yield data[at : at + size]
        at += size


def _inode_extrefs(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        parent, _, size = _INODE_EXTREF.unpack_from(data, at)
        at += _INODE_EXTREF.size
        yield parent, data[at : at + size]
        at += size


def root_refs(fd: int, treeid: int) -> Iterator[tuple[int, bytes]]:
    """The subvolumes directly inside subvolume `treeid`, at this moment: (inode number of the directory, name)."""
    first = Key(treeid, btrfs.BTRFS_ROOT_REF_KEY, 0)
    last = first._replace(offset=U64_MAX)
    for item in btrfs.tree_search_v2(fd, first, last, tree_id=btrfs.BTRFS_ROOT_TREE_OBJECTID):
        directory, _, size = _ROOT_REF.unpack_from(item.data)
        yield directory, item.data[_ROOT_REF.size : _ROOT_REF.size + size]
