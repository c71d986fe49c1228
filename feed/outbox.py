"""The contract between the journal and the publisher: pages to send, in order, and how far they were acknowledged.

Implemented over the system file by the daemon, over a list in tests. All methods are coroutines or cheap; none blocks.
"""

import asyncio
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Position(NamedTuple):
    """The key of a page: snapshot number and page (from 1). Orders as the feed does."""

    seq: int
    page: int


@dataclass(frozen=True, slots=True)
class OutPage:
    """One page, ready to send. `last` marks the last page of its diff."""

    position: Position
    last: bool
    payload: bytes


class Outbox(Protocol):
    """The unpublished pages of one partition."""

    @property
    def partition(self) -> str:
        """The partition's name, as in topics."""

    @property
    def ready(self) -> asyncio.Event:
        """Set when there may be pages after the last fetch; the publisher clears it before it fetches."""

    async def fetch(self, after: Position | None, limit: int, count: int) -> list[OutPage]:
        """Some, at most `count`, of the next pages after `after` (None: after the acknowledged position), none
        larger than `limit` bytes.

        Empty when there is nothing. Raises TransientError while the partition cannot be read (unmounted, I/O error);
        the publisher then waits for `ready`.
        """

    async def acknowledge(self, position: Position) -> None:
        """All pages up to `position` have a good PUBACK."""
