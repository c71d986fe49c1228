"""Several diffs in, one diff out, with the same effect. Pure: the changes themselves are all there is to look at.

The changes are followed in a tree that is made as they name it. A path component that no change has made is an object that exists
since the beginning; it stays nameless until a change says who it is. Of each object the tree keeps what it was at the beginning
(names, attributes), what it is now, and the bytes of it that changed. That gives two partial states, which are compared like
any two.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

from .compare import baseline, compare, differences
from .errors import DamageError
from .model import Attr, ByteRanges, Change, FileType, Ident, Name, Op, Quality
from .rangesets import combined


def squash(changes: Iterable[Change], root: Ident | None = None) -> Iterator[Change]:
    """The changes of the diffs N+1 to M, in their order, as one ordered diff from N to M; see `Squash`. Raises DamageError."""
    whole = Squash(root)
    for change in changes:
        whole.add(change)
    return whole.changes()


@dataclass(eq=False, slots=True)
class _Node:
    """One object, and what the changes tell of it at the beginning and now.

    `old` and `now` are the known entries of a directory, `places` and `names` the known names of the object.
    """

    ident: Ident | None
    existed: bool  # at the beginning
    is_dir: bool
    alive: bool = True
    before: Attr | None = None
    after: Attr | None = None
    places: list[tuple["_Node", bytes]] = field(default_factory=list)
    names: dict[tuple["_Node", bytes], None] = field(default_factory=dict)
    old: dict[bytes, "_Node"] = field(default_factory=dict)
    now: dict[bytes, "_Node"] = field(default_factory=dict)
    ranges: ByteRanges | None = None
    size: int = 0  # of the file that `ranges` lead up to


class Squash:
    """Takes changes with `add`; then `changes` gives the one diff. Memory: by the objects that differ or are on a path to them.

    What is made and deleted in between vanishes, renames become one, detours disappear; `before` is that of the beginning,
    `after` that of the end, and an object that is what it was is not mentioned. Ranges become what was written and not
    cleared or cut off later; `unknown` once is `unknown` for all. A baseline among the changes makes the result a baseline.
    """

    def __init__(self, root: Ident | None = None) -> None:
        """`root`: the root directory's identity, if it is known; the changes tell it when they modify it."""
        self._root_ident = root
        self._whole = False
        self._reset()

    def _reset(self) -> None:
        self._root = _Node(self._root_ident, existed=True, is_dir=True)
        self._alive: dict[Ident, _Node] = {}
        self._gone: dict[Ident, _Node] = {}  # existed at the beginning, and not any more
        self._nameless: set[_Node] = set()
        # the directory that was looked up last; a change that moves one looks up where it goes, which is not below it
        self._last: tuple[bytes, _Node] = (b"", self._root)
        if self._root_ident is not None:
            self._alive[self._root_ident] = self._root

    # ---- following

    def add(self, change: Change) -> None:
        """Follow one change. Raises DamageError if it does not follow from those before it."""
        match change.op:
            case Op.CREATE:
                self._create(change)
                return
            case Op.MODIFY if not change.path:
                node = self._modify_root(change)
            case Op.MODIFY:
                node = self._known(change.path, change)
            case Op.RENAME | Op.LINK:
                if change.from_path is None:
                    raise _wrong(change, "it has no `from`")
                node = self._known(change.from_path, change)
                if change.op is Op.RENAME:
                    self._leave(node, change.from_path)
                self._enter(node, change)
            case Op.UNLINK | Op.DELETE:
                node = self._known(change.path, change)
                self._leave(node, change.path)
        self._tell(node, change)
        if change.op is Op.DELETE:
            self._delete(node, change)

    def _modify_root(self, change: Change) -> _Node:
        if change.before is None:  # a baseline: whatever was before it does not matter
            self._whole = True
            self._root_ident = change.ident
            self._reset()
            self._root.existed = False
        elif self._root.ident is None:
            self._root_ident = self._root.ident = change.ident
            self._alive[change.ident] = self._root
        if self._root.ident != change.ident:
            raise _wrong(change, f"the root is {self._root.ident}, not {change.ident}")
        return self._root

    def _create(self, change: Change) -> None:
        ident, is_dir = change.ident, change.type is FileType.DIR
        if ident in self._alive:
            raise _wrong(change, "the object exists already")
        earlier = self._gone.get(ident)
        if earlier is not None and earlier.is_dir and is_dir:
            # a file system without generations: to whoever compares the two states it is the same directory
            node = self._gone.pop(ident)
            node.alive = True
        else:
            node = _Node(ident, existed=False, is_dir=is_dir)
        node.after = change.after
        self._enter(node, change)
        self._alive[ident] = node

    def _delete(self, node: _Node, change: Change) -> None:
        if node.names or node.now:
            raise _wrong(change, "it is not empty" if node.now else "it has a further name")
        node.alive = False
        del self._alive[change.ident]
        if node.existed:
            self._gone[change.ident] = node

    def _tell(self, node: _Node, change: Change) -> None:
        """What a change says of its object besides its names."""
        if node.existed and node.before is None:
            if change.before is None:
                raise _wrong(change, "it has no `before`, but the object existed")
            node.before = node.after = change.before
            node.size = change.before.size
        if change.ranges is not None and node.existed and change.before is not None and change.after is not None:
            self._add_ranges(node, change.ranges, change.before.size, change.after.size)
        if change.after is not None:
            node.after = change.after

    @staticmethod
    def _add_ranges(node: _Node, ranges: ByteRanges, old: int, new: int) -> None:
        if old != node.size:  # its size changed, and nothing was said of what was written
            ranges = ByteRanges(quality=Quality.UNKNOWN)
        if node.ranges is None:
            node.ranges = ranges
        else:
            assert node.before is not None  # noqa: S101 - told before any ranges
            node.ranges = combined(node.ranges, ranges, (node.before.size, old, new))
        node.size = new

    # ---- the tree

    def _known(self, path: bytes, change: Change) -> _Node:
        """The object that a change is about, by one of its names."""
        directory, name = self._place(path, change)
        node = directory.now.get(name)
        if node is None:
            known = self._alive.get(change.ident)
            if known is not None and (known.is_dir or not known.existed):
                raise _wrong(change, f"{path!r} is none of its names")
            if known is None and change.ident in self._gone:
                raise _wrong(change, "the object was deleted")
            node = known or _Node(change.ident, existed=True, is_dir=change.type is FileType.DIR)
            self._discover(directory, name, node, change)
            self._alive[change.ident] = node
        elif node.ident is None:
            if change.ident in self._alive or change.ident in self._gone:
                raise _wrong(change, f"{path!r} is none of its names")
            node.ident = change.ident
            self._alive[change.ident] = node
            self._nameless.discard(node)
        if node.ident != change.ident:
            raise _wrong(change, f"{path!r} is {node.ident}")
        return node

    def _place(self, path: bytes, change: Change) -> tuple[_Node, bytes]:
        """The directory and the last name of a path."""
        parent, _, name = path.rpartition(b"/")
        if not name:
            raise _wrong(change, f"{path!r} has no last name")
        if parent != self._last[0]:
            directory = self._root
            for component in parent.split(b"/") if parent else ():
                directory = self._directory(directory, component, change)
            self._last = (parent, directory)
        return self._last[1], name

    def _directory(self, directory: _Node, name: bytes, change: Change) -> _Node:
        node = directory.now.get(name)
        if node is None:
            node = _Node(None, existed=True, is_dir=True)
            self._discover(directory, name, node, change)
            self._nameless.add(node)
        if not node.is_dir:
            raise _wrong(change, f"{name!r} is no directory")
        return node

    @staticmethod
    def _discover(directory: _Node, name: bytes, node: _Node, change: Change) -> None:
        """A name that no change has made was there at the beginning."""
        if not directory.existed or name in directory.old:
            raise _wrong(change, f"{name!r} does not exist")
        directory.old[name] = directory.now[name] = node
        node.places.append((directory, name))
        node.names[directory, name] = None

    def _enter(self, node: _Node, change: Change) -> None:
        directory, name = self._place(change.path, change)
        if name in directory.now:
            raise _wrong(change, "the name is taken")
        directory.now[name] = node
        node.names[directory, name] = None

    def _leave(self, node: _Node, path: bytes) -> None:
        parent, _, name = path.rpartition(b"/")
        assert parent == self._last[0]  # noqa: S101 - just looked up
        directory = self._last[1]
        del directory.now[name]
        del node.names[directory, name]

    # ---- the result

    def changes(self) -> Iterator[Change]:
        """The one diff. Nothing may be added any more."""
        sides = _Sides(self._root, [*self._alive.values(), *self._nameless], self._gone)
        if self._whole:
            yield from baseline(sides.new)
            return
        for node in self._alive.values():
            if node.existed and not node.names and node is not self._root:
                yield from self._modified(node, sides)
        waiting: dict[Ident, list[Change]] = {ident: [] for ident in sides.reused.values()}
        for change in compare(sides.old, sides.new, sides.touched, sides.ranges):
            real = sides.reused.get(change.ident)
            if real is not None:
                yield replace(change, ident=real)
                if change.op is Op.DELETE:
                    yield from waiting.pop(real)
            elif change.ident in waiting:  # one identity is never two objects at a time
                waiting[change.ident].append(change)
            elif change.op is not Op.MODIFY or change.path or change.ident == sides.new.root:
                yield change

    def path(self, ident: Ident) -> bytes | None:
        """A path that an object has in the end; None if it has none, or none that a change told of."""
        node = self._alive.get(ident)
        if node is None or (not node.names and node is not self._root):
            return None
        return _path(node, now=True)

    @staticmethod
    def _modified(node: _Node, sides: "_Sides") -> Iterator[Change]:
        """Of a file all known names go and others stay: its attributes are told first, under a name it had."""
        if node.before is None or node.after is None or not node.places or node.ident is None:
            return
        ranges = sides.ranges(node.ident)
        changed = differences(node.before, node.after, ranges)
        if changed:
            path = _path(node, now=False)
            yield Change(
                Op.MODIFY, node.ident, node.after.type, path, None, changed, node.before, node.after, ranges
            )  # fmt: skip


