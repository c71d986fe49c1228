"""The directory that a replica writes to: every step by directory descriptors, so that nothing outside is ever touched.

Paths are bytes from the root. They are walked component by component with O_NOFOLLOW; what is no directory of this file system
is an `AstrayError`. What is made is made in `.snapfeed-replica/tmp`, dressed there, and renamed into its place, so that no half
made object ever has its name. Objects are never opened for reading or writing unless they are regular files.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial

from comparer.errors import DamageError, OperatorError
from comparer.model import Attr, FileType
from feed.escape import printable

OWN = b".snapfeed-replica"
SYSTEM = b".snapfeed"
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
LABELS = frozenset({b"security.selinux"})  # the host's own policy sets these; only what the feed has counts
_MODES = {
    FileType.FIFO: stat.S_IFIFO, FileType.SOCKET: stat.S_IFSOCK, FileType.CHAR: stat.S_IFCHR, FileType.BLOCK: stat.S_IFBLK,
}  # fmt: skip
_HARMLESS = frozenset(
    {
        errno.EPERM,
        errno.EACCES,
        errno.EOPNOTSUPP,
        errno.ENOSPC,
        errno.E2BIG,
        errno.EINVAL,
        errno.ERANGE,
        errno.EOVERFLOW,
    }
)
_REFUSES = frozenset({
    errno.EFBIG, errno.EMLINK, errno.ENAMETOOLONG, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL, errno.EILSEQ, errno.EOVERFLOW,
})  # fmt: skip
_NO_NAME = frozenset(
    {errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}
)  # nothing can have it, or nothing has


class AstrayError(Exception):
    """The directory is not as the replica left it: something else lies where one of its directories must be."""


def refusable(error: OSError) -> bool:
    """Whether a file system says by an error that it cannot hold one object (or name of one) as it is, whenever it is tried."""
    return error.errno in _REFUSES


def parts(path: bytes, what: str = "path") -> list[bytes]:
    """The components of a path of the feed; none for the root. Raises DamageError, naming it, if it could lead astray."""
    found = path.split(b"/") if path else []
    for part in found:
        if part in {b"", b".", b".."} or b"\0" in part or len(part) > 255:
            raise DamageError(f"{what} {printable(path)}: a name in it is not allowed; nothing was written")
    return found


def check_path(path: bytes) -> None:
    """Raises DamageError for a path that no feed may name: see `parts`, and the system directory's and the replica's own."""
    found = parts(path)
    if found and found[0] in {OWN, SYSTEM}:
        raise DamageError(f"path {printable(path)}: {found[0].decode()} is not the feed's; nothing was written")


class Tree:
    """Raises OperatorError for a directory that cannot be used or holds something that is no replica's."""

    def __init__(self, top: bytes, refuse: Callable[[int, bytes], None]) -> None:
        """`refuse` may raise for the directory (its descriptor, its name) before anything is made in it."""
        self.top = top
        self.root = os.geteuid() == 0
        self._held: tuple[bytes, int] | None = None
        self._trash = 0
        try:
            self.root_fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise OperatorError(f"{printable(top)}: {error.strerror}; give an existing directory") from error
        try:
            self.dev = os.fstat(self.root_fd).st_dev
            refuse(self.root_fd, top)
            self.own_fd = self._own_directory()
        except BaseException:
            os.close(self.root_fd)
            raise
        with contextlib.suppress(FileExistsError):
            os.mkdir(b"tmp", 0o700, dir_fd=self.own_fd)
        self.tmp_fd = os.open(b"tmp", os.O_RDONLY | _DIRECTORY, dir_fd=self.own_fd)

    def sweep(self) -> None:
        """Remove what a process before this one left half made."""
        for name in os.listdir(self.tmp_fd):
            self.remove(self.tmp_fd, os.fsencode(name))

    def _own_directory(self) -> int:
        try:
            return os.open(OWN, os.O_RDONLY | _DIRECTORY, dir_fd=self.root_fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise OperatorError(f"{printable(self.top)}/{OWN.decode()}: {error.strerror}; remove it") from error
        if SYSTEM in map(os.fsencode, os.listdir(self.root_fd)):
            raise OperatorError(
                f"{printable(self.top)} is the root of an adopted partition ({SYSTEM.decode()} is in it); give one below it"
            )
        # an ext4 that was just made holds an empty lost+found, which is nobody's data
        if any(name != "lost+found" or self._filled(b"lost+found") for name in os.listdir(self.root_fd)):
            raise OperatorError(
                f"{printable(self.top)} is not empty and no replica; give an empty directory (all that is in it would be lost)"
            )
        os.mkdir(OWN, 0o700, dir_fd=self.root_fd)
        return os.open(OWN, os.O_RDONLY | _DIRECTORY, dir_fd=self.root_fd)

    def _filled(self, name: bytes) -> bool:
        try:
            fd = os.open(name, os.O_RDONLY | _DIRECTORY, dir_fd=self.root_fd)
        except NotADirectoryError:
            return True
        try:
            return bool(os.listdir(fd))
        finally:
            os.close(fd)

    def close(self) -> None:
        self.forget()
        for fd in (self.tmp_fd, self.own_fd, self.root_fd):
            os.close(fd)

    # ---- walking

    def forget(self) -> None:
        """A directory was moved or removed: what is held open may not be what its path says any more."""
        if self._held is not None:
            os.close(self._held[1])
            self._held = None

    def directory(self, path: bytes) -> int:
        """A descriptor (O_PATH) of a directory, held until the next call or `forget`; do not close it. Raises AstrayError."""
        if not path:
            return self.root_fd
        if self._held is not None and self._held[0] == path:
            return self._held[1]
        self.forget()
        fd = self.root_fd
        try:
            for part in parts(path):
                below = os.open(part, os.O_PATH | _DIRECTORY, dir_fd=fd)
                if fd != self.root_fd:
                    os.close(fd)
                fd = below
                if os.fstat(fd).st_dev != self.dev:
                    raise AstrayError(f"{printable(path)}: another file system is mounted there")
        except (FileNotFoundError, NotADirectoryError) as error:
            if fd != self.root_fd:
                os.close(fd)
            raise AstrayError(f"{printable(path)}: no directory is there ({error.strerror})") from error
        except BaseException:
            if fd != self.root_fd:
                os.close(fd)
            raise
        self._held = (path, fd)
        return fd

    def place(self, path: bytes) -> tuple[int, bytes]:
        """(descriptor of the directory, name); of the root itself its own descriptor and `.`. See `directory`."""
        if not path:
            return self.root_fd, b"."
        directory, _, name = path.rpartition(b"/")
        return self.directory(directory), name

    def entries(self, path: bytes) -> list[bytes]:
        """The names in a directory, the replica's own left out, and that of a feed of this directory, once it is adopted."""
        fd = os.open(b".", os.O_RDONLY | _DIRECTORY, dir_fd=self.directory(path))
        try:
            return sorted(name for name in map(os.fsencode, os.listdir(fd)) if path or name not in {OWN, SYSTEM})
        finally:
            os.close(fd)

    def look(self, path: bytes) -> os.stat_result | None:
        """None if nothing has that name, nor perhaps could have it here."""
        fd, name = self.place(path)
        try:
            return os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError as error:
            if error.errno in _NO_NAME:
                return None
            raise

    # ---- names

    def make_directory(self, path: bytes) -> None:
        fd, name = self.place(path)
        try:
            os.mkdir(name, 0o700, dir_fd=fd)
        except FileExistsError:
            # made by the step that was interrupted (then it is empty), or not ours
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=fd)
            self.remove(fd, name)
            os.mkdir(name, 0o700, dir_fd=fd)

    def move_in(self, temporary: bytes, path: bytes) -> None:
        """Give what was made in tmp its name, whatever has it."""
        fd, name = self.place(path)
        try:
            os.rename(temporary, name, src_dir_fd=self.tmp_fd, dst_dir_fd=fd)
        except IsADirectoryError:
            self.remove(fd, name)
            os.rename(temporary, name, src_dir_fd=self.tmp_fd, dst_dir_fd=fd)

    def link(self, old: bytes, new: bytes) -> None:
        """Another name for the object that has the name `old`, whatever has it."""
        fd, name = self.place(old)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(b"link", dir_fd=self.tmp_fd)
        try:
            os.link(name, b"link", src_dir_fd=fd, dst_dir_fd=self.tmp_fd, follow_symlinks=False)
        except FileNotFoundError:
            raise AstrayError(f"{printable(old)}: it is not there") from None
        try:
            self.move_in(b"link", new)
        finally:
            # it may be refused; and renaming one name of an object over another does nothing at all: rename(2)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(b"link", dir_fd=self.tmp_fd)

    def rename(self, old: bytes, new: bytes) -> None:
        """Raises AstrayError if neither of the two names is there."""
        fd, name = self.place(old)
        source = os.dup(fd)  # the second walk may let go of the first
        try:
            target, last = self.place(new)
            try:
                os.stat(name, dir_fd=source, follow_symlinks=False)
            except FileNotFoundError:
                if self.look(new) is None:
                    raise AstrayError(f"{printable(old)}: it is not there") from None
                return  # the step that was interrupted
            self.remove(target, last)
            os.rename(name, last, src_dir_fd=source, dst_dir_fd=target)
        finally:
            os.close(source)
            self.forget()

    def remove_at(self, path: bytes) -> None:
        """Remove what has a name, if anything has."""
        fd, name = self.place(path)
        try:
            self.remove(fd, name)
        except OSError as error:
            if error.errno not in _NO_NAME:
                raise

    def remove(self, fd: int, name: bytes) -> None:
        """Remove a name and all that is in it. A directory's own are moved to tmp one by one, so that no depth is too deep."""
        try:
            os.unlink(name, dir_fd=fd)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in {errno.EISDIR, errno.EPERM}:
                raise
        else:
            return
        if self._held is not None and self._held[1] != fd:
            self.forget()  # it may lie in what goes
        try:
            os.rmdir(name, dir_fd=fd)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
        else:
            return
        waiting = [self._discard(fd, name)]
        while waiting:
            label = waiting.pop()
            inside = os.open(label, os.O_RDONLY | _DIRECTORY, dir_fd=self.tmp_fd)
            try:
                if os.fstat(inside).st_dev != self.dev:
                    raise OperatorError(f"{printable(name)}: another file system is mounted in it; unmount it")
                for entry in map(os.fsencode, os.listdir(inside)):
                    try:
                        os.unlink(entry, dir_fd=inside)
                    except IsADirectoryError:
                        waiting.append(self._discard(inside, entry))
            finally:
                os.close(inside)
            os.rmdir(label, dir_fd=self.tmp_fd)

    def _discard(self, fd: int, name: bytes) -> bytes:
        while True:
            self._trash += 1
            label = b"trash-%d" % self._trash
            try:
                os.stat(label, dir_fd=self.tmp_fd, follow_symlinks=False)
            except FileNotFoundError:
                os.rename(name, label, src_dir_fd=fd, dst_dir_fd=self.tmp_fd)
                return label

    # ---- objects

    @contextlib.contextmanager
    def new_file(self) -> Iterator[int]:
        """An empty file `new` in tmp, open for reading and writing."""
        self._clear()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(b"new", flags, 0o600, dir_fd=self.tmp_fd)
        try:
            yield fd
        finally:
            os.close(fd)

    def new_other(self, attr: Attr) -> None:
        """A symbolic link, fifo, socket or device `new` in tmp. Raises OSError: EPERM for devices without privilege."""
        self._clear()
        if attr.type is FileType.SYMLINK:
            os.symlink(attr.target or b"", b"new", dir_fd=self.tmp_fd)
        else:
            os.mknod(b"new", _MODES[attr.type] | 0o600, attr.rdev or 0, dir_fd=self.tmp_fd)

    def _clear(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(b"new", dir_fd=self.tmp_fd)

    def open_file(self, path: bytes, flags: int) -> int | None:
        """A regular file of ours; None if it is not there or none. Without privilege its mode may be widened for that."""
        fd, name = self.place(path)
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                return None
            try:
                opened = os.open(name, flags, dir_fd=fd)
            except PermissionError:
                self._chmod(fd, name, 0o600)
                opened = os.open(name, flags, dir_fd=fd)
        except FileNotFoundError:
            return None
        if stat.S_ISREG(os.fstat(opened).st_mode):
            return opened
        os.close(opened)
        return None

    def mode(self, attr: Attr) -> int:
        """The mode that an object has here: without privilege a directory stays usable by its owner."""
        return attr.mode if self.root or attr.type is not FileType.DIR else attr.mode | 0o700

    def dress_new(self, attr: Attr) -> list[str]:
        """Give `new` in tmp its attributes; returns what could not be set, for people."""
        return self._dress(self.tmp_fd, b"new", attr)

    def dress(self, path: bytes, attr: Attr) -> list[str]:
        """The same of an object in its place. Raises AstrayError if it is not there."""
        return self._dress(*self.place(path), attr)

    def _dress(self, fd: int, name: bytes, attr: Attr) -> list[str]:
        try:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            raise AstrayError(f"{printable(name)}: it is not there") from None
        flaws: list[str] = []
        if self.root and (found.st_uid, found.st_gid) != (attr.uid, attr.gid):
            # takes setuid and capabilities away
            owner = partial(os.chown, name, attr.uid, attr.gid, dir_fd=fd, follow_symlinks=False)
            flaws += _tried("owner", owner)
        if attr.type is not FileType.SYMLINK:
            flaws += _tried("mode", partial(self._chmod, fd, name, self.mode(attr)))
        flaws += self._dress_xattrs(b"/proc/self/fd/%d/%b" % (fd, name), attr)
        times = (found.st_atime_ns, attr.mtime_ns)
        return flaws + _tried("mtime", partial(os.utime, name, ns=times, dir_fd=fd, follow_symlinks=False))

    def _chmod(self, fd: int, name: bytes, mode: int) -> None:
        """By a descriptor that opens nothing: fchmodat() follows symbolic links."""
        it = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        try:
            found = os.fstat(it).st_mode
            if not stat.S_ISLNK(found) and stat.S_IMODE(found) != mode:
                os.chmod(b"/proc/self/fd/%d" % it, mode)
        finally:
            os.close(it)

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        fd, name = self.place(path)
        return read_xattrs(b"/proc/self/fd/%d/%b" % (fd, name))

    def _dress_xattrs(self, path: bytes, attr: Attr) -> list[str]:
        wanted = dict(attr.xattrs)
        flaws = []
        present = read_xattrs(path)
        for key in present:
            if key not in wanted and key not in LABELS:
                flaws += _tried(_attribute(key), partial(os.removexattr, path, key, follow_symlinks=False))
        for key, value in wanted.items():
            if present.get(key) != value:
                flaws += _tried(_attribute(key), partial(os.setxattr, path, key, value, follow_symlinks=False))
        return flaws


def _attribute(key: bytes) -> str:
    return f"extended attribute {printable(key)}"


def _tried(what: str, action: Callable[[], None]) -> list[str]:
    try:
        action()
    except OSError as error:
        if error.errno not in _HARMLESS:
            raise
        return [f"{what}: {error.strerror}"]
    return []


def read_xattrs(path: bytes) -> dict[bytes, bytes]:
    """All extended attributes of an object, a symbolic link not followed; none where the file system has none."""
    found = {}
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in {errno.EOPNOTSUPP, errno.EPERM, errno.EACCES}:
            return {}
        raise
    for name in names:
        with contextlib.suppress(OSError):  # removed meanwhile, or not for us to see
            found[os.fsencode(name)] = os.getxattr(path, name, follow_symlinks=False)
    return found
