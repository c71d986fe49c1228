"""The table: Markdown for people, JSON for programs, written after each row; rows of earlier runs at the same size are kept."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .row import Figure, Goal, Row, bound, from_document, met, ratios, to_document

_GOOD = {True: "yes", False: "**no**", None: "-"}


class Report:
    """The results directory of one size. `order` are the ids of all rows, in the order of the table; `keep`: earlier rows stay.

    Rows made by this run are those put in since; the others say when they were measured.
    """

    def __init__(
        self, directory: Path, head: Mapping[str, str], order: Sequence[str], files: int, *, keep: bool
    ) -> None:
        self.directory = directory
        self.head = head
        self.order = list(order)
        self.files = files
        self.rows: dict[str, Row] = {}
        self.new: set[str] = set()
        if keep:
            self.rows = {row.id: row for row in earlier(directory / "table.json") if row.files == files}

    def put(self, row: Row) -> None:
        """A row was measured, or failed: what is known is written at once."""
        self.new.add(row.id)
        self.rows[row.id] = row
        self.write()

    def sorted(self) -> list[Row]:
        place = {name: number for number, name in enumerate(self.order)}
        return sorted(self.rows.values(), key=lambda row: (place.get(row.id, len(place)), row.id))

    def failed(self) -> list[Row]:
        """This run's rows that lack something."""
        return [row for row in self.sorted() if row.id in self.new and not row.complete]

    def write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        rows = self.sorted()
        document = {"head": dict(self.head), "files": self.files, "rows": [to_document(row) for row in rows]}
        replace(self.directory / "table.json", json.dumps(document, indent=1) + "\n")
        replace(self.directory / "table.md", table(self.head, rows, self.new))


def replace(path: Path, text: str) -> None:
    """Write a file so that there is always a whole one."""
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)


def earlier(path: Path) -> list[Row]:
    """The rows of an earlier run; none if there is no file, or one of another form."""
    try:
        return [from_document(row) for row in json.loads(path.read_text())["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def number(value: float) -> str:
    """Three digits, more only for whole numbers: 0.0123, 12.3, 1,230."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _goal(figure: Figure, goal: Goal) -> str:
    sign = ">=" if goal.least else "<="
    if goal.peer is None:
        return f"{sign} {number(goal.limit)} {figure.unit}"
    text = f"{sign} {number(goal.limit)} x {goal.peer}"
    limit = bound(figure, goal)
    return text if limit is None else f"{text} ({number(limit)} {figure.unit})"


def lines_of(row: Row, *, new: bool) -> list[str]:
    """A row of the table, a line for each figure."""
    when = "" if new else f" (of {row.measured[:10]})"
    if row.error:
        return [f"| {row.id}{when} | {cell(row.work)} | failed: {cell(row.error)} | | | |"]
    made = []
    for at, figure in enumerate(row.figures):
        shares = ratios(figure)
        peers = [
            f"{name} {number(value)}" + (f" (x {number(shares[name])})" if name in shares else "")
            for name, value in figure.peers.items()
        ]
        if at == 0:
            peers += [f"{name}: missing ({why})" for name, why in row.missing.items()]
        goals = "; ".join(_goal(figure, goal) for goal in figure.goals)
        reached = "; ".join(_GOOD[met(figure, goal, full=row.full)] for goal in figure.goals)
        first, work = (f"{row.id}{when}", f"{row.work}: {figure.name}") if at == 0 else ("", figure.name)
        ours = f"{number(figure.ours)} {figure.unit}"
        made.append("| " + " | ".join(cell(c) for c in (first, work, ours, "; ".join(peers), goals, reached)) + " |")
    return made


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def table(head: Mapping[str, str], rows: Sequence[Row], new: set[str]) -> str:
    lines = ["# What snapfeed costs, side by side with others", ""]
    lines += [f"- {key}: {value}" for key, value in head.items()]
    lines += [
        "",
        "`x`: ours divided by theirs. `-`: the goal is said of the full size, or its peer was not measured.",
        "",
    ]
    lines += ["| row | work | snapfeed | peers | goal | reached |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines += lines_of(row, new=row.id in new)
    notes = [f"- {row.id} (load {row.load:.1f}): {cell(row.note)}" for row in rows if row.note]
    if notes:
        lines += ["", *notes]
    pictures = [f"![{row.id}]({row.id}.svg)" for row in rows if row.series and not row.error]
    if pictures:
        lines += ["", *pictures]
    return "\n".join(lines) + "\n"
