"""The daemon's part of an export: what a diff does not name, out of the snapshot's metadata; no tree is walked."""

from typing import Any

from feed.around import Around
from snapshotter.database import translated
from snapshotter.held import held
from snapshotter.visit import Visit

AT_ONCE = 5_000  # entries of one step


def step(visit: Visit, seq: int, around: Around) -> list[dict[str, Any]] | None:
    """The next entries around the diff up to snapshot `seq`, None at the end; runs in the partition's thread.

    On btrfs they are those of snapshot `seq`. Elsewhere the table knows the newest snapshot only: if one was taken
    meanwhile, its entries are told, and the next export tells the rest. Raises OSError, DamageError.
    """
    with translated(visit.file.path), held(visit, seq) as state:
        return around.step(state.view, AT_ONCE)
