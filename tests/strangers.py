"""Another process that does things to files: what a source sees of others, as against of ourselves."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

_BODY = """
import os, sys, traceback
for line in sys.stdin:
    try:
        exec(eval(line), {"os": os})
        print("done", flush=True)
    except BaseException:
        print(repr(traceback.format_exc()), flush=True)
"""


class Stranger:
    """Executes Python in a process of its own, in the directory given; `do` returns when it is done."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process
        self.pid = process.pid

    def do(self, code: str) -> None:
        self.begin(code)
        self.wait()

    def begin(self, code: str) -> None:
        self._process.stdin.write(repr(code) + "\n")
        self._process.stdin.flush()

    def wait(self) -> None:
        answer = self._process.stdout.readline().strip()
        if answer != "done":
            raise AssertionError(f"the stranger failed: {answer}")


@contextlib.contextmanager
def stranger(directory) -> Iterator[Stranger]:
    command = [sys.executable, "-S", "-c", _BODY]
    with subprocess.Popen(
        command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="ascii"
    ) as process:
        try:
            yield Stranger(process)
        finally:
            process.stdin.close()
            process.kill()
