"""The parser of fanotify records: what it makes of good ones, and that bad ones are damage and nothing worse."""

import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from partitions import require

from comparer.errors import DamageError
from comparer.model import Ident, Name
from snapshotter.linux import fanotify as kernel
from snapshotter.linux import mount_api
from watcher.sources import fanotify_events as events
from watcher.sources.inotify_watches import parse_events

XFS, BTRFS = 0x81, 0x4D
ROOT = struct.pack("=Q", 257)
OTHER_ROOT = struct.pack("=Q", 258)


def xfs(ino):
    return XFS, struct.pack("=QI", ino, 7)


def btrfs(ino, root=ROOT):
    return BTRFS, struct.pack("=Q", ino) + root + struct.pack("=I", 7)


def info(info_type, handle, name=None):
    handle_type, data = handle
    body = struct.pack("=iiIi", 1, 2, len(data), handle_type) + data + (b"" if name is None else name + b"\0")
    body += bytes(-len(body) % 4)
    return struct.pack("=BxH", info_type, 4 + len(body)) + body


def event(mask, *infos, pid=1000, version=3, fd=-1):
    tail = b"".join(infos)
    return struct.pack("=IBxHQii", 24 + len(tail), version, 24, mask, fd, pid) + tail


def dirty(*records, ignored=(), root=b""):
    found = {}
    events.collect(b"".join(records), found, frozenset(ignored), root)
    return events.decode(found, root)


def test_creating():
    got = dirty(event(events.FAN_CREATE, info(2, xfs(1), b"a"), info(1, xfs(2))))
    assert got.names == {Name(Ident(1, 7), b"a")}
    assert got.objects == {Ident(1, 7), Ident(2, 7)}
    assert not got.written
    assert got.lost is None


def test_renaming():
    old, new = info(10, xfs(1), b"a"), info(12, xfs(3), b"b\xff")
    got = dirty(event(events.FAN_RENAME, old, new, info(1, xfs(2))))
    assert got.names == {Name(Ident(1, 7), b"a"), Name(Ident(3, 7), b"b\xff")}
    assert got.objects == {Ident(1, 7), Ident(2, 7), Ident(3, 7)}


@pytest.mark.parametrize("mask", [events.FAN_MODIFY, events.FAN_CLOSE_WRITE])
def test_writing_is_about_the_object_not_its_name(mask):
    got = dirty(event(mask, info(2, xfs(1), b"a"), info(1, xfs(2))))
    assert got.names == set()
    assert got.objects == got.written == {Ident(2, 7)}


def test_without_a_child_handle_the_name_is_all_there_is():
    got = dirty(event(events.FAN_MODIFY, info(2, xfs(1), b"a")))
    assert got.names == {Name(Ident(1, 7), b"a")}
    assert got.objects == set()


@pytest.mark.parametrize("record", [info(2, xfs(1), b"."), info(3, xfs(1)), info(1, xfs(1))])
def test_an_event_on_a_directory_itself(record):
    got = dirty(event(events.FAN_ATTRIB | events.FAN_ONDIR, record))
    assert got.objects == {Ident(1, 7)}
    assert got.names == set()


def test_equal_records_are_kept_once_with_all_their_masks():
    infos = info(2, xfs(1), b"a"), info(1, xfs(2))
    found = {}
    buffer = event(events.FAN_CREATE, *infos) + event(events.FAN_MODIFY, *infos) + event(events.FAN_MODIFY, *infos)
    assert events.collect(buffer, found, frozenset()) == (3, 0)
    assert list(found.values()) == [events.FAN_CREATE | events.FAN_MODIFY]


def test_records_of_ignored_processes_are_counted_and_left_out():
    found = {}
    buffer = event(2, info(1, xfs(1)), pid=5) + event(2, info(1, xfs(2)), pid=6)
    assert events.collect(buffer, found, frozenset({5})) == (2, 1)
    assert events.decode(found).objects == {Ident(2, 7)}


def test_an_overflow():
    assert dirty(event(events.FAN_Q_OVERFLOW, pid=0)).lost == events.OVERFLOW
    assert dirty(event(events.FAN_Q_OVERFLOW, pid=0), root=ROOT).lost == events.OVERFLOW
    assert dirty(event(events.FAN_Q_OVERFLOW, pid=0), event(2, info(1, btrfs(5))), root=ROOT).objects == {Ident(5, 7)}


def test_other_subvolumes_are_left_out_and_a_nested_one_is_no_object_of_ours():
    ours = event(events.FAN_CREATE, info(2, btrfs(256), b"nested"), info(1, btrfs(256, OTHER_ROOT)))
    theirs = event(events.FAN_CREATE, info(2, btrfs(256, OTHER_ROOT), b"x"), info(1, btrfs(257, OTHER_ROOT)))
    got = dirty(ours, theirs, root=ROOT)
    assert got.names == {Name(Ident(256, 7), b"nested")}
    assert got.objects == {Ident(256, 7)}
    found = {}
    events.collect(theirs, found, frozenset(), ROOT)
    assert found == {}


