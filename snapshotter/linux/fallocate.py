"""Holes and durability: fallocate(2) with FALLOC_FL_PUNCH_HOLE, and syncfs(2). Source: include/uapi/linux/falloc.h."""

import ctypes

from .libc import check, libc

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make bytes of a file a hole, which reads as zeros; its size stays. Raises OSError: EOPNOTSUPP, ENOSPC, EPERM."""
    mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    check(libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def syncfs(fd: int) -> None:
    """Return when everything of the file system that holds `fd` is on the disk. Raises OSError: EIO, ENOSPC, EDQUOT."""
    check(libc.syncfs(fd))
