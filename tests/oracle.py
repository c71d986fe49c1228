"""The independent oracle: a walk of a real directory tree with os.lstat and friends; shares no code with what it judges."""

import os
import stat
from pathlib import Path

TYPES = {
    stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket", stat.S_IFCHR: "char", stat.S_IFBLK: "block",
}  # fmt: skip
SYSTEM = b".snapfeed"


def entry(path: bytes) -> dict:
    """What the feed says of an object, as far as lstat and listxattr tell it."""
    st = os.lstat(path)
    kind = TYPES[stat.S_IFMT(st.st_mode)]
    try:
        names = sorted(os.listxattr(path, follow_symlinks=False))
        xattrs = {n: os.getxattr(path, n, follow_symlinks=False) for n in names}
    except OSError:
        xattrs = {}
    return {
        "ino": st.st_ino,
        "type": kind,
        "size": st.st_size,
        "mode": stat.S_IMODE(st.st_mode),
        "uid": st.st_uid,
        "gid": st.st_gid,
        "nlink": st.st_nlink,
        "mtime_ns": st.st_mtime_ns,
        "ctime_ns": st.st_ctime_ns,
        "rdev": st.st_rdev if kind in ("char", "block") else None,
        "xattrs": xattrs,
        "target": os.readlink(path) if kind == "symlink" else None,
    }


def walk(top: bytes | str | Path) -> dict[bytes, dict]:
    """Every entry below `top` by its path from there (the root is b""), the system directory left out.

    Iterative and relative to directory descriptors of its own making only through full paths: deep trees are walked by chdir-free
    joins, so paths must stay below PATH_MAX.
    """
    root = os.fsencode(top)
    dev = os.lstat(root).st_dev
    found = {b"": entry(root)}
    stack = [b""]
    while stack:
        directory = stack.pop()
        for name in os.listdir(os.path.join(root, directory)):
            path = os.path.join(directory, name)
            if path == SYSTEM:
                continue
            full = os.path.join(root, path)
            if os.lstat(full).st_dev != dev:
                continue  # a nested subvolume or a mount: a partition of its own
            found[path] = entry(full)
            if found[path]["type"] == "dir":
                stack.append(path)
    return found
