"""A consumer that applies a diff to a real directory with real system calls, in the order it came, knowing nothing else."""

import base64
import os
import stat

from consumer import name

MODES = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "char": stat.S_IFCHR, "block": stat.S_IFBLK}


class RealDirectory:
    """Content is not its business: a file has the right size, and nothing in it."""

    def __init__(self, top) -> None:
        self.top = os.fsencode(top)

    def at(self, path: bytes) -> bytes:
        return os.path.join(self.top, path) if path else self.top

    def clear(self) -> None:
        import shutil

        for entry in os.scandir(self.top):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)

    def apply(self, diff: dict) -> None:
        if diff.get("baseline"):
            self.clear()
        for change in diff["changes"]:
            self.one(change)
        # a later change moves a directory's times, so attributes are set at the end, where each object is by then
        told = {change["id"]: change for change in diff["changes"] if change["after"] is not None}
        paths = {}
        for change in diff["changes"]:
            path, old = name(change, "path"), name(change, "from")
            if change["op"] == "rename":
                paths = {i: moved(p, old, path) for i, p in paths.items()}
            if change["op"] in ("unlink", "delete"):
                paths = {i: p for i, p in paths.items() if p != path}
            else:
                paths[change["id"]] = path
        for ident, path in sorted(paths.items(), key=lambda item: -item[1].count(b"/")):
            self.dress(path, told[ident])

    def one(self, change: dict) -> None:
        path = self.at(name(change, "path"))
        match change["op"]:
            case "create" if change["type"] == "dir":
                os.mkdir(path)
            case "create" if change["type"] == "file":
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW))
            case "create" if change["type"] == "symlink":
                os.symlink(name(change, "target"), path)
            case "create":
                os.mknod(path, MODES[change["type"]] | 0o600, int(change["after"]["rdev"] or 0))
            case "link":
                os.link(self.at(name(change, "from")), path, follow_symlinks=False)
            case "unlink" | "delete":
                (os.rmdir if change["type"] == "dir" else os.unlink)(path)
            case "rename":
                assert not os.path.lexists(path), f"rename onto {path!r}"
                os.rename(self.at(name(change, "from")), path)

    def dress(self, path: bytes, change: dict) -> None:
        full, after = self.at(path), change["after"]
        if change["type"] == "file":
            os.truncate(full, int(after["size"]))
        os.chown(full, after["uid"], after["gid"], follow_symlinks=False)
        if change["type"] != "symlink":
            os.chmod(full, after["mode"])
        wanted = {key: base64.b64decode(value) for key, value in after.get("xattrs", {}).items()}
        for key in os.listxattr(full, follow_symlinks=False):
            if key not in wanted:
                os.removexattr(full, key, follow_symlinks=False)
        for key, value in wanted.items():
            os.setxattr(full, key, value, follow_symlinks=False)
        os.utime(full, ns=(0, int(after["mtime_ns"])), follow_symlinks=False)


def moved(path: bytes, old: bytes, new: bytes) -> bytes:
    return new + path[len(old) :] if path == old or path.startswith(old + b"/") else path


def comparable(tree: dict[bytes, dict]) -> dict[bytes, dict]:
    """What two file systems can agree on: not inode numbers, change times, nor how they size and count directories."""
    keys = ("type", "mode", "uid", "gid", "mtime_ns", "rdev", "xattrs", "target")
    found = {}
    for path, entry in tree.items():
        if path:
            found[path] = {k: entry[k] for k in keys}
            if entry["type"] != "dir":
                found[path] |= {"size": entry["size"], "nlink": entry["nlink"]}
    return found
