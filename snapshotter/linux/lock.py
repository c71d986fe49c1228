"""A lock that ends with its process: flock(2)."""

import contextlib
import fcntl
import os
from collections.abc import Iterator


@contextlib.contextmanager
def locked(directory: bytes) -> Iterator[int]:
    """Nobody else is in here with the same directory, of which this gives a descriptor; waits. Raises OSError.

    Where the file system has no locks (ENOLCK, EOPNOTSUPP), there is none.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)
