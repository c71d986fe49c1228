"""A writer of random work, as fast as it can, until a line comes on stdin: python hammer.py TOP SEED [REFLINK]."""

import os
import select
import sys

from workload import OPERATIONS, Worker

if __name__ == "__main__":
    worker = Worker(os.fsencode(sys.argv[1]), int(sys.argv[2]), reflink=len(sys.argv) > 3)
    # a file that another writer truncates while it is mapped is a SIGBUS
    OPERATIONS[:] = [operation for operation in OPERATIONS if operation[1] != "mapped"]
    steps = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        try:
            worker.step()
        except OSError:
            continue  # another writer was faster
        worker.log.clear()
        steps += 1
    print(steps)
