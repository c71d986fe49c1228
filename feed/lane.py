"""The pages of one partition on one connection: sent in order, acknowledged in order, stopped only by trouble of their own."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from comparer.errors import SnapfeedError, TransientError
from feed.backoff import Backoff
from feed.cloudevents import ROOM, event
from feed.connection import REFUSED, Connection, event_properties
from feed.outbox import Outbox, OutPage, Position
from feed.pages import payload_limit

_LOG = logging.getLogger("snapfeed.feed")
_BATCH = 128  # pages fetched at a time; how many bytes that may be is the outbox's business


@dataclass(slots=True)
class LaneStats:
    """What happened to one partition's pages since the daemon started. `position` is the last acknowledged one."""

    sent: int = 0
    acknowledged: int = 0
    refused: int = 0
    bytes: int = 0
    position: Position | None = None
    last_error: str | None = None


class _Refused(Exception):  # noqa: N818 -- an answer, not an error
    """The broker answered a page with a reason of 0x80 or more."""


@dataclass(slots=True)
class _Flight:
    """Pages sent and not yet acknowledged, oldest first; `landed` is set whenever something changed."""

    pages: deque[tuple[OutPage, asyncio.Future[int]]]
    more: asyncio.Event


class Lane:
    """Moves pages from an outbox to a connection until cancelled or told to `stop`.

    Go-back-N: after a refused page everything from it on is sent again, as is everything unacknowledged on the next connection.
    While a partition is refused, one page at a time is tried, with back-off.
    """

    def __init__(
        self, outbox: Outbox, topic: str, stats: LaneStats, notify: Callable[[], None], backoff: Backoff
    ) -> None:
        self.outbox = outbox
        self.stats = stats
        self._topic = topic
        self._notify = notify
        self._backoff = backoff
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Send nothing more; `run` returns when what is in flight has been acknowledged."""
        self._stopping.set()

    async def run(self, connection: Connection, packet: int) -> None:
        """Publish until stopped. `packet` is the largest packet in bytes. Raises LinkError when the connection is gone."""
        limit = payload_limit(packet, self._topic, ROOM if connection.v5 else 0)
        probing = False
        while not self._stopping.is_set():
            try:
                await self._stream(connection, limit, probing)
            except _Refused as error:
                probing = True
                self.stats.refused += 1
                self._trouble(str(error))
                await self._pause(self._backoff.delay(), wake=False)
            except TransientError as error:
                self._trouble(f"partition {self.outbox.partition}: {error}")
                await self._pause(self._backoff.delay(), wake=True)
            except SnapfeedError as error:
                self._trouble(f"partition {self.outbox.partition}: {error}")
                await self._pause(30.0, wake=True)
            else:
                probing = False

    async def _stream(self, connection: Connection, limit: int, probing: bool) -> None:
        """From the acknowledged position on; when probing, return after one page was taken."""
        flight = _Flight(deque(), asyncio.Event())
        sender = asyncio.create_task(self._send(connection, limit, flight, probing))
        landing = asyncio.create_task(self._land(flight, sender))
        try:
            await landing
        finally:
            for task in (sender, landing):
                task.cancel()
            await asyncio.gather(sender, landing, return_exceptions=True)
            # What is still under way keeps its place in the window until its answer comes; nobody reads that answer.

    async def _send(self, connection: Connection, limit: int, flight: _Flight, probing: bool) -> None:
        after: Position | None = None
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            while not stopped.done():
                self.outbox.ready.clear()
                pages = await self.outbox.fetch(after, limit, 1 if probing else _BATCH)
                for page in pages:
                    if stopped.done():
                        return
                    if len(page.payload) > limit:
                        seq, number = page.position
                        raise TransientError(
                            f"page {number} of diff {seq} has {len(page.payload)} bytes, {limit} fit the broker's packets"
                        )
                    properties = event_properties(event(page.payload, self._topic)) if connection.v5 else None
                    flight.pages.append((page, await connection.post(self._topic, page.payload, properties=properties)))
                    flight.more.set()
                    self.stats.sent += 1
                    self.stats.bytes += len(page.payload)
                    after = page.position
                if probing and pages:
                    return
                if not pages:
                    if not flight.pages:
                        self._mended()  # it can be read again, and nothing is left to be refused
                    ready = asyncio.create_task(self.outbox.ready.wait())
                    try:
                        await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        ready.cancel()
        finally:
            stopped.cancel()

    async def _land(self, flight: _Flight, sender: "asyncio.Task[None]") -> None:
        """Wait for acknowledgements in order and tell the outbox; several that came together are told as one."""
        while True:
            while not flight.pages:
                if sender.done():
                    sender.result()
                    return
                flight.more.clear()
                more = asyncio.create_task(flight.more.wait())
                try:
                    await asyncio.wait({more, sender}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    more.cancel()
            await asyncio.wait({flight.pages[0][1]})
            taken, failure = self._take(flight)
            if taken is not None:
                await self.outbox.acknowledge(taken)
                self.stats.position = taken
                self._mended()
            if failure is not None:
                raise failure

    def _take(self, flight: _Flight) -> tuple[Position | None, Exception | None]:
        """Remove the answered pages at the head: the last good position, and what stands behind it if that is a failure."""
        taken: Position | None = None
        while flight.pages and flight.pages[0][1].done():
            page, answer = flight.pages.popleft()
            error = answer.exception()
            if error is not None:
                return taken, error if isinstance(error, Exception) else None
            reason = answer.result()
            if reason >= REFUSED:
                seq, number = page.position
                text = f"the broker refuses page {number} of diff {seq} on {self._topic} (reason {reason:#04x})"
                host = self._topic.split("/")[-3]
                acl = f"the broker's ACL and quotas; this host is {host} in topics ([broker] host)"
                return taken, _Refused(f"{text}; it is kept and tried again; check {acl}")
            self.stats.acknowledged += 1
            taken = page.position
        return taken, None

    def _trouble(self, text: str) -> None:
        if self.stats.last_error != text:
            self.stats.last_error = text
            _LOG.warning("%s", text)
            self._notify()

    def _mended(self) -> None:
        self._backoff.reset()
        if self.stats.last_error is not None:
            _LOG.info("partition %s: pages are taken again", self.outbox.partition)
            self.stats.last_error = None
            self._notify()

    async def _pause(self, seconds: float, *, wake: bool) -> None:
        """Wait, but not longer than until told to stop or, where that may help, until the outbox has something new."""
        waits = [asyncio.create_task(self._stopping.wait())]
        if wake:
            waits.append(asyncio.create_task(self.outbox.ready.wait()))
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)  # their cancellation, and not ours, is swallowed
