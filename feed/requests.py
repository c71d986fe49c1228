"""Commands over MQTT: read, handed to the daemon, answered. What a command means is the handler's business (feed.commands)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from feed.broker import NAME, Topics
from feed.commands import LARGEST, answer, readable_id
from feed.connection import REFUSED, Connection, LinkError, PacketError, response_properties

_LOG = logging.getLogger("snapfeed.feed")
AT_ONCE = 256
_WAITING = 512
_SUBSCRIBE_AGAIN = 60.0  # seconds after the broker refused


@dataclass(frozen=True, slots=True)
class Request:
    """A command as it came. `response_topic` and `correlation` are what MQTT 5 gave, if the topic is one we may use."""

    verb: str
    payload: bytes
    response_topic: str | None = None
    correlation: bytes | None = None


Handler = Callable[[Request], Awaitable[bytes]]


@dataclass(slots=True)
class RequestStats:
    """Counts since the start. `received` is all that came; each is handed on, or counted once more as why it was not.

    Not handed on: `retained`, `stray` (no topic of a command) and `dropped` (too many wait), which are not answered; `busy`
    and `oversize`, which are. `unanswered`: answers that could not be sent. `refused_topics`: response topics we do not use.
    `error`: why there are no commands over MQTT at the moment.
    """

    received: int = 0
    retained: int = 0
    stray: int = 0
    dropped: int = 0
    busy: int = 0
    oversize: int = 0
    answered: int = 0
    unanswered: int = 0
    refused_topics: int = 0
    error: str | None = None

    @property
    def refused(self) -> int:
        """Commands that came and were not handed on."""
        return self.retained + self.stray + self.dropped + self.busy + self.oversize


class Requests:
    """Serves the commands of one host. At most 16 are carried out at once; a few more are told so, the rest is dropped.

    Each command that is not handed on leaves one line in the log and one count; those that are, are the handler's to count.
    """

    def __init__(self, names: Topics, handler: Handler, stats: RequestStats) -> None:
        self._topics = names
        self._handler = handler
        self._stats = stats
        self._running = 0

    async def serve(self, connection: Connection) -> None:
        """Serve until cancelled. A refused subscription is logged and asked for again, and costs the commands, not the feed."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            while not await self._subscribed(connection):  # noqa: ASYNC110 -- nothing tells when a broker changes its mind
                await asyncio.sleep(_SUBSCRIBE_AGAIN)
            while True:
                message = await connection.receive()
                request = self._taken(message.topic.value, message.payload, message.properties, retained=message.retain)
                if request is None:
                    continue
                if len(tasks) >= _WAITING:
                    self._stats.dropped += 1
                    _LOG.warning("command %s dropped: %d wait already", ascii(request.verb)[:80], len(tasks))
                    continue
                task = asyncio.create_task(self._carry_out(connection, request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _subscribed(self, connection: Connection) -> bool:
        try:
            await connection.subscribe_live(self._topics.requests)
        except LinkError as error:
            if connection.lost.done():
                raise
            if self._stats.error != str(error):
                self._stats.error = str(error)
                _LOG.warning("%s; commands over MQTT are off until then", error)
            return False
        self._stats.error = None
        return True

    def _taken(self, topic: str, payload: object, properties: object, *, retained: bool) -> Request | None:
        """What came as a request; None for what is no command now."""
        self._stats.received += 1
        verb = self._topics.verb(topic)
        if topic != f"{self._topics.requests[:-1]}{verb}":
            self._stats.stray += 1
            _LOG.warning("a message on %s ignored: it was not subscribed to", ascii(topic)[:200])
            return None
        if retained:
            self._stats.retained += 1
            _LOG.warning("command %s ignored: it was retained; publish commands without retain", ascii(verb)[:80])
            return None
        response = getattr(properties, "ResponseTopic", None)
        correlation = getattr(properties, "CorrelationData", None)
        if response is not None and not self._topics.may_respond(response):
            self._stats.refused_topics += 1
            _LOG.warning("command %s: no answer on %s, only below response/", ascii(verb)[:80], ascii(response)[:200])
            response = None
        return Request(verb, payload if isinstance(payload, bytes) else b"", response, correlation)

    async def _carry_out(self, connection: Connection, request: Request) -> None:
        reply = self._refusal(request)
        if reply is None:
            self._running += 1
            try:
                reply = await self._handler(request)
            except Exception:  # noqa: BLE001
                # A bug in one command must not take the feed down; it is logged whole, and the requester is told.
                _LOG.exception("the command %s failed", ascii(request.verb)[:80])
                error = "the command failed by a fault of the daemon; its log says more"
                reply = answer(readable_id(request.payload), error=error)
            finally:
                self._running -= 1
        await self._answer(connection, request, reply)

    def _refusal(self, request: Request) -> bytes | None:
        """The answer to a command that is not even handed on."""
        if len(request.payload) > LARGEST:
            self._stats.oversize += 1
            text = f"the command has {len(request.payload)} bytes; at most {LARGEST} are taken"
        elif self._running >= AT_ONCE:
            self._stats.busy += 1
            text = f"{AT_ONCE} commands are being carried out; try again later"
        else:
            return None
        _LOG.warning("command %s refused: %s", ascii(request.verb)[:80], text)
        return answer(readable_id(request.payload), error=text)

    async def _answer(self, connection: Connection, request: Request, reply: bytes) -> None:
        """Send an answer wherever it can be sent: the response topic of MQTT 5, and ours if the verb can stand in a topic."""
        topics = [self._topics.response(request.verb)] if NAME.match(request.verb) else []
        if request.response_topic is not None:
            topics.insert(0, request.response_topic)
        sent = False
        try:
            for topic in topics:
                correlation = request.correlation if topic == request.response_topic else None
                sent |= await self._post(connection, topic, reply, request.payload, correlation)
        except LinkError:
            _LOG.info("the answer to a command %s found no connection", ascii(request.verb)[:80])
        if sent:
            self._stats.answered += 1
        else:
            self._stats.unanswered += 1

    @staticmethod
    async def _post(
        connection: Connection, topic: str, reply: bytes, command: bytes, correlation: bytes | None
    ) -> bool:
        properties = response_properties(correlation)
        try:
            reason = await connection.publish_acknowledged(topic, reply, properties=properties)
        except PacketError as error:
            short = answer(readable_id(command), error=f"the answer cannot be sent: {error}"[:1000])
            try:
                reason = await connection.publish_acknowledged(topic, short, properties=properties)
            except PacketError:
                _LOG.warning("an answer cannot be sent: %s", ascii(str(error))[:300])
                return False
        if reason >= REFUSED:
            _LOG.warning("the broker refuses an answer on %s (reason %#04x); check its ACL", ascii(topic)[:200], reason)
        return reason < REFUSED
