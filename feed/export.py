"""A diff as two lists of paths, for tools that know paths only: what must be looked at, what is gone. Pure.

The lists are made so that these two steps turn the old tree into the new one, whatever was renamed to where:

1. remove each path of `deleted`, with everything below it;
2. copy each path of `changed`: that entry alone, a directory without what is in it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from comparer.errors import DamageError
from feed.encode import decode_name

AROUND = "around"
_DIR = "dir"


class Entry(NamedTuple):
    """A path from the partition's root (empty: the root itself), the type of what is or was there, and why it is listed.

    `op`: as in the feed, or `around`: not in the diff itself, but below a renamed directory, another name of a changed file, or
    the directory that a changed entry is in (a tool that replaces a file touches its directory's times).
    """

    path: bytes
    type: str
    op: str


@dataclass(frozen=True, slots=True)
class Lists:
    """`changed`: parents before what they hold, and nothing between a directory and what it holds but what it holds.

    `deleted`: each stands for everything that was below it, so that none is below another.
    """

    changed: list[Entry]
    deleted: list[Entry]


@dataclass(eq=False, slots=True)
class _Node:
    """One name. `origin`: its path at the beginning, None if it had none; `op`: what the diff says of it, None for nothing."""

    parent: "_Node | None"
    name: bytes
    origin: bytes | None
    type: str = _DIR
    op: str | None = None
    below: dict[bytes, "_Node"] | None = None


class Export:
    """Takes the changes of one diff in order with `add`, entries beside them with `add_around`; `lists` gives the lists.

    Memory: by the paths named, not by the tree.
    """

    def __init__(self, *, baseline: bool) -> None:
        self._root = _Node(None, b"", b"")
        self._gone: dict[bytes, Entry] = {}
        self._around: dict[bytes, Entry] = {}
        self._baseline = baseline
        self._all: list[Entry] = []

    def add(self, document: Mapping[str, Any]) -> None:
        """Follow one change, a JSON object of the feed. Raises DamageError if it is none, or cannot be followed."""
        try:
            op, kind, path, other = (document["op"], document["type"], *_names(document))
        except (KeyError, ValueError, TypeError) as error:
            raise DamageError(f"not a change of the feed: {error}") from error
        if self._baseline:
            self._all.append(Entry(path, kind, op))
            return
        if op in ("create", "link"):
            self._put(path, _Node(None, b"", None), kind, op)
        elif op == "rename":
            if other is None:
                raise DamageError("not a change of the feed: a rename without `from`")
            self._put(path, self._take(other), kind, op)
        elif op in ("delete", "unlink"):
            node = self._take(path)
            if node.origin is not None:
                self._gone[node.origin] = Entry(node.origin, kind, op)
        elif op == "modify":
            node = self._find(path)
            node.type, node.op = kind, node.op or op
        else:
            raise DamageError(f"not a change of the feed: op {op!r:.40}")

    def add_around(self, document: Mapping[str, Any]) -> None:
        """An entry of the new tree that a tool must look at though the diff does not name it. Raises DamageError."""
        try:
            path, _ = _names(document)
            self._around[path] = Entry(path, document["type"], AROUND)
        except (KeyError, ValueError, TypeError) as error:
            raise DamageError(f"not an entry of an export: {error}") from error

    def lists(self) -> Lists:
        """What the changes so far come to."""
        if self._baseline:
            return Lists(sorted(self._all, key=_order), [])
        changed, gone = dict(self._around), dict(self._gone)
        for path, node in _walk(self._root):
            if node.op is not None or node.origin != path:
                changed[path] = Entry(path, node.type, node.op or AROUND)
            if node.origin is not None and node.origin != path and node.op == "rename":
                gone[node.origin] = Entry(node.origin, node.type, "rename")
        for path in list(changed):
            above = _parent(path)
            if path and above not in changed:
                changed[above] = Entry(above, _DIR, AROUND)
        return Lists(sorted(changed.values(), key=_order), list(self._to_remove(sorted(gone.values(), key=_order))))

    def _to_remove(self, gone: list[Entry]) -> Iterator[Entry]:
        """Of what left its place: without what is below another, and without files that a file has replaced."""
        last: bytes | None = None
        for entry in gone:
            if last is not None and entry.path.startswith(last + b"/"):
                continue
            now = self._look(entry.path)
            if now is None or _DIR in (now.type, entry.type):
                last = entry.path
                yield entry

    # ---- the names

    def _look(self, path: bytes) -> _Node | None:
        """What has this path now, as far as the changes tell."""
        node: _Node | None = self._root
        for name in path.split(b"/") if path else ():
            node = (node.below or {}).get(name) if node is not None else None
        return node

    def _find(self, path: bytes) -> _Node:
        """The same; what the changes have not named yet has been there since the beginning."""
        node = self._root
        for name in path.split(b"/") if path else ():
            if node.below is None:
                node.below = {}
            found = node.below.get(name)
            if found is None:
                if node.origin is None:
                    raise DamageError(f"a change of {path!r}, which does not follow from the changes before it")
                found = node.below[name] = _Node(node, name, node.origin + b"/" + name if node.origin else name)
            node = found
        return node

    def _take(self, path: bytes) -> _Node:
        node = self._find(path)
        if node.parent is None or node.parent.below is None:
            raise DamageError("a change that moves or removes the root")
        del node.parent.below[node.name]
        return node

    def _put(self, path: bytes, node: _Node, kind: str, op: str) -> None:
        above, _, name = path.rpartition(b"/")
        parent = self._find(above)
        if parent.below is None:
            parent.below = {}
        if not name or name in parent.below:
            raise DamageError(f"{op} of {path!r}, which is there already")
        parent.below[name] = node
        node.parent, node.name, node.type = parent, name, kind
        node.op = op if node.op is None or op == "rename" else node.op


def _walk(root: _Node) -> Iterator[tuple[bytes, _Node]]:
    stack = [(b"", root)]
    while stack:
        path, node = stack.pop()
        yield path, node
        prefix = path + b"/" if path else b""
        stack += [(prefix + name, child) for name, child in (node.below or {}).items()]


def _names(document: Mapping[str, Any]) -> tuple[bytes, bytes | None]:
    path = decode_name(document, "path")
    if path is None:
        raise KeyError("path")
    return path, decode_name(document, "from")


def _parent(path: bytes) -> bytes:
    return path.rpartition(b"/")[0]


def _order(entry: Entry) -> list[bytes]:
    """Parents first, each followed by all that is below it: component by component, not byte by byte."""
    return entry.path.split(b"/") if entry.path else []


def relative(path: bytes) -> bytes:
    """The path as a list for other tools has it: the root is `.`."""
    return path or b"."


def separated(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Each path with a NUL after it; no name can hold one."""
    for entry in entries:
        yield relative(entry.path) + b"\0"
