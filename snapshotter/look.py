"""From a dirty set to what is now: every touched object and entry is looked up, whatever the events said of it.

The outcome is an overlay of the metadata table that is a proper tree again, also while others go on writing: what was
seen half way through a change keeps its old place (which existed), and is to be looked at again by the next snapshot.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from comparer.dirty import Dirty
from comparer.model import Attr, FileType, Ident, Name

from .live import LOOKS, CoveredError, LiveTree
from .settle import settle
from .table import Overlay, Table

_ROUNDS = 4  # looks at what moved while we looked; then the rest is left for the next snapshot
_HANDLE_TRIES = 10


@dataclass(slots=True)
class Outcome:
    """`again`: idents and names whose place or attributes were in motion."""

    view: Overlay
    touched: set[Ident]
    again: Dirty


class Look:
    def __init__(self, tree: LiveTree, old: Table) -> None:
        self.tree = tree
        self.old = old
        self.attrs: dict[Ident, Attr | None] = {}
        self.entries: dict[Name, Ident | None] = {}
        self.again = Dirty()
        self._names: set[Name] = set()  # to be looked at
        self._objects: set[Ident] = set()
        self._places: dict[Ident, Name] = {}  # where a directory was last seen
        self._seen_as: dict[Ident, list[Name]] = {}  # without handles: the names an object was found under
        self._relist: set[Ident] = set()
        self._observed: dict[Name, Ident | None] = {}  # the last answer for a name
        self._was: dict[Name, Ident] = {}  # who had a name that is asked for again
        self._unreached: set[Name] = set()  # without handles: names in directories that no known path led to
        self._missing: dict[Ident, set[Name]] = {}  # by directory: names found to be nothing
        self._holders: dict[int, Ident] = {}  # by inode number: who was last seen alive with it

    def run(self, dirty: Dirty, more: Callable[[], Dirty]) -> Outcome:
        """Look at all of `dirty`, then at what has moved since, until it is quiet or it has been enough.

        Raises OSError for what cannot be read, TransientError if no tree can be made of what was seen.
        """
        self._queue(dirty)
        for _ in range(_ROUNDS):
            self._drain()
            new = more()
            if new.lost:
                self.again.lost = new.lost
            if not new.objects and not new.names:
                break
            self._queue(new)
        else:
            self.again.merge(Dirty(objects=set(self._objects), names=set(self._names)))
            self._drain()
        return Outcome(*settle(self), self.again)

    # ---- looking

    def _queue(self, dirty: Dirty) -> None:
        """Events say these may have changed since they were looked at; so look, also if it is not for the first time."""
        for ident in dirty.objects:
            self.attrs.pop(ident, None)
        for name in dirty.names:
            self._ask_again(name)
        self._objects |= dirty.objects
        if self.tree.codec is None:
            self._relist |= (
                dirty.written
            )  # a directory among them was watched late: what it holds is all to be asked for

    def _ask_again(self, name: Name) -> None:
        earlier = self.entries.pop(name, None)
        if earlier is not None:
            self._was.setdefault(name, earlier)
        self._missing.get(name.parent, set()).discard(name)
        self._names.add(name)

    def _drain(self) -> None:
        while self._objects or self._names:
            while self._objects:
                some = [self._objects.pop() for _ in range(min(len(self._objects), LOOKS))]
                ahead = self.tree.look_at_many([i for i in some if i not in self.attrs and i != self.tree.root])
                for ident in some:
                    self._look_at(ident, ahead.get(ident))
            # parents first, as far as one knows where they are: without handles a path must be found
            names, self._names = sorted(self._names, key=self._depth), set()
            for name in names:
                if name not in self.entries:
                    self._look(name)

    def _depth(self, name: Name) -> int:
        if self.tree.codec is not None:
            return 0
        path = self._path(name.parent)
        return len(path) if path is not None else 1 << 30

    def _look_at(self, ident: Ident, seen: Attr | None) -> None:
        """`seen`: what it was seen to be a moment ago, if it was looked at with others."""
        if ident in self.attrs:
            return
        if ident == self.tree.root:
            self.attrs[ident] = self.tree.look_at_root()
        elif self.tree.codec is None:
            # only its names lead to an object, the old ones and those it was seen under: they settle what it is
            for name in {*self.old.names(ident), *self._seen_as.get(ident, ())}:
                self._ask_again(name)
        else:
            self.attrs[ident] = attr = seen or self.tree.look_at(ident)
            if attr is None:
                self._gone(ident)
            else:
                self._supersedes(ident)

    def _supersedes(self, ident: Ident) -> None:
        """Whoever had this inode number before is gone, whether an event told so or not."""
        earlier = self._holders.get(ident.ino)
        self._holders[ident.ino] = ident
        if earlier is not None and earlier != ident:
            self.attrs[earlier] = None
            self._gone(earlier)
        before = self.old.current(ident.ino)
        if before is not None and before != ident and before not in self.attrs:
            self.attrs[before] = None
            self._gone(before)

    def _gone(self, ident: Ident) -> None:
        """Where an object had names, look what is there now; and at everything a directory held."""
        self.tree.forget(ident)
        before = self.old.attr(ident)
        if before is None:
            return
        for name in self.old.names(ident):
            if self.entries.get(name, ident) == ident:
                self._ask_again(name)
        if before.type is FileType.DIR:
            self._names.update(
                Name(ident, name) for name, _ in self.old.children(ident) if Name(ident, name) not in self.entries
            )

    def _look(self, name: Name) -> None:
        before = self.old.child(*name)
        found = None
        try:
            dirfd = None if self._known_gone(name.parent) else self.tree.directory(name.parent, self._path)
        except CoveredError:
            self.entries[name] = before
            return
        if dirfd is not None:
            found = self.tree.look(dirfd, name.name)
            if found is None and before is not None and self.tree.covered(dirfd, name.name):
                self.entries[name] = before  # what is mounted on it hides it
                return
        elif self.tree.codec is not None and not self._known_gone(name.parent):
            # a handle that does not open may be one that cannot be read: the directory's own names tell
            self.attrs.pop(name.parent, None)
            self._objects.add(name.parent)
        now = found.ident if found else None
        self.entries[name] = now
        # what follows from an answer is done once for it: two objects that changed places would ask for each other for ever
        news = self._observed.get(name, name) != now
        self._observed[name] = now
        if found is None:
            self._missing.setdefault(name.parent, set()).add(name)
            if dirfd is None:
                self._unreached.add(name)
        else:
            self._check_handle(name, dirfd, found.ident)
            self.attrs[found.ident] = found.attr
            if self.tree.codec is None:
                self._seen_as.setdefault(found.ident, []).append(name)
            self._supersedes(found.ident)
            if found.attr.type is FileType.DIR:
                moved = self._places.get(found.ident) != name and self.old.child(*name) != found.ident
                self._places[found.ident] = name
                if found.ident in self._relist:
                    self._relist.discard(found.ident)
                    for child, _ in self.old.children(found.ident):
                        self._ask_again(Name(found.ident, child))
                    self._list(found.ident, again=True)
                elif self.old.attr(found.ident) is None:
                    self._list(found.ident)
                # what was missing in it may only have been out of reach
                for entry in self._missing.pop(found.ident, ()):
                    del self.entries[entry]
                    self._names.add(entry)
                if self.tree.codec is None and moved and news:
                    unreached, self._unreached = self._unreached, set()
                    for entry in unreached:
                        self._ask_again(entry)
        if before is not None and before != now:
            if self.tree.codec is not None:
                if before not in self.attrs:
                    self._objects.add(before)
            elif news:
                self._elsewhere(before)
        earlier = self._was.pop(name, None)
        if self.tree.codec is None and news and earlier is not None and earlier not in (before, now):
            self._elsewhere(earlier)

    def _check_handle(self, name: Name, dirfd: int | None, ident: Ident) -> None:
        """A name leads to what was gone by its handle: then what it holds must not be taken for gone as well. Raises OSError.

        A directory's handle may fail while somebody renames what is above it, so it is tried some times.
        """
        if self.tree.codec is None or not self._known_gone(ident):
            return
        for _ in range(_HANDLE_TRIES):
            if self.tree.look_at(ident) is not None:
                return
            found = self.tree.look(dirfd, name.name) if dirfd is not None else None
            if found is None or found.ident != ident:
                return
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name.name)

    def _known_gone(self, directory: Ident) -> bool:
        return directory in self.attrs and self.attrs[directory] is None

    def _elsewhere(self, ident: Ident) -> None:
        """Without handles: an object left a name. Its other names tell what it is now; without any it is gone."""
        self.tree.forget(ident)
        for name in {*self.old.names(ident), *self._seen_as.get(ident, ())}:
            if self.entries.get(name, ident) == ident:
                self._ask_again(name)
        if (before := self.old.attr(ident)) is not None and before.type is FileType.DIR and ident not in self._places:
            self._names.update(
                Name(ident, name) for name, _ in self.old.children(ident) if Name(ident, name) not in self.entries
            )

    def _list(self, directory: Ident, *, again: bool = False) -> None:
        """A directory that was not there before: all it holds is new to us. `again`: also what was asked for already."""
        dirfd = self.tree.directory(directory, self._path)
        if dirfd is None:
            return
        for name, _ino in self.tree.list(dirfd):
            entry = Name(directory, name)
            if again:
                self._ask_again(entry)
            elif entry not in self.entries:
                self._names.add(entry)

    def _path(self, directory: Ident) -> list[bytes] | None:
        """Where a directory should be now, as names from the root down, as far as is known; None if it is nowhere."""
        climbed: list[bytes] = []
        seen = set()
        while directory != self.tree.root:
            name = self._places.get(directory)
            if name is None or self.entries.get(name, directory) != directory:
                name = next((n for n in self.old.names(directory) if self.entries.get(n, directory) == directory), None)
            if name is None or directory in seen:
                return None
            seen.add(directory)
            climbed.append(name.name)
            directory = name.parent
        return climbed[::-1]
