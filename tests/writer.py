"""A writer that can be told to pause: random work on several partitions until its stdin ends: python writer.py SEED TOP...

Lines on stdin: `go` and `pause`; each `pause` is answered by `paused STEPS` once nothing more is written.
"""

import contextlib
import os
import random
import select
import shutil
import sys
import time

from workload import OPERATIONS, Worker

# of entries: more are thrown away again, so that what a daemon has to know about does not grow
MOST = 350
PACE = 0.02  # seconds between two steps: as fast as possible is what hammer.py is for


def burst(top: bytes, number: int) -> None:
    """Many files at once, enough for several pages."""
    where = os.path.join(top, b"many%d" % number)
    os.makedirs(where, exist_ok=True)
    for name in range(60):
        os.close(os.open(os.path.join(where, b"f%d" % name), os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644))


def step(worker: Worker, dice: random.Random) -> None:
    worker.step()
    worker.log.clear()
    chance = dice.random()
    if chance < 0.004:
        burst(worker.top, dice.randrange(3))
    if chance > 0.95:
        dirs, others = worker.paths()
        if len(dirs) + len(others) > MOST:
            for directory in dirs[1::2]:
                shutil.rmtree(directory, ignore_errors=True)


def main(seed: int, tops: list[str]) -> None:
    # a file that another writer truncates while it is mapped is a SIGBUS
    OPERATIONS[:] = [operation for operation in OPERATIONS if operation[1] != "mapped"]
    dice = random.Random(seed)
    workers = [Worker(os.fsencode(top), dice.randrange(1 << 30), reflink=not top.endswith("ext4")) for top in tops]
    going, steps = False, 0
    while True:
        if select.select([0], [], [], 0 if going else None)[0]:
            told = os.read(0, 100).split()
            if not told:
                return
            going = told[-1] == b"go"
            if not going:
                print(f"paused {steps}", flush=True)
            continue
        with contextlib.suppress(OSError):  # another writer was faster
            step(dice.choice(workers), dice)
        steps += 1
        time.sleep(PACE * dice.random())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
