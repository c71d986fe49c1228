"""Opening a partition's root without being in anybody's way.

Through a detached clone of the mount where that is permitted: an open file on it does not make the user's mount busy, and what is
mounted on top of the partition does not hide it.
"""

import contextlib
import errno
import os

from .linux.mount_api import open_tree_clone

_REFUSED = (errno.EPERM, errno.ENOSYS, errno.EINVAL)


def open_root(stack: contextlib.ExitStack, path: bytes, *, private: bool = True) -> tuple[int, bool]:
    """A descriptor of a mount's root, open until `stack` ends, and whether the mount is a private one. Raises OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if private:
        try:
            mount = open_tree_clone(path)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
        else:
            stack.callback(os.close, mount)  # the mount lives as long as this descriptor
            root = os.open(b".", flags, dir_fd=mount)
            stack.callback(os.close, root)
            return root, True
    root = os.open(path, flags)
    stack.callback(os.close, root)
    return root, False