def test_an_unknown_handle_is_a_loss():
    got = dirty(event(2, info(1, (0x71, b"12345678"))), event(2, info(1, xfs(9))))
    assert "0x71" in got.lost
    assert got.objects == {Ident(9, 7)}
    assert "0x71" in dirty(event(2, info(1, (0x71, b"12345678"))), root=ROOT).lost


@pytest.mark.parametrize(
    "record",
    [
        event(2, info(1, xfs(1)))[:-1],
        event(2)[:-1],
        b"\0",
        event(2, version=4),
        event(2, fd=3),
        struct.pack("=IBxHQii", 0, 3, 24, 2, -1, 1),
    ],
)
def test_what_is_no_record_is_damage(record):
    with pytest.raises(DamageError):
        dirty(event(2, info(1, xfs(1))), record)


@pytest.mark.parametrize(
    "record",
    [
        b"\1",
        b"\1\0\0\0",
        b"\1\0\xff\0",
        info(1, xfs(1))[:-1],
        struct.pack("=BxHiiIi", 1, 20, 0, 0, 99, 1),
        info(2, xfs(1)),
        info(2, xfs(1), b""),
    ],
)
def test_a_damaged_info_record_is_a_loss(record):
    got = dirty(event(2, record), event(2, info(1, xfs(9))))
    assert got.lost is not None
    assert got.objects == {Ident(9, 7)}


def test_info_records_of_other_types_are_skipped():
    pidfd = struct.pack("=BxHi", 4, 8, -1)
    assert dirty(event(2, info(1, xfs(1)), pidfd)).objects == {Ident(1, 7)}


INO = st.integers(0, 2**64 - 1)
HANDLE = st.one_of(st.builds(xfs, INO), st.builds(btrfs, INO, st.sampled_from([ROOT, OTHER_ROOT])))
NAME = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name and b"/" not in name and name != b".")
RECORD = st.one_of(
    st.builds(
        event,
        st.integers(0, 2**64 - 1),
        st.builds(info, st.integers(0, 13), HANDLE, NAME),
        st.builds(info, st.just(1), HANDLE),
    ),
    st.builds(event, st.integers(0, 2**64 - 1), st.binary(max_size=100)),
)


@given(NAME)
def test_names_round_trip(name):
    assert dirty(event(events.FAN_CREATE, info(2, xfs(1), name))).names == {Name(Ident(1, 7), name)}


@given(st.binary(max_size=300), st.sampled_from([b"", ROOT]))
def test_garbage_is_damage_and_nothing_worse(buffer, root):
    try:
        dirty(buffer, root=root)
    except DamageError:
        return


@given(st.lists(RECORD, max_size=4), st.data(), st.sampled_from([b"", ROOT]))
def test_nearly_good_records_are_damage_and_nothing_worse(records, data, root):
    buffer = bytearray(b"".join(records))
    for _ in range(data.draw(st.integers(0, 4))):
        if buffer:
            buffer[data.draw(st.integers(0, len(buffer) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(buffer)))
    try:
        dirty(bytes(buffer[:end]), root=root)
    except DamageError:
        return


@given(st.binary(max_size=200))
def test_inotify_garbage_is_damage_and_nothing_worse(buffer):
    try:
        list(parse_events(buffer))
    except DamageError:
        return


def test_inotify_names_are_bytes():
    one = struct.pack("=iIII", 3, 0x100, 0, 16) + b"\xff\n".ljust(16, b"\0")
    two = struct.pack("=iIII", 4, 0x4, 0, 0)
    assert list(parse_events(one + two)) == [(3, 0x100, 0, b"\xff\n"), (4, 0x4, 0, b"")]


@pytest.mark.parametrize(
    ("header", "module", "prefix"),
    [("fanotify", events, "FAN_"), ("fanotify", kernel, "FAN_"), ("mount", mount_api, "")],
)
def test_numbers_are_those_of_the_kernel_headers(header, module, prefix):
    try:
        with open(f"/usr/include/linux/{header}.h", encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        require(condition=False, lacking=f"linux/{header}.h")
    numbers = {
        name: int(value, 0)
        for name, value in re.findall(r"^#define\s+(\w+)\s+(-?(?:0x)?[0-9a-fA-F]+)\b", text, re.MULTILINE)
    }
    numbers |= {name: int(value, 0) for name, value in re.findall(r"^\t(FSCONFIG_\w+)\s*=\s*(\d+)", text, re.MULTILINE)}
    ours = {
        name: value
        for name, value in vars(module).items()
        if name.isupper() and name.startswith(prefix) and name in numbers
    }
    assert len(ours) >= 9
    assert ours == {name: numbers[name] for name in ours}
