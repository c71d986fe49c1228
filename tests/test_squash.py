"""Squashing: several diffs as one. Chains of random states, and files as arrays of bytes; the replica knows only the one diff."""

import os
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_compare import operated
from trees import ROOT, Replica, Tree, attr

from comparer.compare import TEMPORARY, baseline, compare
from comparer.errors import DamageError
from comparer.extents import Extent, changed_ranges
from comparer.model import ByteRanges, Change, FileType, Ident, Name, Op, Quality, Range
from comparer.rangesets import combined, union, without
from comparer.squash import Squash, squash

UNHURRIED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
EXAMPLES = int(os.environ.get("SNAPFEED_EXAMPLES", "400"))


class Frugal(Tree):
    """A file system without generations: what no state holds any more is given to somebody else."""

    def create(self, parent, name, kind, gen=0):
        if not hasattr(self, "free"):
            self.free = []
        living = {i.ino for i in self.objects}  # `operated` gives numbers away, too
        self.free = [i for i in self.free if i.ino not in living]
        if not self.free:
            return super().create(parent, name, kind, gen)
        ident = self.free.pop()
        self.objects[ident] = attr(kind, mtime_ns=self.next_ino)
        self.entries[Name(parent, name)] = ident
        return ident


@st.composite
def chains(draw, make=Tree):
    """States S0 to Sk, k from 1 to 4."""
    tree = make()
    draw(operated(tree, 0, 20))
    states = [tree]
    for _ in range(draw(st.integers(1, 4))):
        tree = states[-1].copy()
        if make is Frugal:  # neither this state nor the one before it, so that no single diff sees a number used twice
            tree.free = [
                i for s in states[:-1] for i in s.objects if i not in tree.objects and i not in states[-1].objects
            ]
            tree.free = sorted(set(tree.free))
        draw(operated(tree, 0, 12))
        states.append(tree)
    return states


def diff(old, new, **options):
    return list(compare(old, new, set(old.objects) | set(new.objects), **options))


def concatenated(states):
    return [change for old, new in pairwise(states) for change in diff(old, new)]


def check(states, changes):
    """`changes` lead from the first state to the last; what they say of before and after is so; nothing is said twice."""
    first, last = states[0], states[-1]
    replica = Replica(first)
    for number, change in enumerate(changes):
        replica.apply(change)
        if change.op not in (Op.CREATE, Op.LINK):
            assert change.before == first.objects[change.ident]
        if not is_detour(change):
            deleted = any(c.ident == change.ident and c.op is Op.DELETE for c in changes[number:])
            assert change.after == (None if deleted else last.objects[change.ident])
    assert replica.state() == last.by_path()


@settings(max_examples=EXAMPLES, **UNHURRIED)
@given(chains())
def test_it_leads_from_the_first_state_to_the_last(states):
    changes = list(squash(concatenated(states)))
    check(states, changes)
    assert told_of(changes) == told_of(diff(states[0], states[-1]))


def told_of(changes):
    """Nothing more and nothing less, that is; the order among equals may differ, and with it who makes a detour, and under which
    of its names a hard link is spoken of."""
    return sorted((c.op, c.ident) for c in changes if not is_detour(c))


def is_detour(change):
    return change.op is Op.RENAME and TEMPORARY in change.path


