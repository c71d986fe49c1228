"""Random work on a real directory tree, as other programs would do it; every operation is a real system call."""

import ctypes
import mmap
import os
import random
import socket
import stat


def opened(path, mode):
    """open(), but a FIFO in the way is an error, not a wait, and a symbolic link an error, not a way out."""
    return open(path, mode, opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644))


libc = ctypes.CDLL(None, use_errno=True)
RENAME_EXCHANGE = 2
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
AT_FDCWD = -100
HOSTILE = [
    b"new\nline", b"\x1b[31mred", b"\xff\xfe", b"-rf", b"#x", b"+", b"a b", b"\xe2\x80\xaetxt", b"x" * 255, b"$(id)", b"\\", b'"',
    b"%s",
]  # fmt: skip
PLAIN = [b"a", b"b", b"c", b"d", b"e", b"f"]


class Worker:
    """Does random operations below `top`; `random` seeds make it repeatable."""

    def __init__(self, top: bytes, seed: int, *, reflink: bool = False, devices: bool = True) -> None:
        self.top = top
        self.random = random.Random(seed)
        self.reflink = reflink
        self.devices = devices
        self.log: list[str] = []

    def paths(self):
        dirs, others = [self.top], []
        for directory, names, files in os.walk(self.top):
            others += [os.path.join(directory, n) for n in names if os.path.islink(os.path.join(directory, n))]
            if directory == self.top and b".snapfeed" in names:
                names.remove(b".snapfeed")
            names[:] = [n for n in names if not os.path.islink(os.path.join(directory, n))]
            dirs += [os.path.join(directory, n) for n in names]
            others += [os.path.join(directory, n) for n in files]
        return sorted(dirs), sorted(others)  # in one order on every file system: a seed means the same work everywhere

    def step(self) -> None:
        choose = self.random.choice
        dirs, others = self.paths()
        files = [p for p in others if stat.S_ISREG(os.lstat(p).st_mode)]
        names = PLAIN if self.random.random() < 0.85 else HOSTILE
        fresh = os.path.join(choose(dirs), choose(names))
        anything = [*others, *dirs[1:]]
        kind = choose(OPERATIONS)
        needs = {"file": files, "any": anything, "": [None]}[kind[0]]
        if not needs:
            return
        target = choose(needs)
        self.log.append(f"{kind[1]} {target!r} {fresh!r}")
        try:
            getattr(self, kind[1])(target, fresh, anything)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            self.log[-1] += f" -> {error}"

    def data(self, most=20_000):
        return self.random.randbytes(self.random.randrange(1, most))

    def create(self, _target, fresh, _):
        with opened(fresh, "wb") as file:
            file.write(self.data())

    def mkdir(self, _target, fresh, _):
        os.mkdir(fresh)

    def symlink(self, _target, fresh, _):
        os.symlink(self.random.choice([b"/nonexistent/outside", b"..", b"a", b"\xff\n"]), fresh)

    def special(self, _target, fresh, _):
        kind = self.random.choice(["fifo", "socket", "char", "block"] if self.devices else ["fifo", "socket"])
        if kind == "fifo":
            os.mkfifo(fresh)
        elif kind == "socket":
            here = os.open(os.path.dirname(fresh), os.O_PATH)
            try:
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(b"/proc/self/fd/%d/%b" % (here, os.path.basename(fresh)[:60]))
            finally:
                os.close(here)
        else:
            os.mknod(fresh, {"char": stat.S_IFCHR, "block": stat.S_IFBLK}[kind] | 0o600, os.makedev(7, 99))

    def link(self, target, fresh, _):
        os.link(target, fresh, follow_symlinks=False)

    def unlink(self, target, _fresh, _):
        if stat.S_ISDIR(os.lstat(target).st_mode):
            os.rmdir(target)
        else:
            os.unlink(target)

    def rmtree(self, target, _fresh, _):
        import shutil

        if stat.S_ISDIR(os.lstat(target).st_mode):
            shutil.rmtree(target)
        else:
            os.unlink(target)

    def rename(self, target, fresh, _):
        os.rename(target, fresh)

    def exchange(self, target, _fresh, anything):
        other = self.random.choice(anything)
        if libc.renameat2(AT_FDCWD, target, AT_FDCWD, other, RENAME_EXCHANGE):
            raise OSError(ctypes.get_errno(), "exchange")

    def append(self, target, _fresh, _):
        with opened(target, "ab") as file:
            file.write(self.data())

    def overwrite(self, target, _fresh, _):
        with opened(target, "r+b") as file:
            file.seek(self.random.randrange(0, os.fstat(file.fileno()).st_size + 1))
            file.write(self.data(5000))

    def truncate(self, target, _fresh, _):
        with opened(target, "r+b") as file:
            file.truncate(self.random.randrange(0, 40_000))

    def punch(self, target, _fresh, _):
        fd = os.open(target, os.O_RDWR | os.O_NOFOLLOW)
        try:
            start = ctypes.c_long(self.random.randrange(0, 5) * 4096)
            if libc.fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, start, ctypes.c_long(4096)):
                raise OSError(ctypes.get_errno(), "punch")
        finally:
            os.close(fd)

    def mapped(self, target, _fresh, _):
        with opened(target, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory[self.random.randrange(len(memory))] = self.random.randrange(256)

    def chmod(self, target, _fresh, _):
        if not stat.S_ISLNK(os.lstat(target).st_mode):
            os.chmod(target, self.random.choice([0o600, 0o644, 0o755, 0o4755, 0o1777]))

    def chown(self, target, _fresh, _):
        os.lchown(target, self.random.randrange(3), self.random.randrange(3))

    def utimes(self, target, _fresh, _):
        os.utime(target, ns=(self.random.randrange(10**18), self.random.randrange(10**18)), follow_symlinks=False)

    def xattr(self, target, _fresh, _):
        name = self.random.choice([b"trusted.a", b"trusted.b", b"trusted.long-name"])
        if self.random.random() < 0.3:
            os.removexattr(target, name, follow_symlinks=False)
        else:
            os.setxattr(target, name, self.data(60), follow_symlinks=False)

    def reflink_copy(self, target, fresh, _):
        if not self.reflink:
            return
        import fcntl

        with opened(target, "rb") as source, opened(fresh, "wb") as destination:
            fcntl.ioctl(destination, 0x40049409, source.fileno())


OPERATIONS = [
    *[("", name) for name in ("create", "create", "create", "mkdir", "mkdir", "symlink", "special")],
    *[("any", name) for name in ("unlink", "unlink", "rmtree", "rename", "rename", "rename")],
    *[("any", name) for name in ("exchange", "chmod", "chown", "utimes", "xattr")],
    *[("file", name) for name in ("link", "append", "overwrite", "truncate", "punch", "mapped", "reflink_copy")],
]  # fmt: skip
