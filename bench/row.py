"""What a row of the table is: plain values, and what is computed from them. No clock, no disk."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Goal:
    """At most `limit` (`least`: at least), in the figure's unit; with `peer` `limit` times what that peer has.

    `full`: it is said of the full size, and says nothing of a smaller one.
    """

    limit: float
    peer: str | None = None
    least: bool = False
    full: bool = False


@dataclass(frozen=True)
class Figure:
    """One number of a row and the same of each peer, in `unit`."""

    name: str
    unit: str
    ours: float
    goals: tuple[Goal, ...] = ()
    peers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Series:
    """Samples for the plot, in `unit`; with `x` (what they stand against: `axis`), a line."""

    name: str
    unit: str
    y: Sequence[float]
    x: Sequence[float] = ()
    axis: str = ""


@dataclass(frozen=True)
class Row:
    """`missing`: peers that could not be measured, and why. `error`: why there are no figures.

    `files`: the size it was run at; `measured`: when, ISO 8601; `load`: the load average of a minute by then.
    """

    id: str
    work: str
    figures: tuple[Figure, ...] = ()
    series: tuple[Series, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    error: str = ""
    files: int = 0
    full: bool = False
    measured: str = ""
    load: float = 0.0

    @property
    def complete(self) -> bool:
        return not self.error and not self.missing


def bound(figure: Figure, goal: Goal) -> float | None:
    """The goal as a number of the figure's unit; None if the peer it is said of was not measured."""
    if goal.peer is None:
        return goal.limit
    theirs = figure.peers.get(goal.peer)
    return None if theirs is None else goal.limit * theirs


def met(figure: Figure, goal: Goal, *, full: bool) -> bool | None:
    """Whether a figure reaches a goal; None if that cannot be said: of another size, or of a peer that is missing."""
    limit = bound(figure, goal)
    if limit is None or (goal.full and not full):
        return None
    return figure.ours >= limit if goal.least else figure.ours <= limit


def ratios(figure: Figure) -> dict[str, float]:
    """Ours divided by each peer's, where both are more than nothing."""
    return {peer: figure.ours / theirs for peer, theirs in figure.peers.items() if theirs > 0 <= figure.ours}


def percentile(values: Sequence[float], part: float) -> float:
    """The nearest-rank percentile: `part` 0.95 is the smallest value that 95 % do not exceed. Raises ValueError for none."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    rank = max(1, -(-int(part * 1000) * len(ordered) // 1000))
    return ordered[min(rank, len(ordered)) - 1]


def middle(values: Sequence[float]) -> float:
    return float(median(values))


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(slope, value at zero) of the line with the least squares through some points; a single one gives a flat line."""
    count = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return rise, mean_y - rise * mean_x


def to_document(row: Row) -> dict[str, Any]:
    """For JSON: the row's members, with ratios, and with what each goal comes to."""
    document = asdict(row)
    for figure, written in zip(row.figures, document["figures"], strict=True):
        written["ratios"] = ratios(figure)
        written["met"] = [met(figure, goal, full=row.full) for goal in figure.goals]
    return document


def from_document(document: Mapping[str, Any]) -> Row:
    """Raises KeyError, TypeError for what is none of ours."""
    figures = tuple(
        Figure(f["name"], f["unit"], f["ours"], tuple(Goal(**goal) for goal in f["goals"]), f["peers"])
        for f in document["figures"]
    )
    series = tuple(Series(**one) for one in document["series"])
    plain = {
        key: document[key] for key in ("id", "work", "missing", "note", "error", "files", "full", "measured", "load")
    }
    return replace(Row(**plain), figures=figures, series=series)
