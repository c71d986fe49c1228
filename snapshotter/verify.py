"""The last snapshot's view against a full walk of the partition as it is: every disagreement, and whether a writer explains it.

The walk shares nothing with the dirty set or the reconcile: it lists every directory and looks at every entry.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from comparer.model import Attr, FileType, Ident, Name, View

from .live import CoveredError, LiveTree
from .scan import GUARD_NS, REPORT_EVERY, Places, Progress, reached
from .table import Table

_IGNORED = "blocks"  # allocation is the file system's own business: it changes without a change time
_COMPARED = tuple(field.name for field in dataclasses.fields(Attr) if field.name != _IGNORED)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """`path` from the root (empty: the root); `detail` is for people.

    `what`: `missing` (the view has a name that is not there), `extra` (there is one it does not have), `other` (a name leads to
    another object), `attributes`, `nameless` (the view's own fault: an object without a name). `meanwhile`: a change after the
    snapshot explains it, so it is none of the snapshot's.
    """

    path: bytes
    what: str
    detail: str
    meanwhile: bool


def verify(
    tree: LiveTree, view: View, taken_ns: int, progress: Progress, nameless: Callable[[], Iterator[Ident]] | None = None
) -> Iterator[Disagreement]:
    """Compare all of `view`, taken when the clock said `taken_ns`, with what is there now.

    Raises OSError for what cannot be read. `nameless` gives the objects the view holds without a name, where it can. Memory grows
    with directories, not with files.
    """
    yield from _Verification(tree, view, taken_ns).run(progress)
    for ident in nameless() if nameless is not None else ():
        yield Disagreement(b"", "nameless", f"object {ident} has no name", meanwhile=False)


class _Verification:
    def __init__(self, tree: LiveTree, view: View, taken_ns: int) -> None:
        self.tree = tree
        self.view = view
        self.since = taken_ns - GUARD_NS
        self.places = Places(tree.root)

    def run(self, progress: Progress) -> Iterator[Disagreement]:
        root = self.tree.root
        if self.view.root != root:
            yield Disagreement(b"", "other", f"the root is {root}, the snapshot has {self.view.root}", meanwhile=False)
            return
        yield from self._attributes(Name(root, b""), root, self.tree.look_at_root())
        stack, listed, seen = [root], set(), 0
        while stack:
            directory = stack.pop()
            if directory in listed:
                continue  # moved while it was walked
            listed.add(directory)
            dirfd = reached(self.tree, directory, self.places)
            if dirfd is None:
                continue
            known = dict(self.view.children(directory))
            for name, _ in list(self.tree.list(dirfd)):
                entry = Name(directory, name)
                ident = known.pop(name, None)
                yield from self._entry(entry, ident, stack)
                seen += 1
                if seen % REPORT_EVERY == 0:
                    progress(seen)
            for name, ident in known.items():
                yield from self._missing(Name(directory, name), ident)
        progress(seen)

    def _directory(self, directory: Ident) -> int | None:
        return self.tree.directory(directory, self.places.path)

    # ---- one entry

    def _entry(self, entry: Name, known: Ident | None, stack: list[Ident]) -> Iterator[Disagreement]:
        dirfd = self._directory(entry.parent)
        found = self.tree.look(dirfd, entry.name) if dirfd is not None else None
        if found is None:
            if known is not None:
                yield from self._missing(entry, known)
            return
        if found.attr.type is FileType.DIR:
            self.places.put(found.ident, entry)
            stack.append(found.ident)
        if known is None:
            meanwhile = self._moved(found.attr) or self._changed(entry.parent) or self._now(entry) != found.ident
            yield self._say(
                entry, "extra", f"{found.attr.type} {found.ident} is not in the snapshot", meanwhile=meanwhile
            )
        elif known != found.ident:
            meanwhile = self._moved(found.attr) or self._changed(entry.parent) or self._now(entry) != found.ident
            yield self._say(entry, "other", f"is {found.ident}, the snapshot has {known}", meanwhile=meanwhile)
        else:
            yield from self._attributes(entry, found.ident, found.attr)

    def _attributes(self, entry: Name, ident: Ident, now: Attr) -> Iterator[Disagreement]:
        known = self.view.attr(ident)
        if known is None:
            yield self._say(entry, "attributes", "the snapshot has the name but not the object", meanwhile=False)
            return
        different = [name for name in _COMPARED if getattr(known, name) != getattr(now, name)]
        if not different:
            return
        detail = "; ".join(
            f"{name} is {_short(now, name)}, the snapshot has {_short(known, name)}" for name in different
        )
        meanwhile = self._moved(now) or self._again(entry, ident, now)
        yield self._say(entry, "attributes", detail, meanwhile=meanwhile)

    def _missing(self, entry: Name, ident: Ident) -> Iterator[Disagreement]:
        try:
            dirfd = self._directory(entry.parent)
            if dirfd is not None and self.tree.covered(dirfd, entry.name):
                return
        except CoveredError:
            return
        meanwhile = self._changed(entry.parent) or self._now(entry) is not None
        yield self._say(entry, "missing", f"the snapshot has {ident}", meanwhile=meanwhile)

    # ---- did somebody change it after the snapshot?

    def _moved(self, attr: Attr) -> bool:
        return attr.ctime_ns >= self.since

    def _changed(self, directory: Ident) -> bool:
        """Whether a directory has changed since, or is gone."""
        if directory == self.tree.root:
            return self._moved(self.tree.look_at_root())
        if self.tree.codec is not None:
            attr = self.tree.look_at(directory)
            return attr is None or self._moved(attr)
        place = self.places.name(directory)
        parent = self._directory(place.parent) if place is not None else None
        found = self.tree.look(parent, place.name) if parent is not None and place is not None else None
        return found is None or found.ident != directory or self._moved(found.attr)

    def _now(self, entry: Name) -> Ident | None:
        dirfd = self._directory(entry.parent)
        found = self.tree.look(dirfd, entry.name) if dirfd is not None else None
        return found.ident if found is not None else None

    def _again(self, entry: Name, ident: Ident, before: Attr) -> bool:
        """Whether a second look shows something else."""
        if ident == self.tree.root:
            return self.tree.look_at_root() != before
        dirfd = self._directory(entry.parent)
        found = self.tree.look(dirfd, entry.name) if dirfd is not None else None
        return found is None or found.ident != ident or found.attr != before

    # ----

    def _say(self, entry: Name, what: str, detail: str, *, meanwhile: bool) -> Disagreement:
        above = self.places.path(entry.parent) or []
        path = b"/".join([*above, entry.name]) if entry.name else b""
        return Disagreement(path, what, detail, meanwhile)


def _short(attr: Attr, name: str) -> str:
    """A value for people, nothing unescaped: bytes are shown as Python writes them."""
    value = getattr(attr, name)
    if name == "mode":
        return f"{value:o}"
    text = str(value) if isinstance(value, (int, str)) else ascii(value)
    return text if len(text) <= 100 else text[:97] + "..."


def nameless(view: View) -> Callable[[], Iterator[Ident]] | None:
    """What finds a view's objects without a name, None if the view cannot have any."""
    if not isinstance(view, Table):
        return None

    def find() -> Iterator[Ident]:
        rows = view.db.execute(
            "SELECT ino, gen FROM inode WHERE ino != ? AND NOT EXISTS (SELECT 1 FROM entry WHERE entry.ino = inode.ino)",
            (view.root.ino,),
        )
        for row in rows:
            yield Ident(*row)

    return find
