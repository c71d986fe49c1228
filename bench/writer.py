"""A writer in a process of its own: writer.py DIRECTORY COUNT creates and writes COUNT files in the directories that are there.

Prints how many seconds it took, and how many of them on a processor.
"""

import os
import sys
import time


def main(top: str, count: int) -> tuple[float, float]:
    directories = sorted(entry.path for entry in os.scandir(top) if entry.is_dir() and entry.name.startswith("d"))
    share = -(-count // len(directories))
    data = b"x" * 100
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    started, used = time.perf_counter(), time.process_time()
    for number in range(count):
        fd = os.open(f"{directories[number // share]}/f{number}", flags, 0o644)
        os.write(fd, data)
        os.close(fd)
    return time.perf_counter() - started, time.process_time() - used


if __name__ == "__main__":
    print(*main(sys.argv[1], int(sys.argv[2])))
