"""sync_file_range(2): have a file's dirty pages written without waiting for it."""

import ctypes

from .libc import libc

SYNC_FILE_RANGE_WRITE = 2
MOST = 1 << 20  # bytes

_sync_file_range = libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def start_writeback(fd: int) -> None:
    """Begin to write the dirty pages of a file's first MOST bytes: with a large file, the waiting is not for the start.

    What goes wrong is told by who waits for it (FICLONE, FIEMAP_FLAG_SYNC).
    """
    _sync_file_range(fd, 0, MOST, SYNC_FILE_RANGE_WRITE)
