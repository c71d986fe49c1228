"""`snapfeed diff P A B` over several snapshots: from a journal made by hand, and on real partitions with and without a daemon."""

import json
import os
from pathlib import Path

import pytest
from consumer import Consumer, name
from daemon_process import daemon, facts
from partitions import partition, wait_until
from trees import attr
from workload import Worker

from comparer.errors import DamageError, OperatorError, TransientError
from comparer.model import Change, FileType, Ident, Op
from feed.encode import encode_change
from snapshotter.systemfile import DiffRow, Settings, SnapshotRow, SystemFile
from watcher.spans import Span, squashed_pages

FILE = FileType.FILE


@pytest.fixture
def file(tmp_path):
    settings = Settings("epoch", "uuid", "partition", 1 << 30, 3600.0, 0)
    with SystemFile.create(os.fsencode(tmp_path / "system.db"), settings) as made:
        yield made


def journal(file, seq, *pages, parent=-1):
    """Put a diff into the journal: pages of JSON-able changes."""
    with file.transaction():
        for number, changes in enumerate(pages, 1):
            file.add_page(seq, number, len(changes), b",".join(json.dumps(c).encode() for c in changes))
        parent = seq - 1 if parent == -1 else parent
        row = DiffRow(seq, parent, 0, "command", 0, "per-file", None, sum(map(len, pages)), len(pages), 1000)
        file.add(SnapshotRow(seq, 0, "command", 0, row.changes, "per-file", None), row)


def modify(ino, path, content, old=0, new=1, **more):
    change = Change(Op.MODIFY, Ident(ino, 0), FILE, path, None, ("times",), attr(ctime_ns=old), attr(ctime_ns=new))
    return {**encode_change(change, content), **more}


def rename(ino, old_path, path, content, kind=FILE, old=0, new=1):
    change = Change(
        Op.RENAME, Ident(ino, 0), kind, path, old_path, (), attr(kind, ctime_ns=old), attr(kind, ctime_ns=new)
    )
    return encode_change(change, content)


def changes(file, first, last, limit=100_000):
    return [c for chunk in squashed_pages(file, first, last, limit) for c in json.loads(b"[" + chunk.data + b"]")]


def test_a_single_diff_comes_as_it_is_stored(file):
    page = [modify(2, b"f", b"c"), {**modify(3, b"g", None), "not ours": 1}]
    journal(file, 7, page, page[:1])
    assert [c.count for c in squashed_pages(file, 6, 7, 10)] == [2, 1]
    assert changes(file, 6, 7) == [*page, page[0]]
    assert changes(file, 6, 6) == []


def test_several_are_one(file):
    journal(file, 7, [modify(2, b"f", b".snapfeed/clones/7/2.0")], [modify(3, b"g", None)])
    journal(file, 8, [modify(2, b"f", b".snapfeed/clones/8/2.0", 1, 5)])
    journal(file, 9, [modify(4, b"h", None)])
    found = changes(file, 6, 8)
    assert [(c["path"], c["before"]["ctime_ns"], c["after"]["ctime_ns"]) for c in found] == [
        ("f", "0", "5"),
        ("g", "0", "1"),
    ]
    assert [c["content"] for c in found] == [".snapfeed/clones/8/2.0", None]
    longest = max(len(json.dumps(c, separators=(",", ":"))) for c in found)
    assert [c.count for c in squashed_pages(file, 6, 9, longest)] == [1, 1, 1]


def test_content_is_that_of_the_last_snapshot(file):
    """A tree of its own per snapshot: the path is the last one, also where only the directory above has moved since."""
    journal(
        file,
        7,
        [modify(2, b"d/f\xff", b".snapfeed/snapshots/7/d/f\xff")],
        [modify(3, b"g", b".snapfeed/snapshots/7/g")],
    )
    journal(file, 8, [rename(4, b"d", b"e", None, FileType.DIR)], [modify(3, b"g", None, 1, 2)])
    found = {name(c, "path"): name(c, "content") for c in changes(file, 6, 8)}
    assert found == {b"e": None, b"e/f\xff": b".snapfeed/snapshots/8/e/f\xff", b"g": None}


def test_attributes_that_were_left_out_are_not_taken_for_none(file):
    journal(file, 7, [modify(2, b"f", None, omitted_xattrs=["user.big"])])
    with_xattr = modify(2, b"f", None, 1, 2)
    with_xattr["after"]["xattrs"] = {"user.big": "eA=="}
    journal(file, 8, [with_xattr])
    (change,) = changes(file, 6, 8)
    assert change["omitted_xattrs"] == ["user.big"]
    assert "xattrs" not in change["before"] | change["after"]
    assert "xattr" in change["changed"]


