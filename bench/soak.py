"""`make soak`: the tests' random parts for hours: other seeds each round, larger trees; stops at the first failure.

python -m bench.soak [--sequences 10000] [--seed 1]: a run that was stopped goes on with `--seed` of the round it was in.
"""

import argparse
import os
import subprocess
import sys
import time

ROUND = 400  # sequences of a round, all file systems together
EXACT = ["tests/test_exact.py"]
DELIVERY = [  # with the figures of DELIVERY_SIZES
    "tests/test_broker_kills.py",
    "tests/test_replicate_daemon.py",
    "tests/test_outage.py",
    "tests/test_follow.py",
    "tests/test_replica.py",
]
DELIVERY_SIZES = {
    "SNAPFEED_KILLS": "200",
    "SNAPFEED_SNAPSHOTS": "1000",
    "SNAPFEED_DIFFS": "5000",
    "SNAPFEED_EXAMPLES": "20000",
}
OTHERS = [
    "tests/test_invariants.py",
    "tests/test_concurrent.py",
    "tests/test_large.py",
    "tests/test_compare.py",
    "tests/test_overflow.py",
    "tests/test_differential.py",
]


def pytest(files: list[str], **environment: str) -> int:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-o", "faulthandler_timeout=0", *files],
        check=False,
        env={**os.environ, **environment},
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.soak", description=__doc__)
    parser.add_argument("--sequences", type=int, default=10_000, help="of the state machine, all file systems together")
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    options = parser.parse_args()
    done, seed, started = 0, options.seed, time.monotonic()
    while done < options.sequences:
        if pytest(EXACT, SNAPFEED_SEQUENCES=str(ROUND // 4), SNAPFEED_SEED=str(seed)):
            print(f"soak: failed in the round of seed {seed}: go on with --seed {seed}", file=sys.stderr)
            return 1
        if seed % 5 == 0 and pytest(OTHERS, SNAPFEED_RANDOM="1", SNAPFEED_ENTRIES="100000", SNAPFEED_EXAMPLES="20000"):
            return 1
        if seed % 5 == 0 and pytest(DELIVERY, SNAPFEED_RANDOM="1", SNAPFEED_SEED=str(seed), **DELIVERY_SIZES):
            return 1
        done, seed = done + ROUND, seed + 1
        print(f"soak: {done} sequences in {(time.monotonic() - started) / 3600:.2f} h, none failed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
