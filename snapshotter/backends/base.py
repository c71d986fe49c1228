"""The contract of a snapshot backend.

A backend takes one partition's snapshots: it captures the state, offers it and the previous one as views, and keeps
what retention keeps. Every method gets `root_fd`, a descriptor of the partition's root directory that lives for the call
only (no mount is kept busy between calls), and runs in the partition's own thread. A method raises OSError for what the
disk does; whether that is permanent is for the caller to say.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from comparer.dirty import Dirty
from comparer.model import ByteRanges, Ident, View

SYSTEM_DIR = b".snapfeed"


def no_ranges(_ident: Ident) -> ByteRanges | None:
    return None


def no_content(_ident: Ident, _path: bytes) -> bytes | None:
    return None


@dataclass(slots=True)
class Capture:
    """One snapshot not yet committed.

    `old` is the state of the snapshot before (None: a baseline), `new` this one's; only objects in `touched` can differ.
    `ranges(ident)` are the changed bytes of a file that both states hold; None if its content did not change.
    `content(ident, path)` is where this snapshot keeps a file's content, from the partition's root; None if it does not.
    `snapshot` is the path of the whole snapshot's tree, None if there is none. `excluded` names (paths from the root) what is
    on the partition and not in the snapshot, such as nested subvolumes. `again` is to be looked at in the next snapshot as well.
    """

    seq: int
    old: View | None
    new: View
    touched: Collection[Ident] = ()
    ranges: Callable[[Ident], ByteRanges | None] = no_ranges
    content: Callable[[Ident, bytes], bytes | None] = no_content
    snapshot: bytes | None = None
    excluded: tuple[bytes, ...] = ()
    again: Dirty = field(default_factory=Dirty)


class Backend(Protocol):
    @property
    def kind(self) -> str:
        """`btrfs`, `ficlone` or `metadata`."""

    @property
    def consistency(self) -> str:
        """`subvolume`, `per-file` or `metadata` (FEED.md)."""

    @property
    def needs_events(self) -> bool:
        """False if a snapshot is complete whatever events were lost."""

    def sweep(self, root_fd: int, kept: Collection[int]) -> int:
        """Remove what unfinished snapshots (any seq not in `kept`) left on the disk; the number of things removed."""

    def capture(self, root_fd: int, seq: int, head: int | None, dirty: Dirty, more: Callable[[], Dirty]) -> Capture:
        """Take snapshot `seq` after `head` (None: the baseline).

        `dirty.lost` demands a reconcile. `more()` takes what events have brought since `dirty`, for another look before
        the capture is final.
        """

    def commit(self, capture: Capture) -> None:
        """Record the capture's metadata; runs inside the transaction that makes the snapshot."""

    def note(self, again: Dirty) -> None:
        """Remember what the next snapshot has to look at; runs inside a transaction. For a capture that changed nothing."""

    def release(self, capture: Capture) -> None:
        """Close what the capture holds open: its views are of no more use."""

    def discard(self, root_fd: int, capture: Capture) -> None:
        """Undo a capture that will not be committed (nothing changed, or an error)."""

    def expire(self, root_fd: int, seqs: Iterable[int]) -> None:
        """Remove snapshots that retention no longer keeps, inside the transaction that forgets them.

        What cannot be undone is only the removal itself: a crash before the commit leaves rows without snapshots, which the next
        call removes.
        """
