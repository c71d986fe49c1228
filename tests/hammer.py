"""A writer of random work, as fast as it can, until a line comes on stdin: python hammer.py TOP SEED [reflink] [nolink]."""

import os
import select
import sys

from workload import OPERATIONS, Worker

if __name__ == "__main__":
    worker = Worker(os.fsencode(sys.argv[1]), int(sys.argv[2]), reflink="reflink" in sys.argv)
    if "nolink" in sys.argv:  # inotify does not tell whose a name was that came and went between two readings
        OPERATIONS[:] = [operation for operation in OPERATIONS if operation[1] != "link"]
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
