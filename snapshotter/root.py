"""Opening a partition's root without being in anybody's way.

Through a detached clone of the mount where that is permitted: an open file on it does not make the user's mount busy, and what is
mounted on top of the partition does not hide it.
"""

import contextlib
import errno
import os

from comparer.errors import OperatorError

from .backends.base import SYSTEM_DIR
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


def open_system(root_fd: int, shown: str, *, strict: bool = True) -> int:
    """A descriptor of the system directory; the caller closes it. `shown`: the partition's path, for errors.

    Who owns the root directory can put something else in its place, which must not lead us, who may write everywhere, elsewhere:
    a link is not followed, and with `strict` a stranger's directory not used. Raises OperatorError, OSError: ENOENT, EACCES.
    """
    try:
        fd = os.open(SYSTEM_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root_fd)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise OperatorError(f"{shown!r}: .snapfeed is a symbolic link or no directory; remove it") from error
    owner = os.fstat(fd).st_uid
    if strict and owner not in (0, os.geteuid()):
        os.close(fd)
        raise OperatorError(
            f"{shown!r}: .snapfeed belongs to user {owner}, so it is not the one that was made; remove it"
        )
    return fd
