"""bench/soak.py goes through its parts in order, stops at the first that fails, and goes on there."""

import json

import pytest

from bench.soak import LOG, PARTS, STATE, Part, State, remaining, resumed, soak


class Runner:
    """Stands in for pytest: fails once it comes to (seed, part)."""

    def __init__(self, fails=None):
        self.fails, self.ran = fails, []

    def __call__(self, part, environment):
        at = (int(environment["SNAPFEED_SEED"]), part.name)
        self.ran.append(at)
        return int(at == self.fails)


def beginning(last=3, only=()):
    return State(1, last, PARTS[0].name, list(only), 60)


def test_the_first_round_has_every_part_and_the_second_those_that_are_due():
    found = [(seed, part.name) for seed, part in remaining(beginning(2))]
    assert found == [*((1, part.name) for part in PARTS), (2, "exact")]


def test_what_was_chosen_is_run_in_every_round():
    found = [(seed, part.name) for seed, part in remaining(beginning(3, ["overflow", "endurance"]))]
    assert found == [(seed, name) for seed in (1, 2, 3) for name in ("endurance", "overflow")]


@pytest.mark.parametrize("fails", [(1, "exact"), (1, "overflow"), (2, "exact"), (6, "races")])
def test_it_goes_on_with_the_part_that_failed(fails, tmp_path):
    whole, first, second = Runner(), Runner(fails), Runner()
    assert soak(beginning(7), tmp_path, whole) == 0
    assert not (tmp_path / STATE).exists()
    assert soak(beginning(7), tmp_path, first) == 1
    assert first.ran[-1] == fails
    assert soak(resumed(tmp_path), tmp_path, second) == 0
    assert first.ran[:-1] + second.ran == whole.ran
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [(line["seed"], line["part"]) for line in lines] == whole.ran + first.ran + second.ran
    assert [line["exit"] for line in lines].count(1) == 1


def test_an_interrupted_part_is_run_again(tmp_path):
    def interrupted(part, environment):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        soak(beginning(only=["races"]), tmp_path, interrupted)
    assert resumed(tmp_path).part == "races"


@pytest.mark.parametrize(
    "text", [None, "", "{}", '{"seed": 1}', '{"seed":1,"last":1,"part":"?","only":[],"seconds":1}']
)
def test_nothing_to_go_on_with_is_told(text, tmp_path):
    if text is not None:
        (tmp_path / STATE).write_text(text)
    with pytest.raises(SystemExit, match="leave --resume out"):
        resumed(tmp_path)


def test_sizes_are_filled_in(tmp_path):
    part = Part("x", "a b", sizes={"SNAPFEED_SECONDS": "{seconds}", "SNAPFEED_REPORT": "{results}/x-{seed}"})
    assert part.environment(7, 60, tmp_path) == {
        "SNAPFEED_SEED": "7", "SNAPFEED_RANDOM": "1", "SNAPFEED_SECONDS": "60", "SNAPFEED_REPORT": f"{tmp_path}/x-7",
    }  # fmt: skip
    assert part.paths() == ["tests/test_a.py", "tests/test_b.py"]
