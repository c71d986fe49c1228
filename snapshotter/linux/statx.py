"""statx(2): os.stat() has no birth time and follows automounts. Layout: include/uapi/linux/stat.h, struct statx."""

import ctypes
import os
import struct
from typing import NamedTuple

from .libc import check, libc

AT_SYMLINK_NOFOLLOW = 0x100
AT_NO_AUTOMOUNT = 0x800
AT_EMPTY_PATH = 0x1000
STATX_BASIC_STATS = 0x7FF
STATX_BTIME = 0x800
STATX_ATTR_MOUNT_ROOT = 0x2000
STATX_SIZE = 256

# stx_mask blksize attributes | nlink uid gid mode pad | ino size blocks attributes_mask |
# atime btime ctime mtime (s64 sec, u32 nsec, s32 pad each) | rdev major minor, dev major minor
_STATX = struct.Struct("=IIQ IIIH2x QQQQ qI4x qI4x qI4x qI4x IIII")
_FLAGS = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT
_G = 1_000_000_000


class Stat(NamedTuple):
    """What statx said: `mode` with the type bits, `blocks` in bytes, times in nanoseconds, `btime_ns` None if absent."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int | None
    rdev: int
    dev: int
    mount_root: bool  # something is mounted here: what statx describes lies on another mount


def statx(dirfd: int, name: bytes = b"") -> Stat:
    """The metadata of `name` below `dirfd` (of `dirfd` itself if empty). Symbolic links are not followed.

    Raises OSError: ENOENT, ENOTDIR, EACCES, ENAMETOOLONG, EIO.
    """
    buffer = ctypes.create_string_buffer(STATX_SIZE)
    flags = _FLAGS if name else _FLAGS | AT_EMPTY_PATH
    check(libc.statx(dirfd, name, flags, STATX_BASIC_STATS | STATX_BTIME, buffer), name)
    return parse(buffer)


def parse(buffer: "ctypes.Array[ctypes.c_char] | bytearray", offset: int = 0) -> Stat:
    """The `struct statx` at a place of a buffer."""
    (
        mask,
        _,
        attributes,
        nlink,
        uid,
        gid,
        mode,
        ino,
        size,
        blocks,
        _,
        _,
        _,
        bs,
        bn,
        cs,
        cn,
        ms,
        mn,
        rmaj,
        rmin,
        dmaj,
        dmin,
    ) = _STATX.unpack_from(buffer, offset)
    return Stat(
        ino,
        mode,
        nlink,
        uid,
        gid,
        size,
        blocks * 512,
        ms * _G + mn,
        cs * _G + cn,
        bs * _G + bn if mask & STATX_BTIME else None,
        os.makedev(rmaj, rmin),
        os.makedev(dmaj, dmin),
        bool(attributes & STATX_ATTR_MOUNT_ROOT),
    )
