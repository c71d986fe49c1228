"""Sizes and durations as people write them."""

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparer.errors import OperatorError
from watcher.units import (
    LARGEST,
    LONGEST,
    counted,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
    parse_threshold,
)

SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "KB": 10**3, "MB": 10**6, "K": 1 << 10}
DURATIONS = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86400}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 64 << 20),
        ("64 mib", 64 << 20),
        ("1.5KiB", 1536),
        ("4096", 4096),
        (4096, 4096),
        ("1GB", 10**9),
        (" 2 G ", 2 << 30),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("60s", 60), ("5min", 300), ("1.5h", 5400), ("250ms", 0.25), (90, 90), (0.5, 0.5), ("1 d", 86400)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@given(st.integers(1, 10**6), st.sampled_from(sorted(SIZES)))
def test_every_size_unit_is_exact(number, unit):
    number = min(number, LARGEST // SIZES[unit])
    assert parse_size(f"{number}{unit}") == number * SIZES[unit]
    assert parse_size(f"{number} {unit.lower()}") == number * SIZES[unit]


@given(st.integers(1, 366), st.sampled_from(sorted(DURATIONS)))
def test_every_duration_unit(number, unit):
    assert math.isclose(parse_duration(f"{number}{unit}"), number * DURATIONS[unit])


@pytest.mark.parametrize(
    ("given_text", "size"),
    [("64MiB", 64 << 20), ("4KiB", 4096), (4096, 4096), ("4096", 4096), ("1B", 1), ("1 KiB", 1024)],
)
def test_volumes(given_text, size):
    assert parse_threshold(given_text) == size


@pytest.mark.parametrize("given_text", ["64", 64, "4095", " 64 "])
def test_a_volume_without_its_unit_is_no_threshold(given_text):
    with pytest.raises(OperatorError, match="unit") as error:
        parse_threshold(given_text, "defaults.io_threshold")
    assert str(error.value).startswith(f"defaults.io_threshold: {given_text!r} is ")
    assert "64MiB" in str(error.value)


@pytest.mark.parametrize(("number", "text"), [(0, "0 changes"), (1, "1 change"), (2, "2 changes")])
def test_counted(number, text):
    assert counted(number, "change") == text


@given(st.integers(1, 10**15 - 1))
def test_a_plain_number_of_bytes_is_kept_to_the_byte(number):
    assert parse_size(str(number)) == parse_size(number) == number


@pytest.mark.parametrize("parse", [parse_size, parse_duration])
@pytest.mark.parametrize(
    "wrong",
    [
        "12 parsecs",
        "",
        "s",
        "MiB",
        "-1",
        "-1s",
        "0",
        0,
        "1e9",
        "1 2",
        "1..5",
        "nan",
        "inf",
        "٣",
        "1\n2",
        True,
        None,
        [],
        -5,
    ],
)
def test_what_is_none_is_refused_with_a_remedy(parse, wrong):
    with pytest.raises(OperatorError) as error:
        parse(wrong, "defaults.some_key")
    assert str(error.value).startswith("defaults.some_key: ")
    assert repr(wrong) in str(error.value)
    assert "such as" in str(error.value)


@given(st.one_of(st.text(max_size=30), st.integers(), st.floats(), st.none(), st.lists(st.integers(), max_size=2)))
def test_anything_is_read_or_refused(anything):
    for parse in (parse_size, parse_duration):
        with contextlib.suppress(OperatorError):
            assert parse(anything) > 0


@given(st.floats(0.001, LONGEST))
def test_a_duration_is_never_too_long(seconds):
    assert 0 < parse_duration(f"{seconds:.3f}") <= LONGEST
    with pytest.raises(OperatorError):
        parse_duration(f"{int(seconds + LONGEST) + 1}")


@given(st.integers(0, 1 << 60))
def test_a_size_is_shown_with_its_magnitude(size):
    number, unit = format_size(size).split(" ")
    shown = float(number) * {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]
    assert abs(shown - size) <= size * 0.06 + 0.5
    assert float(number) < 1024 or unit == "TiB"


@given(st.integers(1, 1000), st.sampled_from(["KiB", "MiB", "GiB"]))
def test_a_round_size_can_be_read_again(number, unit):
    size = parse_size(f"{number}{unit}")
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.25, "0.25 s"), (60, "60 s"), (90.0, "90 s"), (300, "5 min"), (86400, "24 h")]
)
def test_durations_shown(seconds, shown):
    assert format_duration(seconds) == shown
    assert parse_duration(shown) == seconds
