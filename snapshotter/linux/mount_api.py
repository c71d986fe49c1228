"""Mounts nobody else sees: open_tree(2), fsopen(2), fsconfig(2), fsmount(2). Numbers: include/uapi/linux/mount.h.

A detached mount is a mount of the same file system without a place in any mount namespace. It lives as long as its
descriptor (and whatever was opened through it). While it lives the file system stays active after the user's `umount`
returned (the device remains in use), but the `umount` itself does not fail. So: short visits.
"""

import ctypes
import errno
import os
import re
from typing import NamedTuple

from .libc import check, libc

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_NO_AUTOMOUNT = 0x800
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10

# the C library has wrappers since glibc 2.36; the numbers are the same on every architecture but alpha
_SYS_OPEN_TREE = 428
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432

BTRFS_FS_TREE_OBJECTID = 5


class Mount(NamedTuple):
    """One line of proc_pid_mountinfo(5), as far as it is needed here. `source` is a device's path for disk file systems."""

    fs_type: str
    source: bytes


def _syscall(number: int, *args: int | bytes | None, what: str | bytes | None = None) -> int:
    values = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in args]
    return check(libc.syscall(ctypes.c_long(number), *values), what)


def open_tree_clone(path: bytes | str) -> int:
    """A private detached bind mount of the mount at `path`, without the mounts on top of it: an O_PATH descriptor.

    Raises OSError: EPERM (no CAP_SYS_ADMIN), ENOSYS (before Linux 5.2), EINVAL (an unbindable mount), ENOENT.
    """
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_NO_AUTOMOUNT
    return _syscall(_SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags, what=path)


def fsmount_detached(fs_type: str, source: bytes, options: dict[str, bytes | None]) -> int:
    """A detached mount (read-only, noexec, nodev, nosuid, noatime) of `source`: an O_PATH descriptor.

    An option's value None means a flag. Raises OSError: EPERM, ENODEV (unknown file system), EINVAL (an option), EBUSY
    (the device is mounted with other superblock flags), ENOENT (no such device), ENOSYS.
    """
    context = _syscall(_SYS_FSOPEN, fs_type.encode(), FSOPEN_CLOEXEC, what=fs_type)
    try:
        _syscall(_SYS_FSCONFIG, context, FSCONFIG_SET_STRING, b"source", source, 0, what=source)
        for key, value in options.items():
            command = FSCONFIG_SET_FLAG if value is None else FSCONFIG_SET_STRING
            _syscall(_SYS_FSCONFIG, context, command, key.encode(), value, 0, what=key)
        _syscall(_SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0, what=source)
        attrs = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOATIME
        return _syscall(_SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, attrs, what=source)
    finally:
        os.close(context)


def btrfs_top_level(source: bytes) -> int:
    """A detached read-only mount of the top-level subvolume of the mounted btrfs on device `source`.

    The superblock is shared with the existing mounts and left as it is, which is why "ro" is asked for: without it
    btrfs makes a read-only superblock writable (measured on 6.18), and a writable one is not made read-only by it: it is
    shared, or before Linux 6.8 refused with EBUSY. Raises OSError as fsmount_detached.
    """
    options: dict[str, bytes | None] = {"subvolid": b"%d" % BTRFS_FS_TREE_OBJECTID}
    try:
        return fsmount_detached("btrfs", source, options | {"ro": None})
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return fsmount_detached("btrfs", source, options)  # refused because the superblock is writable already


def mount_of(fd: int) -> Mount:
    """The mount a descriptor was opened through. Raises OSError, ENOENT if it is not in our mount namespace."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        mount_id = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
    with open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            fields, _, tail = line.partition(b" - ")
            if fields.split(b" ", 1)[0] == mount_id.encode():
                fs_type, source = tail.split()[:2]
                return Mount(fs_type.decode(), _unescape(source))
    raise OSError(errno.ENOENT, f"mount {mount_id} is not in /proc/self/mountinfo")


def _unescape(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)
