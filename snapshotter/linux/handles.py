"""File handles: identity without a path. Sources: open_by_handle_at(2), include/linux/exportfs.h, fs/*/export.c.

What a handle holds depends on the file system; the layouts known here are told apart by (type, length):

    type  bytes  file system                                     layout (host byte order)
    0x81  12     XFS with 64-bit inode numbers                   u64 inode, u32 generation
    0x01   8     ext4, XFS inode32, and others (generic)         u32 inode, u32 generation
    0x4d  20     btrfs                                           u64 objectid, u64 root objectid, u32 generation
    0x01  12     tmpfs                                           u32 generation, u64 inode
"""

import ctypes
import os
import struct
from typing import NamedTuple

from comparer.model import Ident

from .libc import check, libc

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_FOLLOW = 0x400
MAX_HANDLE_SZ = 128

_HEAD = struct.Struct("=Ii")  # struct file_handle: handle_bytes, handle_type
_XFS64 = struct.Struct("=QI")
_INO32_GEN = struct.Struct("=II")
_BTRFS = struct.Struct("=QQI")
_TMPFS = struct.Struct("=IQ")


class Handle(NamedTuple):
    """`struct file_handle` without its length: the type and the opaque bytes."""

    type: int
    data: bytes


class UnknownHandleError(ValueError):
    """A handle whose layout is not in the table above; its file system needs another way to be identified."""


def name_to_handle_at(dirfd: int, name: bytes = b"", flags: int | None = None) -> Handle:
    """The handle of `name` below `dirfd` (of `dirfd` itself if empty). Symbolic links are not followed.

    Raises OSError: EOPNOTSUPP (no handles on this file system), ENOENT, EACCES, ESTALE.
    """
    if flags is None:
        flags = 0 if name else AT_EMPTY_PATH
    buffer = ctypes.create_string_buffer(_HEAD.size + MAX_HANDLE_SZ)
    _HEAD.pack_into(buffer, 0, MAX_HANDLE_SZ, 0)
    mount_id = ctypes.c_int()
    check(libc.name_to_handle_at(dirfd, name, buffer, ctypes.byref(mount_id), flags), name)
    size, kind = _HEAD.unpack_from(buffer)
    return Handle(kind, buffer.raw[_HEAD.size : _HEAD.size + size])


def open_by_handle_at(mount_fd: int, handle: Handle, flags: int) -> int:
    """Open a handle on the file system of `mount_fd`; O_CLOEXEC is added. Needs CAP_DAC_READ_SEARCH.

    Raises OSError: ESTALE (the object is gone), EPERM, ELOOP (a symbolic link without O_PATH), ENXIO (a socket).
    """
    buffer = _HEAD.pack(len(handle.data), handle.type) + handle.data
    return check(libc.open_by_handle_at(mount_fd, buffer, flags | os.O_CLOEXEC))


def decode(handle_type: int, data: bytes) -> Ident:
    """The identity inside a handle. Raises UnknownHandleError."""
    size = len(data)
    if handle_type == 0x81 and size == _XFS64.size:
        return Ident(*_XFS64.unpack(data))
    if handle_type == 1 and size == _INO32_GEN.size:
        return Ident(*_INO32_GEN.unpack(data))
    if handle_type == 0x4D and size == _BTRFS.size:
        ino, _root, gen = _BTRFS.unpack(data)
        return Ident(ino, gen)
    if handle_type == 1 and size == _TMPFS.size:
        gen, ino = _TMPFS.unpack(data)
        return Ident(ino, gen)
    raise UnknownHandleError(f"file handle of type {handle_type:#x} with {size} bytes")


class Codec:
    """Makes handles from identities, for one file system, in the layout of a handle seen on it."""

    def __init__(self, sample: Handle) -> None:
        decode(*sample)  # raises for a layout we do not know
        self.sample = sample
        self._btrfs_root = _BTRFS.unpack(sample.data)[1] if sample.type == 0x4D else 0

    def encode(self, ident: Ident) -> Handle:
        """The handle of an identity. Raises struct.error if the inode number does not fit the layout."""
        kind, size = self.sample.type, len(self.sample.data)
        if kind == 0x81:
            return Handle(kind, _XFS64.pack(ident.ino, ident.gen))
        if kind == 0x4D:
            return Handle(kind, _BTRFS.pack(ident.ino, self._btrfs_root, ident.gen))
        if size == _INO32_GEN.size:
            return Handle(kind, _INO32_GEN.pack(ident.ino, ident.gen))
        return Handle(kind, _TMPFS.pack(ident.gen, ident.ino))
