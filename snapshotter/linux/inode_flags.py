"""The attributes of chattr(1): FS_IOC_SETFLAGS. Source: include/uapi/linux/fs.h, ioctl_iflags(2)."""

import fcntl
import struct

from .libc import ior, iow

_LONG = struct.calcsize("l")
FS_IOC_GETFLAGS = ior(ord("f"), 1, _LONG)
FS_IOC_SETFLAGS = iow(ord("f"), 2, _LONG)
FS_IMMUTABLE_FL = 0x10


def set_immutable(fd: int, on: bool) -> None:
    """Set or clear FS_IMMUTABLE_FL. Raises OSError: EPERM (needs CAP_LINUX_IMMUTABLE), ENOTTY, EOPNOTSUPP."""
    flags = bytearray(_LONG)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
    (value,) = struct.unpack_from("=I", flags)
    value = value | FS_IMMUTABLE_FL if on else value & ~FS_IMMUTABLE_FL
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=I", value).ljust(_LONG, b"\0"))
