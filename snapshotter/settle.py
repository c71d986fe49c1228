"""From what was seen, at slightly different times, to a tree: every object has a name, every directory one, all below the root.

Where nobody wrote meanwhile there is nothing to mend. Else an object that was seen in motion keeps its old place, which
existed, or is left out until it is seen somewhere; both are to be looked at again.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from comparer.dirty import Dirty
from comparer.model import Attr, FileType, Ident, Name

from .table import Overlay, Table

if TYPE_CHECKING:
    from .look import Look


def settle(look: "Look") -> tuple[Overlay, set[Ident]]:
    """The new state and the objects in which it can differ from the old one; adds to `look.again`."""
    work = _Settling(look.old, look.attrs, look.entries, look.again)
    work.drop_vanished()
    work.one_place_each(look._places)  # noqa: SLF001 - the other half of the same step
    work.house_homeless(by_handle=look.tree.codec is not None)
    work.detach_unreachable()
    return Overlay(look.old, look.attrs, look.entries), work.touched()


class _Settling:
    def __init__(
        self, old: Table, attrs: dict[Ident, Attr | None], entries: dict[Name, Ident | None], again: Dirty
    ) -> None:
        self.old = old
        self.attrs = attrs
        self.entries = entries
        self.again = again
        self.added: dict[Ident, set[Name]] = defaultdict(set)
        self.inside: dict[Ident, set[Name]] = defaultdict(set)
        for name, ident in entries.items():
            self.inside[name.parent].add(name)
            if ident is not None:
                self.added[ident].add(name)

    def point(self, name: Name, ident: Ident | None) -> None:
        before = self.entries.get(name)
        if before is not None:
            self.added[before].discard(name)
        self.entries[name] = ident
        self.inside[name.parent].add(name)
        if ident is not None:
            self.added[ident].add(name)

    def attr(self, ident: Ident) -> Attr | None:
        return self.attrs[ident] if ident in self.attrs else self.old.attr(ident)

    def names(self, ident: Ident) -> Iterator[Name]:
        yield from self.added.get(ident, ())
        for name in self.old.names(ident):
            if name not in self.entries:
                yield name

    def alive(self, directory: Ident) -> bool:
        return directory == self.old.root or self.attr(directory) is not None

    # ---- the steps

    def drop_vanished(self) -> None:
        """An object that went after its name was seen, or before it."""
        for name, ident in list(self.entries.items()):
            if ident is not None and self.attr(ident) is None:
                self.point(name, None)
                self.again.names.add(name)
        for ident, attr in list(self.attrs.items()):
            if attr is None:
                for name in [n for n in self.old.names(ident) if n not in self.entries]:
                    self.point(name, None)
                    self.again.names.add(name)

    def one_place_each(self, places: dict[Ident, Name]) -> None:
        """A directory seen under two names moved between the looks: the later one is where it is."""
        for ident, place in places.items():
            names = list(self.names(ident))
            if len(names) > 1:
                kept = place if place in names else names[0]
                for name in names:
                    if name != kept:
                        self.point(name, None)
                        self.again.names.add(name)

    def house_homeless(self, *, by_handle: bool) -> None:
        """An object without a name: gone, where names are all one can look at; else it moved while we looked."""
        seen = {ident: attr for ident, attr in self.attrs.items() if attr is not None}
        suspects = set(seen)
        suspects.update(i for n in self.entries if (i := self.old.child(*n)) is not None and i not in self.attrs)
        # directories first: with one that is buried, what was seen in it becomes homeless as well
        for ident in sorted(suspects, key=lambda i: (not self.is_directory(i), i)):
            if ident == self.old.root or next(self.names(ident), None) is not None:
                continue
            attr = seen.get(ident)
            known = list(self.old.names(ident))
            kept = next((n for n in known if self.entries.get(n) is None and self.alive(n.parent)), None)
            buried = self.attr(ident) is None
            if by_handle and attr is not None and kept is not None and not (buried and attr.type is FileType.DIR):
                self.attrs[ident] = attr
                self.point(kept, ident)
                self.again.names.add(kept)
                self.again.objects.add(ident)
            else:
                self.bury(ident)
                if by_handle and known:
                    self.again.objects.add(ident)

    def is_directory(self, ident: Ident) -> bool:
        attr = self.attr(ident)
        return attr is not None and attr.type is FileType.DIR

    def bury(self, ident: Ident) -> None:
        """An object leaves the state, and what a directory held with it, unless that has another name."""
        burials = [ident]
        for gone in burials:
            attr = self.attr(gone)
            self.attrs[gone] = None
            if attr is None or attr.type is not FileType.DIR:
                continue
            held: dict[Name, Ident | None] = {Name(gone, name): i for name, i in self.old.children(gone)}
            held.update((n, self.entries[n]) for n in self.inside.get(gone, ()))
            for name, child in held.items():
                if child is None:
                    continue
                self.point(name, None)
                if child not in burials and next(self.names(child), None) is None:
                    burials.append(child)

    def detach_unreachable(self) -> None:
        """What hangs in a directory that is not in the state goes. Circles, which no tree has, are cut open."""
        attached: set[Ident] = {self.old.root}
        for name in list(self.entries):
            while (ident := self.entries[name]) is not None:
                chain = self.upwards(name.parent, attached)
                if chain[-1] in attached:
                    attached.update(chain)
                    break
                if chain[-1] in chain[:-1]:
                    self.cut(chain[chain.index(chain[-1]) : -1])
                    continue
                self.point(name, None)
                if next(self.names(ident), None) is None:
                    self.bury(ident)

    def upwards(self, directory: Ident, attached: set[Ident]) -> list[Ident]:
        """The directories from `directory` up to one that is attached, that is nowhere, or that is in the list already."""
        chain = [directory]
        while directory not in attached:
            place = next(self.names(directory), None) if self.attr(directory) is not None else None
            if place is None:
                break
            directory = place.parent
            if directory in chain:
                return [*chain, directory]
            chain.append(directory)
        return chain

    def cut(self, circle: list[Ident]) -> None:
        """Directories seen inside each other moved between the looks: one goes back to its old place, or is left out for now."""
        for directory in circle:
            old = [n for n in self.old.names(directory) if self.entries.get(n) is None and n.parent not in circle]
            home = next((n for n in old if self.alive(n.parent)), None)
            if home is not None:
                break
        else:
            directory, home = circle[0], None
        for name in list(self.names(directory)):
            self.point(name, None)
            self.again.names.add(name)
        self.again.objects.add(directory)
        if home is not None:
            self.point(home, directory)
            self.again.names.add(home)
        else:
            self.bury(directory)

    def touched(self) -> set[Ident]:
        found = set(self.attrs)
        for name, ident in self.entries.items():
            found.update(i for i in (self.old.child(*name), ident) if i is not None)
        return found
