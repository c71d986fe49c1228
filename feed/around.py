"""What a diff does not name and a tool that works with paths must look at all the same. Pure: changes and a view in, entries out.

The feed tells a renamed directory once, and a changed file under one of its names. Tools such as rsync and borg know paths only:
to them everything below the directory is new, and each further name of the file holds the changed content as well.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from comparer.errors import DamageError
from comparer.model import FileType, Ident, View
from feed.encode import encode_name

_NAMED = frozenset({"modify", "link", "rename"})


class Around:
    """Give it the documents of a diff with `see`; then ask `step` with a view of the state it leads to, until that gives None.

    Memory: one identity for each renamed directory and each changed object with several names, then one for each directory below.
    """

    def __init__(self) -> None:
        self._moved: dict[str, None] = {}
        self._linked: dict[str, None] = {}
        self._stack: list[tuple[bytes, Ident]] = []
        self._entered: set[Ident] = set()

    def see(self, documents: Iterable[Mapping[str, Any]]) -> None:
        """Changes of the diff, as in pages."""
        for document in documents:
            op = document["op"]
            if document["type"] == "dir":
                if op == "rename":
                    self._moved[document["id"]] = None
            elif op in _NAMED and document["after"] is not None and document["after"]["nlink"] > 1:
                self._linked[document["id"]] = None

    def step(self, view: View, limit: int) -> list[dict[str, Any]] | None:
        """Some entries, about `limit` of them: `{"path", "path_b64"?, "type", "id"}`; None when that was all.

        The view may change from one step to the next; what it does not hold (any more) is left out: the next diff tells.
        """
        found: list[dict[str, Any]] = []
        while len(found) < limit:
            if self._stack:
                self._list(view, *self._stack.pop(), found)
            elif self._moved:
                directory = _ident(self._moved.popitem()[0])
                path = path_of(view, directory)
                if path is not None:
                    self._enter(path, directory)
            elif self._linked:
                self._names(view, _ident(self._linked.popitem()[0]), found)
            else:
                break
        return found or None

    def _enter(self, path: bytes, directory: Ident) -> None:
        if directory not in self._entered:
            self._entered.add(directory)
            self._stack.append((path, directory))

    def _list(self, view: View, path: bytes, directory: Ident, found: list[dict[str, Any]]) -> None:
        for name, ident in view.children(directory):
            attr = view.attr(ident)
            if attr is None:
                raise DamageError(
                    f"name {name!r} in directory {directory} points to object {ident}, which is not there"
                )
            below = path + b"/" + name
            found.append(_entry(below, attr.type, ident))
            if attr.type is FileType.DIR:
                self._enter(below, ident)
            elif attr.nlink > 1:  # its names elsewhere must be made one with this one
                self._linked[str(ident)] = None

    def _names(self, view: View, ident: Ident, found: list[dict[str, Any]]) -> None:
        attr = view.attr(ident)
        if attr is None:
            return
        for name in view.names(ident):
            above = path_of(view, name.parent)
            if above is not None:
                found.append(_entry(above + b"/" + name.name if above else name.name, attr.type, ident))


def path_of(view: View, directory: Ident) -> bytes | None:
    """The path of a directory from the root, empty for the root; None if the view does not hold it."""
    parts: list[bytes] = []
    while directory != view.root:
        name = next(iter(view.names(directory)), None)
        if name is None:
            return None
        directory = name.parent
        parts.append(name.name)
    return b"/".join(reversed(parts))


def _entry(path: bytes, kind: FileType, ident: Ident) -> dict[str, Any]:
    document: dict[str, Any] = {"type": kind.value, "id": str(ident)}
    encode_name(document, "path", path)
    return document


def _ident(text: str) -> Ident:
    ino, _, gen = text.partition(".")
    return Ident(int(ino), int(gen))
