"""The btrfs engine and the table engine say the same of the same work: two machines for one answer."""

import os

import pytest
from broker_processes import collector, mosquitto
from consumer import Consumer, name
from daemon_process import HOST, daemon
from partitions import partition, wait_until
from workload import Worker

ROUNDS = 12
# What its file system counts in its own way. Times are left out too: whether a rename, or a call that changes nothing, moves the
# change time is for the file system to say (each is checked against its own walk).
OF_DIRECTORIES = {"size", "links", "data"}


def net(diff: dict, before: dict[bytes, str]) -> list:
    """What a diff says of each object, whatever way it took: names before and after, type, kinds of attribute changed."""
    names = dict(before)
    first: dict[str, set[bytes]] = {}
    for path, ident in before.items():
        first.setdefault(ident, set()).add(path)
    kinds: dict[str, set[str]] = {}
    types: dict[str, str] = {}
    for change in diff["changes"]:
        path, ident = name(change, "path"), change["id"]
        types[ident] = change["type"]
        kinds.setdefault(ident, set()).update(change.get("changed", ()))
        if change["op"] in ("create", "link"):
            names[path] = ident
        elif change["op"] in ("unlink", "delete"):
            del names[path]
        elif change["op"] == "rename":
            old = name(change, "from")
            for moved in [p for p in names if p == old or p.startswith(old + b"/")]:
                names[path + moved[len(old) :]] = names.pop(moved)
    last: dict[str, set[bytes]] = {}
    for path, ident in names.items():
        last.setdefault(ident, set()).add(path)
    found = []
    for ident, told in kinds.items():
        was, now = sorted(first.get(ident, ())), sorted(last.get(ident, ()))
        counted = told - {"times"} - (OF_DIRECTORIES if types[ident] == "dir" else set())
        if counted or was != now:
            found.append((types[ident], was, now, sorted(counted)))
    return sorted(found)


@pytest.mark.kernel
@pytest.mark.parametrize("seed", [1, 2])
def test_btrfs_and_xfs_tell_the_same(tmp_path, seed):
    with (
        partition("xfs", tmp_path) as xfs,
        partition("btrfs", tmp_path) as btrfs,
        mosquitto(tmp_path) as broker,
        collector(broker, f"snapfeed/{HOST}/+/changes") as pages,
        daemon(tmp_path, xfs.path, btrfs.path, broker=broker.url) as snapfeed,
    ):
        workers = [Worker(os.fsencode(p.path), seed, reflink=True) for p in (xfs, btrfs)]
        consumers = [Consumer(), Consumer()]
        known = {snapfeed.partition(p.path)["partition"]: c for p, c in zip((xfs, btrfs), consumers, strict=True)}

        def caught_up(answers) -> bool:
            for message in pages.new():
                known[message.topic.split("/")[2]].feed([message.payload])
            return all(c.head == (a["epoch"], a["seq"]) for c, a in zip(consumers, answers, strict=True))

        wait_until(lambda: all(p["head"] for p in snapfeed.status()["partitions"]), "both baselines")
        answers = [snapfeed.snapshot(p.path) for p in (xfs, btrfs)]
        wait_until(lambda: caught_up(answers), "both baselines arrive")
        for _ in range(ROUNDS):
            before = [dict(c.names) for c in consumers]
            count = [len(c.diffs) for c in consumers]
            for worker in workers:
                for _ in range(20):
                    worker.step()
            logs = [
                [line.replace(os.fsdecode(p.path), "") for line in w.log]
                for w, p in zip(workers, (xfs, btrfs), strict=True)
            ]
            assert [line.split(" -> ")[0] for line in logs[0]] == [line.split(" -> ")[0] for line in logs[1]]
            assert [" -> " in line for line in logs[0]] == [" -> " in line for line in logs[1]], (
                "one of them refused the work"
            )
            answers = [snapfeed.snapshot(p.path) for p in (xfs, btrfs)]
            wait_until(lambda a=answers: caught_up(a), "both diffs")
            told = []
            for consumer, names, index in zip(consumers, before, count, strict=True):
                fresh = [d for d in consumer.diffs[index:] if not d.get("baseline")]
                assert len(fresh) == 1
                told.append(net(fresh[0], names))
            for consumer, part in zip(consumers, (xfs, btrfs), strict=True):
                consumer.compare(part.path)
            only = [[entry for entry in told[i] if entry not in told[1 - i]] for i in (0, 1)]
            assert only == [[], []], "told by one of them only"
