"""States as dictionaries: a view for the comparison, random operations on it, and a strict replay of changes by path."""

import copy
from dataclasses import dataclass, field, replace

from comparer.model import Attr, Change, FileType, Ident, Name, Op

ROOT = Ident(1, 0)


def attr(kind: FileType = FileType.FILE, **fields) -> Attr:
    base = {"size": 0, "blocks": 0, "mode": 0o644, "uid": 0, "gid": 0, "nlink": 1, "mtime_ns": 0, "ctime_ns": 0}
    return Attr(kind, **{**base, **fields})


@dataclass
class Tree:
    """A state that is its own view (comparer.model.View)."""

    objects: dict[Ident, Attr] = field(default_factory=lambda: {ROOT: attr(FileType.DIR)})
    entries: dict[Name, Ident] = field(default_factory=dict)
    next_ino: int = 2
    root: Ident = ROOT

    def attr(self, ident):
        return self.objects.get(ident)

    def names(self, ident):
        return [n for n, i in self.entries.items() if i == ident]

    def child(self, parent, name):
        return self.entries.get(Name(parent, name))

    def children(self, parent):
        return [(n.name, i) for n, i in self.entries.items() if n.parent == parent]

    def copy(self):
        return copy.deepcopy(self)

    # ---- what a file system does

    def dirs(self):
        return [i for i, a in self.objects.items() if a.type is FileType.DIR]

    def below(self, top):
        """`top` and every directory in it."""
        found = [top]
        for directory in found:
            found += [i for _, i in self.children(directory) if self.objects[i].type is FileType.DIR]
        return found

    def _count(self, ident):
        if ident in self.objects and self.objects[ident].type is not FileType.DIR:
            self.objects[ident] = replace(self.objects[ident], nlink=len(self.names(ident)))

    def create(self, parent, name, kind, gen=0):
        ident = Ident(self.next_ino, gen)
        self.next_ino += 1
        self.objects[ident] = attr(kind)
        self.entries[Name(parent, name)] = ident
        return ident

    def link(self, ident, name):
        self.entries[name] = ident
        self._count(ident)

    def remove(self, name):
        ident = self.entries.pop(name)
        if not self.names(ident):
            for child, _ in self.children(ident):
                self.remove(Name(ident, child))
            del self.objects[ident]
        else:
            self._count(ident)

    def rename(self, old, new):
        ident = self.entries[old]
        if new in self.entries:
            if self.entries[new] == ident:
                return
            self.remove(new)
        del self.entries[old]
        self.entries[new] = ident

    def exchange(self, one, other):
        self.entries[one], self.entries[other] = self.entries[other], self.entries[one]

    # ---- by path

    def by_path(self):
        """path -> (ident, attr); what a walk would find."""
        found = {b"": (self.root, self.objects[self.root])}
        stack = [(b"", self.root)]
        while stack:
            prefix, directory = stack.pop()
            for name, ident in self.children(directory):
                found[prefix + name] = (ident, self.objects[ident])
                if self.objects[ident].type is FileType.DIR:
                    stack.append((prefix + name + b"/", ident))
        return found


class Replica:
    """A consumer that knows nothing but the changes: strict about every step, and about what `before` and `from` say."""

    def __init__(self, tree: Tree | None = None) -> None:
        self.idents: dict[bytes, Ident] = {}
        self.attrs: dict[Ident, Attr] = {}
        if tree is not None:
            for path, (ident, attributes) in tree.by_path().items():
                self.idents[path] = ident
                self.attrs[ident] = attributes

    def state(self):
        return {path: (ident, self.attrs[ident]) for path, ident in self.idents.items()}

    def _parent_exists(self, path):
        parent, slash, _ = path.rpartition(b"/")
        if not slash:
            parent = b""
        assert self.attrs[self.idents[parent]].type is FileType.DIR, f"parent of {path!r}"

    def apply(self, change: Change) -> None:
        path, ident = change.path, change.ident
        if change.op is Op.CREATE:
            assert path not in self.idents, f"create over {path!r}"
            assert ident not in self.attrs
            self._parent_exists(path)
            self.idents[path] = ident
        elif change.op is Op.LINK:
            assert path not in self.idents, f"link over {path!r}"
            assert self.idents[change.from_path] == ident
            self._parent_exists(path)
            self.idents[path] = ident
        elif change.op in (Op.UNLINK, Op.DELETE):
            assert self.idents[path] == ident, f"{change.op} {path!r}"
            assert not any(p.startswith(path + b"/") for p in self.idents), f"{path!r} is not empty"
            del self.idents[path]
            others = ident in self.idents.values()
            assert others == (change.op is Op.UNLINK), f"{change.op} {path!r}, other names: {others}"
            if not others:
                del self.attrs[ident]
        elif change.op is Op.RENAME:
            assert self.idents[change.from_path] == ident
            assert path not in self.idents, f"rename over {path!r}"
            self._parent_exists(path)
            assert not path.startswith(change.from_path + b"/"), "a directory moved below itself"
            moved = [p for p in self.idents if p == change.from_path or p.startswith(change.from_path + b"/")]
            assert len(moved) == 1 or change.type is FileType.DIR
            for old in moved:
                self.idents[path + old[len(change.from_path) :]] = self.idents.pop(old)
        else:
            assert self.idents[path] == ident, f"modify {path!r}"
        if change.after is not None:
            self.attrs[ident] = change.after
