"""`make bench`: what becomes of the figures (pure), and a row from end to end at a tiny size."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from daemon_process import ROOT, environment
from partitions import require

from bench.report import Report, earlier, lines_of, number, table
from bench.row import Figure, Goal, Row, Series, bound, from_document, met, percentile, ratios, slope, to_document
from bench.snapshot import read_of_files
from bench.trees import edit, fill

FIGURE = Figure("median", "ms", 12.0, (Goal(15, full=True), Goal(1.5, "find")), {"find": 6.0, "rsync": 48.0})
ROW = Row("P1", "a | b", (FIGURE,), (Series("snapfeed", "ms", [11.0, 13.0]),), {"watchman": "is not here"}, "hot")


def test_a_goal_of_the_full_size_says_nothing_of_a_smaller_one():
    absolute, relative = FIGURE.goals
    assert met(FIGURE, absolute, full=True) is True
    assert met(FIGURE, absolute, full=False) is None
    assert met(FIGURE, relative, full=False) is False
    assert bound(FIGURE, relative) == 9.0


def test_a_goal_against_a_peer_that_is_missing_is_open():
    assert met(FIGURE, Goal(1.0, "watchman"), full=True) is None


def test_some_goals_are_to_be_exceeded():
    assert met(FIGURE, Goal(13, least=True), full=True) is False
    assert met(FIGURE, Goal(12, least=True), full=True) is True


def test_ratios_are_ours_to_theirs():
    assert ratios(replace(FIGURE, peers={"find": 6.0, "idle": 0.0, "less": -1.0})) == {"find": 2.0}


@pytest.mark.parametrize(("part", "expected"), [(0.5, 50), (0.95, 95), (0.99, 99), (1.0, 100)])
def test_percentiles_are_values_that_occurred(part, expected):
    assert percentile([*range(100, 0, -1)], part) == expected
    assert percentile([7.0], part) == 7.0


def test_what_a_million_files_more_cost():
    assert slope([(1.0, 5.0), (2.0, 7.0), (3.0, 9.0)]) == (2.0, 3.0)
    assert slope([(4.0, 5.0)]) == (0.0, 5.0)


def test_a_line_of_the_table_has_ratios_goals_and_what_is_missing():
    (line,) = lines_of(ROW, new=True)
    assert line.startswith(
        r"| P1 | a \| b: median | 12 ms | find 6 (x 2); rsync 48 (x 0.25); watchman: missing (is not here) |"
    )
    assert line.endswith("| <= 15 ms; <= 1.5 x find (9 ms) | -; **no** |")


def test_a_row_of_an_earlier_run_says_of_when_it_is_and_one_that_failed_why():
    old = replace(ROW, measured="2026-03-14T09:26:53Z")
    assert lines_of(old, new=False)[0].startswith("| P1 (of 2026-03-14) |")
    failed = Row("P2", "btrfs", error="OSError: no\nspace")
    assert lines_of(failed, new=True) == ["| P2 | btrfs | failed: OSError: no space | | | |"]
    assert "![P2]" not in table({}, [failed], {"P2"})


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (0.01234, "0.0123"), (12.34, "12.3"), (123.4, "123"), (1234567, "1,234,567")]
)
def test_numbers_have_three_digits(value, shown):
    assert number(value) == shown


def test_rows_of_the_same_size_are_kept_and_others_are_not(tmp_path):
    order = ["P1", "P2"]
    Report(tmp_path, {}, order, 1000, keep=False).put(
        replace(ROW, id="P2", files=1000, measured="2026-03-14T09:26:53Z")
    )
    kept = Report(tmp_path, {"size": "small"}, order, 1000, keep=True)
    kept.put(replace(ROW, files=1000))
    assert [row.id for row in earlier(tmp_path / "table.json")] == order
    shown = (tmp_path / "table.md").read_text()
    assert "- size: small" in shown
    assert "| P2 (of 2026-03-14) |" in shown
    assert [row.id for row in kept.failed()] == ["P1"]  # it lacks a peer; P2 is none of this run's

    assert not Report(tmp_path, {}, order, 2000, keep=True).rows
    assert not Report(tmp_path, {}, order, 1000, keep=False).rows


def test_a_results_file_of_another_form_is_not_in_the_way(tmp_path):
    for text in ("", "[]", '{"rows": [{"row": "an older one"}]}'):
        (tmp_path / "table.json").write_text(text)
        assert earlier(tmp_path / "table.json") == []
    assert from_document(json.loads(json.dumps(to_document(ROW)))).figures == ROW.figures


def test_what_strace_saw_being_read():
    calls = [
        '12 pread64(7</m/.snapfeed/system.db>, "..."..., 4096, 0) = 4096',
        '12 read(9</proc/1/io>, "rchar"..., 8192) = 90',
        '12 read(9</m/large>, "data"..., 8192) = 8192',
        '12 pread64(9</m/.snapfeed/clones/2/1.1>, "data"..., 512, 0) = 512',
        "12 mmap(NULL, 4096, PROT_READ, MAP_SHARED, 9</m/large>, 0) = 0x7f0000000000",
        "12 read(9</m/large>, 0x7f00, 8192) = -1 EIO (Input/output error)",
    ]
    assert read_of_files("\n".join(calls), "/m") == 8192 + 512 + 4096


def test_edits_are_as_many_as_asked_for_and_differ(tmp_path):
    fill(tmp_path, 2000)
    first, second = (edit(tmp_path, 2000, Random(seed)) for seed in (1, 2))
    assert len(first) == len(second) == 100
    assert first != second
    grown = {path for path in first if (tmp_path / path).stat().st_size == 200}
    assert len(grown) >= 60  # some may have been appended to twice
    assert len(first - grown - {path for path in first if (tmp_path / path).stat().st_size == 300}) == 30


def bench(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        check=False,
        timeout=120,
        **options,
    )


def test_an_unknown_row_is_refused_with_what_there_is():
    done = bench("P99")
    assert done.returncode == 2
    assert b"no row 'P99'; there are P1, P2" in done.stderr
    assert bench("--list").stdout.splitlines()[0].startswith(b"P1 ")


@pytest.mark.kernel
def test_a_row_from_end_to_end(tmp_path):
    require(os.geteuid() == 0, "root")
    require(os.path.exists("/dev/loop-control"), "loop devices")
    for command in ("mkfs.xfs", "mosquitto", "find"):
        require(shutil.which(command) is not None, command)
    done = bench("--files", "300", "P7", "F4", "--results", tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    rows = {row.id: row for row in earlier(tmp_path / "table.json")}
    assert set(rows) == {"P7", "F4"}
    reconcile, _ = rows["P7"].figures
    assert set(reconcile.peers) == {"bulkstat loop", "find with stat"}
    assert all(value > 0 for value in (reconcile.ours, *reconcile.peers.values()))
    assert rows["F4"].figures[0].ours > 10
    assert rows["F4"].files == 300
    assert "| P7 |" in done.stdout.decode()
