"""A change on the wire is the change: names of any bytes, all attributes, ranges; and what is no change is refused."""

import contextlib
import shlex
import subprocess
import unicodedata

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comparer.errors import DamageError
from comparer.model import Attr, ByteRanges, Change, FileType, Ident, Op, Quality, Range
from feed.documents import CHANGED
from feed.encode import decode_change, decode_name, encode_bytes, encode_change
from feed.escape import printable

PATHS = st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name)
U64 = st.integers(0, 2**64 - 1)
NS = st.integers(-(2**63), 2**63 - 1)
XATTRS = st.dictionaries(st.binary(min_size=1, max_size=12), st.binary(max_size=40), max_size=4).map(
    lambda pairs: tuple(sorted(pairs.items()))
)


@st.composite
def ranges(draw):
    def some():
        numbers = sorted(draw(st.sets(st.integers(0, 2**52), max_size=8)))
        return tuple(Range(a, b - a) for a, b in zip(numbers[::2], numbers[1::2], strict=False))

    return ByteRanges(some(), some(), draw(st.sampled_from(Quality)))


@st.composite
def changes(draw):
    kind, op = draw(st.sampled_from(FileType)), draw(st.sampled_from(Op))
    target = draw(PATHS) if kind is FileType.SYMLINK else None
    some = st.integers(0, 2**32 - 1)

    def attr():
        return Attr(
            kind,
            draw(U64),
            draw(U64),
            draw(st.integers(0, 0o7777)),
            draw(some),
            draw(some),
            draw(some),
            draw(NS),
            draw(NS),
            draw(st.none() | NS),
            draw(st.none() | U64),
            draw(XATTRS),
            target,
        )

    before, after = draw(st.sampled_from([(0, 1), (1, 0), (1, 1)]))
    return Change(
        op,
        Ident(draw(U64), draw(st.integers(0, 2**32 - 1))),
        kind,
        draw(PATHS | st.just(b"")),
        draw(PATHS) if op in {Op.RENAME, Op.LINK} else None,
        tuple(sorted(draw(st.sets(st.sampled_from(sorted(CHANGED)))))) if op in {Op.MODIFY, Op.RENAME} else (),
        attr() if before else None,
        attr() if after else None,
        draw(st.none() | ranges()),
    )


@given(changes(), st.none() | PATHS)
def test_round_trip(change, content):
    document = orjson.loads(encode_bytes(change, content))
    assert decode_change(document) == change
    assert decode_name(document, "content") == content
    assert {"op", "type", "id", "path", "before", "after", "content"} <= document.keys()


def test_every_byte_value_in_every_name():
    every = bytes(sorted(set(range(1, 256)) - {ord("/")}))
    attr = Attr(FileType.SYMLINK, 1, 0, 0o777, 0, 0, 1, 0, 0, target=every, xattrs=((every, every),))
    change = Change(Op.RENAME, Ident(1, 2), FileType.SYMLINK, every, every[::-1], ("xattr",), attr, attr)
    assert decode_change(orjson.loads(encode_bytes(change))) == change


def test_shape_of_the_document():
    attr = Attr(
        FileType.FILE, 5, 4096, 0o644, 1, 2, 1, 10**18, 10**18, None, None, ((b"user.\xff", b"v"), (b"user.a", b"w"))
    )
    change = Change(Op.CREATE, Ident(12, 3), FileType.FILE, b"a/\xff", after=attr, ranges=ByteRanges((Range(0, 5),)))
    document = encode_change(change, b".snapfeed/clones/12.3/1")
    assert document["id"] == "12.3"
    assert document["path"] == "a/\\xff"
    assert document["path_b64"] == "YS//"
    assert document["before"] is None
    assert document["after"]["size"] == "5"
    assert document["after"]["mtime_ns"] == "1" + "0" * 18
    assert document["after"]["rdev"] is None
    assert document["after"]["xattrs"] == {"user.a": "dw=="}
    assert document["after"]["xattrs_b64"] == {"dXNlci7/": "dg=="}
    assert document["ranges"] == [[0, 5]]
    assert document["ranges_quality"] == "exact"
    assert document["content"] == ".snapfeed/clones/12.3/1"
    assert "from" not in document
    assert "changed" not in document


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first draw builds tables of all characters
@given(changes(), st.data())
def test_a_damaged_document_is_damage_and_nothing_else(change, data):
    document = encode_change(change)
    field = data.draw(st.sampled_from(sorted(document)))
    document[field] = data.draw(JSON)
    with contextlib.suppress(DamageError):
        decode_change(document)


@pytest.mark.parametrize("value", ["9" * 5000, "1e3", " 1", "", "1_0", "²", 7, None])
def test_a_number_that_is_none(value):
    attr = Attr(FileType.FILE, 5, 0, 0o644, 0, 0, 1, 0, 0)
    document = encode_change(Change(Op.CREATE, Ident(1, 1), FileType.FILE, b"x", after=attr))
    document["after"]["size"] = value
    with pytest.raises(DamageError):
        decode_change(document)


@given(st.binary(max_size=60) | st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace")))
def test_printable_hides_nothing_and_moves_nothing(path):
    text = printable(path)
    assert text
    assert all(unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} for char in text)


def test_printable_reads_well_and_back():
    paths = [
        b"src/main.c",
        b"",
        b"two words",
        b"it's",
        b"a\nb",
        b"\x1b[31mred",
        b"\xff\xfe",
        "\u202egnp.exe".encode(),
        b"-rf",
        b"~",
    ]
    paths += [b"$HOME", b"`id`", b"a\\b", "größe".encode(), b"'\"$x", bytes(range(1, 256))]
    script = "printf '%s\\0' " + " ".join(printable(path) for path in paths)
    assert subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.split(b"\0")[:-1] == paths
    assert printable(b"src/main.c") == "src/main.c"
    assert printable("größe".encode()) == "'größe'"
    assert printable(b"\x1b[31m") == "$'\\e[31m'"
    assert shlex.split(printable(b"two words")) == ["two words"]
