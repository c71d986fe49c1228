"""Who is who on one file system: (inode, generation), from the file handle where there is one, else from the birth time.

The rule is chosen once for a file system, by asking its root, and is the same for every object on it: the event sources
and the scans must give one object one identity.
"""

import os
import zlib

from comparer.model import Ident

from .handles import UnknownHandleError, decode, name_to_handle_at
from .statx import Stat, statx


class Identifier:
    """The rule of one file system. Needs no privilege.

    `by_handle`: generations are the file system's own (name_to_handle_at(2) works and the layout is known); otherwise
    they are a 32-bit digest of the birth time, or 0 where there is none.
    """

    def __init__(self, root_fd: int) -> None:
        """Ask the root directory. Raises OSError if even statx fails."""
        found = statx(root_fd)
        try:
            self.by_handle = decode(*name_to_handle_at(root_fd)).ino == found.ino
        except (OSError, UnknownHandleError):
            self.by_handle = False

    def ident(self, dirfd: int, name: bytes = b"") -> Ident:
        """The identity of `name` below `dirfd` (of `dirfd` itself if empty). Raises OSError as statx."""
        if self.by_handle:
            return decode(*name_to_handle_at(dirfd, name))
        return by_birth(statx(dirfd, name))

    def identify(self, dirfd: int, name: bytes = b"") -> tuple[Ident, Stat]:
        """Identity and metadata of one and the same object, even while others rename, delete and reuse.

        Raises OSError as statx. An O_PATH descriptor holds the object between the two looks; it opens nothing, triggers
        no automount and makes no event.
        """
        if not self.by_handle:
            found = statx(dirfd, name)
            return by_birth(found), found
        if not name:
            return decode(*name_to_handle_at(dirfd)), statx(dirfd)
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)
        try:
            return decode(*name_to_handle_at(fd)), statx(fd)
        finally:
            os.close(fd)


def by_birth(found: Stat) -> Ident:
    """The identity of an object without a handle: the generation is a digest of its birth time (0 if there is none)."""
    if found.btime_ns is None:
        return Ident(found.ino, 0)
    return Ident(found.ino, zlib.crc32(found.btime_ns.to_bytes(16, "little", signed=True)))