class _Sides:
    """What was and what is, as two partial views. An object without a known identity gets one that no object has.

    `reused`: a deleted object whose identity another one has now, by the identity that stands for it here.
    """

    def __init__(self, root: _Node, alive: Collection[_Node], gone: dict[Ident, _Node]) -> None:
        self._keys: dict[_Node, Ident] = {}
        self.reused: dict[Ident, Ident] = {}
        self.nodes: dict[Ident, _Node] = {}
        taken = {node.ident for node in alive}
        for number, node in enumerate([root, *alive]):
            self._enter(node, node.ident or Ident(-1 - number, 0))
        for ident, node in gone.items():
            key = ident
            if ident in taken:
                key = Ident(ident.ino, -1 - ident.gen)
                self.reused[key] = ident
            self._enter(node, key)
        self.touched = {key for key, node in self.nodes.items() if node.ident is not None}
        self.old = _Side(self, root, new=False)
        self.new = _Side(self, root, new=True)

    def _enter(self, node: _Node, key: Ident) -> None:
        if node not in self._keys:
            self._keys[node] = key
            self.nodes[key] = node

    def key(self, node: _Node) -> Ident:
        return self._keys[node]

    def ranges(self, ident: Ident) -> ByteRanges | None:
        node = self.nodes[ident]
        if node.ranges is None or node.before is None or node.after is None:
            return None
        return node.ranges if node.after.size == node.size else ByteRanges(quality=Quality.UNKNOWN)


