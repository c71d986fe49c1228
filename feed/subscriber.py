"""A consumer of the feed: whole diffs from pages, in order, duplicates dropped; gaps told or, for who has a name, closed.

What is decided is decided in feed.assembler (without a name) and feed.follow (with one); here are the connection and the clock.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import aiomqtt
import orjson

from comparer.errors import DamageError, OperatorError
from feed.acks import Acks
from feed.ask import Ask
from feed.assembler import Assembler, Diff, Gap
from feed.backoff import Backoff
from feed.broker import NAME, BrokerConfig
from feed.connection import REFUSED, UNHEARD, Connection, LinkError
from feed.dialer import Dialer
from feed.escape import printable
from feed.follow import Action, Deliver, Follower, Timing, Warn
from feed.pages import parse_page
from feed.positions import FilePositions, MemoryPositions, Position, Positions

__all__ = ["Damage", "Diff", "FilePositions", "Gap", "Item", "Positions", "Sign", "Subscriber", "Timing"]

_LOG = logging.getLogger("snapfeed.feed")
_TICK = 0.25
_LARGEST_ANSWER = 65_536
_ASKED = ("replay", "baseline", "ack")
Sign = Callable[[str, str, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Damage:
    """A message that is no page; the text says why. It was left out."""

    topic: str
    error: str


Item = Diff | Gap | Damage


class Subscriber:
    """Iterate over it: `Diff`, `Gap` and `Damage` as they arrive, for ever, through reconnects.

    `topic_filter` defaults to the changes of every host and partition. `subscribed` is set while the broker sends us what
    is published. Who leaves the loop early closes the iterator (contextlib.aclosing), which closes the connection.

    With `consumer`, a name that no other process uses at the same time, there are no gaps: what is missing is asked for.
    Iterating begins after the last diff that was committed, with a baseline where there is none; a diff whose envelope has
    `baseline` set replaces all that was known of its partition. `positions` keeps what was committed over restarts
    (FilePositions), by default in memory. `sign` gets the verb, the host and the command, and returns the command as it is to be
    sent. `topic_filter` is then `<base>/<host>/<partition>/changes` with names or `+`.

    Work on a diff that takes long belongs into a thread: who does not give the event loop back loses the connection.

    Raises OperatorError for TLS files that cannot be used, names that are none, and positions that cannot be stored.
    """

    def __init__(
        self,
        config: BrokerConfig,
        *,
        topic_filter: str | None = None,
        identifier: str = "",
        consumer: str | None = None,
        positions: Positions | None = None,
        sign: Sign | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._dialer = Dialer(config, identifier)
        self._filter = topic_filter or f"{config.base}/+/+/changes"
        self._consumer = consumer
        self._base = config.base
        self._assembler = Assembler()
        self._positions: Positions = positions or MemoryPositions()
        self._sign = sign
        self._timing = timing or Timing()
        if consumer is not None:
            if not NAME.match(consumer):
                raise OperatorError(
                    f"consumer: {consumer!r:.80} is no name for a topic; use 1 to 64 of A-Z a-z 0-9 _ -"
                )
            self._scope = _scope(config.base, self._filter)
        elif positions is not None or sign is not None:
            raise OperatorError("positions and sign are for a consumer; give it a name")
        self._session: _Session | None = None
        self._storing = asyncio.Lock()
        self._stored: dict[tuple[str, str], Position] = {}
        self.subscribed = asyncio.Event()
        self.last_error: str | None = None

    @property
    def duplicates(self) -> int:
        """Pages that had come before."""
        return self._assembler.duplicates if self._session is None else self._session.follower.duplicates

    async def __aiter__(self) -> AsyncIterator[Item]:
        session = None
        if self._consumer is not None:
            session = self._session = _Session(self._consumer, self._scope, self._base, self._timing, self)
        backoff = Backoff()
        while True:
            try:
                async with self._dialer.open_client() as connection:
                    await self._subscribe(connection)
                    self.subscribed.set()
                    self.last_error = None
                    backoff.reset()
                    if session is not None:
                        await session.begin(connection)
                    while True:
                        items = await (self._plain(connection) if session is None else session.step(connection))
                        for item in items:
                            began = time.monotonic()
                            yield item
                            if session is not None:
                                session.worked(time.monotonic() - began)
            except LinkError as error:
                if str(error) != self.last_error:
                    self.last_error = str(error)
                    _LOG.warning("%s; trying again", error)
            finally:
                self.subscribed.clear()
                if session is not None:
                    session.end()
            await asyncio.sleep(backoff.delay())

    async def commit(self, diff: Diff) -> None:
        """What the diff says has been done, and is as durable as it must be: begin after it the next time, tell the daemon so.

        The position is stored when this returns; what the daemon is told is best effort. To be called in the order of the
        diffs; one that was committed already does nothing. Raises OperatorError if the position cannot be stored.
        """
        if self._consumer is None:
            raise OperatorError("only a consumer with a name can commit; give Subscriber one")
        envelope = diff.envelope
        key = (envelope.host, envelope.partition)
        async with self._storing:
            stored = self._stored.get(key)
            if stored is not None and stored[0] == envelope.epoch and envelope.seq <= stored[1]:
                return
            await asyncio.to_thread(self._positions.store, *key, envelope.epoch, envelope.seq)
            self._stored[key] = (envelope.epoch, envelope.seq)
        if self._session is not None:
            self._session.committed(*key, self._stored[key])

    async def load(self, host: str, partition: str) -> Position | None:
        """What was committed last; for the session."""
        async with self._storing:
            found = await asyncio.to_thread(self._positions.load, host, partition)
            if found is not None:
                self._stored[host, partition] = found
        return found

    def signed(self, ask: Ask) -> bytes:
        """A command as it is sent; for the session."""
        document = ask.document if self._sign is None else self._sign(ask.verb, ask.host, ask.document)
        return orjson.dumps(document)

    async def _subscribe(self, connection: Connection) -> None:
        await connection.subscribe_live(self._filter)
        if self._consumer is None:
            return
        host, partition = self._scope
        await connection.subscribe_live(f"{self._base}/{host}/{partition}/replay/{self._consumer}")
        for verb in _ASKED:
            await connection.subscribe_live(f"{self._base}/{host}/response/{verb}")

    async def _plain(self, connection: Connection) -> list[Item]:
        message = await connection.receive()
        if message.retain or not isinstance(message.payload, bytes):
            return []
        try:
            return list(self._assembler.add(parse_page(message.payload)))
        except DamageError as error:
            return [Damage(message.topic.value, str(error))]


def _scope(base: str, topic_filter: str) -> tuple[str, str]:
    """The host and the partition of a filter, names or `+`. Raises OperatorError for what a consumer cannot follow."""
    found = re.fullmatch(rf"{re.escape(base)}/([^/]+)/([^/]+)/changes", topic_filter)
    if found is None or any(one != "+" and not NAME.match(one) for one in found.groups()):
        raise OperatorError(
            f"topic filter {topic_filter!r:.200}: a consumer follows {base}/<host>/<partition>/changes, with names or `+`"
        )
    return found[1], found[2]


class _Session:
    """One iteration of a consumer: between the connection and what is decided (feed.follow, feed.acks)."""

    def __init__(
        self, consumer: str, scope: tuple[str, str], base: str, timing: Timing, subscriber: Subscriber
    ) -> None:
        def new_id() -> str:
            return f"{consumer}-{uuid.uuid4().hex}"

        self.follower = Follower(consumer, new_id, timing)
        self._acks = Acks(consumer, new_id, timing.acks, timing.answer)
        self._subscriber = subscriber
        self._scope = scope
        self._base = base
        self._connection: Connection | None = None
        self._dropped = 0
        self._posts: set[asyncio.Task[None]] = set()
        self._worked = 0.0
        self._ticked = 0.0

    # ---- the clock

    def worked(self, seconds: float) -> None:
        """The consumer was at work, and nothing was read: no time has passed for those who were to answer."""
        self._worked += seconds

    def _now(self) -> float:
        return time.monotonic() - self._worked

    # ---- the connection

    async def begin(self, connection: Connection) -> None:
        """We are subscribed to the pages and the answers. Raises LinkError."""
        self._connection, self._dropped = connection, 0
        self._act(self._acks.connected(self._now()))
        self._act(self.follower.connected(self._now()))
        host, partition = self._scope
        if "+" not in self._scope:
            self._act(await self._learn(host, partition))
        for topic_filter in (f"{self._base}/{host}/{partition}/state", f"{self._base}/{host}/status"):
            try:
                await connection.subscribe_retained(topic_filter)
            except LinkError as error:
                if connection.lost.done():
                    raise
                _LOG.warning("%s; without it, quiet partitions are not known", error)

    def end(self) -> None:
        """The connection is gone."""
        self._connection = None
        for task in self._posts:
            task.cancel()
        self.follower.disconnected()
        self._acks.disconnected()

    async def step(self, connection: Connection) -> list[Item]:
        """Wait for a message or for time to pass. Raises LinkError."""
        message = await connection.poll(_TICK)
        found = [] if message is None else await self._read(message)
        now = self._now()
        if connection.dropped != self._dropped and message is None:
            self._dropped = connection.dropped
            _LOG.warning("messages came faster than they were read, and were dropped; what is missing is asked for")
            found += self._act(self.follower.dropped(now))
        if now >= self._ticked + _TICK:
            self._ticked = now
            found += self._act(self.follower.tick(now))
            self._act(self._acks.tick(now))
        if message is not None and not found:
            await asyncio.sleep(0)  # many messages may be there already: let others have a turn
        return found

    def committed(self, host: str, partition: str, position: Position) -> None:
        self._act(self._acks.commit(host, partition, position, self._now()))

    # ---- messages

    async def _read(self, message: aiomqtt.Message) -> list[Item]:
        topic = message.topic.value
        payload = message.payload if isinstance(message.payload, bytes) else b""
        levels = topic.removeprefix(f"{self._base}/").split("/")
        match levels:
            case [host, partition, "changes"] if not message.retain:
                return await self._page(topic, host, partition, payload, live=True)
            case [host, partition, "replay", _] if not message.retain:
                return await self._page(topic, host, partition, payload, live=False)
            case [_, "response", _] if not message.retain:
                return self._answer(payload)
            case [host, partition, "state"]:
                return await self._state(host, partition, payload)
            case [host, "status"]:
                document = _object(payload)
                if not message.retain and document is not None and document.get("state") == "online":
                    self.follower.online(host, self._now())
        return []

    async def _page(self, topic: str, host: str, partition: str, payload: bytes, *, live: bool) -> list[Item]:
        try:
            page = parse_page(payload)
            if (page.envelope.host, page.envelope.partition) != (host, partition):
                raise DamageError("not a page of this topic: it names another host or partition")
        except DamageError as error:
            return [Damage(topic, str(error))]
        found = self._act(await self._learn(host, partition))
        return found + self._act(self.follower.page(page, len(payload), self._now(), live=live))

    async def _state(self, host: str, partition: str, payload: bytes) -> list[Item]:
        document = _object(payload)
        if document is None or document.get("partition") != partition:
            return []  # cleared; or an answer to the command `state`, for the topic does not tell
        found = self._act(await self._learn(host, partition))
        return found + self._act(self.follower.state(host, partition, document, self._now()))

    def _answer(self, payload: bytes) -> list[Item]:
        document = _object(payload) if len(payload) <= _LARGEST_ANSWER else None
        if document is None or not isinstance(document.get("id"), str):
            return []
        if document.get("status") != "ok":
            _LOG.debug("answer: %s", printable(payload[:500]))
        self._acks.answered(document["id"], self._now(), document)
        return self._act(self.follower.answered(document["id"], document, self._now()))

    async def _learn(self, host: str, partition: str) -> list[Action]:
        """A partition that was not known until now: begin where its consumer stopped."""
        if self.follower.knows(host, partition):
            return []
        position = await self._subscriber.load(host, partition)
        if position is not None:
            self._act(self._acks.commit(host, partition, position, self._now()))
        return self.follower.add(host, partition, position, self._now())

    # ---- actions

    def _act(self, actions: Iterable[Action]) -> list[Item]:
        """Send and log what is to be; return what is to be handed on."""
        found: list[Item] = []
        for action in actions:
            match action:
                case Deliver(diff):
                    found.append(diff)
                case Warn(text):
                    _LOG.warning("%s", text)
                case Ask():
                    self._send(action)
        return found

    def _send(self, ask: Ask) -> None:
        connection = self._connection
        if connection is None:
            return
        payload = self._subscriber.signed(ask)
        task = asyncio.get_running_loop().create_task(self._post(connection, ask, payload))
        self._posts.add(task)
        task.add_done_callback(self._posts.discard)

    async def _post(self, connection: Connection, ask: Ask, payload: bytes) -> None:
        try:
            reason = await connection.publish_acknowledged(f"{self._base}/{ask.host}/request/{ask.verb}", payload)
        except LinkError:
            return  # the session ends, and says so itself
        now = self._now()
        if reason == UNHEARD:
            self._acks.answered(ask.id, now)
            self._act(self.follower.unheard(ask.id, now))
        elif reason >= REFUSED:
            self._acks.answered(ask.id, now)
            error = f"the broker refuses the command (reason {reason:#04x}); grant it in its ACL"
            self._act(self.follower.answered(ask.id, {"status": "error", "error": error}, now))


def _object(payload: bytes) -> dict[str, Any] | None:
    """A JSON object; None for anything else, which others may publish there."""
    try:
        document = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None
