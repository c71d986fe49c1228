"""The directories an inotify source watches, as a tree. Pure bookkeeping: no I/O.

A watch sticks to its directory however that is renamed, and names in events are relative to it; so a directory's identity
is always right. The tree is only needed to open a directory again (its path may be out of date by the events not read yet).
"""

from dataclasses import dataclass, field
from typing import Self

from comparer.model import Ident


@dataclass(slots=True, eq=False)
class Directory:
    """A watched directory: its watch descriptor, identity, place (`parent` None: the root, or moved to nobody knows where).

    `listed`: what is in it was looked at since it is watched.
    """

    wd: int
    ident: Ident
    parent: Self | None = None
    name: bytes = b""
    children: dict[bytes, Self] = field(default_factory=dict)
    listed: bool = False


class DirectoryTree:
    """Directories by watch descriptor and by place; `homeless` are those whose place is not known."""

    def __init__(self, root: Directory) -> None:
        self.root = root
        self.by_wd = {root.wd: root}
        self.homeless: set[Directory] = set()

    def put(self, directory: Directory, parent: Directory, name: bytes) -> None:
        """Add a directory, or move it, to a place; another one that had this place is homeless."""
        there = parent.children.get(name)
        if there is directory:
            return
        if there is not None:
            self.detach(there)
        self.detach(directory)
        self.homeless.discard(directory)
        directory.parent, directory.name = parent, name
        parent.children[name] = directory
        self.by_wd[directory.wd] = directory

    def detach(self, directory: Directory) -> None:
        """Take a directory from its place; it stays known by its watch descriptor."""
        parent = directory.parent
        if parent is not None and parent.children.get(directory.name) is directory:
            del parent.children[directory.name]
            self.homeless.add(directory)
        directory.parent = None

    def gone(self, directory: Directory) -> None:
        """Forget a directory that was deleted: it was empty, so what the tree has in it is somewhere else."""
        for child in list(directory.children.values()):
            self.detach(child)
        self.drop(directory)

    def drop(self, directory: Directory) -> list[Directory]:
        """Forget a directory and all below it; which these were."""
        self.detach(directory)
        stack = [directory]
        dropped = []
        while stack:
            last = stack.pop()
            self.homeless.discard(last)
            if self.by_wd.pop(last.wd, None) is not None:
                dropped.append(last)
            stack.extend(last.children.values())
        return dropped

    def path(self, directory: Directory) -> list[bytes] | None:
        """The names from the root to a directory, None if it is not in the tree (any more)."""
        names: list[bytes] = []
        while directory is not self.root:
            if directory.parent is None or len(names) > len(self.by_wd):
                return None
            names.append(directory.name)
            directory = directory.parent
        return names[::-1]
