"""btrfs ioctls. Layouts and numbers: include/uapi/linux/btrfs.h and btrfs_tree.h; behaviour: fs/btrfs/ioctl.c, send.c.

Functions are named as the ioctls. All but `snap_create_v2` and `subvol_create_v2` on one's own subvolumes need CAP_SYS_ADMIN.
No descriptor here may be O_PATH (EBADF).
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from typing import NamedTuple

from .libc import check, ior, iow, iowr, libc

BTRFS_IOCTL_MAGIC = 0x94
BTRFS_FIRST_FREE_OBJECTID = 256  # the inode number of every subvolume's root directory
BTRFS_EMPTY_SUBVOL_DIR_OBJECTID = 2  # the inode number of what a snapshot shows in place of a nested subvolume
BTRFS_ROOT_TREE_OBJECTID = 1
BTRFS_SUBVOL_RDONLY = 1 << 1
BTRFS_ROOT_SUBVOL_RDONLY = 1 << 0
BTRFS_SEND_FLAG_NO_FILE_DATA = 1 << 0
U64_MAX = (1 << 64) - 1

# item types
BTRFS_INODE_ITEM_KEY = 1
BTRFS_INODE_REF_KEY = 12
BTRFS_INODE_EXTREF_KEY = 13
BTRFS_XATTR_ITEM_KEY = 24
BTRFS_DIR_ITEM_KEY = 84
BTRFS_DIR_INDEX_KEY = 96
BTRFS_EXTENT_DATA_KEY = 108
BTRFS_ROOT_ITEM_KEY = 132
BTRFS_ROOT_REF_KEY = 156

_VOL_ARGS = struct.Struct("=q4088s")  # struct btrfs_ioctl_vol_args: fd, name
_VOL_ARGS_V2 = struct.Struct("=qQQ32s4040s")  # struct btrfs_ioctl_vol_args_v2: fd, transid, flags, unused, name
_SEARCH_ARGS_V2 = struct.Struct("=QQQQQQQIIII4QQ")  # struct btrfs_ioctl_search_args_v2: search_key, buf_size
_SEARCH_HEADER = struct.Struct("=QQQII")  # transid, objectid, offset, type, len
# max_id num_devices fsid nodesize sectorsize clone_alignment csum_type csum_size flags generation metadata_uuid reserved
_FS_INFO_ARGS = struct.Struct("=QQ16sIIIHHQQ16s944x")
_DEV_INFO_ARGS = struct.Struct("=Q16sQQ3032x1024s")  # devid uuid bytes_used total_bytes unused path
_SEND_ARGS = struct.Struct("=qQQQQI28x")  # send_fd clone_sources_count clone_sources parent_root flags version
# treeid name parent_id dirid generation flags uuid parent_uuid received_uuid c/o/s/rtransid, c/o/s/rtime, reserved
_SUBVOL_INFO_ARGS = struct.Struct("=Q256sQQQQ16s16s16sQQQQ64x64x")

BTRFS_IOC_SNAP_DESTROY = iow(BTRFS_IOCTL_MAGIC, 15, _VOL_ARGS.size)
BTRFS_IOC_TREE_SEARCH_V2 = iowr(BTRFS_IOCTL_MAGIC, 17, _SEARCH_ARGS_V2.size)
BTRFS_IOC_SNAP_CREATE_V2 = iow(BTRFS_IOCTL_MAGIC, 23, _VOL_ARGS_V2.size)
BTRFS_IOC_SUBVOL_CREATE_V2 = iow(BTRFS_IOCTL_MAGIC, 24, _VOL_ARGS_V2.size)
BTRFS_IOC_DEV_INFO = iowr(BTRFS_IOCTL_MAGIC, 30, _DEV_INFO_ARGS.size)
BTRFS_IOC_FS_INFO = ior(BTRFS_IOCTL_MAGIC, 31, _FS_INFO_ARGS.size)
BTRFS_IOC_SEND = iow(BTRFS_IOCTL_MAGIC, 38, _SEND_ARGS.size)
BTRFS_IOC_GET_SUBVOL_INFO = ior(BTRFS_IOCTL_MAGIC, 60, _SUBVOL_INFO_ARGS.size)

_U32 = struct.Struct("=I")
_NR_ITEMS = 64  # offsetof(struct btrfs_ioctl_search_key, nr_items)
_LARGEST = 1 << 16  # bytes; an item is smaller than a tree block, and that is at most 64 KiB
_PIPE = 1 << 20


class Key(NamedTuple):
    """struct btrfs_key, in the order in which trees are sorted."""

    objectid: int
    type: int
    offset: int


class Item(NamedTuple):
    """One item of a tree: its key and its bytes (little-endian structures, btrfs_tree.h)."""

    objectid: int
    type: int
    offset: int
    data: bytes


class SubvolInfo(NamedTuple):
    """The parts of struct btrfs_ioctl_get_subvol_info_args that are used here. `treeid` is the subvolume's id."""

    treeid: int
    generation: int
    read_only: bool
    uuid: bytes
    parent_uuid: bytes
    otransid: int


