"""Commands: what is well-formed goes through, whatever else is refused with a reason, and never anything else happens."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparer.errors import OperatorError
from feed.commands import LARGEST, VERBS, Command, CommandError, Executed, RateLimit, answer, parse_command

GOOD = [
    ("snapshot", {"id": "1"}),
    ("snapshot", {"id": "1", "partition": "data"}),
    ("state", {"id": "x" * 128}),
    ("replay", {"id": "1", "partition": "data", "since": {"epoch": "e", "seq": 4}, "consumer": "c"}),
    ("baseline", {"id": "1", "consumer": "c"}),
    ("ack", {"id": "1", "consumer": "c", "epoch": "e", "seq": 2**53}),
    ("thresholds", {"id": "1", "partition": "data", "io_threshold": "64MiB", "time_threshold": None}),
]


@pytest.mark.parametrize(("verb", "document"), GOOD)
def test_good_commands(verb, document):
    command = parse_command(verb, orjson.dumps(document))
    fields = {name: value for name, value in document.items() if name not in {"id", "partition"}}
    assert command == Command(verb, document["id"], document.get("partition"), fields)


@pytest.mark.parametrize(
    ("verb", "payload", "text"),
    [
        ("snapshot", b"x" * 10**6, "at most 4096"),
        ("snapshot", b"[" * 100_000, "at most 4096"),
        ("snapshot", b"[" * 2000 + b"]" * 2000, "nested"),
        ("snapshot", b'{"id":"1","partition":' + b"9" * 4000 + b"}", "not JSON|integer|partition|string"),
        ("snapshot", b"9" * 4000, "not JSON|number|integer"),
        ("snapshot", b"", "not JSON"),
        ("snapshot", b'"x"', "expected an object"),
        ("snapshot", b"null", "expected an object"),
        ("snapshot", b"{}", "`id`"),
        ("snapshot", b'{"id":5}', "`id`"),
        ("snapshot", b'{"id":""}', "`id`"),
        ("snapshot", b'{"id":"%s"}' % (b"x" * 129), "`id`"),
        ("snapshot", b'{"id":"1","partition":[]}', "partition"),
        ("snapshot", b'{"id":"1","force":true}', "no field 'force'"),
        ("explode", b'{"id":"1"}', "unknown verb"),
        ("replay", b'{"id":"1","consumer":"c"}', "needs the field `since`"),
        ("replay", b'{"id":"1","consumer":"c","since":{"epoch":"e"}}', "needs the field `seq`"),
        ("replay", b'{"id":"1","consumer":"c","since":{"epoch":"e","seq":true}}', "boolean"),
        ("ack", b'{"id":"1","consumer":"c","epoch":"e","seq":-1}', "between"),
        ("ack", b'{"id":"1","consumer":"c","epoch":"e","seq":99999999999999999}', "between"),
        ("ack", b'{"id":"1","consumer":"c","epoch":"e","seq":1.5}', "number"),
        ("baseline", b'{"id":"1","consumer":""}', "characters"),
    ],
)
def test_refused_commands(verb, payload, text):
    with pytest.raises(CommandError, match=text) as error:
        parse_command(verb, payload)
    assert isinstance(error.value, OperatorError)
    assert error.value.id in {None, "1"}
    assert orjson.loads(answer(error.value.id, error=str(error.value)))["status"] == "error"


def test_a_refused_command_keeps_its_id():
    with pytest.raises(CommandError) as error:
        parse_command("explode", b'{"id":"mine"}')
    assert error.value.id == "mine"


def test_brackets_in_strings_are_no_depth():
    assert parse_command("snapshot", orjson.dumps({"id": '[[[[[[[[[[["\\[[[[{'})).id == '[[[[[[[[[[["\\[[[[{'


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["id", "partition", "since", "consumer", "epoch", "seq", "io_threshold"]) | st.text(max_size=8)


@given(st.sampled_from(sorted(VERBS)) | st.text(max_size=10), st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_document(verb, document):
    try:
        command = parse_command(verb, orjson.dumps(document))
    except CommandError:
        return
    assert command.verb in VERBS
    assert command.id == document["id"]


@given(st.sampled_from(sorted(VERBS)), st.binary(max_size=LARGEST + 10))
def test_any_bytes(verb, payload):
    with pytest.raises(CommandError):
        parse_command(verb, payload)


def test_answers():
    assert orjson.loads(answer("1", {"seq": 4})) == {"id": "1", "status": "ok", "error": None, "data": {"seq": 4}}
    assert orjson.loads(answer(None, error="no")) == {"id": None, "status": "error", "error": "no", "data": None}


def test_at_most_once():
    executed = Executed(size=2)
    first = Command("snapshot", "1")
    assert executed.begin(first)
    assert not executed.begin(first)
    assert executed.reply(first) is None
    executed.finish(first, b"done")
    assert not executed.begin(first)
    assert executed.reply(first) == b"done"
    assert executed.begin(Command("state", "1"))
    executed.forget(Command("state", "1"))
    assert executed.begin(Command("state", "1"))
    assert executed.begin(Command("snapshot", "3"))  # the bound: the oldest is forgotten
    assert executed.begin(first)


@given(st.lists(st.floats(0, 100, allow_nan=False), max_size=60))
def test_rate_limit_never_exceeds_rate_and_burst(pauses):
    limit, now, allowed = RateLimit(2.0, 5), 1000.0, 0
    for pause in pauses:
        now += pause / 10
        allowed += limit.allow(now)
    assert allowed <= 5 + 2.0 * (now - 1000.0) + 1e-6
    assert limit.allow(now + 1000.0)


def test_a_clock_that_goes_back_gives_nothing():
    limit = RateLimit(1.0, 1)
    assert limit.allow(100.0)
    assert not limit.allow(50.0)
    assert not limit.allow(100.5)
    assert limit.allow(101.0)
