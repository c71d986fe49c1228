"""Pages: nothing lost or reordered, never above the limit, what does not fit is coarser and says so."""

from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparer.errors import DamageError, OperatorError
from comparer.model import Attr, ByteRanges, Change, FileType, Ident, Op, Range
from feed.cloudevents import ROOM
from feed.coarsen import merge
from feed.encode import decode_change, encode_bytes
from feed.pages import Chunk, Envelope, chunk_limit, chunks, page_payload, parse_page, payload_limit, payloads, resplit

ENVELOPE = Envelope(
    "edge7", "data", "u-1", "e-1", 42, 41, 1795351234000000000, "volume", 67108864, "per-file", ".snapfeed/head"
)


def change(number: int, path: bytes = b"x", **more) -> bytes:
    attr = Attr(FileType.FILE, number, 0, 0o644, 0, 0, 1, 0, 0, xattrs=more.pop("xattrs", ()))
    return encode_bytes(Change(Op.CREATE, Ident(number, 1), FileType.FILE, path, after=attr, **more))


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=30), st.integers(1800, 4000), st.integers(1400, 1800))
def test_all_changes_in_order_on_pages_that_fit(paths, limit, smaller):
    encoded = [change(number, path) for number, path in enumerate(paths)]
    cut = list(chunks(encoded, limit))
    assert sum(chunk.count for chunk in cut) == len(encoded)
    assert all(len(chunk.data) <= limit for chunk in cut)
    for room in (10**6, limit, smaller):
        pages = payloads(ENVELOPE, cut, room)
        assert all(len(page) <= room for page in pages)
        read = [parse_page(page) for page in pages]
        assert [page.page for page in read] == list(range(1, len(pages) + 1))
        assert {page.pages for page in read} == {len(pages)}
        assert all(page.envelope == ENVELOPE for page in read)
        assert [orjson.dumps(one) for page in read for one in page.changes] == encoded


def test_the_envelope_has_the_fields_of_the_feed():
    document = orjson.loads(page_payload(ENVELOPE, 1, 3, b""))
    assert document == {
        "format": "snapfeed/1",
        "host": "edge7",
        "partition": "data",
        "uuid": "u-1",
        "epoch": "e-1",
        "seq": 42,
        "parent": 41,
        "page": 1,
        "pages": 3,
        "time_ns": "1795351234000000000",
        "trigger": "volume",
        "volume": 67108864,
        "consistency": "per-file",
        "snapshot": ".snapfeed/head",
        "changes": [],
    }


def test_a_default_chunk_fits_a_default_packet_with_the_longest_topic():
    topic = "/".join(["b" * 64] * 4 + ["h" * 64, "p" * 64, "replay", "c" * 64])
    widest = Envelope(
        "h" * 64,
        "p" * 64,
        "u" * 64,
        "e" * 64,
        2**53,
        2**53,
        2**63,
        "reconcile",
        2**53,
        "per-file",
        "s" * 200,
        baseline=True,
    )
    for packet in (8192, 131_072):
        payload = page_payload(widest, 10**9, 10**9, b"x" * chunk_limit(packet))
        assert len(payload) <= payload_limit(packet, topic, ROOM)
    with pytest.raises(OperatorError, match="max_packet"):
        chunk_limit(1000)


def test_ten_thousand_ranges_become_a_superset():
    ranges = ByteRanges(tuple(Range(n * 8192, 4096) for n in range(10_000)), (Range(10**9, 4096),))
    (only,) = chunks([change(1, ranges=ranges)], 4000)
    read = decode_change(orjson.loads(only.data))
    assert len(only.data) <= 4000
    assert read.ranges.quality == "superset"
    assert read.ranges.cleared == ()  # a `cleared` that covers live data would be a lie
    assert len(read.ranges.written) > 20
    for offset, length in (*ranges.written, *ranges.cleared):
        assert any(a <= offset and offset + length <= a + b for a, b in read.ranges.written)


def test_huge_xattrs_are_left_out_by_name():
    xattrs = tuple((b"user.%03d" % n, b"v" * 1000) for n in range(60))
    (only,) = chunks([change(1, xattrs=xattrs)], 8000)
    document = orjson.loads(only.data)
    assert document["omitted_xattrs"] == [f"user.{n:03d}" for n in range(60)]
    assert decode_change(document).after.xattrs == ()
    names = tuple((b"user." + b"%0200d" % n, b"") for n in range(60))
    (only,) = chunks([change(1, xattrs=names)], 8000)
    assert orjson.loads(only.data)["omitted_xattrs"] == ["*"]


def test_what_cannot_be_made_small_is_named():
    with pytest.raises(OperatorError, match=r"\$'\\x1b|\\e\[31m"):
        list(chunks([change(1, b"\x1b[31m" + b"p" * 4000)], 2000))


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 50)), min_size=1, max_size=30), st.integers(1, 10))
def test_merged_ranges_cover_and_are_few(ranges, count):
    merged = merge([list(one) for one in ranges], count)
    assert 1 <= len(merged) <= count
    assert all(a[0] + a[1] < b[0] for a, b in pairwise(merged))
    for offset, length in ranges:
        assert any(a <= offset and offset + length <= a + b for a, b in merged)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "snapfeed/2"),
        ("seq", "42"),
        ("seq", True),
        ("page", 0),
        ("pages", 0),
        ("changes", {}),
        ("changes", [1]),
        ("time_ns", 5),
        ("time_ns", "9" * 5000),
        ("host", None),
        ("parent", "x"),
    ],
)
def test_what_is_no_page_is_damage(field, value):
    document = orjson.loads(page_payload(ENVELOPE, 1, 1, b""))
    document[field] = value
    with pytest.raises(DamageError, match="not a page"):
        parse_page(orjson.dumps(document))


@given(st.binary(max_size=200))
def test_any_bytes_are_damage(payload):
    with pytest.raises(DamageError):
        parse_page(payload)


def test_bytes_that_hurt_parsers():
    for payload in (b"[" * 100_000, b"9" * 5000, b'{"a":' * 50_000, b"\xff" * 1000, b"x" * 10**6):
        with pytest.raises(DamageError):
            parse_page(payload)
    with pytest.raises(DamageError):
        resplit(Chunk(1, b"{" * 100), 10)


def test_unknown_fields_are_ignored():
    document = orjson.loads(page_payload(ENVELOPE, 1, 1, b"")) | {"later": [1]}
    assert parse_page(orjson.dumps(document)).envelope == ENVELOPE
