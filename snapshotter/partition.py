"""Partitions: which they are, how to find them, and what a mounted one can do."""

import contextlib
import os
from dataclasses import dataclass

from comparer.errors import OperatorError, TransientError

from .backends.base import SYSTEM_DIR
from .linux.btrfs import BTRFS_FIRST_FREE_OBJECTID
from .linux.fsuuid import fs_label, fs_uuid
from .linux.handles import name_to_handle_at
from .linux.mountinfo import Mount, mounts
from .root import open_root
from .systemfile import SYSTEM_FILE

TOP_LEVEL = 5  # BTRFS_FS_TREE_OBJECTID
# File systems of the kernel's own, of no interest to a backup; everything else is visited.
PSEUDO = frozenset(
    "autofs bdev binfmt_misc bpf cgroup cgroup2 configfs cpuset debugfs devpts devtmpfs efivarfs fusectl hugetlbfs mqueue nsfs "
    "overlay pipefs proc pstore ramfs rpc_pipefs securityfs selinuxfs sockfs squashfs sysfs tracefs".split()
)


@dataclass(frozen=True, slots=True)
class Partition:
    """One mounted file system (or, `kind` "directory", one directory of one, for those who may not watch more).

    `uuid`: the file system's, with `:<subvolume id>` for a btrfs subvolume other than the top level; None if it has none.
    """

    path: bytes
    fs_type: str
    source: bytes
    uuid: str | None
    kind: str = "partition"

    @property
    def system_file(self) -> bytes:
        return os.path.join(self.path, SYSTEM_DIR, SYSTEM_FILE)


def topmost(path: bytes, table: list[Mount] | None = None) -> Mount | None:
    """The mount that one sees at `path`: the last one there."""
    found = [m for m in (mounts() if table is None else table) if m.path == path]
    return found[-1] if found else None


def mount_holding(path: bytes) -> Mount:
    """The mount that `path` lies on."""
    table = mounts()
    while True:
        found = topmost(path, table)
        if found is not None or path == b"/":
            break
        path = os.path.dirname(path)
    if found is None:
        raise TransientError("/proc/self/mountinfo shows no root mount")
    return found


def partition_at(path: str | bytes, *, directory: bool = False) -> Partition:
    """What is mounted at `path`; with `directory`, any directory. Raises OperatorError, naming the remedy."""
    shown = os.fsdecode(path)
    try:
        real = os.path.realpath(os.fsencode(path), strict=True)
    except OSError as error:
        raise OperatorError(f"{shown!r}: {error.strerror}; give the mount point of a mounted file system") from error
    if not os.path.isdir(real):
        raise OperatorError(f"{shown!r} is not a directory; give the mount point of a mounted file system")
    mount = topmost(real)
    if directory and (mount is None or not _whole(mount)):
        held = mount_holding(real)
        return Partition(real, held.fs_type, held.source, None, "directory")
    if mount is None:
        holder = os.fsdecode(mount_holding(real).path)
        raise OperatorError(
            f"{shown!r} is not a mount point (it lies on {holder!r}); give a mount point, or adopt just this directory with"
            f" `snapfeed init --directory {shown}`"
        )
    if not _whole(mount):
        raise OperatorError(
            f"{shown!r} is a bind mount of {os.fsdecode(mount.root)!r}, a part of its file system; mount all of it"
        )
    return Partition(real, mount.fs_type, mount.source, uuid_of(real, mount.fs_type))


def _whole(mount: Mount) -> bool:
    """Whether the mount shows a file system (or subvolume) from its root."""
    if mount.fs_type == "btrfs":
        return os.stat(mount.path).st_ino == BTRFS_FIRST_FREE_OBJECTID
    return mount.root == b"/"


def uuid_of(path: bytes | int, fs_type: str) -> str | None:
    """Raises OSError."""
    with contextlib.ExitStack() as stack:
        fd = path if isinstance(path, int) else open_root(stack, path)[0]
        found = fs_uuid(fd, fs_type)
        if found is not None and fs_type == "btrfs":
            subvolume = int.from_bytes(name_to_handle_at(fd).data[8:16], "little")
            if subvolume != TOP_LEVEL:
                return f"{found}:{subvolume}"
        return found


def label_of(partition: Partition) -> str | None:
    """The file system's label; None for a directory, or if there is none."""
    if partition.kind != "partition" or (partition.uuid is not None and ":" in partition.uuid):
        return None  # subvolumes share the label of their file system
    try:
        with contextlib.ExitStack() as stack:
            return fs_label(open_root(stack, partition.path)[0])
    except OSError:
        return None


def is_adopted(path: bytes) -> bool:
    """Whether there is a system file. Raises OperatorError if one may not look."""
    try:
        os.lstat(os.path.join(path, SYSTEM_DIR, SYSTEM_FILE))
    except PermissionError as error:
        raise OperatorError(
            f"{os.fsdecode(path)!r}: no permission to its system directory; run as its owner (root)"
        ) from error
    except OSError:
        return False
    return True


def still_mounted(partition: Partition) -> bool:
    """Whether a partition is what one sees at its mount point."""
    mount = topmost(partition.path)
    try:
        return mount is not None and _whole(mount) and uuid_of(partition.path, mount.fs_type) == partition.uuid
    except OSError:
        return False


def adopted() -> list[Partition]:
    """Every adopted partition that is mounted; one that is mounted twice is named by its first mount point."""
    table = mounts()
    found: dict[str, Partition] = {}
    for mount in table:
        if mount.fs_type in PSEUDO or topmost(mount.path, table) is not mount:
            continue
        try:
            if not is_adopted(mount.path) or not _whole(mount):
                continue
            uuid = uuid_of(mount.path, mount.fs_type)
        except (OSError, OperatorError):
            continue  # unmounted since, or not ours to read: not visited
        key = uuid or f"{mount.dev}{os.fsdecode(mount.root)}"
        found.setdefault(key, Partition(mount.path, mount.fs_type, mount.source, uuid))
    return list(found.values())
