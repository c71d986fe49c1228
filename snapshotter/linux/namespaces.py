"""A mount namespace of one's own for a while: unshare(2), setns(2), mount(2). Numbers: include/uapi/linux/{sched,mount}.h."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

from .libc import check, libc

CLONE_NEWNS = 0x20000
MS_REC = 0x4000
MS_SLAVE = 1 << 19


@contextlib.contextmanager
def private_mounts() -> Iterator[None]:
    """What this thread mounts in here nobody else sees, and it ends with the process, however that ends.

    What others unmount meanwhile is unmounted here as well, where mounts are shared as systemd makes them: so no disk is held.

    Raises OSError: EPERM (no CAP_SYS_ADMIN or CAP_SYS_CHROOT). Only for a process of one thread.
    """
    with contextlib.ExitStack() as stack:
        flags = os.O_RDONLY | os.O_CLOEXEC
        outside, root, here = (os.open(path, flags) for path in ("/proc/self/ns/mnt", "/", "."))
        for fd in (outside, root, here):
            stack.callback(os.close, fd)
        check(libc.unshare(CLONE_NEWNS), "unshare")
        try:
            none = ctypes.c_char_p(None)
            check(libc.mount(none, ctypes.c_char_p(b"/"), none, ctypes.c_ulong(MS_REC | MS_SLAVE), none), "/")
            yield
        finally:
            check(libc.setns(outside, CLONE_NEWNS), "setns")
            os.fchdir(root)  # setns(2) went to the namespace's own root
            os.chroot(".")
            os.fchdir(here)