class FsInfo(NamedTuple):
    """The parts of struct btrfs_ioctl_fs_info_args that are used here; sizes in bytes."""

    fsid: bytes
    max_id: int
    num_devices: int
    nodesize: int
    sectorsize: int


def snap_create_v2(directory_fd: int, name: bytes, source_fd: int, *, read_only: bool = True) -> None:
    """Snapshot the subvolume whose root directory is `source_fd` as `name` in `directory_fd`.

    When it returns, the snapshot is on the disk: create_snapshot() commits the transaction itself. Raises OSError: EEXIST,
    EINVAL (not a subvolume), EXDEV (another file system), ENOSPC, EROFS, EPERM, ETXTBSY (an active swap file).
    """
    flags = BTRFS_SUBVOL_RDONLY if read_only else 0
    _ioctl(directory_fd, BTRFS_IOC_SNAP_CREATE_V2, _VOL_ARGS_V2.pack(source_fd, 0, flags, b"", _checked(name)))


def subvol_create_v2(directory_fd: int, name: bytes) -> None:
    """Make an empty subvolume `name` in `directory_fd`. Raises OSError: EEXIST, ENOSPC, EROFS, EPERM."""
    _ioctl(directory_fd, BTRFS_IOC_SUBVOL_CREATE_V2, _VOL_ARGS_V2.pack(0, 0, 0, b"", _checked(name)))


def snap_destroy(directory_fd: int, name: bytes) -> None:
    """Remove the subvolume or snapshot `name` in `directory_fd`; its space comes back in the background.

    Raises OSError: ENOENT, EINVAL (not a subvolume), EPERM (a send is reading it, or no privilege), EBUSY (mounted), ENOTEMPTY.
    """
    _ioctl(directory_fd, BTRFS_IOC_SNAP_DESTROY, _VOL_ARGS.pack(0, _checked(name)))


def _ioctl(fd: int, request: int, argument: bytes) -> bytearray:
    """One ioctl; its argument as the kernel left it. (With immutable bytes fcntl allows 1,024 bytes only.)"""
    buffer = bytearray(argument)
    fcntl.ioctl(fd, request, buffer, True)
    return buffer


def _checked(name: bytes) -> bytes:
    if not name or b"/" in name or b"\0" in name or len(name) > 255:
        raise ValueError(f"{name!r} is no name for a subvolume")
    return name


def send(snapshot_fd: int, stream_fd: int, parent_root: int) -> None:
    """Write the send stream, without file data, from subvolume id `parent_root` to `snapshot_fd` into `stream_fd`; blocks.

    Both must be read-only. Raises OSError: ENAMETOOLONG (a path of more than 4,095 bytes), EPERM, EAGAIN (balance, dedupe),
    EPIPE (the reader has gone), ENOMEM, EIO.
    """
    _ioctl(snapshot_fd, BTRFS_IOC_SEND, _SEND_ARGS.pack(stream_fd, 0, 0, parent_root, BTRFS_SEND_FLAG_NO_FILE_DATA, 0))


def send_stream(snapshot_fd: int, parent_root: int) -> Iterator[bytes]:
    """The stream of `send` in pieces of up to 1 MiB, as it is made; a thread of its own makes it.

    Raises what `send` raises, after the last piece. May be closed early.
    """
    failure: list[OSError] = []
    reader, writer = os.pipe2(os.O_CLOEXEC)

    def work() -> None:
        try:
            send(snapshot_fd, writer, parent_root)
        except OSError as error:
            failure.append(error)
        finally:
            os.close(writer)

    thread = threading.Thread(target=work, name="btrfs-send")
    with contextlib.suppress(OSError):  # EPERM above pipe-user-pages-soft; the default size will do
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE)
    try:
        thread.start()
        while data := os.read(reader, _PIPE):
            yield data
    finally:
        os.close(reader)  # a send still at work gets EPIPE
        thread.join()
    if failure:
        raise failure[0]


