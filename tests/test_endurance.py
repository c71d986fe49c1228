"""A short soak (endurance.py), and whether it would see a leak.

SNAPFEED_SECONDS: how long (3600 in `make soak`); SNAPFEED_SEED: other dice; SNAPFEED_REPORT: a file for the samples.
"""

import os

import pytest
from endurance import LONG, MIB, endure, judge

SECONDS = float(os.environ.get("SNAPFEED_SECONDS", "6"))
SEED = int(os.environ.get("SNAPFEED_SEED", "1"))


@pytest.mark.kernel
def test_exact_at_every_quiet_point_and_flat(tmp_path):
    quiets = 45.0 if SECONDS >= LONG else 3.0
    report = endure(tmp_path, SECONDS, SEED, os.environ.get("SNAPFEED_REPORT"), quiets)
    last = report.lines[-1]
    assert last["quiet"] >= 2
    assert sum(count for what, count in last["events"].items() if what.startswith("daemon")) > 0
    assert {one["host"] for one in report.of("sample")} == {"killed", "steady"}
    assert report.of("quiet")[-1]["steps"] > 100
    print(last, report.of("quiet")[-1])


def samples(anon=lambda t: 40 * MIB, fds=lambda t: 30, host="steady", life=10**9):
    return [
        {"host": host, "t": float(t), "pid": t // life, "age": t % life, "rss": 60 * MIB, "pss": 50 * MIB,
         "anon": anon(t), "fds": fds(t), "threads": 8, "journal": 5 * MIB, "kept": 12, "spools": 0}
        for t in range(0, 3600, 5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (samples(), ""),
        (samples(anon=lambda t: 40 * MIB + min(t, 300) * 50_000), ""),  # it grows while it gets warm
        (samples(anon=lambda t: 40 * MIB + t * 2_500), "steady: anon has grown"),  # 9 MB an hour
        (samples(fds=lambda t: 30 + t // 600), "steady: fds has grown"),
        (samples(fds=lambda t: 1000 if t == 50 else 30), "fds 1000 is more than"),
        (samples(host="killed", life=60, anon=lambda t: 40 * MIB + t % 60 * 50_000), ""),
        (samples(host="killed", life=60, anon=lambda t: 40 * MIB + t * 2_500), "killed: anon has grown"),
    ],
)
def test_a_leak_would_be_told(made, told):
    found = judge(made)
    assert (found == []) if not told else (told in found[0] and len(found) == 1)