@settings(max_examples=EXAMPLES // 2, **UNHURRIED)
@given(chains(make=Frugal))
def test_identities_that_are_used_again(states):
    check(states, list(squash(concatenated(states))))


@settings(max_examples=EXAMPLES // 2, **UNHURRIED)
@given(chains(), st.data())
def test_squashing_what_was_squashed_is_squashing_all(states, data):
    diffs = [diff(old, new) for old, new in pairwise(states)]
    start = data.draw(st.integers(0, len(diffs) - 1))
    end = data.draw(st.integers(start + 1, len(diffs)))
    inner = list(squash([c for d in diffs[start:end] for c in d]))
    check(states[start : end + 1], inner)
    pieces = [*[c for d in diffs[:start] for c in d], *inner, *[c for d in diffs[end:] for c in d]]
    check(states, list(squash(pieces)))


@settings(max_examples=EXAMPLES // 4, **UNHURRIED)
@given(chains())
def test_one_diff_stays_what_it_is(states):
    single = diff(states[0], states[1])
    again = list(squash(single))
    assert told_of(again) == told_of(single) == told_of(squash(again))
    check(states[:2], again)


@settings(max_examples=EXAMPLES // 4, **UNHURRIED)
@given(chains())
def test_after_a_baseline_comes_a_baseline(states):
    whole = list(squash([*baseline(states[0]), *concatenated(states)]))
    assert (whole[0].op, whole[0].path, whole[0].before) == (Op.MODIFY, b"", None)
    assert {c.op for c in whole[1:]} <= {Op.CREATE, Op.LINK}
    replica = Replica()
    replica.idents[b""] = whole[0].ident
    for change in whole:
        replica.apply(change)
    assert replica.state() == states[-1].by_path()
    # whatever was before a baseline does not count
    assert list(squash([*concatenated(states), *whole])) == whole


@settings(max_examples=EXAMPLES // 4, **UNHURRIED)
@given(chains())
def test_the_root_given_beforehand_makes_no_difference(states):
    changes = concatenated(states)
    check(states, list(squash(changes, ROOT)))


@settings(max_examples=EXAMPLES // 4, **UNHURRIED)
@given(chains())
def test_paths_in_the_end(states):
    whole = Squash()
    for change in concatenated(states):
        whole.add(change)
    found = states[-1].by_path()
    for ident in {c.ident for c in whole.changes()}:
        path = whole.path(ident)
        assert found[path][0] == ident if path is not None else ident not in states[-1].objects


# ---- by example


def grown(*steps):
    """The states that come of applying functions to a tree one after the other."""
    states = [Tree()]
    for step in steps:
        states.append(states[-1].copy())
        step(states[-1])
    return states


def ops(states):
    changes = list(squash(concatenated(states)))
    check(states, changes)
    return [(c.op, c.from_path, c.path) for c in changes]


def test_what_is_made_and_deleted_vanishes():
    def make(tree):
        tree.create(tree.create(ROOT, b"d", FileType.DIR), b"f", FileType.FILE)

    assert (
        ops(grown(make, lambda t: t.rename(Name(ROOT, b"d"), Name(ROOT, b"e")), lambda t: t.remove(Name(ROOT, b"e"))))
        == []
    )


def test_a_chain_of_renames_is_one_and_one_that_comes_back_is_none():
    def rename(old, new):
        return lambda tree: tree.rename(Name(ROOT, old), Name(ROOT, new))

    states = grown(
        lambda t: t.create(ROOT, b"a", FileType.FILE), rename(b"a", b"b"), rename(b"b", b"c"), rename(b"c", b"a")
    )
    assert ops(states[1:4]) == [(Op.RENAME, b"a", b"c")]
    assert ops(states[1:]) == []
    assert ops(states) == [(Op.CREATE, None, b"a")]


def test_two_swaps_are_none_and_an_attribute_that_comes_back_is_none():
    states = grown(
        lambda t: [t.create(ROOT, b"a", FileType.DIR), t.create(ROOT, b"b", FileType.FILE)],
        lambda t: t.exchange(Name(ROOT, b"a"), Name(ROOT, b"b")),
        lambda t: t.objects.update({ROOT: replace(t.objects[ROOT], mode=0o700)}),
        lambda t: t.exchange(Name(ROOT, b"a"), Name(ROOT, b"b")),
        lambda t: t.objects.update({ROOT: replace(t.objects[ROOT], mode=0o644)}),
    )
    assert ops(states[1:]) == []


def test_a_directory_known_only_from_paths_is_moved_later():
    def fill(tree):
        top = tree.create(ROOT, b"top", FileType.DIR)
        tree.create(tree.create(top, b"sub", FileType.DIR), b"f", FileType.FILE)

    def write(tree):
        (ident,) = [i for n, i in tree.entries.items() if n.name == b"f"]
        tree.objects[ident] = replace(tree.objects[ident], size=tree.objects[ident].size + 1)

    def move(tree):
        tree.rename(Name(ROOT, b"top"), Name(ROOT, b"moved"))

    states = grown(fill, write, move, write)
    assert ops(states[1:]) == [(Op.RENAME, b"top", b"moved"), (Op.MODIFY, None, b"moved/sub/f")]


def test_hard_links_that_no_change_tells_of():
    """The last of the known names goes, others stay; what else changed is told all the same."""
    file, old, new = Ident(5, 0), attr(nlink=3, size=1), attr(nlink=3, size=2)
    ranges = ByteRanges((Range(0, 2),))
    changes = [
        Change(Op.MODIFY, file, FileType.FILE, b"d/a", None, ("data", "size"), old, new, ranges),
        Change(
            Op.UNLINK, file, FileType.FILE, b"d/a", before=new, after=new
        ),  # a stale link count: no `modify` follows
    ]
    first, second = squash(changes)
    assert first == changes[0]
    assert second == Change(Op.UNLINK, file, FileType.FILE, b"d/a", before=old, after=new)


def test_a_directory_that_waits_gives_way_to_a_file_of_the_same_identity():
    """No generations: directory 7 goes after something has left it, and file 7 comes."""
    old = Tree()
    seven, kept = Ident(7, 0), Ident(8, 0)
    old.objects |= {seven: attr(FileType.DIR), kept: attr(FileType.FILE)}
    old.entries |= {Name(ROOT, b"d"): seven, Name(seven, b"k"): kept}
    middle = old.copy()
    middle.rename(Name(seven, b"k"), Name(ROOT, b"k"))
    middle.remove(Name(ROOT, b"d"))
    new = middle.copy()
    new.objects[seven] = attr(FileType.FILE)
    new.entries[Name(ROOT, b"a")] = seven
    assert ops([old, middle, new]) == [
        (Op.RENAME, b"d/k", b"k"),
        (Op.DELETE, None, b"d"),
        (Op.CREATE, None, b"a"),
    ]


def test_a_directory_that_waits_and_one_of_the_same_identity_are_one_and_the_same():
    """As for whoever compares the two states alone; else the new one's files would come before it, or it beside the old one."""
    seven, eight = Ident(7, 0), Ident(8, 0)
    old = Tree()
    old.objects |= {seven: attr(FileType.DIR), eight: attr(FileType.FILE)}
    old.entries |= {Name(ROOT, b"d"): seven, Name(seven, b"k"): eight}
    middle = old.copy()
    middle.rename(Name(seven, b"k"), Name(ROOT, b"k"))
    middle.remove(Name(ROOT, b"d"))
    new = middle.copy()
    new.objects |= {seven: attr(FileType.DIR), Ident(9, 0): attr(FileType.FILE)}
    new.entries |= {Name(ROOT, b"a"): seven, Name(seven, b"f"): Ident(9, 0)}
    assert (Op.RENAME, b"d", b"a") in ops([old, middle, new])


DIR = FileType.DIR


def made(ino, path, kind=FileType.FILE):
    return Change(Op.CREATE, Ident(ino, 0), kind, path, after=attr(kind))


def changed(op, ino, path, kind=FileType.FILE):
    return Change(op, Ident(ino, 0), kind, path, before=attr(kind), after=None if op is Op.DELETE else attr(kind))


NONSENSE = {
    "created twice": [made(2, b"a"), made(2, b"b")],
    "name taken": [made(2, b"a"), made(3, b"a")],
    "another object": [made(2, b"a"), changed(Op.MODIFY, 3, b"a")],
    "in a file": [made(2, b"a"), made(3, b"a/b")],
    "in a new directory": [made(2, b"a", DIR), changed(Op.DELETE, 3, b"a/b")],
    "not empty": [made(2, b"a/b"), changed(Op.DELETE, 3, b"a", DIR)],
    "deleted": [changed(Op.DELETE, 2, b"a"), changed(Op.MODIFY, 2, b"a")],
    "deleted, and there": [changed(Op.DELETE, 2, b"a"), changed(Op.MODIFY, 2, b"b")],
    "a directory elsewhere": [changed(Op.MODIFY, 2, b"a", DIR), changed(Op.MODIFY, 2, b"b", DIR)],
    "another root": [changed(Op.MODIFY, 2, b"", DIR), changed(Op.MODIFY, 3, b"", DIR)],
    "a name of nothing": [made(2, b"a/")],
    "no before": [Change(Op.DELETE, Ident(2, 0), FileType.FILE, b"a")],
    "no from": [changed(Op.RENAME, 2, b"a")],
}


@pytest.mark.parametrize("changes", NONSENSE.values(), ids=NONSENSE.keys())
def test_what_does_not_follow_is_an_error_not_a_guess(changes):
    with pytest.raises(DamageError, match="does not follow"):
        squash(changes)


# ---- content


class Contents:
    """Files as arrays: of each byte who wrote it and what; None is a hole."""

    def __init__(self):
        self.files: dict[Ident, list[tuple[int, int] | None]] = {}

    def copy(self):
        made = Contents()
        made.files = {ident: list(held) for ident, held in self.files.items()}
        return made

    def data(self, ident):
        return bytes(b[1] if b else 0 for b in self.files[ident])

    def extents(self, ident):
        return [Extent(at, 1, b[0]) for at, b in enumerate(self.files[ident]) if b]


SIZE = 24


@st.composite
def written_chains(draw):
    """States of a tree of two files and their contents; the files also swap names, so that some renames are detours."""
    tree, contents = Tree(), Contents()
    idents = [tree.create(ROOT, name, FileType.FILE) for name in (b"a", b"b")]
    stamps = iter(range(1, 10_000))
    contents.files = {i: [(next(stamps), 1)] * 0 for i in idents}
    states = []
    for _ in range(draw(st.integers(2, 5))):
        for _ in range(draw(st.integers(0, 4))):
            ident = draw(st.sampled_from(idents))
            held = contents.files[ident]
            start, end = sorted(draw(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))))
            kind = draw(st.sampled_from(["write", "write", "truncate", "punch", "swap"]))
            if kind == "write":
                held += [None] * (end - len(held))
                held[start:end] = [(next(stamps), draw(st.integers(1, 255))) for _ in range(start, end)]
            elif kind == "truncate":
                held[end:] = [None] * (end - len(held))
            elif kind == "punch":
                held[start:end] = [None] * len(held[start:end])
            else:
                tree.exchange(Name(ROOT, b"a"), Name(ROOT, b"b"))
            tree.objects[ident] = replace(tree.objects[ident], size=len(held), mtime_ns=next(stamps))
        states.append((tree, contents))
        tree, contents = tree.copy(), contents.copy()
    return states


def ranges_between(old, new):
    def ranges(ident):
        sizes = len(old.files[ident]), len(new.files[ident])
        return changed_ranges(old.extents(ident), sizes[0], new.extents(ident), sizes[1]) or None

    return ranges


def bytes_of(ranges):
    found = [at for offset, length in ranges for at in range(offset, offset + length)]
    assert found == sorted(set(found))
    return set(found)


@settings(max_examples=EXAMPLES, **UNHURRIED)
@given(written_chains())
def test_copying_the_changed_ranges_gives_the_file(states):
    changes = [
        change
        for (old, old_contents), (new, new_contents) in pairwise(states)
        for change in diff(old, new, ranges=ranges_between(old_contents, new_contents))
    ]
    first, last = states[0][1], states[-1][1]
    told = {ident: ByteRanges() for ident in first.files}
    squashed = list(squash(changes))
    check([states[0][0], states[-1][0]], squashed)
    for change in squashed:
        if change.ranges is not None:
            told[change.ident] = change.ranges
            assert ("data" in change.changed) == bool(change.ranges)
    for ident, ranges in told.items():
        assert ranges.quality is Quality.EXACT
        size = len(last.files[ident])
        copy = bytearray(first.data(ident)[:size].ljust(size, b"\0"))
        written, cleared = bytes_of(ranges.written), bytes_of(ranges.cleared)
        assert not written & cleared
        for at in cleared:
            if at < size:
                copy[at] = 0
        for at in written:
            copy[at] = last.data(ident)[at]
        assert copy == last.data(ident)
        direct = ranges_between(first, last)(ident) or ByteRanges()
        assert ranges.written == direct.written
        assert bytes_of(direct.cleared) <= cleared
        assert max(cleared, default=-1) < max(size, len(first.files[ident]))


def modify(old, new, ranges):
    return Change(
        Op.MODIFY,
        Ident(2, 0),
        FileType.FILE,
        b"f",
        None,
        ("data",),
        attr(size=old),
        attr(size=new, mtime_ns=new),
        ranges,
    )


def test_the_worst_quality_counts():
    exact, vague = ByteRanges((Range(0, 4),)), ByteRanges((Range(2, 4),), (), Quality.SUPERSET)
    (change,) = squash([modify(9, 9, exact), modify(9, 9, vague)])
    assert change.ranges == ByteRanges((Range(0, 6),), (), Quality.SUPERSET)
    (change,) = squash([modify(9, 9, exact), modify(9, 9, ByteRanges(quality=Quality.UNKNOWN)), modify(9, 9, vague)])
    assert change.ranges == ByteRanges(quality=Quality.UNKNOWN)


def test_a_size_that_changed_without_ranges_makes_them_unknown():
    exact = ByteRanges((Range(0, 4),))
    for chain in ([modify(4, 4, exact), modify(4, 8, None)], [modify(4, 8, None), modify(8, 8, exact)]):
        (change,) = squash(chain)
        assert change.ranges == ByteRanges(quality=Quality.UNKNOWN)
    (change,) = squash([modify(4, 6, None), modify(6, 8, None)])
    assert change.ranges is None  # as if nobody had ever asked


def test_truncation_cuts_what_was_written_though_the_ranges_do_not_say_so():
    first, second = ByteRanges((Range(0, 2), Range(4, 6))), ByteRanges((Range(1, 1),))
    assert combined(first, second, (3, 10, 6)) == ByteRanges((Range(0, 2), Range(4, 2)))
    assert combined(first, second, (8, 10, 6)) == ByteRanges((Range(0, 2), Range(4, 2)), (Range(6, 2),))
    assert combined(ByteRanges(), ByteRanges(), (4, 4, 9)) == ByteRanges(cleared=(Range(4, 5),))
    assert combined(ByteRanges(cleared=(Range(2, 8),)), ByteRanges((Range(4, 2),)), (10, 2, 10)) == ByteRanges(
        (Range(4, 2),), (Range(2, 2), Range(6, 4))
    )


SETS = st.sets(st.integers(0, 30))


@given(SETS, SETS)
def test_sets_of_bytes(one, other):
    ranges = [union(Range(at, 1) for at in found) for found in (one, other)]
    assert bytes_of(union(*ranges)) == one | other
    assert bytes_of(without(*ranges)) == one - other