def search_buffer() -> bytearray:
    """Memory for `tree_search_v2`, for one thread to use again and again; large enough for any item twice."""
    return bytearray(_SEARCH_ARGS_V2.size + 2 * _LARGEST)


def tree_search_v2(
    fd: int, first: Key, last: Key, *, tree_id: int = 0, min_transid: int = 0, buffer: bytearray | None = None
) -> Iterator[Item]:
    """Every item from `first` to `last` of a tree (0: the subvolume of `fd`), sorted; about 2 us a call on a hot tree.

    With `min_transid` only items in tree blocks written in that transaction or later: a superset of the items changed since.
    Raises OSError: EPERM, ENOENT (no such tree), EIO, EUCLEAN.
    """
    if buffer is None:
        buffer = search_buffer()
    start, room = _SEARCH_ARGS_V2.size, len(buffer) - _SEARCH_ARGS_V2.size
    header, size = _SEARCH_HEADER, _SEARCH_HEADER.size
    objectid, kind, offset = first
    while True:
        _SEARCH_ARGS_V2.pack_into(
            buffer, 0, tree_id, objectid, last.objectid, offset, last.offset, min_transid, U64_MAX, kind, last.type,
            0xFFFFFFFF, 0, 0, 0, 0, 0, room,
        )  # fmt: skip
        fcntl.ioctl(fd, BTRFS_IOC_TREE_SEARCH_V2, buffer, True)
        (count,) = _U32.unpack_from(buffer, _NR_ITEMS)
        at = start
        items = []
        for _ in range(count):
            _, objectid, offset, kind, length = header.unpack_from(buffer, at)
            at += size
            items.append(Item(objectid, kind, offset, bytes(buffer[at : at + length])))
            at += length
        yield from items
        if at - start <= room - size - _LARGEST or (objectid, kind, offset) >= last:
            return  # any item would still have fitted, so there is none
        objectid, kind, offset = _after(objectid, kind, offset)


def _after(objectid: int, kind: int, offset: int) -> Key:
    if offset < U64_MAX:
        return Key(objectid, kind, offset + 1)
    if kind < 255:
        return Key(objectid, kind + 1, 0)
    return Key(objectid + 1, 0, 0)


def fs_info(fd: int) -> FsInfo:
    """BTRFS_IOC_FS_INFO of the file system of `fd`."""
    answer = _ioctl(fd, BTRFS_IOC_FS_INFO, bytes(_FS_INFO_ARGS.size))
    max_id, devices, fsid, nodesize, sectorsize, *_ = _FS_INFO_ARGS.unpack(answer)
    return FsInfo(fsid, max_id, devices, nodesize, sectorsize)


def dev_info(fd: int) -> Iterator[tuple[int, bytes]]:
    """Every device of the file system of `fd`: (devid, path as the kernel knows it; empty if the device is missing)."""
    for devid in range(1, fs_info(fd).max_id + 1):
        try:
            answer = _ioctl(fd, BTRFS_IOC_DEV_INFO, _DEV_INFO_ARGS.pack(devid, b"", 0, 0, b""))
        except OSError as error:
            if error.errno != errno.ENODEV:  # numbers are not reused, so there are gaps
                raise
            continue
        *_, path = _DEV_INFO_ARGS.unpack(answer)
        yield devid, path.rstrip(b"\0")


def get_subvol_info(fd: int) -> SubvolInfo:
    """BTRFS_IOC_GET_SUBVOL_INFO of the subvolume that `fd` lies in; `generation` is as of the last commit."""
    answer = _ioctl(fd, BTRFS_IOC_GET_SUBVOL_INFO, bytes(_SUBVOL_INFO_ARGS.size))
    treeid, _, _, _, generation, flags, uuid, parent, _, _, otransid, _, _ = _SUBVOL_INFO_ARGS.unpack(answer)
    return SubvolInfo(treeid, generation, bool(flags & BTRFS_ROOT_SUBVOL_RDONLY), uuid, parent, otransid)


def syncfs(fd: int) -> None:
    """Commit what is pending on the file system of `fd`. Cheap if nothing is."""
    check(libc.syncfs(ctypes.c_int(fd)))


def reopen(directory_fd: int) -> int:
    """A descriptor for ioctls on the directory that `directory_fd` (perhaps O_PATH) is open on."""
    return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory_fd)