class _Side:
    """One of the two states: a `comparer.model.View` of what the changes tell of it."""

    def __init__(self, sides: _Sides, root: _Node, *, new: bool) -> None:
        self._sides = sides
        self._new = new
        self._root = sides.key(root)

    @property
    def root(self) -> Ident:
        return self._root

    def attr(self, ident: Ident) -> Attr | None:
        node = self._sides.nodes.get(ident)
        if node is None:
            return None
        if self._new:
            return node.after if node.alive else None
        return node.before

    def names(self, ident: Ident) -> Iterator[Name]:
        node = self._sides.nodes.get(ident)
        if node is not None:
            for directory, name in node.names if self._new else node.places:
                yield Name(self._sides.key(directory), name)

    def child(self, parent: Ident, name: bytes) -> Ident | None:
        node = self._sides.nodes.get(parent)
        if node is None:
            return None
        found = (node.now if self._new else node.old).get(name)
        return None if found is None else self._sides.key(found)

    def children(self, parent: Ident) -> Iterator[tuple[bytes, Ident]]:
        node = self._sides.nodes.get(parent)
        if node is not None:
            for name, found in (node.now if self._new else node.old).items():
                yield name, self._sides.key(found)


def _path(node: _Node, *, now: bool) -> bytes:
    """One known path of a node, at the end or at the beginning."""
    names: list[bytes] = []
    while found := (node.names if now else node.places):
        node, name = next(iter(found))
        names.append(name)
    return b"/".join(reversed(names))


def _wrong(change: Change, why: str) -> DamageError:
    return DamageError(
        f"{change.op} {change.path!r} of {change.ident} does not follow from the changes before it: {why}"
    )
