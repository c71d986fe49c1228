"""What a process costs: processor time and memory, from outside."""

import time
from pathlib import Path
from typing import NamedTuple

from partitions import wait_until

MB = 1e6


def cpu(pid: int) -> float:
    """Processor seconds of a process so far, all its threads, ended ones as well: its CPU clock (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


def wait_quiet(pid: int, calm: float = 0.5, deadline: float = 300) -> None:
    """Wait until a process has used no more than 2 ms of processor in the last `calm` seconds."""
    seen = (time.monotonic(), cpu(pid))

    def quiet() -> bool:
        nonlocal seen
        now, used = time.monotonic(), cpu(pid)
        if used - seen[1] > 0.002 + 0.002 * (now - seen[0]) / calm:
            seen = (now, used)
        return now - seen[0] >= calm

    wait_until(quiet, f"process {pid} is quiet", deadline)


class Cost(NamedTuple):
    """Seconds: as the clock on the wall has it, and on a processor."""

    wall: float
    cpu: float


class Clock:
    """Runs from its making on: what has passed since then, and what a process (by default ours) has used meanwhile."""

    def __init__(self, pid: int | None = None) -> None:
        self.pid = pid
        self.used = self._used()
        self.started = time.perf_counter()

    def read(self) -> Cost:
        wall = time.perf_counter() - self.started
        return Cost(wall, self._used() - self.used)

    def _used(self) -> float:
        return time.process_time() if self.pid is None else cpu(self.pid)


class Memory(NamedTuple):
    """In MB (10^6 bytes)."""

    rss: float
    peak: float  # of rss
    pss: float
    anonymous: float


def memory(pid: int) -> Memory:
    status = _fields(Path(f"/proc/{pid}/status").read_text())
    rollup = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text())
    return Memory(status["VmRSS"], status["VmHWM"], rollup["Pss"], status["RssAnon"])


def reset_peak(pid: int) -> None:
    """Let VmHWM begin anew at what is resident now (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _fields(text: str) -> dict[str, float]:
    found = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[key] = int(value.split()[0]) * 1024 / MB
    return found
