"""fanotify_init(2), fanotify_mark(2) and the size of the queue. Numbers: include/uapi/linux/fanotify.h."""

import ctypes
import fcntl
import struct
import termios

from .libc import check, libc

FAN_CLOEXEC = 0x1
FAN_NONBLOCK = 0x2
FAN_CLASS_NOTIF = 0x0
FAN_UNLIMITED_QUEUE = 0x10
FAN_REPORT_FID = 0x200
FAN_REPORT_DIR_FID = 0x400
FAN_REPORT_NAME = 0x800
FAN_REPORT_TARGET_FID = 0x1000
FAN_REPORT_DFID_NAME = FAN_REPORT_DIR_FID | FAN_REPORT_NAME
FAN_REPORT_DFID_NAME_TARGET = FAN_REPORT_DFID_NAME | FAN_REPORT_FID | FAN_REPORT_TARGET_FID

FAN_MARK_ADD = 0x1
FAN_MARK_ONLYDIR = 0x8
FAN_MARK_IGNORED_SURV_MODIFY = 0x40
FAN_MARK_FILESYSTEM = 0x100
FAN_MARK_EVICTABLE = 0x200
FAN_MARK_IGNORE = 0x400
FAN_MARK_IGNORE_SURV = FAN_MARK_IGNORE | FAN_MARK_IGNORED_SURV_MODIFY

FAN_EVENT_METADATA_LEN = 24

libc.fanotify_init.argtypes = [ctypes.c_uint, ctypes.c_uint]
libc.fanotify_mark.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]


def fanotify_init(flags: int, event_f_flags: int = 0) -> int:
    """A new fanotify group's descriptor.

    Raises OSError: EPERM (no CAP_SYS_ADMIN), EINVAL (a flag this kernel does not know), ENOSYS, EMFILE (too many groups).
    """
    return check(libc.fanotify_init(flags, event_f_flags))


def fanotify_mark(fd: int, flags: int, mask: int, dirfd: int, path: bytes | None = None) -> None:
    """Add, change or remove a mark on `path` below `dirfd` (on `dirfd` itself, not opened O_PATH, if None).

    Raises OSError: EXDEV (a btrfs subvolume that is not the top level), EOPNOTSUPP (no file handles), ENODEV (no fsid),
    EINVAL (an event bit this kernel does not know), EPERM, ENOSPC (too many marks).
    """
    check(libc.fanotify_mark(fd, flags, mask, dirfd, path), path)


def queued(fd: int) -> int:
    """How many events wait in the queue of a group. FIONREAD tells their metadata only: 24 bytes for each."""
    (size,) = struct.unpack("=i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(size) // FAN_EVENT_METADATA_LEN
