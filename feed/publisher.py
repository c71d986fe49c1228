"""The publisher: one per broker, for ever. Diffs from outboxes, retained states, status with a last will, commands."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiomqtt
import orjson

from feed.backoff import Backoff
from feed.broker import BrokerConfig, check, topics
from feed.connection import (
    PACKET_TOO_LARGE,
    REFUSED,
    SESSION_TAKEN_OVER,
    Connection,
    Limits,
    LinkError,
    PacketError,
)
from feed.dialer import Dialer
from feed.documents import StatusDocument
from feed.lane import Lane, LaneStats
from feed.outbox import Outbox, Position
from feed.pages import SMALLEST_PACKET
from feed.requests import Handler, Requests, RequestStats

_LOG = logging.getLogger("snapfeed.feed")
_LARGEST_INCOMING = 2_000_000  # bytes; no command has so many, but who sends a large one by mistake is to be answered
_STABLE_SECONDS = 10.0  # a connection that lasted this long was a good one: the next back-off begins small
_SHORT_SECONDS = 60.0  # one that was made and is gone within this time
_OFTEN = 3  # in a row, without a failure to connect between them: a broker that is down refuses connections
_WORDLESS = (None, 0x80)  # the broker did not say why, or "unspecified error"


_Key = tuple[str, str | None]  # a partition's changes, or what one consumer asked for


@dataclass(slots=True)
class PublisherStats:
    """Counts since the start, and what is the matter now. `packet` is the largest packet in bytes on this connection."""

    connections: int = 0
    failures: int = 0
    protocol: int | None = None
    packet: int | None = None
    state_refusals: int = 0
    lanes: dict[str, LaneStats] = field(default_factory=dict)
    replays: dict[tuple[str, str], LaneStats] = field(default_factory=dict)  # (partition, consumer)
    requests: RequestStats = field(default_factory=RequestStats)


class Publisher:
    """Keeps a broker told. All methods are for the event loop's thread; `run` is to be a task for as long as the daemon lives.

    `version` and the time of the start go into the status topic. `handler` gets the commands. `on_status` is called without
    arguments whenever `connected`, `last_error` or a lane's error changes. Raises OperatorError for a config that cannot work.
    """

    def __init__(
        self,
        config: BrokerConfig,
        *,
        version: str,
        handler: Handler | None = None,
        on_status: Callable[[], None] | None = None,
        now: Callable[[], float] = time.time,
        backoff: Callable[[], Backoff] = Backoff,
        limits: Limits | None = None,
    ) -> None:
        self.config = check(config)
        self.topics = topics(config.base, config.host)
        self.stats = PublisherStats()
        self.last_error: str | None = None
        self._version = version
        self._now = now
        self._backoff = backoff
        self._on_status = on_status or (lambda: None)
        self._requests = Requests(self.topics, handler, self.stats.requests) if handler is not None else None
        limits = limits or Limits(incoming=_LARGEST_INCOMING)
        self._dialer = Dialer(config, config.identifier or f"snapfeed-{config.host}", limits)
        self._packet = config.max_packet
        self._hung_up = 0  # connections in a row that ended while a partition's pages found no acknowledgement at all
        self._cut_short = 0  # connections in a row that were lost soon after they were made
        self._outboxes: dict[_Key, Outbox] = {}
        self._lanes: dict[_Key, tuple[Lane, asyncio.Task[None]]] = {}
        self._states: dict[str, bytes] = {}
        self._unsent: dict[str, None] = {}  # an ordered set of partitions
        self._refused: dict[str, str] = {}  # topics of states and the status that the broker does not take, and why
        self._retry = backoff()  # of those
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        self._stopped = asyncio.Event()
        self._patience = 2.0
        self._logged: str | None = None
        self._connection: Connection | None = None
        self._group: asyncio.TaskGroup | None = None

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def packet(self) -> int:
        """The largest packet in bytes, as far as is known now."""
        return self.stats.packet or self._packet

    def add(self, outbox: Outbox, consumer: str | None = None) -> LaneStats:
        """Publish what an outbox holds, from now on: as the partition's changes, or as what one consumer asked for.

        Returns what happens to its pages. Raises OperatorError if a name cannot stand in a topic.
        """
        key = (outbox.partition, consumer)
        self._topic(key)
        self._cancel_lane(key)
        self._outboxes[key] = outbox
        stats = self._stats(key)
        self._open_lane(key, outbox)
        return stats

    def remove(self, outbox: Outbox) -> None:
        """Publish no more from an outbox. An acknowledgement that is being written now may still be written."""
        for key in [key for key, found in self._outboxes.items() if found is outbox]:
            del self._outboxes[key]
            self._cancel_lane(key)
            if key[1] is not None:
                self.stats.replays.pop((key[0], key[1]), None)

    def _topic(self, key: _Key) -> str:
        partition, consumer = key
        return self.topics.changes(partition) if consumer is None else self.topics.replay(partition, consumer)

    def _stats(self, key: _Key) -> LaneStats:
        partition, consumer = key
        if consumer is None:
            return self.stats.lanes.setdefault(partition, LaneStats())
        return self.stats.replays.setdefault((partition, consumer), LaneStats())

    def set_state(self, partition: str, payload: bytes) -> None:
        """Set the retained state of a partition; empty clears it. Only the latest is sent, and again on every connection."""
        self.topics.state(partition)
        self._states[partition] = payload
        self._unsent[partition] = None
        self._wake.set()

    async def run(self) -> None:
        """Connect, publish, reconnect, until `stop`. Cancelled, it cuts the connection: the broker publishes the last will."""
        backoff = self._backoff()
        try:
            while not self._stop.is_set():
                started, acknowledged = asyncio.get_running_loop().time(), self._progress()
                connections = self.stats.connections
                try:
                    await self._until_stopped(asyncio.create_task(self._session()))
                except LinkError as error:
                    self.stats.failures += 1
                    if error.reason == PACKET_TOO_LARGE:
                        error = self._smaller(error)
                    # one on which pages were taken was good, too: whoever kills brokers is not to wait long for the feed
                    if (
                        self._progress() > acknowledged
                        or asyncio.get_running_loop().time() - started >= _STABLE_SECONDS
                    ):
                        backoff.reset()
                        self._logged = None
                    short = asyncio.get_running_loop().time() - started < _SHORT_SECONDS
                    self._cut_short = self._cut_short + 1 if short and self.stats.connections > connections else 0
                    self._report(f"{error}{self._rival(error)}")
                    await self._pause(backoff.delay())
        finally:
            self._stopped.set()

    def _rival(self, error: LinkError) -> str:
        """What a connection hints at that is made at once and ended without a word, again and again: brokers may not say it."""
        if self._cut_short < _OFTEN or error.reason not in _WORDLESS:
            return ""
        return (
            f"; it is lost again and again: does another client have our client identifier, {self._dialer.identifier!r},"
            " such as a second daemon with the same [broker] host?"
        )

    def _progress(self) -> int:
        """Pages that brokers have acknowledged."""
        return sum(lane.acknowledged for lane in self._all_stats().values())

    def _all_stats(self) -> dict[_Key, LaneStats]:
        lanes: dict[_Key, LaneStats] = {(partition, None): lane for partition, lane in self.stats.lanes.items()}
        lanes.update(self.stats.replays.items())
        return lanes

    async def _until_stopped(self, session: "asyncio.Task[None]") -> None:
        """Let a session run, but not much longer than asked to stop; one that is still connecting ends at once."""
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({session, stop}, return_when=asyncio.FIRST_COMPLETED)
            if self.connected:
                await asyncio.wait({session}, timeout=self._patience + 2.0)
        finally:
            stop.cancel()
            if not session.done():
                session.cancel()
                await asyncio.wait({session})
        if not session.cancelled():
            session.result()

    async def stop(self, patience: float = 2.0) -> None:
        """Stop well: wait up to `patience` seconds for what is in flight, publish `offline`, disconnect; `run` returns."""
        self._patience = patience
        self._stop.set()
        await self._stopped.wait()

    async def _session(self) -> None:
        since = self._timestamp()
        will = aiomqtt.Will(self.topics.status, self._status("offline", since), qos=1, retain=True)
        async with self._dialer.open_client(will) as connection:
            self.stats.connections += 1
            self.stats.protocol = 5 if connection.v5 else 4
            self.stats.packet = connection.limit = self._room(connection)
            self._refused.clear()
            await self._tell(connection, self.topics.status, self._status("online", since))
            if not connection.retains:
                _LOG.warning(
                    "broker %s keeps no retained messages: status and states reach only who listens", self.config.url
                )
            before = {key: (lane.sent, lane.position) for key, lane in self._all_stats().items()}
            try:
                await self._work(connection)
            except LinkError as error:
                self._judge_hanging_up(error, before, connection.largest)
                raise
            finally:
                self._group, self._connection = None, None
                self._lanes.clear()
                if not self._stop.is_set():
                    self._on_status()
            await self._say_goodbye(connection)

    def _room(self, connection: Connection) -> int:
        """The largest packet for this connection, in bytes. Raises LinkError if the broker's limit is below what pages need."""
        theirs = connection.max_packet
        if theirs is None:
            return self._packet
        if theirs < SMALLEST_PACKET:
            raise LinkError(
                f"broker {self.config.url} takes packets of {theirs} bytes at most, and pages need {SMALLEST_PACKET}; "
                "raise its limit (max_packet_size), or use another broker"
            )
        return min(self._packet, theirs)

    def _smaller(self, error: LinkError) -> LinkError:
        """The broker found a packet too large without having announced a limit: try half as much next time."""
        used = self.stats.packet or self._packet
        if used <= SMALLEST_PACKET:
            text = f"broker {self.config.url} finds packets of {used} bytes too large, and pages need as much"
            return LinkError(f"{text}; raise its limit (max_packet_size), or use another broker", error.reason)
        self._packet = max(SMALLEST_PACKET, used // 2)
        text = f"the broker found a packet too large; they have {self._packet} bytes at most from now on"
        return LinkError(f"{text}; better say how many it takes in [broker] max_packet", error.reason)

    async def _work(self, connection: Connection) -> None:
        """Everything that goes on at once on a connection; ends by LinkError, or by `stop` after what is in flight arrived."""
        lost: LinkError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                self._connection, self._group = connection, group
                background = [
                    group.create_task(self._publish_states(connection)),
                    group.create_task(_until_lost(connection)),
                ]
                if self._requests is not None:
                    background.append(group.create_task(self._requests.serve(connection)))
                for key, outbox in self._outboxes.items():
                    self._open_lane(key, outbox)
                self._report(None)
                await self._stop.wait()
                for lane, _ in self._lanes.values():
                    lane.stop()
                if self._lanes:
                    await asyncio.wait({task for _, task in self._lanes.values()}, timeout=self._patience)
                for task in [*background, *(task for _, task in self._lanes.values())]:
                    task.cancel()
        except* LinkError as errors:
            lost = _first(errors)
        if lost is not None:  # raised in there, it would be in a group of its own before Python 3.11.4
            raise lost from None

    def _judge_hanging_up(
        self, error: LinkError, before: dict[_Key, tuple[int, Position | None]], largest: int
    ) -> None:
        """MQTT 3.1.1 knows neither limit nor reason: a broker that finds a packet too large just hangs up, again and again.

        So when it did twice on pages of which it acknowledged none, smaller ones are tried; where the smallest do not help
        either, it was something else.
        """
        lanes = self._all_stats()
        known = {key: before.get(key, (0, None)) for key in lanes}
        stuck = any(lane.sent > known[key][0] and lane.position == known[key][1] for key, lane in lanes.items())
        told = error.reason in {PACKET_TOO_LARGE, SESSION_TAKEN_OVER}
        self._hung_up = self._hung_up + 1 if stuck and not told else 0
        if self._hung_up < 2:
            return
        self._hung_up = 0
        if largest > SMALLEST_PACKET:
            self._packet = max(SMALLEST_PACKET, min(self._packet, largest) // 2)
            _LOG.warning(
                "the broker hangs up on pages of %d bytes; trying %d; see [broker] max_packet", largest, self._packet
            )
        else:
            self._packet = self.config.max_packet

    async def _say_goodbye(self, connection: Connection) -> None:
        payload = self._status("offline", self._timestamp())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await self._tell(connection, self.topics.status, payload)

    def _open_lane(self, key: _Key, outbox: Outbox) -> None:
        if self._group is None or self._connection is None or self._stop.is_set():
            return
        lane = Lane(outbox, self._topic(key), self._stats(key), self._on_status, self._backoff())
        work = lane.run(self._connection, self.stats.packet or self._packet)
        try:
            task = self._group.create_task(work)
        except RuntimeError:  # this connection is lost, and what worked on it is ending: the next one opens all lanes
            work.close()
            return
        self._lanes[key] = (lane, task)

    def _cancel_lane(self, key: _Key) -> None:
        lane = self._lanes.pop(key, None)
        if lane is not None:
            lane[1].cancel()

    async def _publish_states(self, connection: Connection) -> None:
        """States, latest only; a refused one is tried again later."""
        self._unsent = dict.fromkeys(self._states)
        while True:
            while self._unsent:
                partition = next(iter(self._unsent))
                del self._unsent[partition]
                payload = self._states[partition]
                if not await self._tell(connection, self.topics.state(partition), payload):
                    asyncio.get_running_loop().call_later(self._retry.delay(), self._send_again, partition)
                    continue
                self._retry.reset()
                if not payload and self._states.get(partition) == b"":
                    del self._states[partition]
            self._wake.clear()
            await self._wake.wait()

    def _send_again(self, partition: str) -> None:
        if partition in self._states:
            self._unsent[partition] = None
            self._wake.set()

    async def _tell(self, connection: Connection, topic: str, payload: bytes) -> bool:
        """Publish a retained message: whether the broker took it. Why it did not is shown until it takes one on this topic."""
        try:
            reason = await connection.publish_acknowledged(topic, payload, retain=True)
        except PacketError as error:
            trouble = str(error)
        else:
            if reason < REFUSED:
                if self._refused.pop(topic, None) is not None:
                    _LOG.info("the broker takes %s again", topic)
                    self._show(next(iter(self._refused.values()), None))
                return True
            trouble = f"the broker refuses {topic} (reason {reason:#04x}); check the broker's ACL and quotas"
        self.stats.state_refusals += 1
        if self._refused.get(topic) != trouble:
            self._refused[topic] = trouble
            _LOG.warning("%s; it is tried again", trouble)
            self._show(trouble)
        return False

    def _status(self, state: str, since: str) -> bytes:
        document: StatusDocument = {"state": state, "version": self._version, "since": since}
        return orjson.dumps(document)

    def _timestamp(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._now()))

    def _report(self, error: str | None) -> None:
        """Log a reason once, until it changes."""
        if error is None:
            _LOG.info("connected to broker %s (MQTT %s)", self.config.url, "5" if self.stats.protocol == 5 else "3.1.1")
            error = next(iter(self._refused.values()), None)
        elif error != self._logged:
            self._logged = error
            _LOG.warning("%s; trying again until it works, diffs are kept", error)
        self._show(error)

    def _show(self, error: str | None) -> None:
        self.last_error = error
        self._on_status()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()


async def _until_lost(connection: Connection) -> None:
    raise await asyncio.shield(connection.lost)


def _first(errors: BaseExceptionGroup[LinkError]) -> LinkError:
    """One of several reports of the same loss: the one that carries a reason, if any does."""
    leaves: list[LinkError] = []
    for error in errors.exceptions:
        leaves += [_first(error)] if isinstance(error, BaseExceptionGroup) else [error]
    return next((error for error in leaves if error.reason is not None), leaves[0])
