"""Two states in, ordered changes out. State-based: what an object *was* and *is* counts, never how it got there.

The order makes every step possible on a real directory tree:

1. names that go and nothing waits for: files first, then directories that nobody leaves, deepest first;
2. placements (create, rename, link) from the top of the new tree down, so that a parent is where it belongs before anything
   is put into it, which also keeps a directory from being moved below itself; whoever sits on a wanted name is moved on
   first, or, where that goes in a circle, to a temporary name;
3. directories that had to wait until something had left them, deepest first;
4. attributes of what stayed: files, then directories, deepest first.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from .model import Attr, ByteRanges, Change, FileType, Ident, Name, Op, View

TEMPORARY = b".snapfeed-tmp-"


def differences(before: Attr, after: Attr, ranges: ByteRanges | None) -> tuple[str, ...]:
    """The `changed` field: which kinds of attribute differ. `blocks` never counts."""
    found = []
    if ranges:
        found.append("data")
    if before.size != after.size:
        found.append("size")
    if before.mode != after.mode:
        found.append("mode")
    if (before.uid, before.gid) != (after.uid, after.gid):
        found.append("owner")
    if (before.mtime_ns, before.ctime_ns, before.btime_ns) != (after.mtime_ns, after.ctime_ns, after.btime_ns):
        found.append("times")
    if before.xattrs != after.xattrs:
        found.append("xattr")
    if before.nlink != after.nlink:
        found.append("links")
    return tuple(found)


def baseline(view: View, several: Callable[[], Collection[Ident]] = tuple) -> Iterator[Change]:
    """A whole state as changes: the root as a `modify` with nothing before, then everything, directories first.

    An object that has one name by its link count, and more in the state, as one that was seen in motion, must be among `several`.
    """
    root = view.attr(view.root)
    if root is None:
        raise ValueError("the state has no root directory")
    yield Change(Op.MODIFY, view.root, FileType.DIR, b"", after=root)
    first_names: dict[Ident, bytes] = {}
    seen_twice = frozenset(several())
    stack = [(b"", view.root)]
    while stack:
        prefix, directory = stack.pop()
        for name, ident in sorted(view.children(directory)):
            attr = view.attr(ident)
            if attr is None:
                raise ValueError(f"name {name!r} points to object {ident}, which the state does not hold")
            path = prefix + name
            if ident in first_names:
                yield Change(Op.LINK, ident, attr.type, path, from_path=first_names[ident], after=attr)
                continue
            yield Change(Op.CREATE, ident, attr.type, path, after=attr)
            if attr.type is FileType.DIR:
                stack.append((path + b"/", ident))
            elif attr.nlink > 1 or ident in seen_twice:
                first_names[ident] = path


def compare(
    old: View,
    new: View,
    touched: Collection[Ident],
    ranges: Callable[[Ident], ByteRanges | None] = lambda _ident: None,
) -> Iterator[Change]:
    """The changes from `old` to `new`; only objects in `touched` are looked at, so all that differ must be among them.

    Of a directory that went, everything it held must be touched too. Objects whose attributes and names are equal give nothing.
    """
    return _Comparison(old, new, ranges).changes(touched)


@dataclass(slots=True)
class _Object:
    """One touched object: its attributes in both states, and the names it has at this point of the replay."""

    ident: Ident
    before: Attr | None
    after: Attr | None
    names: set[Name]  # now, at this step
    wanted: set[Name]  # in the new state
    sources: dict[Name, Name] = field(default_factory=dict)  # wanted name -> the present name that becomes it
    reported: bool = False  # a rename or create has carried the attributes

    @property
    def type(self) -> FileType:
        attr = self.after or self.before
        assert attr is not None  # noqa: S101 - made only for objects that one of the states holds
        return attr.type


class _Comparison:
    def __init__(self, old: View, new: View, ranges: Callable[[Ident], ByteRanges | None]) -> None:
        self.old = old
        self.new = new
        self.ranges = ranges
        self.objects: dict[Ident, _Object] = {}
        self.pending: dict[Name, _Object] = {}  # placements not yet made
        self.occupants: dict[Name, Ident | None] = {}  # where the tree now differs from `old`
        self.moved: dict[Ident, Name] = {}  # directories that are no longer where `old` has them, or new
        self.settled: set[Ident] = {new.root}  # directories known to be in their final place, with all above them
        self.paths: dict[Ident, bytes] = {}  # cache of directory prefixes at this step
        self.depths: dict[Ident, int] = {}

    # ---- the steps

    def changes(self, touched: Collection[Ident]) -> Iterator[Change]:
        for ident in sorted(touched):
            self._load(ident)
        gone = [o for o in self.objects.values() if o.after is None]
        blocked = self._blocked({o.ident for o in gone if o.type is FileType.DIR})

        for obj in self.objects.values():
            yield from self._drop_names(obj)
        free = [o for o in gone if o.type is FileType.DIR and o.ident not in blocked]
        for obj in sorted(free, key=lambda o: -self._old_depth(o.ident)):
            yield self._delete(obj)

        for name in sorted(self.pending, key=lambda n: (self._new_depth(n.parent), n.parent, n.name)):
            if name in self.pending:
                self_chain = self._unsettled(name.parent)
                for directory in self_chain:
                    yield from self._settle(directory)
                if name in self.pending:
                    yield from self._place(name)

        late = [self.objects[ident] for ident in blocked]
        for obj in sorted(late, key=lambda o: -self._old_depth(o.ident)):
            yield self._delete(obj)

        yield from self._modifications()

    def _load(self, ident: Ident) -> None:
        before, after = self.old.attr(ident), self.new.attr(ident)
        if ident in self.objects or (before is None and after is None):
            return
        names = set(self.old.names(ident)) if before else set()
        wanted = set(self.new.names(ident)) if after else set()
        obj = self.objects[ident] = _Object(ident, before, after, names, wanted)
        if ident == self.new.root:
            return
        added = sorted(wanted - names)
        removed = sorted(names - wanted) if after else []
        for same in (lambda a, b: a.parent == b.parent, lambda a, b: a.name == b.name, lambda _a, _b: True):
            for target in added:
                if target in obj.sources:
                    continue
                source = next((r for r in removed if same(r, target)), None)
                if source is not None:
                    removed.remove(source)
                    obj.sources[target] = source
        for target in added:
            self.pending[target] = obj

    def _blocked(self, gone: set[Ident]) -> set[Ident]:
        """Directories that go, but only after something has been moved out of them."""
        blocked: set[Ident] = set()
        for obj in self.objects.values():
            for source in obj.sources.values():
                parent = source.parent
                while parent in gone and parent not in blocked:
                    blocked.add(parent)
                    parent = next(iter(self.objects[parent].names)).parent
        return blocked

    def _drop_names(self, obj: _Object) -> Iterator[Change]:
        """Unlink what goes without a successor; the last name of a directory that goes is not dropped here."""
        keep = obj.wanted | set(obj.sources.values())
        going = sorted(n for n in obj.names if n not in keep)
        if obj.after is None:
            if obj.type is FileType.DIR:
                return
            *further, last = going
            for name in further:
                yield self._unlink(obj, name)
            path = self._path(last)
            self._vacate(obj, last)
            yield Change(Op.DELETE, obj.ident, obj.type, path, before=obj.before)
        else:
            for name in going:
                yield self._unlink(obj, name)

    def _unlink(self, obj: _Object, name: Name) -> Change:
        path = self._path(name)
        self._vacate(obj, name)
        return Change(Op.UNLINK, obj.ident, obj.type, path, before=obj.before, after=obj.after)

    def _delete(self, obj: _Object) -> Change:
        (name,) = obj.names
        path = self._path(name)
        self._vacate(obj, name)
        return Change(Op.DELETE, obj.ident, obj.type, path, before=obj.before)

    def _settle(self, directory: Ident) -> Iterator[Change]:
        """Put a directory, whose parent is settled, where it belongs."""
        if directory not in self.settled:
            for name in self.new.names(directory):
                if name in self.pending:
                    yield from self._place(name)
            self.settled.add(directory)

    def _place(self, name: Name) -> Iterator[Change]:
        """Give `name` its object. Whoever sits there is moved on first: a chain from its far end, a circle by a detour."""
        chain = [name]
        while chain:
            target = chain[-1]
            occupant = self._occupant(target)
            if occupant is not None:
                sitter = self.objects[occupant]
                onward = next((t for t, s in sitter.sources.items() if s == target and t in self.pending), None)
                if onward is not None and onward not in chain:
                    yield from self._try_settle(onward.parent)
                    if onward.parent in self.settled and onward in self.pending and self._occupant(target) == occupant:
                        chain.append(onward)
                        continue
                if self._occupant(target) == occupant:
                    yield self._detour(sitter, target)
                continue
            chain.pop()
            obj = self.pending.pop(target, None)
            if obj is not None:
                yield self._arrive(obj, target)

    def _try_settle(self, directory: Ident) -> Iterator[Change]:
        """Settle a directory and all above it if nothing is in the way; else leave the rest for later."""
        for ancestor in self._unsettled(directory):
            waiting = [n for n in self.new.names(ancestor) if n in self.pending]
            if any(self._occupant(n) is not None for n in waiting):
                return
            for name in waiting:
                yield self._arrive(self.pending.pop(name), name)
            self.settled.add(ancestor)

    def _arrive(self, obj: _Object, name: Name) -> Change:
        source = obj.sources.pop(name, None)
        path = self._path(name)
        if source is not None:
            from_path = self._path(source)
            self._vacate(obj, source)
            self._occupy(obj, name)
            assert obj.before is not None and obj.after is not None  # noqa: S101, PT018 - only survivors have sources
            content = None if obj.reported else self._content(obj)
            changed = () if obj.reported else differences(obj.before, obj.after, content)
            obj.reported = True
            return Change(Op.RENAME, obj.ident, obj.type, path, from_path, changed, obj.before, obj.after, content)
        if not obj.names:
            self._occupy(obj, name)
            obj.reported = True
            return Change(Op.CREATE, obj.ident, obj.type, path, after=obj.after)
        from_path = self._path(min(obj.names))
        self._occupy(obj, name)
        return Change(Op.LINK, obj.ident, obj.type, path, from_path, before=obj.before, after=obj.after)

    def _detour(self, obj: _Object, name: Name) -> Change:
        """Move an object out of the way, to a temporary name in the root."""
        label = TEMPORARY + str(obj.ident).encode()
        spare = Name(self.new.root, label)
        number = 0
        while self._occupant(spare) is not None or self.new.child(*spare) is not None:
            number += 1
            spare = Name(self.new.root, label + b"-%d" % number)
        path, from_path = self._path(spare), self._path(name)
        self._vacate(obj, name)
        self._occupy(obj, spare)
        for target, source in obj.sources.items():
            if source == name:
                obj.sources[target] = spare
        # what changed is said by the rename to its place; what was told before is not taken back here
        return Change(Op.RENAME, obj.ident, obj.type, path, from_path, (), obj.before, obj.after or obj.before)

    def _modifications(self) -> Iterator[Change]:
        stayed = [o for o in self.objects.values() if o.before and o.after and not o.reported]
        stayed.sort(key=lambda o: -self._new_depth(o.ident) if o.type is FileType.DIR else -(1 << 60))
        for obj in stayed:
            assert obj.before is not None and obj.after is not None  # noqa: S101, PT018 - filtered above
            content = self._content(obj)
            changed = differences(obj.before, obj.after, content)
            if changed:
                path = self._path(min(obj.names)) if obj.names else b""
                yield Change(
                    Op.MODIFY,
                    obj.ident,
                    obj.type,
                    path,
                    None,
                    changed,
                    before=obj.before,
                    after=obj.after,
                    ranges=content,
                )

    def _content(self, obj: _Object) -> ByteRanges | None:
        return self.ranges(obj.ident) if obj.type is FileType.FILE else None

    # ---- the tree at this step

    def _occupant(self, name: Name) -> Ident | None:
        if name in self.occupants:
            return self.occupants[name]
        return self.old.child(*name)

    def _vacate(self, obj: _Object, name: Name) -> None:
        self.occupants[name] = None
        obj.names.discard(name)

    def _occupy(self, obj: _Object, name: Name) -> None:
        self.occupants[name] = obj.ident
        obj.names.add(name)
        if obj.type is FileType.DIR:
            self.moved[obj.ident] = name
            if obj.before is not None:
                self.paths.clear()

    def _location(self, directory: Ident) -> Name:
        """Where a directory is at this step."""
        if directory in self.moved:
            return self.moved[directory]
        return _only(self.old, directory)

    def _path(self, name: Name) -> bytes:
        return self._prefix(name.parent) + name.name

    def _prefix(self, directory: Ident) -> bytes:
        """The path of a directory at this step with a trailing slash; empty for the root."""
        climbed: list[tuple[Ident, bytes]] = []
        while directory != self.new.root and directory not in self.paths:
            location = self._location(directory)
            climbed.append((directory, location.name))
            directory = location.parent
        prefix = self.paths.get(directory, b"")
        for below, name in reversed(climbed):
            prefix += name + b"/"
            self.paths[below] = prefix
        return prefix

    def _unsettled(self, directory: Ident) -> list[Ident]:
        """The directories from the highest unsettled one down to `directory`, along the new tree."""
        chain = []
        while directory not in self.settled:
            chain.append(directory)
            directory = _only(self.new, directory).parent
        return chain[::-1]

    def _old_depth(self, ident: Ident) -> int:
        depth = 0
        while ident != self.old.root:
            ident = _only(self.old, ident).parent
            depth += 1
        return depth

    def _new_depth(self, ident: Ident) -> int:
        climbed = []
        while ident != self.new.root and ident not in self.depths:
            climbed.append(ident)
            ident = _only(self.new, ident).parent
        depth = self.depths.get(ident, 0)
        for below in reversed(climbed):
            depth += 1
            self.depths[below] = depth
        return depth


def _only(view: View, directory: Ident) -> Name:
    """The one name of a directory. Raises ValueError if the view is not a tree there."""
    for name in view.names(directory):
        return name
    raise ValueError(f"directory {directory} has no name in its state")
