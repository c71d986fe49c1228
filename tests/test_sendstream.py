"""The parser of send streams and the replay of their paths, without a disk."""

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comparer.crc32c import crc32c
from comparer.errors import DamageError
from comparer.model import Ident, Range
from comparer.sendreplay import Replay
from comparer.sendstream import Attribute, Cmd, Command, Parser

ROOT = Ident(256, 3)
A = Attribute


def attribute(kind, value):
    data = struct.pack("<Q", value) if isinstance(value, int) else value
    return struct.pack("<HH", kind, len(data)) + data


def command(kind, *attributes):
    payload = b"".join(a if isinstance(a, bytes) else attribute(*a) for a in attributes)
    head = struct.pack("<IHI", len(payload), kind, 0)
    return head[:6] + struct.pack("<I", crc32c(crc32c(0, head), payload)) + payload


def stream(*commands, version=1):
    return b"btrfs-stream\0" + struct.pack("<I", version) + b"".join(commands) + command(Cmd.END)


SAMPLE = [
    command(Cmd.SNAPSHOT, (A.PATH, b"2"), (A.UUID, bytes(16)), (A.CTRANSID, 9), (A.CLONE_UUID, bytes(16)), (A.CLONE_CTRANSID, 7)),
    command(Cmd.MKDIR, (A.PATH, b"o277-8-0"), (A.INO, 277)),
    command(Cmd.RENAME, (A.PATH, b"o277-8-0"), (A.PATH_TO, b"new")),
    command(Cmd.RENAME, (A.PATH, b"d"), (A.PATH_TO, b"new/d")),
    command(Cmd.UPDATE_EXTENT, (A.PATH, b"new/d/f"), (A.FILE_OFFSET, 4096), (A.SIZE, 8192)),
    command(Cmd.TRUNCATE, (A.PATH, b"new/d/f"), (A.SIZE, 12288)),
    command(Cmd.SET_XATTR, (A.PATH, b"new/d/f"), (A.XATTR_NAME, b"user.k"), (A.XATTR_DATA, b"")),
    command(Cmd.UTIMES, (A.PATH, b""), (A.ATIME, bytes(12)), (A.MTIME, bytes(12)), (A.CTIME, bytes(12))),
]  # fmt: skip


def parse(data, size=1 << 16, **options):
    parser = Parser(**options)
    found = [c for at in range(0, len(data), size) for c in parser.feed(data[at : at + size])]
    parser.close()
    return found


def test_crc32c():
    # RFC 3720 B.4 inverts before and after; the register between is the same
    assert crc32c(0xFFFFFFFF, b"123456789") ^ 0xFFFFFFFF == 0xE3069283


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_commands_come_out_whatever_the_pieces(size):
    found = parse(stream(*SAMPLE), size, check_crc=True)
    assert [c.kind for c in found] == [
        Cmd.SNAPSHOT, Cmd.MKDIR, Cmd.RENAME, Cmd.RENAME, Cmd.UPDATE_EXTENT, Cmd.TRUNCATE, Cmd.SET_XATTR, Cmd.UTIMES, Cmd.END,
    ]  # fmt: skip
    assert found[1].u64(A.INO) == 277
    assert found[2].data(A.PATH_TO) == b"new"
    assert found[6].data(A.XATTR_DATA) == b""
    assert found[7].data(A.PATH) == b""


def test_version_2_data_has_no_length_and_may_be_long():
    data = bytes(range(256)) * 400
    write = command(Cmd.WRITE, (A.PATH, b"f"), (A.FILE_OFFSET, 0), struct.pack("<H", A.DATA) + data)
    (found, _) = parse(stream(write, version=2), check_crc=True)
    assert found.data(A.DATA) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"btrfs",
        b"btrfs-stream\0",
        b"btrfs-strean\0" + bytes(40),
        stream(version=0),
        stream(version=3),
        stream(*SAMPLE)[:-1],
        stream(*SAMPLE)[:-10],
        stream(*SAMPLE) + b"x",
        stream(*SAMPLE) + stream(*SAMPLE),
        stream(command(99)),
        stream(command(Cmd.UNSPEC)),
        stream(command(Cmd.UNLINK, b"\x0f\0\xff\xff")),
        stream(command(Cmd.UNLINK, b"\x0f")),
        stream(struct.pack("<IHI", 0xFFFFFFFF, Cmd.UNLINK, 0)),
    ],
)
def test_damage(data):
    with pytest.raises(DamageError):
        parse(data)


