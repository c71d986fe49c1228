"""The UUID of a mounted file system. Sources: include/uapi/linux/{fs,btrfs}.h, fs/xfs/libxfs/xfs_fs.h, fs/ext4/ext4.h."""

import errno
import fcntl
import struct
import uuid

from .libc import ior

_FSUUID2 = struct.Struct("=B16s")
FS_IOC_GETFSUUID = ior(0x15, 0, _FSUUID2.size)  # since Linux 6.9: ext4, XFS, btrfs, tmpfs, ...
_BTRFS_FS_INFO_SIZE = 1024
BTRFS_IOC_FS_INFO = ior(
    0x94, 31, _BTRFS_FS_INFO_SIZE
)  # struct btrfs_ioctl_fs_info_args: max_id, num_devices, fsid[16], ...
_XFS_FSOP_GEOM_V1_SIZE = 112
_XFS_UUID_OFFSET = 64  # behind seven u32, one padding u32, and the u64s datablocks, rtblocks, rtextents, logstart
XFS_IOC_FSGEOMETRY_V1 = ior(ord("X"), 100, _XFS_FSOP_GEOM_V1_SIZE)
_EXT4_FSUUID = struct.Struct("=II16s")  # fsu_len, fsu_flags, fsu_uuid
EXT4_IOC_GETFSUUID = ior(ord("f"), 44, 8)

_UNKNOWN = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def fs_uuid(fd: int, fs_type: str) -> str | None:
    """The file system's UUID in the usual form, None if it has none that can be asked for.

    `fd` must be open for reading (not O_PATH). Raises OSError other than "no such ioctl".
    """
    found = _ask(fd, FS_IOC_GETFSUUID, bytearray(_FSUUID2.size), 1)
    if found is None and fs_type == "btrfs":
        found = _ask(fd, BTRFS_IOC_FS_INFO, bytearray(_BTRFS_FS_INFO_SIZE), 16)
    if found is None and fs_type == "xfs":
        found = _ask(fd, XFS_IOC_FSGEOMETRY_V1, bytearray(_XFS_FSOP_GEOM_V1_SIZE), _XFS_UUID_OFFSET)
    if found is None and fs_type == "ext4":
        found = _ask(fd, EXT4_IOC_GETFSUUID, bytearray(_EXT4_FSUUID.pack(16, 0, b"")), 8)
    return None if found is None or not any(found) else str(uuid.UUID(bytes=found))


def _ask(fd: int, request: int, buffer: bytearray, offset: int) -> bytes | None:
    try:
        fcntl.ioctl(fd, request, buffer)
    except OSError as error:
        if error.errno in _UNKNOWN:
            return None
        raise
    return bytes(buffer[offset : offset + 16])


_FSLABEL_MAX = 256
FS_IOC_GETFSLABEL = ior(0x94, 49, _FSLABEL_MAX)


def fs_label(fd: int) -> str | None:
    """The file system's label, None if it has none or cannot be asked. `fd` must be open for reading."""
    try:
        buffer = bytearray(_FSLABEL_MAX)
        fcntl.ioctl(fd, FS_IOC_GETFSLABEL, buffer)
    except OSError:
        return None
    return buffer.split(b"\0", 1)[0].decode("utf-8", "replace") or None
