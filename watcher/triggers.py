"""When a snapshot is due. A pure function of what is known; time is an argument."""

import enum
from dataclasses import dataclass


class Trigger(enum.StrEnum):
    COMMAND = "command"
    VOLUME = "volume"
    TIME = "time"
    START = "start"
    RECONCILE = "reconcile"


@dataclass(frozen=True, slots=True)
class Due:
    """`trigger` None: a heartbeat, nothing changed."""

    trigger: Trigger | None


@dataclass(frozen=True, slots=True)
class Facts:
    """One partition now. Times are monotonic seconds; volume and thresholds bytes and seconds.

    `events`: something was touched since the last snapshot, as far as events tell. `silent_volume`: bytes that must be written
    without any event before that alone is a reason to look (more than our own writes leave in the meters). `lost`: events cannot
    be trusted to be complete. `commands`: how many wait. `last`: when the last snapshot or heartbeat was.
    """

    now: float
    last: float
    volume: int
    events: bool
    io_threshold: int
    time_threshold: float
    silent_volume: int
    commands: int = 0
    lost: bool = False
    fresh: bool = False  # no snapshot since the daemon started
    check_due: bool = False  # the periodic reconcile


def decide(facts: Facts) -> Due | None:
    """What is due now; None for nothing. Command first, else what the start asks for, else volume, else time."""
    if facts.commands:
        return Due(Trigger.COMMAND)
    if facts.fresh:
        return Due(Trigger.START)
    if facts.lost or facts.check_due:
        return Due(Trigger.RECONCILE)
    if facts.volume >= facts.io_threshold and facts.events:
        return Due(Trigger.VOLUME)
    if facts.volume >= max(facts.io_threshold, facts.silent_volume):
        return Due(Trigger.VOLUME)
    if facts.now - facts.last >= facts.time_threshold:
        return Due(Trigger.TIME if facts.events or facts.volume >= facts.silent_volume else None)
    return None


def next_look(facts: Facts, poll: float) -> float:
    """Seconds until `decide` has to be asked again, if no event comes: the time threshold, or the next reading of the meters."""
    return max(0.0, min(poll, facts.last + facts.time_threshold - facts.now))