def test_a_wrong_checksum_is_damage():
    data = bytearray(stream(*SAMPLE))
    data[-20] ^= 1
    with pytest.raises(DamageError):
        parse(bytes(data), check_crc=True)


def test_attributes_are_checked():
    (found, _) = parse(stream(command(Cmd.TRUNCATE, (A.PATH, b"f"), (A.SIZE, b"1234"))))
    with pytest.raises(DamageError, match="8"):
        found.u64(A.SIZE)
    with pytest.raises(DamageError, match="INO"):
        found.u64(A.INO)


def replayed(data, old=None):
    entries = {(ROOT, b"d"): Ident(260, 5), (Ident(260, 5), b"f"): Ident(261, 5), (ROOT, b"x"): Ident(262, 5)} | (
        old or {}
    )
    replay = Replay(ROOT, lambda parent, name: entries.get((parent, name)), {277: Ident(277, 8)}.get)
    for each in parse(data):
        replay.apply(each)
    return replay


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutations_are_damage_or_another_stream_and_nothing_else(data):
    mutated = bytearray(stream(*SAMPLE))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        cut = data.draw(st.integers(0, 8))
        mutated[at : at + cut] = data.draw(st.binary(max_size=8))
        if not mutated:
            break
    with contextlib.suppress(DamageError):
        replayed(bytes(mutated))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 2))
def test_garbage_behind_a_good_header(garbage, version):
    with pytest.raises(DamageError):
        parse(b"btrfs-stream\0" + struct.pack("<I", version) + garbage + b"\xff" * 8)


def test_replay_follows_a_renamed_directory():
    replay = replayed(stream(*SAMPLE))
    assert replay.touched == {ROOT, Ident(260, 5), Ident(261, 5), Ident(277, 8)}
    assert replay.changed == {Ident(261, 5): [Range(4096, 8192)]}


def test_replay_orphans_swaps_links_and_removals():
    replay = replayed(
        stream(
            command(Cmd.RENAME, (A.PATH, b"d"), (A.PATH_TO, b"o260-5-0")),
            command(Cmd.RENAME, (A.PATH, b"x"), (A.PATH_TO, b"d")),
            command(Cmd.LINK, (A.PATH, b"y"), (A.PATH_LINK, b"o260-5-0/f")),
            command(Cmd.UNLINK, (A.PATH, b"o260-5-0/f")),
            command(Cmd.RMDIR, (A.PATH, b"o260-5-0")),
            command(Cmd.UPDATE_EXTENT, (A.PATH, b"y"), (A.FILE_OFFSET, 0), (A.SIZE, 5)),
            command(Cmd.UPDATE_EXTENT, (A.PATH, b"d"), (A.FILE_OFFSET, 1), (A.SIZE, 6)),
        )
    )
    assert replay.touched == {ROOT, Ident(260, 5), Ident(261, 5), Ident(262, 5)}
    assert replay.changed == {Ident(261, 5): [Range(0, 5)], Ident(262, 5): [Range(1, 6)]}


def test_replay_asks_the_new_state_for_a_generation_that_the_stream_does_not_tell():
    assert Ident(277, 8) in replayed(stream(command(Cmd.MKFILE, (A.PATH, b"plain"), (A.INO, 277)))).touched
    with pytest.raises(DamageError):
        replayed(stream(command(Cmd.MKFILE, (A.PATH, b"plain"), (A.INO, 278))))


@pytest.mark.parametrize("path", [b"nowhere", b"d/nowhere", b"nowhere/f", b"x/", b"/x", b""])
def test_replay_of_a_path_that_does_not_exist_is_damage(path):
    replay = Replay(ROOT, lambda _parent, _name: None, lambda _ino: None)
    with pytest.raises(DamageError):
        replay.apply(Command(Cmd.UNLINK, {A.PATH: path}))
