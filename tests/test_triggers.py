"""When a snapshot is due: the rules as properties."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.triggers import Due, Facts, Trigger, decide, next_look

MIB = 1 << 20
QUIET = Facts(
    now=100.0, last=90.0, volume=0, events=False, io_threshold=64 * MIB, time_threshold=60.0, silent_volume=8 * MIB
)

facts = st.builds(
    Facts,
    now=st.floats(0, 1e6),
    last=st.floats(0, 1e6),
    volume=st.integers(0, 1 << 40),
    events=st.booleans(),
    io_threshold=st.integers(1, 1 << 40),
    time_threshold=st.floats(0.001, 1e5),
    silent_volume=st.just(8 * MIB),
    commands=st.integers(0, 3),
    lost=st.booleans(),
    fresh=st.booleans(),
    check_due=st.booleans(),
)


@pytest.mark.parametrize(
    ("changed", "due"),
    [
        ({}, None),
        ({"commands": 1}, Due(Trigger.COMMAND)),
        ({"fresh": True}, Due(Trigger.START)),
        ({"lost": True}, Due(Trigger.RECONCILE)),
        ({"check_due": True}, Due(Trigger.RECONCILE)),
        ({"volume": 64 * MIB, "events": True}, Due(Trigger.VOLUME)),
        ({"volume": 64 * MIB - 1, "events": True}, None),
        ({"volume": 64 * MIB}, Due(Trigger.VOLUME)),  # written without an event: mmap
        ({"io_threshold": 1, "volume": MIB, "events": True}, Due(Trigger.VOLUME)),
        ({"io_threshold": 1, "volume": MIB}, None),  # what our own work may leave in the meters is no reason
        ({"now": 150.0}, Due(None)),
        ({"now": 149.9}, None),
        ({"now": 150.0, "events": True}, Due(Trigger.TIME)),
        ({"now": 150.0, "volume": 8 * MIB}, Due(Trigger.TIME)),
        ({"now": 150.0, "volume": MIB}, Due(None)),
        ({"now": 1000.0, "volume": 64 * MIB, "events": True}, Due(Trigger.VOLUME)),
        ({"now": 1000.0, "volume": 64 * MIB, "commands": 2, "lost": True, "fresh": True}, Due(Trigger.COMMAND)),
    ],
)
def test_cases(changed, due):
    assert decide(replace(QUIET, **changed)) == due


@given(facts)
def test_a_command_is_never_kept_waiting(now):
    assert decide(replace(now, commands=max(1, now.commands))) == Due(Trigger.COMMAND)


@given(facts)
def test_what_is_due_stays_due(now):
    """More volume, more time, or an event do not take back that something is due."""
    due = decide(now)
    for later in (
        replace(now, volume=now.volume * 2 + 1),
        replace(now, now=now.now + 1e6),
        replace(now, events=True),
        replace(now, commands=now.commands + 1),
    ):
        again = decide(later)
        assert due is None or again is not None
        assert due is None or due.trigger is None or again.trigger is not None


@given(facts)
def test_silence_never_lasts_longer_than_the_time_threshold(now):
    assert decide(replace(now, now=now.last + now.time_threshold * 1.001 + 0.001)) is not None


@given(facts)
def test_nothing_written_and_nothing_touched_is_no_snapshot(now):
    idle = replace(now, volume=0, events=False, commands=0, lost=False, fresh=False, check_due=False)
    due = decide(idle)
    assert due is None or due.trigger is None


@given(facts, st.integers(0, 8 * MIB - 1))
def test_our_own_work_cannot_trigger_the_next_one(now, left):
    """What a snapshot leaves in the meters, and no event, asks for nothing."""
    after = replace(now, volume=left, events=False, commands=0, lost=False, fresh=False, check_due=False, last=now.now)
    assert decide(after) is None


@given(facts, st.floats(0.01, 10))
def test_the_next_look_is_in_time(now, poll):
    pause = next_look(now, poll)
    assert 0 <= pause <= poll
    assert now.now + pause <= max(now.now, now.last + now.time_threshold) + 1e-6
