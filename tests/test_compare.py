"""The comparison: random trees and random operations; a replica that knows only the changes must become the new state."""

import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trees import ROOT, Replica, Tree

from comparer.compare import baseline, compare
from comparer.model import FileType, Ident, Name, Op

NAMES = [b"a", b"b", b"c", b"d"]
EXAMPLES = int(os.environ.get("SNAPFEED_EXAMPLES", "600"))
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
KINDS = ["file", "dir", "symlink", "link", "remove", "rename", "rename", "exchange", "attr", "reuse"]


@st.composite
def operated(draw, tree: Tree, least: int, most: int):
    """Apply random operations to `tree`; returns every object that was ever involved."""
    for _ in range(draw(st.integers(least, most))):
        files = [n for n, i in tree.entries.items() if tree.objects[i].type is not FileType.DIR]
        names = sorted(tree.entries)
        kind = draw(
            st.sampled_from(
                ["file", "dir", "symlink", "link", "remove", "rename", "rename", "exchange", "attr", "reuse"]
            )
        )
        parent = draw(st.sampled_from(sorted(tree.dirs())))
        target = Name(parent, draw(st.sampled_from(NAMES)))
        if kind in ("file", "dir", "symlink"):
            if target not in tree.entries:
                tree.create(*target, FileType(kind))
        elif kind == "link" and files and target not in tree.entries:
            tree.link(tree.entries[draw(st.sampled_from(sorted(files)))], target)
        elif kind == "remove" and names:
            tree.remove(draw(st.sampled_from(names)))
        elif kind == "rename" and names:
            source = draw(st.sampled_from(names))
            moved = tree.entries[source]
            occupant = tree.entries.get(target)
            into_itself = tree.objects[moved].type is FileType.DIR and target.parent in tree.below(moved)
            above = occupant is not None and source.parent in tree.below(occupant)
            mixed = occupant is not None and tree.objects[moved].type != tree.objects[occupant].type
            if not into_itself and not above and not mixed:
                tree.rename(source, target)
        elif kind == "exchange" and names:
            one, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
            first, second = tree.entries[one], tree.entries[other]
            if one.parent not in tree.below(second) and other.parent not in tree.below(first):
                tree.exchange(one, other)
        elif kind == "attr":
            ident = draw(st.sampled_from(sorted(tree.objects)))
            tree.objects[ident] = replace(tree.objects[ident], mode=draw(st.integers(0, 0o777)))
        elif kind == "reuse" and files:
            name = draw(st.sampled_from(sorted(files)))
            old = tree.entries[name]
            tree.remove(name)
            if old not in tree.objects:
                new = Ident(old.ino, old.gen + 1)
                tree.objects[new] = replace(
                    tree.objects[ROOT], type=draw(st.sampled_from([FileType.FILE, FileType.SYMLINK]))
                )
                tree.entries[name] = new


@st.composite
def pairs(draw):
    old = Tree()
    draw(operated(old, 0, 25))
    new = old.copy()
    draw(operated(new, 1, 20))
    return old, new


def replay(old: Tree, new: Tree):
    replica = Replica(old)
    changes = list(compare(old, new, set(old.objects) | set(new.objects)))
    for change in changes:
        replica.apply(change)
    assert replica.state() == new.by_path()
    return changes


@settings(
    max_examples=int(os.environ.get("SNAPFEED_EXAMPLES", "600")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(pairs())
def test_replaying_the_changes_gives_the_new_state(pair):
    old, new = pair
    changes = replay(old, new)
    for change in changes:
        if change.op not in (Op.CREATE, Op.LINK):
            assert change.before is not None
    # nothing is said of what did not change, and of each survivor its attributes are said once
    told = [c.ident for c in changes if c.op in (Op.MODIFY, Op.CREATE)]
    assert len(told) == len(set(told))


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
@given(pairs())
def test_a_baseline_into_nothing_gives_the_state(pair):
    _, tree = pair
    replica = Replica()
    for change in baseline(tree):
        if change.path == b"":
            replica.idents[b""] = change.ident
        replica.apply(change)
        replica.attrs[change.ident] = change.after
    assert replica.state() == tree.by_path()


def test_a_baseline_creates_once_what_was_seen_at_both_ends_of_a_rename():
    tree = Tree()
    ident = tree.create(ROOT, b"from", FileType.SYMLINK)
    tree.entries[Name(ROOT, b"to")] = ident  # and its link count is one
    found = [(c.op, c.path, c.from_path) for c in baseline(tree, lambda: [ident])][1:]
    assert found == [(Op.CREATE, b"from", None), (Op.LINK, b"to", b"from")]


def test_equal_states_give_nothing():
    tree = Tree()
    tree.create(ROOT, b"a", FileType.FILE)
    assert replay(tree, tree.copy()) == []


def test_a_moved_directory_is_one_record():
    old = Tree()
    top = old.create(ROOT, b"top", FileType.DIR)
    for number in range(50):
        old.create(top, b"%d" % number, FileType.FILE)
    new = old.copy()
    new.rename(Name(ROOT, b"top"), Name(ROOT, b"moved"))
    (only,) = replay(old, new)
    assert (only.op, only.from_path, only.path) == (Op.RENAME, b"top", b"moved")


def test_a_swap_goes_through_a_temporary_name():
    old = Tree()
    one, other = old.create(ROOT, b"a", FileType.DIR), old.create(ROOT, b"b", FileType.FILE)
    old.create(one, b"x", FileType.FILE)
    new = old.copy()
    new.exchange(Name(ROOT, b"a"), Name(ROOT, b"b"))
    changes = replay(old, new)
    assert [c.op for c in changes] == [Op.RENAME] * 3
    assert {c.ident for c in changes} == {one, other}


def test_a_name_without_its_object_is_an_error_not_a_guess():
    tree = Tree()
    tree.entries[Name(ROOT, b"ghost")] = Ident(99, 0)
    with pytest.raises(ValueError, match="ghost"):
        list(baseline(tree))
