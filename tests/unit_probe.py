"""A script: what the daemon does that needs privilege, on one mount point, each thing told that failed.

unit_probe.py prepare MOUNT   as full root: .snapfeed/, and a directory and a file of another user that nobody else may enter
unit_probe.py work MOUNT      with the rights to be tried; prints a line for each step that was refused

tests/test_etc.py runs it as etc/snapfeed.service would run the daemon.
"""

import asyncio
import contextlib
import ctypes
import errno
import os
import socket
import sqlite3
import ssl
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from snapshotter.linux import btrfs, fanotify, fiemap, handles, inode_flags, mount_api
from snapshotter.linux.libc import libc

SYSTEM = ".snapfeed"
STRANGER = 1000
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1  # MemoryDenyWriteExecute=, since Linux 6.3
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
MARK = fanotify.FAN_MARK_ADD | fanotify.FAN_MARK_FILESYSTEM | fanotify.FAN_MARK_ONLYDIR
FAN_MODIFY, FAN_CREATE = 0x2, 0x100


@contextlib.contextmanager
def step(name):
    try:
        yield
    except OSError as error:
        print(f"{name}: {errno.errorcode.get(error.errno or 0)}")


def prepare(path):
    root = os.open(path, DIRECTORY)
    if mount_api.mount_of(root).fs_type == "btrfs":
        btrfs.subvol_create_v2(root, SYSTEM.encode())
    else:
        os.mkdir(SYSTEM, dir_fd=root)
    os.chmod(SYSTEM, 0o700, dir_fd=root)
    os.mkdir("private", 0o700, dir_fd=root)
    file = os.open("private/file", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=root)
    os.write(file, b"x" * 8192)
    for fd in (file, os.open("private", DIRECTORY, dir_fd=root), root):
        os.fchown(fd, STRANGER, STRANGER)
    os.fchmod(root, 0o700)


def reflink_and_protect(root, system):
    """A file of a stranger, opened by its handle, cloned; the clone made immutable, and removed."""
    anchor = os.open(".", DIRECTORY, dir_fd=root)
    seen = os.open("private/file", os.O_PATH, dir_fd=root)
    with step("O_NOATIME"):
        handles.open_by_handle_at(anchor, handles.name_to_handle_at(seen), os.O_RDONLY | os.O_NOATIME)
    source = handles.open_by_handle_at(anchor, handles.name_to_handle_at(seen), os.O_RDONLY)
    clone = os.open("clone", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400, dir_fd=system)
    with step("FICLONE"):
        fiemap.ficlone(source, clone)
        list(fiemap.extents(source))
    with step("immutable"):
        inode_flags.set_immutable(clone, on=True)
        inode_flags.set_immutable(clone, on=False)
    os.unlink("clone", dir_fd=system)


def watch(path):
    group = fanotify.fanotify_init(
        fanotify.FAN_CLOEXEC | fanotify.FAN_UNLIMITED_QUEUE | fanotify.FAN_REPORT_DFID_NAME_TARGET
    )
    root = os.open(path, DIRECTORY)
    try:
        fanotify.fanotify_mark(group, MARK, FAN_MODIFY | FAN_CREATE, root)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        top = mount_api.btrfs_top_level(mount_api.mount_of(root).source)
        fanotify.fanotify_mark(group, MARK, FAN_MODIFY | FAN_CREATE, top, b".")


def subvolume_snapshots(root, system):
    root, system = btrfs.reopen(root), btrfs.reopen(system)
    names = (b"1", b"2")
    for name in names:
        btrfs.snap_create_v2(system, name, root)
    with step("send"):
        old, new = (os.open(name, DIRECTORY, dir_fd=system) for name in names)
        list(btrfs.send_stream(new, btrfs.get_subvol_info(old).treeid))
    with step("search"):
        list(btrfs.tree_search_v2(root, btrfs.Key(256, 1, 0), btrfs.Key(256, 255, btrfs.U64_MAX)))
    with step("devices"):
        list(btrfs.dev_info(root))
    for name in names:
        with step("removing a snapshot"):
            btrfs.snap_destroy(system, name)


async def network():
    """The event loop, a thread, a name looked up, TLS, the control socket."""
    ssl.create_default_context()
    await asyncio.to_thread(socket.getaddrinfo, "localhost", 8883)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM):
        pass


def work(path):
    libc.prctl(*map(ctypes.c_ulong, (PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0)))
    with step("a private mount"):
        os.close(mount_api.open_tree_clone(path))
    with step("fanotify"):
        watch(path)
    with step("strangers' directories"):
        root = os.open(path, DIRECTORY)
        system = os.open(SYSTEM, DIRECTORY, dir_fd=root)
        reflink_and_protect(root, system)
        with step("the system file"):
            database = sqlite3.connect(os.path.join(path, SYSTEM, "probe.db"))
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE t (x)")
            database.commit()
            database.close()
            os.unlink("probe.db", dir_fd=system)
        if mount_api.mount_of(root).fs_type == "btrfs":
            with step("a subvolume snapshot"):
                subvolume_snapshots(root, system)
    asyncio.run(network())


if __name__ == "__main__":
    {"prepare": prepare, "work": work}[sys.argv[1]](sys.argv[2])
