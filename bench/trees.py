"""The trees that are measured: made, and changed, in ways that do not depend on who is measured."""

import os
from pathlib import Path
from random import Random

PER_DIRECTORY = 1000
LARGE_EVERY = 50
LARGE = 16384  # bytes; the others have 100
SMALL = 100
APPENDED, WRITTEN_WITHIN = 70, 30


def fill(top: Path, files: int) -> None:
    """Make `files` files of 100 bytes, each fiftieth of 16 KiB, a thousand to a directory, and write them to the disk."""
    small, large = b"x" * SMALL, b"y" * LARGE
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    for first in range(0, files, PER_DIRECTORY):
        directory = top / f"{first // PER_DIRECTORY}"
        directory.mkdir()
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for number in range(first, min(first + PER_DIRECTORY, files)):
                file = os.open(f"{number}", flags, 0o644, dir_fd=fd)
                os.write(file, small if number % LARGE_EVERY else large)
                os.close(file)
        finally:
            os.close(fd)
    os.sync()


def name(number: int) -> str:
    return f"{number // PER_DIRECTORY}/{number}"


def edit(top: Path, files: int, random: Random) -> set[str]:
    """Append to 70 small files, write a block within 30 large ones; the paths. Fewer where there are not so many."""
    large = random.sample(range(0, files, LARGE_EVERY), min(WRITTEN_WITHIN, -(-files // LARGE_EVERY)))
    small: set[int] = set()
    while len(small) < min(APPENDED, files // 4):
        number = random.randrange(files)
        if number % LARGE_EVERY:
            small.add(number)
    for number in small:
        fd = os.open(top / name(number), os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"z" * SMALL)
        os.close(fd)
    for number in large:
        fd = os.open(top / name(number), os.O_WRONLY)
        os.pwrite(fd, random.randbytes(4096), 4096 * random.randrange(LARGE // 4096))
        os.close(fd)
    return {name(number) for number in (*small, *large)}
