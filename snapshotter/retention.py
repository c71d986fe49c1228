"""What is kept: snapshots for retention and for consumers that lag, the journal by age and by bytes. Plain functions.

The bounds are for everybody together. Nothing here drops a diff that was not published; what exceeds the bounds and is not
published yet can only be made smaller, by squashing (`to_squash` says which).
"""

from dataclasses import dataclass

from .systemfile import JournalRow, SystemFile

_G = 1_000_000_000
_SOME = 512  # diffs looked at at a time
MOST_CONSUMERS = 64  # of a partition: its state, which names them, is one message
BATCH = 50_000  # changes squashed at a time, which is what bounds the memory it takes


@dataclass(frozen=True, slots=True)
class Limits:
    """`age` (seconds) and `bytes` (as stored) bound the journal.

    Of the snapshots that a consumer has not acknowledged yet, the newest `hold_snapshots` are kept beside those that retention
    keeps, if it was heard of within `hold_age` seconds.
    """

    age: float = 7 * 86400.0
    bytes: int = 256 << 20
    hold_snapshots: int = 256
    hold_age: float = 7 * 86400.0


def needed(file: SystemFile, limits: Limits, now_ns: int) -> int | None:
    """The oldest snapshot that a consumer holds; None if none is held."""
    since = now_ns - limits.hold_age * _G
    wanted = [row.seq for row in file.consumers() if row.time_ns >= since]
    if not wanted:
        return None
    kept = [row.seq for row in file.snapshots()]
    held = kept[-limits.hold_snapshots :] if limits.hold_snapshots else []
    return max(min(wanted), held[0]) if held else None


def prune(file: SystemFile, limits: Limits, now_ns: int) -> None:
    """Drop published diffs that are too old, or too many bytes; those between kept snapshots stay. In a transaction."""
    kept = file.snapshots()
    bound = min(kept[0].seq if kept else 0, file.published())
    total, last, old = file.journal_bytes(), 0, now_ns - limits.age * _G
    while rows := file.journal(last, _SOME):
        for row in rows:
            if row.seq > bound or (total <= limits.bytes and row.time_ns >= old):
                rows = []
                break
            last, total = row.seq, total - row.bytes
        if not rows:
            break
    if last:
        file.drop_diffs(last)


def to_squash(file: SystemFile, limits: Limits, now_ns: int, keep: int) -> tuple[int, int] | None:
    """The first and the last number of diffs that are to become one, because the unpublished exceed the bounds; None if none.

    Only diffs that nobody can have seen, never those between the newest `keep` snapshots, and none across what a consumer has.
    Some 50,000 changes at a time, and only where it saves something, so that no diff is squashed again and again: call it until
    it is None. Far above the bound in bytes larger ones are squashed, too, whatever memory that takes.
    """
    total, old = file.journal_bytes(), now_ns - limits.age * _G
    seen = max(file.offered(), file.published())
    oldest = file.journal(seen, 1)
    if not oldest or (total <= limits.bytes and oldest[0].time_ns >= old):
        return None
    snapshots = [row.seq for row in file.snapshots()]
    newest = snapshots[-keep] if len(snapshots) >= keep else 0
    rows = file.journal(seen, 64 * _SOME)
    free = [row for row in rows if row.seq <= newest and (total > limits.bytes or row.time_ns < old)]
    stops = {row.seq for row in file.consumers()}
    found = _run(free, stops, BATCH)
    if found is None and total > limits.bytes * 3 // 2:
        found = _run(free, stops, 20 * BATCH)
    return found


def _run(free: list[JournalRow], stops: set[int], most: int) -> tuple[int, int] | None:
    """The first run of diffs with at most `most` changes together, of which none is more than half."""
    for first in range(len(free) - 1):
        whole = largest = 0
        for last in range(first, len(free)):
            changes = free[last].changes + 1
            if whole + changes > most:
                last -= 1  # noqa: PLW2901
                break
            whole, largest = whole + changes, max(largest, changes)
            if free[last].seq in stops:
                break
        if last > first and 2 * largest <= whole:
            return free[first].seq, free[last].seq
    return None
