"""Changed byte ranges of a file between two btrfs snapshots: both extent maps compared within the ranges a send stream names.

The stream alone does not tell written data from a hole, and names a whole extent where part of it is new. Data is never read.
"""

import struct
from collections.abc import Callable, Iterable, Iterator

from comparer.extents import Extent, changed_ranges
from comparer.model import Attr, ByteRanges, FileType, Ident, Quality, Range

from .btrfs_view import SubvolumeView

# generation ram_bytes compression encryption other_encoding type | disk_bytenr disk_num_bytes offset num_bytes
_EXTENT_HEAD = struct.Struct("<QQBBHB")
_EXTENT_REST = struct.Struct("<QQQQ")
_INLINE, _REG, _PREALLOC = range(3)
# An extent item is at most BTRFS_MAX_EXTENT_SIZE (128 MiB) long, a preallocated one 256 MiB (btrfs_prealloc_file_range).
_LONGEST = 1 << 30
_STEP = 1 << 17
_SCAN = 256  # so many ranges in one file: read all its extent items instead of looking for each range's


class FileRanges:
    """The changed bytes of a file that both snapshots hold; a `Capture.ranges`.

    `named` are the ranges to look at per file, None: all of every file. Written inline and compressed extents give `superset`,
    all else is exact to the block (what a defragmentation or deduplication moves counts as written). Raises OSError as the
    views do.
    """

    def __init__(
        self, old: SubvolumeView, new: SubvolumeView, named: Callable[[Ident], Iterable[Range]] | None = None
    ) -> None:
        self._old = old
        self._new = new
        self._named = named

    def __call__(self, ident: Ident) -> ByteRanges | None:
        before, after = self._old.attr(ident), self._new.attr(ident)
        if before is None or after is None or after.type is not FileType.FILE:
            return None
        windows = self._windows(ident, before, after)
        if not windows and before.size == after.size:
            return None
        old = _Extents(self._old, ident.ino, windows)
        new = _Extents(self._new, ident.ino, windows)
        found = changed_ranges(old, before.size, new, after.size)
        cleared = found.cleared
        if after.size > before.size:
            cleared = _with_growth(cleared, found.written, before.size, after.size)
        vague = _overlap(found.written, [*old.inline, *new.inline, *new.compressed])
        quality = Quality.SUPERSET if vague else Quality.EXACT
        return ByteRanges(found.written, cleared, quality) or None

    def _windows(self, ident: Ident, before: Attr, after: Attr) -> list[Range]:
        end = max(before.size, after.size)
        if self._named is None:
            return [Range(0, end)] if end else []
        windows = _merged(self._named(ident))
        if len(windows) > _SCAN:
            return [Range(0, end)]
        return windows


class _Extents:
    """The extents of one file clipped to windows, as `changed_ranges` takes them.

    `inline` and `compressed`, once iterated: where there are such extents. The place of an extent is its disk extent and the
    offset into it, so that two places are equal only if they are the same bytes, compressed or not; that of inline data is the
    transaction that wrote it.
    """

    def __init__(self, view: SubvolumeView, ino: int, windows: list[Range]) -> None:
        self.inline: list[Range] = []
        self.compressed: list[Range] = []
        self._view = view
        self._ino = ino
        self._windows = windows

    def __iter__(self) -> Iterator[Extent]:
        for start, length in self._windows:
            end = start + length
            for extent in self._from(start, end):
                first = max(extent.logical, start)
                last = min(extent.logical + extent.length, end)
                if first < last:
                    assert extent.physical is not None  # noqa: S101 - _extent() always gives one
                    yield Extent(first, last - first, extent.physical + first - extent.logical, extent.unwritten)

    def _from(self, start: int, end: int) -> Iterator[Extent]:
        """The extents that may reach into start..end: those that begin there, and the last one that begins before."""
        step, upper = _STEP, start
        while upper and start - upper < _LONGEST:
            lower = max(0, start - step)
            previous = None
            for item in self._view.extent_items(self._ino, lower, upper):
                previous = item
            if previous is not None:
                yield from self._extent(previous.offset, previous.data)
                break
            upper, step = lower, step * 16
        for item in self._view.extent_items(self._ino, start, end):
            yield from self._extent(item.offset, item.data)

    def _extent(self, logical: int, data: bytes) -> Iterator[Extent]:
        generation, ram_bytes, compression, encryption, other, kind = _EXTENT_HEAD.unpack_from(data)
        if kind == _INLINE:
            self.inline.append(Range(logical, ram_bytes))
            yield Extent(logical, ram_bytes, -1 - generation << 128)
            return
        disk_bytenr, _, offset, num_bytes = _EXTENT_REST.unpack_from(data, _EXTENT_HEAD.size)
        if not disk_bytenr:
            return  # a hole with an item of its own (file systems without NO_HOLES)
        if compression or encryption or other:
            self.compressed.append(Range(logical, num_bytes))
        yield Extent(logical, num_bytes, (disk_bytenr << 64) + offset, kind == _PREALLOC)


def _overlap(ranges: Iterable[Range], others: Iterable[Range]) -> bool:
    """Whether any two share a byte."""
    marks = sorted(
        [(r.offset, r.offset + r.length, 0) for r in ranges] + [(r.offset, r.offset + r.length, 1) for r in others]
    )
    reach = [-1, -1]
    for start, end, side in marks:
        if reach[1 - side] > start:
            return True
        reach[side] = max(reach[side], end)
    return False


def _merged(ranges: Iterable[Range]) -> list[Range]:
    merged: list[Range] = []
    for offset, length in sorted(ranges):
        if merged and offset <= merged[-1].offset + merged[-1].length:
            end = max(offset + length, merged[-1].offset + merged[-1].length)
            merged[-1] = Range(merged[-1].offset, end - merged[-1].offset)
        elif length:
            merged.append(Range(offset, length))
    return merged


def _with_growth(cleared: tuple[Range, ...], written: tuple[Range, ...], old_size: int, size: int) -> tuple[Range, ...]:
    """`cleared` and what lies between the old and the new end without having been written: zeros that were not there."""
    grown = []
    at = old_size
    for offset, length in written:
        if offset > at:
            grown.append(Range(at, offset - at))
        at = max(at, offset + length)
    grown.append(Range(at, max(0, size - at)))
    return tuple(_merged([*cleared, *grown]))
