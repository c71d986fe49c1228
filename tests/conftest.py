"""Fixtures: real partitions. `part` runs a test on every file system; `xfs`, `btrfs`, `ext4` on one."""

import pytest
from partitions import partition


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
