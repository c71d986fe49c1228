"""Extent maps to byte ranges, against a model that holds the bytes."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from comparer.extents import Extent, changed_ranges
from comparer.model import Quality

BLOCK = 4


@st.composite
def files(draw):
    """(extents, size, content): each block is a hole, unwritten, or data at some physical place; equal places hold equal data."""
    blocks = draw(st.lists(st.sampled_from(["hole", "unwritten", *range(6)]), max_size=12))
    size = draw(st.integers(max(0, (len(blocks) - 3) * BLOCK), len(blocks) * BLOCK + 6))
    extents, content = [], bytearray(size)
    for number, block in enumerate(blocks):
        if block == "hole":
            continue
        place = 1000 + (number if block == "unwritten" else (number + 12 * block)) * BLOCK
        extents.append(Extent(number * BLOCK, BLOCK, place, block == "unwritten"))
        if block != "unwritten":
            for at in range(number * BLOCK, min(size, (number + 1) * BLOCK)):
                content[at] = 1 + block
    return extents, size, bytes(content)


@settings(max_examples=1500, deadline=None)
@given(files(), files())
def test_a_consumer_that_copies_only_the_ranges_has_the_new_file(old, new):
    old_places = {(e.logical, e.physical) for e in old[0] if not e.unwritten}
    content = bytearray(new[2])
    for extent in new[0]:
        if (
            extent.logical,
            extent.physical,
        ) in old_places:  # a shared block was not written: behind the old end are zeros
            for at in range(max(old[1], extent.logical), min(new[1], extent.logical + BLOCK)):
                content[at] = 0
    new = (new[0], new[1], bytes(content))
    found = changed_ranges(old[0], old[1], new[0], new[1])
    assert found.quality is Quality.EXACT
    copy = bytearray(old[2].ljust(new[1], b"\xee"))  # what is beyond the old end is not known to be zero
    for offset, length in found.cleared:
        assert length > 0
        copy[offset : offset + length] = bytes(max(0, min(length, len(copy) - offset)))
    for offset, length in found.written:
        assert length > 0
        assert offset + length <= new[1]
        copy[offset : offset + length] = new[2][offset : offset + length]
    assert bytes(copy[: new[1]]) == new[2]
    for ranges in (found.written, found.cleared):
        assert all(a.offset + a.length < b.offset for a, b in itertools.pairwise(ranges)), ranges


@given(files())
def test_equal_maps_give_nothing(file):
    assert not changed_ranges(file[0], file[1], file[0], file[1])


def test_three_rewritten_blocks_are_exactly_those():
    old = [Extent(0, 1 << 30, 1 << 40)]
    new, at = [], 0
    for number, offset in enumerate((4096, 8 << 20, 1 << 29)):
        new += [Extent(at, offset - at, (1 << 40) + at), Extent(offset, 4096, (1 << 41) + number * 4096)]
        at = offset + 4096
    new.append(Extent(at, (1 << 30) - at, (1 << 40) + at))
    found = changed_ranges(old, 1 << 30, new, 1 << 30)
    assert found.written == ((4096, 4096), (8 << 20, 4096), (1 << 29, 4096))
    assert not found.cleared


def test_growth_behind_a_write_is_not_lost():
    old = [Extent(0, 8192, 10 << 20)]
    new = [Extent(0, 4096, 10 << 20), Extent(4096, 4096, 20 << 20)]
    found = changed_ranges(old, 5000, new, 20000)
    assert found.cleared == ((8192, 11808),)


def test_a_place_that_says_nothing_is_unknown():
    found = changed_ranges([Extent(0, 4096, None)], 100, [Extent(0, 4096, None)], 100)
    assert found.quality is Quality.UNKNOWN
