"""`make soak`: the tests' random and long parts for hours: other dice each round, larger trees; stops at the first failure.

python -m bench.soak [--list] [--resume] [--only NAME ...] [--rounds 25] [--seed 1] [--seconds 3600]

A round is one seed: all parts that are due in it, one after the other (`--list` shows them). What was run goes to
bench/results/local/soak.jsonl, a line for each part: when, name, seed, sizes, seconds, exit code. Where it is, is in soak.json
beside it: `--resume` goes on there after it was stopped or has failed, with the part that was running, and with the choice made
then.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "local"
STATE, LOG = "soak.json", "soak.jsonl"


@dataclass(frozen=True)
class Part:
    """Test files with their sizes, which are environment variables; due in every so many rounds, and in the first."""

    name: str
    files: str
    every: int = 5
    random: bool = True  # the property tests look elsewhere each time; without it the seed alone decides
    sizes: dict[str, str] = field(default_factory=dict)

    def due(self, seed: int) -> bool:
        return (seed - 1) % self.every == 0

    def environment(self, seed: int, seconds: int, results: Path) -> dict[str, str]:
        own = {key: value.format(seed=seed, seconds=seconds, results=results) for key, value in self.sizes.items()}
        return {"SNAPFEED_SEED": str(seed), **({"SNAPFEED_RANDOM": "1"} if self.random else {}), **own}

    def paths(self) -> list[str]:
        return [f"tests/test_{name}.py" for name in self.files.split()]


PARTS = (
    # four file systems, so 400 sequences a round, 10,000 in 25 rounds
    Part("exact", "exact", 1, random=False, sizes={"SNAPFEED_SEQUENCES": "100"}),
    Part(
        "endurance",
        "endurance",
        sizes={"SNAPFEED_SECONDS": "{seconds}", "SNAPFEED_REPORT": "{results}/endurance-{seed}.jsonl"},
    ),
    Part("kill-points", "kill_points", sizes={"SNAPFEED_POINTS": "all"}),
    Part("disk-faults", "disk_faults pulled_and_stepped", sizes={"SNAPFEED_POINTS": "all"}),
    Part("power-cut", "power_cut", sizes={"SNAPFEED_IMAGES": "500"}),
    Part("corruption", "corruption", sizes={"SNAPFEED_CORRUPTIONS": "10000"}),
    Part("overflow", "overflow", sizes={"SNAPFEED_OPERATIONS": "1000000"}),
    Part("races", "races", sizes={"SNAPFEED_SECONDS": "300"}),
    Part(
        "invariants",
        "invariants concurrent large compare differential",
        sizes={"SNAPFEED_ENTRIES": "100000", "SNAPFEED_EXAMPLES": "20000"},
    ),
    Part(
        "delivery",
        "broker_kills replicate_daemon outage follow replica",
        sizes={
            "SNAPFEED_KILLS": "200",
            "SNAPFEED_SNAPSHOTS": "1000",
            "SNAPFEED_DIFFS": "5000",
            "SNAPFEED_EXAMPLES": "20000",
        },
    ),
)


@dataclass
class State:
    """Where a soak is: the next part of which round, and what was chosen. Kept as JSON."""

    seed: int
    last: int
    part: str
    only: list[str]
    seconds: int

    def store(self, results: Path) -> None:
        results.mkdir(parents=True, exist_ok=True)
        temporary = results / f"{STATE}.new"
        temporary.write_text(json.dumps(asdict(self)) + "\n")
        temporary.replace(results / STATE)


def resumed(results: Path) -> State:
    """What was stored. Raises SystemExit where nothing was, or what is no state of these parts."""
    try:
        found = State(**json.loads((results / STATE).read_text()))
        index(found.part)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"soak: nothing to go on with in {results / STATE} ({error!r}): leave --resume out") from error
    return found


def index(name: str) -> int:
    return {part.name: number for number, part in enumerate(PARTS)}[name]


def remaining(state: State) -> Iterator[tuple[int, Part]]:
    """(seed, part) of all that is still to be run, in order, beginning with the state's own. `only` runs in every round."""
    for seed in range(state.seed, state.last + 1):
        for number, part in enumerate(PARTS):
            chosen = part.name in state.only if state.only else part.due(seed)
            if chosen and (seed > state.seed or number >= index(state.part)):
                yield seed, part


def pytest(part: Part, environment: dict[str, str]) -> int:
    """Run it to its end: pytest's exit code."""
    options = ["-q", "-x", "-rP", "--no-header", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=0"]
    command = [sys.executable, "-m", "pytest", *options, *part.paths()]
    return subprocess.run(command, check=False, cwd=ROOT, env={**os.environ, **environment}).returncode


def soak(state: State, results: Path, run: Callable[[Part, dict[str, str]], int] = pytest) -> int:
    """All that remains. 0, or 1 after the first part that failed; `results` has then what --resume needs to run it again."""
    started = time.monotonic()
    for done, (seed, part) in enumerate(list(remaining(state)), 1):
        state.seed, state.part = seed, part.name
        state.store(results)
        environment = part.environment(seed, state.seconds, results)
        sizes = " ".join(f"{key}={value}" for key, value in environment.items())
        print(f"soak: round {seed} of {state.last}: {part.name} ({sizes})", flush=True)
        when, began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), time.monotonic()
        code = run(part, environment)
        took = time.monotonic() - began
        with open(results / LOG, "a", encoding="utf-8") as file:
            line = {
                "time": when,
                "part": part.name,
                "seed": seed,
                "sizes": environment,
                "seconds": round(took, 1),
                "exit": code,
            }
            file.write(json.dumps(line) + "\n")
        if code:
            print(f"soak: {part.name} failed in round {seed}: repeat it with --resume", file=sys.stderr)
            return 1
        hours = (time.monotonic() - started) / 3600
        print(f"soak: {part.name} passed in {took:.0f} s; {done} parts in {hours:.2f} h, none failed", flush=True)
    (results / STATE).unlink(missing_ok=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="the parts, their sizes, and how often they are due")
    parser.add_argument("--resume", action="store_true", help="go on where it was stopped, or has failed")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="this part, in every round (repeatable)"
    )
    parser.add_argument("--rounds", type=int, help="how many; 25, or 1 with --only")
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--seconds", type=int, default=3600, help="of the part endurance")
    options = parser.parse_args()
    if options.list:
        for part in PARTS:
            environment = part.environment(options.seed, options.seconds, RESULTS)
            sizes = " ".join(f"{key}={value}" for key, value in environment.items())
            print(f"{part.name}: every {part.every}. round: {sizes} {' '.join(part.paths())}")
        return 0
    unknown = set(options.only) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in PARTS)}")
    if options.resume:
        state = resumed(RESULTS)
    else:
        rounds = options.rounds or (1 if options.only else 25)
        state = State(options.seed, options.seed + rounds - 1, PARTS[0].name, options.only, options.seconds)
    try:
        return soak(state, RESULTS)
    except KeyboardInterrupt:
        print(f"soak: stopped in round {state.seed}, at {state.part}: go on with --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
