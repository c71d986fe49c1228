"""unshare(2): a working directory of the calling thread's own, so that names can be looked up from an open directory.

For calls that take a path and have no form with a directory descriptor (listxattr(2); listxattrat(2) is of Linux 6.13): by way of
/proc/self/fd the same look costs twice as much.
"""

import contextlib
import os
from collections.abc import Iterator

from .libc import check, libc

CLONE_FS = 0x200  # <linux/sched.h>


@contextlib.contextmanager
def own_working_directory() -> Iterator[bool]:
    """Whether the thread may change its working directory (os.chdir takes a descriptor) without moving any other thread's.

    At the end it is where it was. No namespace is made, and no privilege needed; a filter of system calls may forbid it.
    """
    try:
        check(libc.unshare(CLONE_FS), "unshare")
        before = os.open(b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        os.chdir(before)
        os.close(before)
