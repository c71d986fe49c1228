"""A consumer's model: knows nothing but the changes, applied one by one, and is strict about each.

model = Model()                 # a baseline goes onto an empty one
apply(model, changes)           # AssertionError on any step that a real directory tree would refuse, or that lies
model.entries()                 # {path: what oracle.walk says of it}
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from comparer.model import Attr, Change, FileType, Ident, Op


@dataclass(eq=False)
class Node:
    """One object, whatever its names; `below` for directories."""

    ident: Ident
    attr: Attr
    names: int = 0
    below: dict[bytes, "Node"] = field(default_factory=dict)


class Model:
    def __init__(self) -> None:
        self.root: Node | None = None

    def node(self, path: bytes) -> Node:
        node = self.root
        assert node is not None, "no baseline yet"
        for name in path.split(b"/") if path else []:
            assert name in node.below, f"{path!r}: {name!r} does not exist"
            node = node.below[name]
        return node

    def place(self, path: bytes) -> tuple[Node, bytes]:
        """The directory that holds or is to hold `path`, and the last name."""
        parent, _, name = path.rpartition(b"/")
        directory = self.node(parent)
        assert directory.attr.type is FileType.DIR, f"{parent!r} is no directory"
        assert name, f"{path!r} has no name"
        return directory, name

    def copy(self) -> "Model":
        made = Model()
        nodes = {id(node): Node(node.ident, node.attr, node.names) for _, node in self.walk()}
        for _, node in self.walk():
            nodes[id(node)].below = {name: nodes[id(child)] for name, child in node.below.items()}
        made.root = nodes[id(self.root)]
        return made

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        assert self.root is not None
        stack = [(b"", self.root)]
        while stack:
            path, node = stack.pop()
            yield path, node
            stack += [(path + b"/" + name if path else name, child) for name, child in node.below.items()]

    def entries(self) -> dict[bytes, dict]:
        return {path: entry(node) for path, node in self.walk()}

    def objects(self) -> set[Ident]:
        return {node.ident for _, node in self.walk()}


def entry(node: Node) -> dict:
    """As oracle.entry()."""
    attr = node.attr
    same = ("size", "mode", "uid", "gid", "nlink", "mtime_ns", "ctime_ns", "rdev", "target")
    found = {name: getattr(attr, name) for name in same}
    return {
        "ino": node.ident.ino,
        "type": str(attr.type),
        "xattrs": {os.fsdecode(n): v for n, v in attr.xattrs},
        **found,
    }


def apply(model: Model, changes: Iterable[Change]) -> int:
    """Apply all changes; the number applied. Raises AssertionError naming the change that does not fit."""
    count = 0
    for change in changes:
        try:
            _STEPS[change.op](model, change)
        except AssertionError as error:
            raise AssertionError(
                f"change {count}: {change.op} {change.path!r} from {change.from_path!r}: {error}"
            ) from error
        count += 1
    return count


def _enter(model: Model, path: bytes, node: Node) -> None:
    directory, name = model.place(path)
    assert name not in directory.below, "the name is taken"
    directory.below[name] = node
    node.names += 1


def _leave(model: Model, change: Change, path: bytes) -> Node:
    directory, name = model.place(path)
    assert name in directory.below, f"{path!r} does not exist"
    node = directory.below.pop(name)
    node.names -= 1
    assert node.ident == change.ident, f"{path!r} is {node.ident}, not {change.ident}"
    return node


def _same(node: Node, change: Change) -> None:
    assert node.ident == change.ident, f"is {node.ident}, not {change.ident}"
    assert node.attr.type is change.type


def _known(node: Node, change: Change) -> None:
    """`before` is what the object was before the diff, or what an earlier step (a link, a rename) has already made of it."""
    assert change.before is not None
    assert change.after is not None
    if b".snapfeed-tmp-" in (change.path[:14], (change.from_path or b"")[:14]):
        return  # the first half of a detour carries the old attributes, whatever an earlier step has said
    known = replace(node.attr, blocks=0)  # blocks move without a change
    assert known in (replace(change.before, blocks=0), replace(change.after, blocks=0)), "`before` is not what it was"


def _create(model: Model, change: Change) -> None:
    assert change.after is not None
    _enter(model, change.path, Node(change.ident, change.after))


def _modify(model: Model, change: Change) -> None:
    assert change.after is not None
    if model.root is None:
        assert change.path == b"", "a baseline starts with the root"
        model.root = Node(change.ident, change.after)
        return
    node = model.node(change.path)
    _same(node, change)
    _known(node, change)
    node.attr = change.after


def _rename(model: Model, change: Change) -> None:
    assert change.from_path is not None
    assert change.path != change.from_path
    assert not change.path.startswith(change.from_path + b"/"), "a directory moved below itself"
    node = model.node(change.from_path)
    _same(node, change)
    _known(node, change)
    _leave(model, change, change.from_path)
    _enter(model, change.path, node)
    assert change.after is not None
    node.attr = change.after


def _link(model: Model, change: Change) -> None:
    assert change.from_path is not None
    node = model.node(change.from_path)
    _same(node, change)
    assert node.attr.type is not FileType.DIR, "a hard link to a directory"
    _enter(model, change.path, node)
    if change.after is not None:
        node.attr = change.after


def _unlink(model: Model, change: Change) -> None:
    node = _leave(model, change, change.path)
    assert node.names, "the last name goes with a delete, not an unlink"
    if change.after is not None:
        node.attr = change.after


def _delete(model: Model, change: Change) -> None:
    node = _leave(model, change, change.path)
    assert not node.names, "a delete of an object that has further names"
    assert not node.below, "a delete of a directory that is not empty"


_STEPS = {
    Op.CREATE: _create,
    Op.MODIFY: _modify,
    Op.RENAME: _rename,
    Op.LINK: _link,
    Op.UNLINK: _unlink,
    Op.DELETE: _delete,
}
