"""The self-test of an event source: touch a canary, demand its event. Tells "watching" from "blind"."""

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

DEADLINE = 5.0


class Testable(Protocol):
    """An event source that can be asked to notice this process's own touch of the system directory."""

    def expect_own(self) -> AbstractContextManager[asyncio.Event]:
        """While open, an event caused by this process in the system directory sets the asyncio.Event.

        What was queued before is drained first and does not count. The canary's events do not enter the dirty set.
        """


async def self_test(source: Testable, touch: Callable[[], None], deadline: float = DEADLINE) -> bool:
    """Whether a started source hears. `touch` makes and removes a file in the system directory.

    Called in the source's loop. False: no event within `deadline` seconds. What `touch` raises is passed on.
    """
    with source.expect_own() as seen:
        touch()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                await seen.wait()
        return seen.is_set()
