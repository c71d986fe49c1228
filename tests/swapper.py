"""A writer that exchanges directories for symbolic links to the outside, and back, until its stdin ends: swapper.py TOP.

`prepare` makes `swapped0` ... with files in them below TOP, and links to directories of the same names and content in OUTSIDE.
Between two exchanges it changes a file, so that there is always something to look at and to clone. Prints how often it exchanged.
"""

import ctypes
import os
import select
import sys

PAIRS, FILES = 4, 6
RENAME_EXCHANGE = 2
libc = ctypes.CDLL(None, use_errno=True)


def fill(directory: str) -> None:
    """The same names inside and outside: what is looked up through a link is found there, too."""
    os.makedirs(os.path.join(directory, "below", "deeper"))
    for where in ("", "below", "below/deeper"):
        for number in range(FILES):
            with open(os.path.join(directory, where, f"file{number}"), "wb") as file:
                file.write(b"x" * 5000)


def prepare(top: str, outside: str) -> None:
    for number in range(PAIRS):
        fill(os.path.join(outside, f"swapped{number}"))
        fill(os.path.join(top, f"swapped{number}"))
        os.symlink(os.path.join(outside, f"swapped{number}"), os.path.join(top, f"swapped-link{number}"))
        os.symlink(os.path.join(outside, f"swapped{number}"), os.path.join(top, f"swapped{number}", "swapped-link"))


def exchange(directory: int, one: str, other: str) -> None:
    if libc.renameat2(directory, os.fsencode(one), directory, os.fsencode(other), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main(top: str) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    root = os.open(top, flags)
    inside = [os.open(f"swapped{number}", flags, dir_fd=root) for number in range(PAIRS)]
    done = 0
    while not select.select([0], [], [], 0)[0]:
        number = done % PAIRS
        exchange(root, f"swapped{number}", f"swapped-link{number}")
        exchange(inside[number], "below", "swapped-link")
        name = f"file{done // PAIRS % FILES}"
        file = os.open(name, os.O_WRONLY | os.O_NOFOLLOW, dir_fd=inside[number])
        os.write(file, b"%d" % done)
        os.close(file)
        if done % 7 == 0:
            os.rename(name, "moved", src_dir_fd=inside[number], dst_dir_fd=inside[number])
            os.rename("moved", name, src_dir_fd=inside[number], dst_dir_fd=inside[number])
        done += 1
    # an even number of exchanges: everything is where it was
    for number in range(PAIRS):
        if (done - number + PAIRS - 1) // PAIRS % 2:
            exchange(root, f"swapped{number}", f"swapped-link{number}")
            exchange(inside[number], "below", "swapped-link")
    return done


if __name__ == "__main__":
    print(main(sys.argv[1]))
