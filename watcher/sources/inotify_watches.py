"""inotify(7) through pyinotify: its WatchManager and its constants; the one file that imports it.

Not its Notifier: that one decodes names strictly, so that a single name which is not UTF-8 loses a whole batch of events,
and it follows paths, where we follow directories. Directories are watched through /proc/self/fd, so that no name becomes a
path and no symbolic link is followed.
"""

import fcntl
import logging
import os
import struct
import termios
from collections.abc import Iterator

import pyinotify

from comparer.errors import DamageError

IN_ISDIR: int = pyinotify.IN_ISDIR
IN_IGNORED: int = pyinotify.IN_IGNORED
IN_UNMOUNT: int = pyinotify.IN_UNMOUNT
IN_Q_OVERFLOW: int = pyinotify.IN_Q_OVERFLOW
IN_CREATE: int = pyinotify.IN_CREATE
IN_MOVED_FROM: int = pyinotify.IN_MOVED_FROM
IN_MOVED_TO: int = pyinotify.IN_MOVED_TO
IN_DELETE: int = pyinotify.IN_DELETE
IN_ATTRIB: int = pyinotify.IN_ATTRIB
CONTENT: int = pyinotify.IN_MODIFY | pyinotify.IN_CLOSE_WRITE
GONE: int = IN_DELETE | IN_MOVED_FROM
CAME: int = IN_CREATE | IN_MOVED_TO
MASK: int = CONTENT | GONE | CAME | IN_ATTRIB | pyinotify.IN_ONLYDIR

_EVENT = struct.Struct("=iIII")  # struct inotify_event: wd, mask, cookie, len

pyinotify.log.handlers.clear()  # it prints on stderr by itself
pyinotify.log.setLevel(logging.CRITICAL)


def parse_events(buffer: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """The (wd, mask, cookie, name) of each `struct inotify_event` of a read. Raises DamageError."""
    offset, size = 0, len(buffer)
    while offset < size:
        start = offset + _EVENT.size
        if start > size:
            raise DamageError(f"inotify: {size - offset} bytes after the last event")
        wd, mask, cookie, length = _EVENT.unpack_from(buffer, offset)
        offset = start + length
        if offset > size:
            raise DamageError(f"inotify: a name of {length} bytes with {size - start} left")
        yield wd, mask, cookie, buffer[start:offset].partition(b"\0")[0]


class Watches(pyinotify.WatchManager):  # type: ignore[misc]  # the package has no types
    """The watches of one inotify instance. Making one raises OSError (without errno) or PyinotifyError."""

    def __init__(self) -> None:
        try:
            super().__init__()
        except pyinotify.PyinotifyError as error:
            raise OSError(str(error)) from error
        os.set_inheritable(self.get_fd(), False)
        os.set_blocking(self.get_fd(), False)

    def watch(self, directory_fd: int, mask: int = MASK) -> int:
        """The watch descriptor of an open directory; the same one for a directory already watched. Raises OSError."""
        path = f"/proc/self/fd/{directory_fd}"
        wd = int(self.add_watch(path, mask)[path])
        if wd < 0:
            number = self._inotify_wrapper.get_errno()
            raise OSError(number, os.strerror(number))
        return wd

    def unwatch(self, wd: int) -> None:
        if wd in self.watches:
            self.rm_watch(wd)

    def forget(self, wd: int) -> None:
        self.watches.pop(wd, None)


def readable(fd: int) -> int:
    """How many bytes wait in the queue (FIONREAD)."""
    (size,) = struct.unpack("=i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(size)
