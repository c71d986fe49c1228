"""Sets of bytes as sorted, disjoint ranges, and two successive changes of a file's content as one. All in linear time."""

from collections.abc import Iterable, Sequence

from .model import ByteRanges, Quality, Range

_ORDER = (Quality.EXACT, Quality.SUPERSET, Quality.UNKNOWN)


def union(*sets: Iterable[Range]) -> tuple[Range, ...]:
    """The bytes in any of the sets; ranges that touch become one. The arguments need not be sorted."""
    found: list[Range] = []
    for offset, length in sorted(piece for ranges in sets for piece in ranges):
        if length <= 0:
            continue
        if found and offset <= found[-1].offset + found[-1].length:
            end = max(offset + length, found[-1].offset + found[-1].length)
            found[-1] = Range(found[-1].offset, end - found[-1].offset)
        else:
            found.append(Range(offset, length))
    return tuple(found)


def without(ranges: Sequence[Range], holes: Sequence[Range]) -> tuple[Range, ...]:
    """The bytes of `ranges` that are not in `holes`; both sorted and disjoint."""
    left: list[Range] = []
    at = 0
    for offset, length in ranges:
        start, end = offset, offset + length
        while at < len(holes) and holes[at].offset + holes[at].length <= start:
            at += 1
        look = at
        while look < len(holes) and holes[look].offset < end:
            if holes[look].offset > start:
                left.append(Range(start, holes[look].offset - start))
            start = holes[look].offset + holes[look].length
            look += 1
        if start < end:
            left.append(Range(start, end - start))
    return tuple(left)


def up_to(ranges: Sequence[Range], size: int) -> tuple[Range, ...]:
    """The bytes of sorted, disjoint `ranges` below `size`."""
    return tuple(Range(r.offset, min(r.length, size - r.offset)) for r in ranges if r.offset < size)


def between(start: int, end: int) -> tuple[Range, ...]:
    """The bytes from `start` to `end`, none if `end` is not above it."""
    return (Range(start, end - start),) if start < end else ()


def combined(first: ByteRanges, second: ByteRanges, sizes: tuple[int, int, int]) -> ByteRanges:
    """What changed in a file from state 0 to 2, given what did from 0 to 1 and from 1 to 2; `sizes` are those of the three.

    Written is what was written in either and not cleared or cut off later; cleared what reads as zeros in state 2, or was cut
    off of state 0, and is not written later. The quality is the worse one; `unknown` has no ranges.
    """
    quality = max(first.quality, second.quality, key=_ORDER.index)
    if quality is Quality.UNKNOWN:
        return ByteRanges(quality=quality)
    size0, size1, size2 = sizes
    cut = between(size2, max(size0, size1))
    grown = without(between(size1, size2), second.written)
    clear = union(second.cleared, cut, grown)
    written = union(up_to(without(first.written, clear), size2), second.written)
    cleared = up_to(union(first.cleared, clear), max(size0, size2))
    return ByteRanges(written, without(cleared, written), quality)
