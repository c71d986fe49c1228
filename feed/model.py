"""The simplest consumer: a state kept in memory by applying changes one at a time, knowing nothing else. Pure.

Strict: a change that cannot be applied (a name taken, a parent missing, a directory not empty) raises DamageError; a correct
feed never makes one.
"""

from comparer.errors import DamageError
from comparer.model import Attr, Change, FileType, Ident, Op


class TreeModel:
    """Paths (bytes from the root, which is b"") to objects, objects to attributes. A renamed directory costs what it holds."""

    def __init__(self) -> None:
        self.paths: dict[bytes, Ident] = {}
        self.attrs: dict[Ident, Attr] = {}
        self._names: dict[Ident, int] = {}
        self._children: dict[bytes, set[bytes]] = {}

    def reset(self) -> None:
        """Before a baseline: forget everything."""
        self.__init__()  # type: ignore[misc]

    def apply(self, change: Change) -> None:
        """Raises DamageError."""
        match change.op:
            case Op.CREATE:
                self._put(change.path, change.ident, change)
            case Op.LINK:
                self._expect(change.from_path, change)
                self._put(change.path, change.ident, change)
            case Op.UNLINK | Op.DELETE:
                self._expect(change.path, change)
                if self._children.get(change.path):
                    raise _wrong(change, "the directory is not empty")
                self._take(change.path)
                if (change.ident in self._names) != (change.op is Op.UNLINK):
                    raise _wrong(change, "unlink is for a further name, delete for the last one")
                if change.op is Op.DELETE:
                    del self.attrs[change.ident]
            case Op.RENAME:
                self._expect(change.from_path, change)
                self._move(change)
            case Op.MODIFY:
                if change.path == b"" and not self.paths:
                    self.paths[b""] = change.ident  # the root: the beginning of a baseline
                    self._children[b""] = set()
                self._expect(change.path, change)
        if change.after is not None:
            self.attrs[change.ident] = change.after

    def _expect(self, path: bytes | None, change: Change) -> None:
        if path is None or self.paths.get(path) != change.ident:
            raise _wrong(change, "that name is another object, or none")

    def _put(self, path: bytes, ident: Ident, change: Change) -> None:
        parent = path.rpartition(b"/")[0]
        if path in self.paths:
            raise _wrong(change, "the name is taken")
        if parent not in self._children:
            raise _wrong(change, "the directory it is in does not exist")
        self.paths[path] = ident
        self._names[ident] = self._names.get(ident, 0) + 1
        self._children[parent].add(path)
        if change.type is FileType.DIR:
            self._children[path] = set()

    def _take(self, path: bytes) -> None:
        ident = self.paths.pop(path)
        self._children[path.rpartition(b"/")[0]].discard(path)
        self._children.pop(path, None)
        self._names[ident] -= 1
        if not self._names[ident]:
            del self._names[ident]

    def _move(self, change: Change) -> None:
        old, new = change.from_path or b"", change.path
        parent = new.rpartition(b"/")[0]
        if new in self.paths:
            raise _wrong(change, "the name is taken")
        if parent not in self._children or new.startswith(old + b"/"):
            raise _wrong(change, "the directory it moves to does not exist")
        self._children[old.rpartition(b"/")[0]].discard(old)
        self._children[parent].add(new)
        moving = [(old, new)]
        while moving:
            before, after = moving.pop()
            self.paths[after] = self.paths.pop(before)
            if before in self._children:
                held = self._children.pop(before)
                renamed = {child: after + child[len(before) :] for child in held}
                self._children[after] = set(renamed.values())
                moving += renamed.items()


def _wrong(change: Change, why: str) -> DamageError:
    return DamageError(f"{change.op} {change.path!r}: {why}")
