"""The watched directories of one file system: opening, watching and scanning them. What inotify(7) leaves to its user."""

import errno
import os
from collections.abc import Callable

from comparer.model import Ident
from snapshotter.linux.identity import Identifier
from snapshotter.linux.mount_api import open_tree_clone

from .directory_tree import Directory, DirectoryTree
from .inotify_watches import Watches

SYSTEM_DIRECTORY = b".snapfeed"
TOO_FEW_WATCHES = "inotify: too few watches for all directories: raise fs.inotify.max_user_watches"
HELD = 64  # directories kept open in a scan

_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


class WatchedTree:
    """A watch on every directory of the file system at `root`, but for the system directory and what cannot be read.

    Not entered: other file systems, symbolic links. `appeared(directory, name)` is called for all that is found in a new
    directory. `gap` says why a directory that should be watched is not; a `rescan` tries again. Making one raises OSError
    if not even the root can be watched.
    """

    def __init__(
        self, root: bytes, identifier: Identifier | None, appeared: Callable[[Directory, bytes], None]
    ) -> None:
        self.root = root
        self.gap: str | None = None
        self.watches = Watches()
        self._appeared = appeared
        self._outside: set[Ident] = set()
        self._returned = False
        try:
            fd = self._open_root()
            self.identifier = identifier or Identifier(fd)
            self.tree = self._all(fd)
        except BaseException:
            self.watches.close()
            raise

    def _open_root(self) -> int:
        try:
            mount_fd = open_tree_clone(self.root)  # with privilege: what lies below other mounts is seen too
        except OSError:
            return os.open(self.root, _READ)
        try:
            return os.open(b".", _READ, dir_fd=mount_fd)
        finally:
            os.close(mount_fd)

    def _all(self, root_fd: int) -> DirectoryTree:
        """Watch the root and all below. Closes `root_fd`."""
        try:
            self._dev = os.fstat(root_fd).st_dev
            root = Directory(self.watches.watch(root_fd), self.identifier.ident(root_fd))
        except BaseException:
            os.close(root_fd)
            raise
        self.tree = DirectoryTree(root)
        self._scan(root, root_fd, new=False)
        return self.tree

    def rescan(self) -> None:
        """After events were lost: watch what is there now, and nothing else."""
        self.gap = None
        before = self.tree
        try:
            self._all(self._open_root())
        except OSError as error:
            self.gap = f"inotify: {error.strerror}"
            return
        for wd in before.by_wd.keys() - self.tree.by_wd.keys():
            self.watches.unwatch(wd)

    def look(self, parent: Directory, name: bytes) -> bool:
        """Watch the subdirectory that is at a place now, if one is; what is in it, if it is new, has appeared.

        False if the place could not be looked at because `parent` is not where the tree has it.
        """
        try:
            fd = self.open(parent)
        except OSError as error:
            if error.errno in _NOT_THERE:
                return False
            self.gap = f"inotify: a directory cannot be opened again: {error.strerror}"
            return True
        try:
            entered = self._enter(parent, name, fd)
        finally:
            os.close(fd)
        if entered is not None:
            directory, fd, new = entered
            if new:
                self._scan(directory, fd, new=True)
            else:
                os.close(fd)
        return True

    def drop(self, directory: Directory) -> None:
        """Watch a directory, and all below it, no longer. The root stays."""
        if directory is not self.tree.root:
            for dropped in self.tree.drop(directory):
                self.watches.unwatch(dropped.wd)
                self._outside.add(dropped.ident)

    def came_back(self) -> bool:
        """Whether a directory, dropped since the last call, was entered again: what happened in between was not seen."""
        came_back, self._returned = self._returned, False
        self._outside.clear()
        return came_back

    def open(self, directory: Directory, flags: int = _PLACE) -> int:
        """Open a watched directory where the tree has it. Raises OSError, ENOENT if another one is there."""
        names = self.tree.path(directory)
        if names is None:
            raise OSError(errno.ENOENT, "not in the tree")
        fd = os.open(self.root, _PLACE)
        try:
            for name in names:
                below = os.open(name, _PLACE, dir_fd=fd)
                os.close(fd)
                fd = below
            same = os.fstat(fd).st_dev == self._dev and self.identifier.ident(fd) == directory.ident
            if same and flags == _PLACE:
                return os.dup(fd)
            if same:
                return os.open(b".", flags, dir_fd=fd)
        finally:
            os.close(fd)
        raise OSError(errno.ENOENT, "another directory is in its place")

    def open_system_directory(self) -> int:
        """Open the system directory for watching it. Raises OSError."""
        return os.open(os.path.join(self.root, SYSTEM_DIRECTORY), _READ)

    def close(self) -> None:
        """Remove all watches. Once."""
        self.watches.close()

    def _enter(self, parent: Directory, name: bytes, parent_fd: int) -> tuple[Directory, int, bool] | None:
        """Watch a subdirectory: it, its descriptor, and whether it is new; None if it is gone, not ours, or unreadable."""
        try:
            fd = os.open(name, _READ, dir_fd=parent_fd)
        except OSError as error:
            self._unseen(error)
            return None
        try:
            if os.fstat(fd).st_dev != self._dev:
                os.close(fd)
                return None
            wd = self.watches.watch(fd)
            known = self.tree.by_wd.get(wd)
            directory = known or Directory(wd, self.identifier.ident(fd))
        except OSError as error:
            os.close(fd)
            self._unseen(error)
            return None
        self._returned |= known is None and directory.ident in self._outside
        self.tree.put(directory, parent, name)
        return directory, fd, known is None

    def _unseen(self, error: OSError) -> None:
        """Whether a directory that was not watched makes a gap: not if it is gone, nor if a scan cannot read it either."""
        if error.errno == errno.ENOSPC:
            self.gap = TOO_FEW_WATCHES
        elif error.errno not in (*_NOT_THERE, errno.EACCES):
            self.gap = f"inotify: a directory cannot be watched: {error.strerror}"

    def _scan(self, top: Directory, top_fd: int, *, new: bool) -> None:
        """Watch all below a watched directory; closes `top_fd`."""
        stack = [(top, top_fd)]
        while stack:
            directory, fd = stack.pop()
            try:
                fd = self.open(directory, _READ) if fd < 0 else fd
            except OSError as error:
                self._unseen(error)
                continue
            try:
                for name, is_dir in _entries(fd):
                    if directory is self.tree.root and name == SYSTEM_DIRECTORY:
                        continue
                    if new:
                        self._appeared(directory, name)
                    if is_dir and (entered := self._enter(directory, name, fd)) is not None:
                        below, below_fd, _ = entered
                        if len(stack) >= HELD:
                            os.close(below_fd)
                            below_fd = -1
                        stack.append((below, below_fd))
            except OSError as error:
                self._unseen(error)
            finally:
                os.close(fd)


def _entries(fd: int) -> list[tuple[bytes, bool]]:
    with os.scandir(fd) as entries:
        return [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
