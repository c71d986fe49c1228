"""Where a file's bytes lie: FS_IOC_FIEMAP, and FICLONE, and the number of extents. Source: include/uapi/linux/{fiemap,fs}.h."""

import fcntl
import struct
from collections.abc import Iterator

from comparer.extents import Extent

from .libc import ior, iow, iowr

_FIEMAP = struct.Struct("=QQIIII")  # fm_start, fm_length, fm_flags, fm_mapped_extents, fm_extent_count, fm_reserved
_EXTENT = struct.Struct("=QQQ16xI12x")  # fe_logical, fe_physical, fe_length, fe_reserved64[2], fe_flags, fe_reserved[3]
FS_IOC_FIEMAP = iowr(ord("f"), 11, _FIEMAP.size)
FIEMAP_MAX_OFFSET = (1 << 64) - 1
FIEMAP_FLAG_SYNC = 0x1
FIEMAP_EXTENT_LAST = 0x1
FIEMAP_EXTENT_UNKNOWN = 0x2
FIEMAP_EXTENT_DELALLOC = 0x4
FIEMAP_EXTENT_ENCODED = 0x8
FIEMAP_EXTENT_DATA_ENCRYPTED = 0x80
FIEMAP_EXTENT_NOT_ALIGNED = 0x100
FIEMAP_EXTENT_DATA_INLINE = 0x200
FIEMAP_EXTENT_DATA_TAIL = 0x400
FIEMAP_EXTENT_UNWRITTEN = 0x800
_PLACELESS = (
    FIEMAP_EXTENT_UNKNOWN
    | FIEMAP_EXTENT_DELALLOC
    | FIEMAP_EXTENT_ENCODED
    | FIEMAP_EXTENT_DATA_ENCRYPTED
    | FIEMAP_EXTENT_NOT_ALIGNED
    | FIEMAP_EXTENT_DATA_INLINE
    | FIEMAP_EXTENT_DATA_TAIL
)
_BATCH = 512  # extents an ioctl
FICLONE = iow(0x94, 9, 4)
_FSXATTR = struct.Struct("=IIIII8x")  # fsx_xflags, fsx_extsize, fsx_nextents, fsx_projid, fsx_cowextsize
FS_IOC_FSGETXATTR = ior(ord("X"), 31, _FSXATTR.size)


def extent(logical: int, physical: int, length: int, flags: int) -> Extent:
    """What `struct fiemap_extent` says."""
    return Extent(logical, length, None if flags & _PLACELESS else physical, bool(flags & FIEMAP_EXTENT_UNWRITTEN))


def extents(fd: int) -> Iterator[Extent]:
    """The extent map of a file, sorted, after its dirty pages were written. Raises OSError: EOPNOTSUPP, EIO."""
    start = 0
    while True:
        buffer = bytearray(_FIEMAP.size + _BATCH * _EXTENT.size)
        _FIEMAP.pack_into(buffer, 0, start, FIEMAP_MAX_OFFSET - start, FIEMAP_FLAG_SYNC, 0, _BATCH, 0)
        fcntl.ioctl(fd, FS_IOC_FIEMAP, buffer)
        mapped = _FIEMAP.unpack_from(buffer)[3]
        if not mapped:
            return
        for number in range(mapped):
            logical, physical, length, flags = _EXTENT.unpack_from(buffer, _FIEMAP.size + number * _EXTENT.size)
            yield extent(logical, physical, length, flags)
            if flags & FIEMAP_EXTENT_LAST:
                return
            start = logical + length


def extent_count(fd: int) -> int:
    """How many data extents a file has, without reading them (XFS and others with FS_IOC_FSGETXATTR; 0 where it is not known)."""
    buffer = bytearray(_FSXATTR.size)
    try:
        fcntl.ioctl(fd, FS_IOC_FSGETXATTR, buffer)
    except OSError:
        return 0
    return int(_FSXATTR.unpack_from(buffer)[2])


def ficlone(source: int, destination: int) -> None:
    """Make an empty file share all blocks of another. ioctl_ficlone(2).

    Raises OSError: EOPNOTSUPP or EINVAL (no reflink here), EXDEV, ENOSPC, ETXTBSY (swap file), EPERM.
    """
    fcntl.ioctl(destination, FICLONE, source)
