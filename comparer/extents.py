"""Extent maps in, changed byte ranges out. Two files that share a block have the same bytes there, unread.

The maps are those of two clones that both still exist: a block shared by them cannot have been written since (copy on write),
so the parts whose physical place differs are exactly what changed. Moves (defragmentation, dedupe) give more, never less.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .model import ByteRanges, Quality, Range


class Extent(NamedTuple):
    """A run of a file: `logical` and `length` in bytes; `physical` None if its place says nothing (inline, encoded,
    delayed, unknown); `unwritten` reads as zeros. Holes have no extent.
    """

    logical: int
    length: int
    physical: int | None
    unwritten: bool = False


def changed_ranges(old: Iterable[Extent], old_size: int, new: Iterable[Extent], new_size: int) -> ByteRanges:
    """What differs between two extent maps, each sorted by `logical`.

    Written where the new map has data in another place; cleared where it has none (hole, unwritten, past the end) and the old one
    had some. Quality is `unknown` if a place that says nothing takes part, `superset` never (the caller knows what moves blocks).
    """
    written: list[Range] = []
    cleared: list[Range] = []
    unknown = False
    for start, end, was, now in _overlay(old, new, max(old_size, new_size)):
        had = was is not None and not was.unwritten and start < old_size
        has = now is not None and not now.unwritten and start < new_size
        if has and had:
            assert was is not None and now is not None  # noqa: S101, PT018 - had and has say so
            if was.physical is None or now.physical is None:
                unknown = True
            elif was.physical + (start - was.logical) != now.physical + (start - now.logical):
                _append(written, start, min(end, new_size))
        elif has:
            _append(written, start, min(end, new_size))
        elif had:
            _append(cleared, start, min(end, old_size))
    if new_size < old_size:
        _append(cleared, new_size, old_size)
        cleared = _merge(cleared)
    elif new_size > old_size:
        # new space without data: its bytes are zeros that were not there before
        cleared = _merge([*cleared, *_subtract([Range(old_size, new_size - old_size)], written)])
    if unknown:
        return ByteRanges(quality=Quality.UNKNOWN)
    return ByteRanges(tuple(written), tuple(cleared))


def _append(ranges: list[Range], start: int, end: int) -> None:
    if end <= start:
        return
    if ranges and ranges[-1].offset + ranges[-1].length == start:
        ranges[-1] = Range(ranges[-1].offset, end - ranges[-1].offset)
    else:
        ranges.append(Range(start, end - start))


def _merge(ranges: list[Range]) -> list[Range]:
    merged: list[Range] = []
    for start, length in sorted(ranges):
        if merged and start <= merged[-1].offset + merged[-1].length:
            end = max(start + length, merged[-1].offset + merged[-1].length)
            merged[-1] = Range(merged[-1].offset, end - merged[-1].offset)
        else:
            merged.append(Range(start, length))
    return merged


def _subtract(ranges: list[Range], holes: list[Range]) -> list[Range]:
    """`ranges` without what `holes` cover; both sorted and disjoint."""
    left: list[Range] = []
    for offset, length in ranges:
        start, end = offset, offset + length
        for hole, size in holes:
            if hole + size <= start or hole >= end:
                continue
            _append(left, start, hole)
            start = hole + size
        _append(left, start, end)
    return left


def _overlay(
    old: Iterable[Extent], new: Iterable[Extent], limit: int
) -> Iterator[tuple[int, int, Extent | None, Extent | None]]:
    """Cut both maps at each other's borders: (start, end, old extent or None, new extent or None), holes in both left out."""
    olds, news = iter(old), iter(new)
    was, now = next(olds, None), next(news, None)
    at = 0
    while at < limit and (was is not None or now is not None):
        while was is not None and was.logical + was.length <= at:
            was = next(olds, None)
        while now is not None and now.logical + now.length <= at:
            now = next(news, None)
        borders = [limit]
        borders += [e.logical if e.logical > at else e.logical + e.length for e in (was, now) if e is not None]
        end = min(borders)
        inside_old = was if was is not None and was.logical <= at else None
        inside_new = now if now is not None and now.logical <= at else None
        if inside_old is not None or inside_new is not None:
            yield at, end, inside_old, inside_new
        at = end
