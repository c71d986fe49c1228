"""A witness beside the system file: the newest (epoch, seq) committed, as an extended attribute of the system directory.

Written after each commit, it tells a system file that was replaced, or restored from an older copy, from the one that was
written last: going on with such a one would use numbers again that consumers know. A file system without xattrs has none.
"""

import errno
import os
from typing import NamedTuple

_NAMES = (b"trusted.snapfeed.head", b"user.snapfeed.head")  # the first needs CAP_SYS_ADMIN
_REFUSED = (errno.EPERM, errno.EOPNOTSUPP, errno.EACCES, errno.ENOSYS)


class Witness(NamedTuple):
    epoch: str
    seq: int


def write(system_directory: bytes, witness: Witness) -> None:
    """Raises OSError: EIO, ENOSPC, EROFS."""
    value = f"{witness.epoch} {witness.seq}".encode()
    for name in _NAMES:
        try:
            os.setxattr(system_directory, name, value)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
        else:
            return


def read(system_directory: bytes) -> Witness | None:
    """None if there is none, or none that we wrote. Raises OSError."""
    for name in _NAMES:
        try:
            epoch, _, seq = os.getxattr(system_directory, name).decode("ascii", "replace").partition(" ")
        except OSError as error:
            if error.errno not in (errno.ENODATA, *_REFUSED):
                raise
            continue
        if seq.isdecimal():
            return Witness(epoch, int(seq))
    return None
