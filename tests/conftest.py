"""Fixtures: real partitions. `part` runs a test on every file system; `xfs`, `btrfs`, `ext4` on one."""

import contextlib
import os
import signal
import threading

import pytest
from hypothesis import settings
from partitions import beside_others, partition, require

from snapshotter.linux import batch

# The suite says the same of the same code each time; SNAPFEED_RANDOM=1 (and `make soak`) looks elsewhere each time.
settings.register_profile("suite", derandomize="SNAPFEED_RANDOM" not in os.environ)
settings.load_profile("suite")


def pytest_configure():
    """Ended by SIGTERM (a time limit, an impatient user), a run cleans up as after Ctrl-C: partitions are unmounted.

    In the background of a script SIGINT is ignored, also by what is started; here it is not, since tests end programs with it.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _beside_others(request):
    """What a test does to the whole machine (`alone_on_this_machine`) waits for the other real ones, and they for it."""
    with beside_others() if request.node.get_closest_marker("kernel") else contextlib.nullcontext():
        yield


@pytest.fixture(params=["xfs", "btrfs", "ext4"])
def part(request, tmp_path):
    with partition(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def xfs(tmp_path):
    with partition("xfs", tmp_path) as made:
        yield made


@pytest.fixture
def btrfs(tmp_path):
    with partition("btrfs", tmp_path) as made:
        yield made


@pytest.fixture
def ext4(tmp_path):
    with partition("ext4", tmp_path) as made:
        yield made


@pytest.fixture
def one_by_one(monkeypatch):
    """Without the library in C: one system call at a time, from Python."""
    monkeypatch.setattr(batch, "_library", None)


@pytest.fixture(params=["library", "one by one"])
def both_ways(request):
    """With the library in C, and without it."""
    if request.param == "one by one":
        request.getfixturevalue("one_by_one")
    else:
        require(batch.available(), "a compiler when this was installed (snapshotter/linux/batch.c)")
