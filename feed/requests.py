"""Commands over MQTT: read, handed to the daemon, answered. What a command means is the handler's business (feed.commands)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from feed.broker import Topics
from feed.commands import answer
from feed.connection import Connection, LinkError, response_properties

_LOG = logging.getLogger("snapfeed.feed")
AT_ONCE = 16
_WAITING = 64


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
    """Counts since the start. `retained`, `busy` and `dropped` were not handed on; `dropped` were not even answered."""

    received: int = 0
    retained: int = 0
    busy: int = 0
    dropped: int = 0
    answered: int = 0
    refused_topics: int = 0


class Requests:
    """Serves the commands of one host. At most 16 are carried out at once; a few more are told so, the rest is dropped."""

    def __init__(self, names: Topics, handler: Handler, stats: RequestStats) -> None:
        self._topics = names
        self._handler = handler
        self._stats = stats
        self._running = 0

    async def serve(self, connection: Connection) -> None:
        """Serve until cancelled. A refused subscription is logged, and costs the commands, not the feed."""
        try:
            await connection.subscribe_live(self._topics.requests)
        except LinkError as error:
            if connection.lost.done():
                raise
            _LOG.warning("%s; commands over MQTT are off until then", error)
            return
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                message = await connection.receive()
                if message.retain:
                    self._stats.retained += 1
                    continue
                self._stats.received += 1
                if len(tasks) >= _WAITING:
                    self._stats.dropped += 1
                    continue
                request = self._request(message.topic.value, message.payload, message.properties)
                task = asyncio.create_task(self._carry_out(connection, request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _request(self, topic: str, payload: object, properties: object) -> Request:
        response = getattr(properties, "ResponseTopic", None)
        correlation = getattr(properties, "CorrelationData", None)
        if response is not None and not self._topics.may_respond(response):
            self._stats.refused_topics += 1
            response = None
        data = payload if isinstance(payload, bytes) else b""
        return Request(self._topics.verb(topic), data, response, correlation)

    async def _carry_out(self, connection: Connection, request: Request) -> None:
        if self._running >= AT_ONCE:
            self._stats.busy += 1
            reply = answer(None, error=f"{AT_ONCE} commands are being carried out; try again later")
        else:
            self._running += 1
            try:
                reply = await self._handler(request)
            except Exception:  # noqa: BLE001
                # A bug in one command must not take the feed down; it is logged whole, and the requester is told.
                _LOG.exception("the command %r failed", request.verb[:64])
                reply = answer(None, error="the command failed by a fault of the daemon; its log says more")
            finally:
                self._running -= 1
        try:
            if request.response_topic is not None:
                properties = response_properties(request.correlation)
                await connection.post(request.response_topic, reply, properties=properties)
            await connection.publish_acknowledged(self._topics.response(request.verb), reply)
            self._stats.answered += 1
        except LinkError:
            _LOG.info("the answer to a command %r found no connection", request.verb[:64])
