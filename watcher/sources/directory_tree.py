"""The directories an inotify source watches, as a tree. Pure bookkeeping: no I/O.

A watch sticks to its directory however that is renamed, and names in events are relative to it; so a directory's identity
is always right. The tree is only needed to open a directory again (its path may be out of date by the events not read yet).
"""

from dataclasses import dataclass, field
from typing import Self

from comparer.model import Ident


@dataclass(slots=True, eq=False)
class Directory:
    """A watched directory: its watch descriptor, identity, place (`parent` None: the root, or moved to nobody knows where)."""

    wd: int
    ident: Ident
    parent: Self | None = None
    name: bytes = b""
    children: dict[bytes, Self] = field(default_factory=dict)


class DirectoryTree:
    """Directories by watch descriptor and by place."""

    def __init__(self, root: Directory) -> None:
        self.root = root
        self.by_wd = {root.wd: root}

    def put(self, directory: Directory, parent: Directory, name: bytes) -> None:
        """Add a directory, or move it, to a place."""
        self.detach(directory)
        directory.parent, directory.name = parent, name
        parent.children[name] = directory
        self.by_wd[directory.wd] = directory

    def detach(self, directory: Directory) -> None:
        """Take a directory from its place; it stays known by its watch descriptor."""
        parent = directory.parent
        if parent is not None and parent.children.get(directory.name) is directory:
            del parent.children[directory.name]
        directory.parent = None

    def drop(self, directory: Directory) -> list[Directory]:
        """Forget a directory and all below it; which these were."""
        self.detach(directory)
        stack = [directory]
        dropped = []
        while stack:
            last = stack.pop()
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
