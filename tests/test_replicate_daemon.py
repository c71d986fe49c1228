"""`snapfeed replicate` with a real daemon and broker: catches up, follows, verifies."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from broker_processes import mosquitto
from daemon_process import CLI, HOST, ROOT, daemon, environment, facts, snapfeed
from partitions import partition, run, wait_until
from test_replica import Gardener, assert_same, work

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("fs", ["xfs", "btrfs", "ext4"])
def test_a_replica_catches_up_follows_and_is_exact(fs, tmp_path):
    copy = tmp_path / "copy"
    with (
        partition(fs, tmp_path) as part,
        mosquitto(tmp_path) as broker,
        daemon(tmp_path, part.path, broker=broker.url) as running,
    ):
        worker = Gardener(os.fsencode(part.path), 3, reflink=fs != "ext4")
        work(part, worker, 150)
        taken = running.snapshot()
        wait_until(lambda: running.published(taken["seq"]), "the first diffs are published: only a baseline can help")
        where = ["--broker", broker.url, "--host", HOST, "--partition", taken["partition"], "--source", part.path]
        done = facts("replicate", *where, "--once", copy)
        assert [(one["seq"], one["baseline"]) for one in done] == [(taken["seq"], True)]
        assert_same(part.path, copy)

        for _ in range(2):
            work(part, worker, 80)
            taken = running.snapshot()
        wait_until(lambda: running.published(taken["seq"]), "more diffs are published: replayed")
        done = facts("replicate", *where, "--once", copy)
        assert done[-1]["seq"] == taken["seq"]
        assert not any(one["baseline"] for one in done)
        assert_same(part.path, copy)
        assert facts("replicate", *where, "--once", copy) == []
        assert ", 0 disagreements; content of " in snapfeed("replicate", "--verify", "--source", part.path, copy).stdout

        command = [*CLI, "replicate", *where, "--json", copy]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment()) as following:
            try:
                work(part, worker, 60)
                taken = running.snapshot()
                assert json.loads(following.stdout.readline())["seq"] == taken["seq"]
                assert_same(part.path, copy)
                following.send_signal(signal.SIGINT)
                assert following.wait(20) == 0
            finally:
                following.kill()


SNAPSHOTS = int(os.environ.get("SNAPFEED_SNAPSHOTS", "12"))
KILLS = int(os.environ.get("SNAPFEED_KILLS", "4"))

MAKEFILE = """
OBJECTS := $(patsubst src/%.c,build/%.o,$(wildcard src/*.c))
program: $(OBJECTS)
\tgcc -o $@.new $^ && mv $@.new $@
build/%.o: src/%.c src/all.h
\t@mkdir -p build
\tgcc -MMD -c -o $@ $<
clean:
\trm -rf build program
"""


def source_file(number, value):
    main = "int main(void) { return one0() != 0; }\n" if not number else ""
    return f'#include "all.h"\nint one{number}(void) {{ return {value} + {number}; }}\n{main}'


class Project:
    """A small C project: edited, built, cleaned, branched."""

    def __init__(self, top, files, seed):
        self.top, self.files, self.random = top, files, random.Random(seed)
        (top / "src").mkdir()
        (top / "Makefile").write_text(MAKEFILE)
        (top / "src/all.h").write_text("".join(f"int one{n}(void);\n" for n in range(files)))
        for number in range(files):
            (top / f"src/{number}.c").write_text(source_file(number, 0))

    def work(self):
        for _ in range(3):
            number = self.random.randrange(self.files)
            (self.top / f"src/{number}.c").write_text(source_file(number, self.random.randrange(1000)))
        what = self.random.random()
        if what < 0.15:
            run("make", "-C", self.top, "clean")
        elif what < 0.3:
            (self.top / "src/all.h").touch()
        elif what < 0.4:
            shutil.copytree(self.top / "src", self.top / f"branch{self.random.randrange(3)}", dirs_exist_ok=True)
        run("make", "-s", "-j2", "-C", self.top, "program")


def test_a_tree_that_is_being_built_stays_exact(tmp_path):
    """The replicator is killed at random while diffs arrive; SNAPFEED_SNAPSHOTS, SNAPFEED_KILLS: how many."""
    dice = random.Random(4)
    with (
        partition("xfs", tmp_path) as part,
        partition("ext4", tmp_path) as target,
        mosquitto(tmp_path) as broker,
        daemon(tmp_path, part.path, broker=broker.url) as running,
    ):
        copy = target.path / "copy"
        name = running.partition()["partition"]
        where = [
            "--broker",
            broker.url,
            "--host",
            HOST,
            "--partition",
            name,
            "--source",
            str(part.path),
            "--consumer",
            "copy",
        ]
        said = (tmp_path / "said").open("wb")

        def start():
            return subprocess.Popen(
                [*CLI, "replicate", *where, "--json", copy], stdout=said, stderr=said, cwd=ROOT, env=environment()
            )

        replicator, killed, project = start(), 0, Project(part.path, 30, 7)
        try:
            for number in range(SNAPSHOTS):
                project.work()
                head = running.snapshot()["seq"]
                if killed < KILLS and dice.random() < 1.5 * KILLS / SNAPSHOTS:
                    time.sleep(dice.uniform(0, 1.2))  # anywhere: connecting, applying, idle
                    replicator.kill()
                    replicator.wait()
                    killed += 1
                    replicator = start()
                elif number % 10 == 9:
                    wait_until(lambda head=head: held(running, head), f"the copy has {head}", 60)
            wait_until(lambda: held(running, head), f"the copy has {head}", 90)
            replicator.send_signal(signal.SIGINT)
            assert replicator.wait(20) == 0, (tmp_path / "said").read_text()
        finally:
            replicator.kill()
            replicator.wait()
            said.close()
        assert killed >= KILLS // 2
        assert_same(part.path, copy)
        diffs = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines() if line.startswith("{")]
        print(f"{SNAPSHOTS} snapshots, {killed} kills, {len(diffs)} diffs applied")


def held(running, head):
    return any(c["consumer"] == "copy" and c["seq"] >= head for c in running.partition()["consumers"])
