"""Reading a kernel descriptor in asyncio: at once after a quiet time, in batches under load.

KERNEL.md's measurement: waiting 50 ms between two reads makes following seven times cheaper, because the kernel merges
equal events and one read returns many. The first events after a quiet time are somebody's single write, though, whose page is
waited for: so the waits begin short and double while there is something to read after each.
"""

import asyncio
from collections.abc import Callable

INTERVAL = 0.05  # seconds between two reads under load
SHORTEST = 0.001  # seconds between the first two: a file is created, written and closed in less


class BatchedReader:
    """Calls `drain` when `fd` becomes readable, then not again for at most `interval` seconds; `wake` if it found anything.

    `drain` returns whether it collected something; it must not block.
    """

    def __init__(
        self, fd: int, drain: Callable[[], bool], wake: Callable[[], None], interval: float = INTERVAL
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._drain = drain
        self._wake = wake
        self._interval = interval
        self._wait = SHORTEST
        self._resumed = 0.0  # the loop's time
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        quiet = self._loop.time() - self._resumed
        self._wait = SHORTEST if quiet > self._interval else min(self._wait * 2, self._interval)
        self._loop.remove_reader(self._fd)
        self._timer = self._loop.call_later(self._wait, self._resume)
        if self._drain():
            self._wake()

    def _resume(self) -> None:
        self._timer = None
        self._resumed = self._loop.time()
        self._loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Stop reading; to be called before the descriptor is closed. Once."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop.remove_reader(self._fd)