def test_a_squashed_diff_in_the_journal_is_followed(file):
    journal(file, 9, [modify(2, b"f", None)], parent=6)
    journal(file, 10, [modify(2, b"f", None, 1, 2)])
    assert changes(file, 6, 9) == [modify(2, b"f", None)]
    (change,) = changes(file, 6, 10)
    assert change["after"]["ctime_ns"] == "2"


def test_a_gap_is_an_error_not_a_shorter_diff(file):
    journal(file, 7, [modify(2, b"f", None)])
    journal(file, 9, [modify(2, b"f", None)])
    journal(file, 12, [modify(2, b"f", None)], parent=9)
    for first, last in [(6, 9), (7, 9), (8, 10), (10, 12), (9, 11), (20, 21)]:
        with pytest.raises(OperatorError, match="does not lead from snapshot"):
            changes(file, first, last)


def test_pages_cut_anew_meanwhile_are_an_error(file):
    journal(file, 7, [modify(2, b"f", None)], [modify(3, b"g", None)])
    span = Span(6, 7, 1000)
    while not span.step(file).count:
        pass
    file.replace_pages(7, [(1, b"{}"), (1, b"{}"), (1, b"{}")], 500)
    with pytest.raises(TransientError, match="ask again"):
        span.step(file)


@pytest.mark.parametrize("body", [b"{", b"{}", b'{"op": "create"}'])
def test_a_page_that_is_none_is_damage(file, body):
    journal(file, 7, [modify(2, b"f", None)])
    journal(file, 8, [modify(2, b"f", None)])
    file.replace_pages(8, [(1, body)], 1000)
    with pytest.raises(DamageError):
        changes(file, 6, 8)


# ---- real partitions

NOWHERE = "mqtt://127.0.0.1:1"  # nothing is acknowledged, so the journal keeps the baseline
ENVELOPE = {
    "format": "snapfeed/1", "epoch": "e", "uuid": "u", "time_ns": "0", "trigger": "command", "volume": 0,
    "consistency": "", "snapshot": None, "page": 1, "pages": 1,
}  # fmt: skip


def consumer_of(baseline, *diffs):
    """A model that was given a baseline as snapshot 1, and diffs as (parent, seq, changes)."""
    made = Consumer()
    made.take({**ENVELOPE, "parent": None, "seq": 1, "baseline": True, "changes": baseline})
    for parent, seq, found in diffs:
        made.take({**ENVELOPE, "parent": parent, "seq": seq, "changes": found})
    return made


def content_matches(top: Path, found: list[dict]) -> int:
    """Whatever says where its content is kept has there what the partition holds now, if it is there now; how many did."""
    count = 0
    for change in found:
        content, path = name(change, "content"), name(change, "path")
        if content is None:
            continue
        with open(os.path.join(os.fsencode(top), content), "rb") as kept:
            data = kept.read()
        if change["op"] != "unlink" and not path.split(b"/")[0].startswith(b".snapfeed-tmp-"):
            with open(os.path.join(os.fsencode(top), path), "rb") as file:
                assert file.read() == data, change
            count += 1
    return count


@pytest.mark.kernel
@pytest.mark.parametrize("fs", ["xfs", "btrfs"])
def test_five_snapshots_of_work(fs, tmp_path):
    with partition(fs, tmp_path) as part, daemon(tmp_path, part.path, broker=NOWHERE, started=False) as snapfeed:
        worker = Worker(os.fsencode(part.path), 7, reflink=True)

        def work(steps):
            for _ in range(steps):
                worker.step()

        work(400)
        snapfeed.start()
        wait_until(lambda: snapfeed.partition()["head"], "the first snapshot")
        assert [row["seq"] for row in snapfeed.facts("snapshots", part.path)] == [1]
        for seq in range(2, 7):
            work(60)
            (part.path / f"kept {seq}").write_bytes(
                os.urandom(5000)
            )  # something has content, whatever the work has left
            assert snapfeed.snapshot()["seq"] == seq

        def ask(first, last):
            batches = snapfeed.ask("diff", partition=str(part.path), **{"from": first, "to": last})
            return [change for batch in batches for change in batch]

        found = snapfeed.facts("diff", part.path, "1", "6")
        assert found == ask(1, 6)
        halves = [(1, 3, ask(1, 3)), (3, 6, ask(3, 6))]
        singles = [(seq, seq + 1, ask(seq, seq + 1)) for seq in range(1, 6)]
        assert 0 < len(found) < sum(len(changes) for _, _, changes in singles)
        assert content_matches(part.path, found)
        assert snapfeed.stop() == 0
        assert facts("diff", part.path, "1", "6", env=snapfeed.env) == found  # without a daemon
        with SystemFile.open(os.fsencode(part.path / ".snapfeed/system.db")) as file:
            baseline = changes(file, 0, 1)
            state = changes(file, 0, 6)
        for diffs in ([(1, 6, found)], halves, singles):
            consumer_of(baseline, *diffs).compare(part.path)
        consumer_of(state).compare(part.path)
        assert content_matches(part.path, state)
