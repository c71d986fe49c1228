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

    Not entered: other file systems, symbolic links. `entered(directory)` is called when a new directory is watched, then
    `appeared(directory, name)` for all that is found in it. `gap` says why a directory that should be watched is not; a
    `rescan` tries again. Making one raises OSError if not even the root can be watched.
    """

    def __init__(
        self,
        root: bytes,
        identifier: Identifier | None,
        entered: Callable[[Directory], None],
        appeared: Callable[[Directory, bytes], None],
    ) -> None:
        self.root = root
        self.gap: str | None = None
        self.watches = Watches()
        self._entered = entered
        self._appeared = appeared
        self._unlisted: set[Directory] = set()
        self._outside: set[Ident] = set()
        self._outside_before: set[Ident] = set()
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
        self._unlisted.clear()
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
            self._outside.add(before.by_wd[wd].ident)  # moved while we looked, maybe: then an event tells where to

    def look(self, parent: Directory, name: bytes) -> bool:
        """Take the tree to what is at a place now: watch the directory there, and if it is new, what is in it has appeared.

        False if the place could not be looked at because `parent` is not where the tree has it.
        """
        try:
            fd = self.open(parent)
        except OSError as error:
            return self._not_opened(error)
        try:
            entered = self._enter(parent, name, fd)
        finally:
            os.close(fd)
        if entered is not None:
            directory, fd = entered
            if directory.listed:
                os.close(fd)
            else:
                self._scan(directory, fd, new=True)
        return True

    def list_again(self) -> None:
        """Directories that had been moved on before they could be listed."""
        unlisted, self._unlisted = self._unlisted, set()
        for directory in unlisted:
            if self.has(directory) and not directory.listed:
                try:
                    fd = self.open(directory, _READ)
                except OSError as error:
                    if not self._not_opened(error):
                        self._unlisted.add(directory)
                else:
                    self._scan(directory, fd, new=True)

    def has(self, directory: Directory) -> bool:
        """Whether a directory is (still) watched."""
        return self.tree.by_wd.get(directory.wd) is directory

    def gone(self, directory: Directory) -> None:
        """The kernel watches a directory no longer: it was deleted. The root stays."""
        if directory is not self.tree.root:
            self.tree.gone(directory)

    def drop(self, directory: Directory) -> None:
        """Watch a directory, and all below it, no longer. The root stays."""
        if directory is not self.tree.root:
            for dropped in self.tree.drop(directory):
                self.watches.unwatch(dropped.wd)
                self._outside.add(dropped.ident)

    def came_back(self) -> bool:
        """Whether a directory, dropped since the last call but one, was entered again: what happened between was not seen.

        Before the last call, too: who asked then may have found it in its place again, and have seen no change.
        """
        came_back, self._returned = self._returned, False
        self._outside_before, self._outside = self._outside, set()
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

    def _enter(self, parent: Directory, name: bytes, parent_fd: int) -> tuple[Directory, int] | None:
        """Watch what is at a place: the directory and its descriptor; None if none is there, or not ours, or unreadable."""
        try:
            fd = os.open(name, _READ, dir_fd=parent_fd)
        except OSError as error:
            self._unseen(error)
            if error.errno in _NOT_THERE and name in parent.children:
                self.tree.detach(parent.children[name])
            return None
        try:
            if os.fstat(fd).st_dev != self._dev:  # mounted on what we watch, maybe
                os.close(fd)
                return None
            wd = self.watches.watch(fd)
            known = self.tree.by_wd.get(wd)
            directory = known or Directory(wd, self.identifier.ident(fd))
        except OSError as error:
            os.close(fd)
            self._unseen(error)
            return None
        if known is None and (directory.ident in self._outside or directory.ident in self._outside_before):
            self._returned = True
        self.tree.put(directory, parent, name)
        return directory, fd

    def _not_opened(self, error: OSError) -> bool:
        """A watched directory could not be opened again. False if it is not where the tree has it."""
        if error.errno in _NOT_THERE:
            return False
        self.gap = f"inotify: a directory cannot be opened again: {error.strerror}"
        return True

    def _unseen(self, error: OSError) -> None:
        """Whether a directory that was not watched makes a gap: not if it is gone, nor if a scan cannot read it either."""
        if error.errno == errno.ENOSPC:
            self.gap = TOO_FEW_WATCHES
        elif error.errno not in (*_NOT_THERE, errno.EACCES):
            self.gap = f"inotify: a directory cannot be watched: {error.strerror}"

    def _scan(self, top: Directory, top_fd: int, *, new: bool) -> None:
        """Watch all below a watched directory, but for what is known already; closes `top_fd`."""
        stack = [(top, top_fd)]
        while stack:
            directory, fd = stack.pop()
            try:
                fd = self.open(directory, _READ) if fd < 0 else fd
            except OSError as error:
                if not self._not_opened(error):
                    self._unlisted.add(directory)
                continue
            try:
                self._list(directory, fd, stack, new=new)
            except OSError as error:
                self._unseen(error)
            finally:
                os.close(fd)

    def _list(self, directory: Directory, fd: int, stack: list[tuple[Directory, int]], *, new: bool) -> None:
        if new:
            self._entered(directory)
        entries = _entries(fd)
        directory.listed = True
        for name, is_dir in entries:
            if directory is self.tree.root and name == SYSTEM_DIRECTORY:
                continue
            if new:
                self._appeared(directory, name)
            if is_dir and (entered := self._enter(directory, name, fd)) is not None:
                below, below_fd = entered
                if below.listed or len(stack) >= HELD:
                    os.close(below_fd)
                    below_fd = -1
                if not below.listed:
                    stack.append((below, below_fd))


def _entries(fd: int) -> list[tuple[bytes, bool]]:
    with os.scandir(fd) as entries:
        return [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
