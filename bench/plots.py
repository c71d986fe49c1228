"""A picture for each row: its samples, ours and the peers', on one scale, with the goals as lines."""

import io
from pathlib import Path

from .report import replace
from .row import Row, Series, bound

OURS, OTHERS, GOAL = "#1f5fa8", "#8a8a8a", "#b03030"


def plot(row: Row, directory: Path) -> str | None:
    """Write <row>.svg. Returns why not, if matplotlib is missing or there is nothing to show."""
    if not row.series:
        return "no samples"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib is missing: `make bench` installs it, or pip install -e '.[bench]'"
    lines = [series for series in row.series if series.x]
    strips = [series for series in row.series if not series.x]
    figure = Figure(figsize=(9, 0.8 + 0.35 * len(strips) + (3.2 if lines else 0) + 0.8), layout="constrained")
    parts = [part for part in (lines, strips) if part]
    axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=[3.2 if p is lines else 1 for p in parts])
    for part, axis in zip(parts, axes[:, 0], strict=True):
        (_lines if part is lines else _strips)(axis, part, row)
    figure.suptitle(f"{row.id}: {row.work}", fontsize=10)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    replace(directory / f"{row.id}.svg", out.getvalue())
    return None


def _colour(series: Series) -> str:
    return OURS if series.name.startswith("snapfeed") else OTHERS


def _limits(row: Row, unit: str) -> list[float]:
    found = [bound(figure, goal) for figure in row.figures if figure.unit == unit for goal in figure.goals]
    return [limit for limit in found if limit]


def _strips(axis, strips: list[Series], row: Row) -> None:
    for place, series in enumerate(strips):
        axis.plot(series.y, [place] * len(series.y), "|", color=_colour(series), markersize=12, alpha=0.5)
        ordered = sorted(series.y)
        if ordered:
            axis.plot([ordered[len(ordered) // 2]], [place], "o", color=_colour(series), markersize=5)
    unit = strips[0].unit
    for limit in _limits(row, unit):
        axis.axvline(limit, color=GOAL, linestyle="--", linewidth=1)
    if all(value > 0 for series in strips for value in series.y):
        axis.set_xscale("log")
    axis.set_yticks(range(len(strips)), [series.name for series in strips], fontsize=8)
    axis.set_ylim(len(strips) - 0.5, -0.5)
    axis.set_xlabel(f"{unit} (dot: median, dashed: goal)", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)


def _lines(axis, lines: list[Series], row: Row) -> None:
    for series in lines:
        axis.plot(series.x, series.y, "o-", label=series.name, markersize=4)
    for limit in _limits(row, lines[0].unit):
        axis.axhline(limit, color=GOAL, linestyle="--", linewidth=1)
    spread = [value for series in lines for value in series.x]
    if min(spread) > 0 and max(spread) / min(spread) > 20:
        axis.set_xscale("log")
    values = [value for series in lines for value in series.y]
    if min(values) > 0 and max(values) / min(values) > 50:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel(lines[0].axis, fontsize=8)
    axis.set_ylabel(lines[0].unit, fontsize=8)
    axis.legend(fontsize=8)
    axis.tick_params(labelsize=8)
