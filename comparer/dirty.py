"""The dirty set: where events say to look. Hints, never truth."""

from dataclasses import dataclass, field

from .model import Ident, Name


@dataclass(slots=True)
class Dirty:
    """What events have touched since it was last taken.

    `objects`: inodes whose attributes or content may have changed; `names`: directory entries that may have come, gone
    or changed their object; `written`: the subset of `objects` whose content may have changed; `lost`: why the set may
    be incomplete (a reason for people), None if it is complete. `events` counts events, for the log only.
    """

    objects: set[Ident] = field(default_factory=set)
    written: set[Ident] = field(default_factory=set)
    names: set[Name] = field(default_factory=set)
    lost: str | None = None
    events: int = 0

    def __bool__(self) -> bool:
        return bool(self.objects or self.names or self.lost)

    def merge(self, other: "Dirty") -> None:
        """Add what `other` holds; used when a snapshot failed and its dirty set has to be looked at again."""
        self.objects |= other.objects
        self.written |= other.written
        self.names |= other.names
        self.lost = self.lost or other.lost
        self.events += other.events
