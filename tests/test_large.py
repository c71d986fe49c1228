"""Large trees: a directory of many entries made, moved (one record) and removed; paths 1,000 deep."""

import contextlib
import json
import os
import shutil

import pytest
from broker_processes import collector, mosquitto
from daemon_process import HOST, daemon
from oracle import walk
from partitions import partition, run, wait_until

from feed.encode import decode_change
from feed.model import TreeModel

ENTRIES = int(os.environ.get("SNAPFEED_ENTRIES", "20000"))  # `make soak` has 100,000


class Feed:
    """A daemon on one partition and a consumer of its pages."""

    def __init__(self, fs, directory, stack, size="2G"):
        part = stack.enter_context(partition(fs, directory, size))
        self.top = os.fsencode(part.path)
        broker = stack.enter_context(mosquitto(directory))
        self.pages = stack.enter_context(collector(broker, f"snapfeed/{HOST}/+/changes"))
        self.daemon = stack.enter_context(daemon(directory, part.path, broker=broker.url))
        self.model = TreeModel()
        self.seq = 0
        self.ops: list[str] = []
        wait_until(lambda: self.daemon.partition()["head"], "the baseline")
        self.snapshot()

    def snapshot(self):
        """Take one, catch up, compare with a walk; the operations of the diffs that came."""
        answer = self.daemon.snapshot()
        self.ops = []
        wait_until(lambda: self.take() >= answer["seq"], f"diff {answer['seq']}", 120)
        walked = walk(self.top)
        assert self.model.paths.keys() == walked.keys()
        for path, ident in self.model.paths.items():
            attr, found = self.model.attrs[ident], walked[path]
            told = (ident.ino, str(attr.type), attr.size, attr.mode, attr.nlink, attr.mtime_ns, attr.ctime_ns)
            assert told == tuple(found[k] for k in ("ino", "type", "size", "mode", "nlink", "mtime_ns", "ctime_ns")), (
                path
            )
        return self.ops

    def take(self):
        for message in self.pages.new():
            page = json.loads(message.payload)
            for document in page["changes"]:
                self.model.apply(decode_change(document))
                self.ops.append(document["op"])
            if page["page"] == page["pages"]:
                self.seq = page["seq"]
        return self.seq


@pytest.mark.kernel
@pytest.mark.parametrize("fs", ["xfs", "btrfs"])
def test_a_directory_of_many_entries(fs, tmp_path):
    with contextlib.ExitStack() as stack:
        feed = Feed(fs, tmp_path, stack)
        read = feed.daemon.io()["read_bytes"]
        many = feed.top + b"/many"
        os.mkdir(many)
        for number in range(ENTRIES):
            os.close(os.open(b"%b/%d" % (many, number), os.O_WRONLY | os.O_CREAT))
        assert feed.snapshot().count("create") == ENTRIES + 1
        os.mkdir(feed.top + b"/below")
        feed.snapshot()
        os.rename(many, feed.top + b"/below/moved")
        ops = feed.snapshot()
        assert ops.count("rename") == 1
        assert set(ops) <= {"rename", "modify"}
        assert len(ops) <= 3
        shutil.rmtree(feed.top + b"/below/moved")
        assert feed.snapshot().count("delete") == ENTRIES + 1
        assert (
            feed.daemon.io()["read_bytes"] - read < 64 << 20
        )  # metadata of the file system at most, when memory is short


@pytest.mark.kernel
@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4"])
def test_a_path_a_thousand_deep(fs, tmp_path):
    with contextlib.ExitStack() as stack:
        feed = Feed(fs, tmp_path, stack)
        path = feed.top + b"/deep"
        for depth in range(1001):
            os.mkdir(path + b"/d" * depth)
        with open(path + b"/d" * 1000 + b"/file", "wb") as file:
            file.write(b"x" * 5000)
        assert feed.snapshot().count("create") == 1002
        os.rename(path + b"/d" * 500, feed.top + b"/half")
        assert feed.snapshot().count("rename") == 1
        with open(feed.top + b"/half" + b"/d" * 500 + b"/file", "ab") as file:
            file.write(b"y")
        feed.snapshot()
        run("rm", "-r", feed.top + b"/half")
        assert feed.snapshot().count("delete") == 502


if "SNAPFEED_SOURCE" in os.environ:  # a source tarball to unpack and build in: minutes, so not in the suite

    @pytest.mark.kernel
    @pytest.mark.parametrize("fs", ["xfs", "btrfs"])
    def test_unpacking_a_large_source_tree_and_building_in_it(fs, tmp_path):
        with contextlib.ExitStack() as stack:
            feed = Feed(fs, tmp_path, stack, "8G")
            run("tar", "-xf", os.environ["SNAPFEED_SOURCE"], "-C", feed.top, timeout=600)
            created = feed.snapshot().count("create")
            assert created > 1000
            tree = next(e.path for e in os.scandir(feed.top) if e.is_dir() and e.name != b".snapfeed")
            done = run("make", "-C", tree, "-j2", "defconfig", "scripts", check=False, timeout=600)
            print(created, "created; make exited", done.returncode)
            feed.snapshot()
            os.rename(tree, feed.top + b"/renamed")
            assert feed.snapshot().count("rename") == 1
            run("rm", "-r", feed.top + b"/renamed")
            assert feed.snapshot().count("delete") >= created
