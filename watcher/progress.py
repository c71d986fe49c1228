"""How far a piece of work is: told by its thread, shown by the loop, and not more often than anybody looks."""

import asyncio
import math
import time
from collections.abc import Callable

EVERY = 0.2  # seconds


def reporter(
    loop: asyncio.AbstractEventLoop, show: Callable[[int], None], now: Callable[[], float] = time.monotonic
) -> Callable[[int], None]:
    """To be called with the number of entries done, from any one thread; `show` is called in the loop, at most EVERY seconds.

    Each time wakes the loop, which takes the processor from the work it tells of: a reconcile tells every 1,024 entries.
    """
    last = -math.inf

    def report(entries: int) -> None:
        nonlocal last
        moment = now()
        if moment - last >= EVERY:
            last = moment
            loop.call_soon_threadsafe(show, entries)

    return report
