"""One connection to a broker: aiomqtt with what it hides (CONNACK properties, PUBACK reasons) and a window of our own.

A connection is made, used and thrown away; there is no reconnecting client and nothing of value in paho's queue. That is
because paho 2.2 forgets its in-flight window after a reconnect and takes a refusal (reason >= 0x80) for an acknowledgement.

Facts about aiomqtt 2.5.1 and paho 2.2 that this file relies on, and the only place that does:
- aiomqtt registers its own bound methods `_on_connect`, `_on_disconnect`, `_on_publish` with paho, so a subclass that overrides
  them sees what paho sees;
- before the CONNACK aiomqtt ignores a lost connection and waits for its whole time-out: `_on_disconnect` below ends that wait;
- between the CONNACK and the end of `__aenter__` aiomqtt forgets a lost connection: `watch` remembers it;
- after a failed or cancelled connect neither closes the socket: `cut` does;
- it registers sockets by numbers that may be another's by the time that happens: `_on_socket_open` and its neighbour do not;
- what paho cannot parse it raises, keeps, and raises again whenever the socket is readable: `_guarded` ends the connection;
- it waits with asyncio.wait_for, which in Python 3.11 drops a cancellation that comes as the wait ends: `_wait_for` does not;
- paho takes a PUBACK for a packet that it has not sent, and reads packets of any size: `_on_publish` and `_receive` do not.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import aiomqtt
import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from comparer.errors import OperatorError
from feed.cloudevents import Event

WINDOW = 20
REFUSED = 0x80
INBOX = 64 << 20  # bytes of messages that wait to be read
UNHEARD = 0x10  # MQTT 5.0, 3.4.2.1: taken, but nobody is subscribed
_QUEUED = 10_000  # packets that wait for a broker that does not read: answers to what it sends all the same
_PIECE = 262_144  # bytes taken from the socket at once
PACKET_TOO_LARGE = 0x95
SESSION_TAKEN_OVER = 0x8E


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait for a CONNACK, and for any PUBACK, in seconds; the largest packet taken from a broker, in bytes."""

    connect: float = 10.0
    acknowledge: float = 60.0
    incoming: int | None = None


class PacketError(OperatorError):
    """A message cannot be sent: its packet is larger than the broker takes, or its topic is none."""


class SilentError(aiomqtt.MqttError):
    """The broker ended the connection, or spoke no MQTT, before it answered."""


class _ViolationError(Exception):
    """The broker did what no broker may. Raised within paho's callbacks, where paho's lock forbids to close the socket."""


class LinkError(Exception):
    """The connection could not be had or is gone. `reason` is MQTT's code where there is one; the text says what to do."""

    def __init__(self, text: str, reason: int | None = None) -> None:
        super().__init__(text)
        self.reason = reason


class Connection(aiomqtt.Client):
    """A connection with a window: at most 20 publishes, and at most the broker's Receive Maximum, are unacknowledged at once."""

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, timeout=limits.connect, **kwargs)
        self.v5 = kwargs["protocol"] is aiomqtt.ProtocolVersion.V5
        self.receive_maximum = 65_535
        self.max_packet: int | None = None
        self.largest = 0  # payload in bytes that was sent so far
        self.maximum_qos = 2
        self.retains = True
        self.wildcards = True
        self.limit: int | None = None  # bytes of the largest packet that `post` sends; the broker's limit until set
        self.lost: asyncio.Future[LinkError] = self._loop.create_future()
        self._limits = limits
        self._slots = asyncio.Semaphore(WINDOW)
        self._acks: dict[int, asyncio.Future[int]] = {}
        self._progress = 0.0
        self._watchdog: asyncio.TimerHandle | None = None
        self._arrived = asyncio.Event()
        self._inbox = 0  # bytes
        self.dropped = 0
        self.pending_calls_threshold = WINDOW  # aiomqtt warns above 10 pending calls; the window is bounded here
        paho_client: Any = self._client
        self._take = paho_client._sock_recv  # noqa: SLF001 -- paho has no other place to bound what is read
        paho_client._sock_recv = self._receive  # noqa: SLF001
        paho_client.loop_read = self._guarded(paho_client.loop_read)
        paho_client.loop_write = self._guarded(paho_client.loop_write)

    async def _wait_for(self, fut: Awaitable[T], timeout: float | None) -> T:  # noqa: ASYNC109 - aiomqtt's
        try:
            async with asyncio.timeout(self.timeout if timeout is None else timeout):
                return await fut
        except TimeoutError:
            raise aiomqtt.MqttError("Operation timed out") from None

    def _receive(self, size: int) -> bytes:
        """Bytes from the socket. paho asks for all that is missing of a packet, which a broker may say to be 256 MiB."""
        if self._limits.incoming is not None and size > self._limits.incoming:
            raise _ViolationError(f"the broker sends a packet of more than {self._limits.incoming} bytes")
        return self._take(min(size, _PIECE))  # type: ignore[no-any-return]

    def _guarded(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """A step of paho's loop that ends the connection where it fails, instead of failing again and again."""

        def guarded() -> Any:
            try:
                result = step()
            except Exception as error:  # noqa: BLE001 -- paho raises anything for what it cannot parse
                nonsense = f"the broker sent what is no MQTT ({error!r:.200})"
                self._give_up(str(error) if isinstance(error, _ViolationError) else nonsense)
                return paho.MQTT_ERR_PROTOCOL
            if len(self._unsent()) > _QUEUED:
                self._give_up("the broker sends, and reads nothing")
            return result

        return guarded

    def _on_socket_open(self, client: paho.Client, userdata: Any, sock: Any) -> None:  # noqa: ARG002
        """As aiomqtt, but nothing happens to a socket that was closed meanwhile: its number may be another's by then."""

        def read() -> None:
            client.loop_read()
            while client.socket() is sock and getattr(sock, "pending", int)() > 0:  # decrypted: select does not see it
                client.loop_read()

        def register() -> None:
            if sock.fileno() >= 0:
                self._loop.add_reader(sock.fileno(), read)
                self._misc_task = self._loop.create_task(self._misc_loop())

        self._loop.call_soon_threadsafe(register)

    def _on_socket_register_write(self, client: paho.Client, userdata: Any, sock: Any) -> None:  # noqa: ARG002
        def register() -> None:
            if sock.fileno() >= 0:
                self._loop.add_writer(sock.fileno(), client.loop_write)

        self._loop.call_soon_threadsafe(register)

    async def _misc_loop(self) -> None:
        """Pings: at least four looks in a keep-alive period, which the broker may have made as short as a second."""
        while self._client.loop_misc() == paho.MQTT_ERR_SUCCESS:  # noqa: ASYNC110 -- paho looks at the clock
            await asyncio.sleep(min(1.0, self._client._keepalive / 4 or 1.0))  # noqa: SLF001

    def _on_connect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.ConnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        """Remember what the CONNACK says (MQTT 5.0, 3.2.2.3), which aiomqtt drops."""
        if self._connected.done():
            raise _ViolationError("the broker answered the CONNECT twice")
        self.receive_maximum = getattr(properties, "ReceiveMaximum", self.receive_maximum)
        self.max_packet = self.limit = getattr(properties, "MaximumPacketSize", None)
        self.maximum_qos = getattr(properties, "MaximumQoS", self.maximum_qos)
        self.retains = getattr(properties, "RetainAvailable", 1) != 0
        self.wildcards = getattr(properties, "WildcardSubscriptionAvailable", 1) != 0
        self._slots = asyncio.Semaphore(max(1, min(WINDOW, self.receive_maximum)))
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.DisconnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        """Tell those who wait; before the CONNACK too, where aiomqtt stays silent."""
        if not self._connected.done():
            self._connected.set_exception(SilentError("the broker closed the connection before it answered"))
        super()._on_disconnect(client, userdata, flags, reason_code, properties)
        self._lose(_farewell(reason_code))

    def _on_publish(
        self, client: paho.Client, userdata: Any, mid: int, reason_code: ReasonCode, properties: Properties
    ) -> None:
        """Hand the PUBACK's reason (MQTT 5.0, 3.4.2.1) to the publisher; with MQTT 3.1.1 it is 0."""
        if any(packet["mid"] == mid and packet["command"] >> 4 == PacketTypes.PUBLISH for packet in self._unsent()):
            raise _ViolationError("the broker acknowledged what had not been sent")
        self._progress = self._loop.time()
        waiting = self._acks.pop(mid, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(int(reason_code.value))
        super()._on_publish(client, userdata, mid, reason_code, properties)

    def _unsent(self) -> Any:
        """Packets of which not every byte has left; a broker that reads leaves none here."""
        return self._client._out_packet  # noqa: SLF001

    def _look(self) -> None:
        """Give up a broker that answers pings but acknowledges nothing: only a new connection makes it take the pages again."""
        self._watchdog = None
        if not self._acks or self.lost.done():
            return
        left = self._progress + self._limits.acknowledge - self._loop.time()
        if left > 0:
            self._watchdog = self._loop.call_later(left, self._look)
        else:
            self.cut(f"the broker has acknowledged nothing for {self._limits.acknowledge:g} s")

    def watch(self) -> None:
        """From now on, whatever ends the connection shows in `lost`: also an error of the socket, which paho does not report."""

        def ended(done: asyncio.Future[None]) -> None:
            error = None if done.cancelled() else done.exception()
            self._lose(LinkError(f"the connection to the broker is gone ({error or 'closed'})"))

        if self.lost.done() and not self._disconnected.done():
            self._disconnected.set_result(None)
        self._disconnected.add_done_callback(ended)

    def _lose(self, error: LinkError) -> None:
        if not self.lost.done():
            self.lost.set_result(error)
        waiting, self._acks = self._acks, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(LinkError(str(error), error.reason))

    async def post(
        self, topic: str, payload: bytes, *, retain: bool = False, properties: Properties | None = None
    ) -> "asyncio.Future[int]":
        """Wait for a place in the window and send with QoS 1. The future gives the PUBACK's reason, or raises LinkError.

        Posts of one task leave in the order of their calls. Raises PacketError for what this broker never takes. The future
        must not be cancelled: its place in the window is free when the PUBACK is there, not when nobody waits any more.
        """
        size = _packet_size(topic, payload, self.v5, properties)
        if self.limit is not None and size > self.limit:
            raise PacketError(f"a message of {size} bytes for {topic:.200} is too large: {self.limit} bytes are taken")
        slots = self._slots
        await slots.acquire()
        try:
            if self.lost.done():
                raise self.lost.result()
            # paho itself and not aiomqtt's publish(), which would wait for the PUBACK and drop its reason.
            info = self._client.publish(topic, payload, 1, retain and self.retains, properties)
        except BaseException as error:
            slots.release()
            if isinstance(error, ValueError):
                raise PacketError(f"a message for {topic:.200}: {error}") from None
            raise
        future: asyncio.Future[int] = self._loop.create_future()

        def settled(done: asyncio.Future[int]) -> None:
            slots.release()
            _ = done.cancelled() or done.exception()  # read, or asyncio complains where nobody waits any more

        future.add_done_callback(settled)
        if info.rc == paho.MQTT_ERR_SUCCESS:
            if not self._acks:
                self._progress = self._loop.time()
            self._acks[info.mid] = future
            self.largest = max(self.largest, len(payload))
            if self._watchdog is None:
                self._watchdog = self._loop.call_later(self._limits.acknowledge, self._look)
        else:
            future.set_exception(LinkError(paho.error_string(info.rc)))
        return future

    async def publish_acknowledged(
        self, topic: str, payload: bytes, *, retain: bool = False, properties: Properties | None = None
    ) -> int:
        """Send with QoS 1 and wait for the PUBACK: its reason."""
        return await asyncio.shield(await self.post(topic, payload, retain=retain, properties=properties))

    async def subscribe_live(self, topic_filter: str) -> None:
        """Subscribe with QoS 1 to what comes from now on: no retained messages. Raises LinkError if the broker refuses."""
        await self._subscribe(topic_filter, SubscribeOptions(qos=1, retainAsPublished=True, retainHandling=2))

    async def subscribe_retained(self, topic_filter: str) -> None:
        """The same with retained messages first; only those have `retain` set."""
        await self._subscribe(topic_filter, SubscribeOptions(qos=1, retainAsPublished=False, retainHandling=0))

    async def _subscribe(self, topic_filter: str, options: SubscribeOptions) -> None:
        if not self.wildcards and set(topic_filter) & {"+", "#"}:  # one that tries all the same is disconnected (0xA2)
            raise LinkError(f"the broker takes no wildcards, as in the subscription of {topic_filter}")
        try:
            if self.v5:
                reasons = await self.subscribe(topic_filter, options=options)
            else:
                reasons = await self.subscribe(topic_filter, qos=1)
        except aiomqtt.MqttError as error:
            raise LinkError(f"subscribing to {topic_filter}: {error}") from None
        reason = reasons[0] if reasons else ReasonCode(PacketTypes.SUBACK, "Unspecified error")
        code = reason if isinstance(reason, int) else reason.value
        if code >= REFUSED:
            raise LinkError(
                f"the broker refuses the subscription of {topic_filter} ({reason}); grant it in its ACL", code
            )

    async def receive(self) -> aiomqtt.Message:
        """The next message. Raises LinkError when the connection is gone."""
        try:
            return self._taken(await anext(self.messages))
        except aiomqtt.MqttError as error:
            raise (self.lost.result() if self.lost.done() else LinkError(str(error))) from None

    async def poll(self, seconds: float) -> aiomqtt.Message | None:
        """The next message if one comes within that time. Raises LinkError when the connection is gone and all was read."""
        if self._queue.empty():
            self._arrived.clear()
            waiter = asyncio.ensure_future(self._arrived.wait())
            either: set[asyncio.Future[Any]] = {waiter, self.lost}
            try:
                await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiter.cancel()
        if not self._queue.empty():
            return self._taken(self._queue.get_nowait())
        if self.lost.done():
            raise self.lost.result()
        return None

    def _taken(self, message: aiomqtt.Message) -> aiomqtt.Message:
        self._inbox -= _weight(message.payload)
        return message

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        """Bound what waits for a slow reader in bytes, not only in messages; what is beyond is dropped, and counted."""
        weight = _weight(message.payload)
        if self._inbox + weight > INBOX or self._queue.full():
            self.dropped += 1
            return
        self._inbox += weight
        super()._on_message(client, userdata, message)
        self._arrived.set()

    def _give_up(self, why: str) -> None:
        """Cut, and tell those who wait for the CONNACK, too."""
        if not self._connected.done():
            self._connected.set_exception(SilentError(why))
        self.cut(why)

    def cut(self, why: str = "the connection was given up") -> None:
        """Drop the connection as a crash would: no DISCONNECT, so the broker publishes the last will."""
        # paho has no public way to close its socket without a DISCONNECT.
        self._client._sock_close()  # noqa: SLF001
        self._lose(LinkError(why))
        if not self._disconnected.done():
            self._disconnected.set_result(None)
        if self._watchdog is not None:
            self._watchdog.cancel()


def _weight(payload: Any) -> int:
    """Bytes of a message in memory, about."""
    return 512 + (len(payload) if isinstance(payload, bytes) else 0)


def _farewell(reason: ReasonCode) -> LinkError:
    code = int(reason.value)
    if code == SESSION_TAKEN_OVER:
        text = "another client uses our client identifier; is a second daemon running with the same [broker] host?"
    elif code == PACKET_TOO_LARGE:
        text = "the broker found a packet too large; lower [broker] max_packet"
    else:
        text = f"the connection to the broker is gone ({reason})"
    return LinkError(text, code)


def response_properties(correlation: bytes | None) -> Properties | None:
    """The properties of an answer with MQTT 5: the correlation data of the request (MQTT 5.0, 3.3.2.3.6)."""
    if correlation is None:
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.CorrelationData = correlation
    return properties


def event_properties(event: Event) -> Properties:
    """The properties of a page with MQTT 5: a CloudEvent in binary mode (MQTT 5.0, 3.3.2.3.7 and 3.3.2.3.9)."""
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ContentType = event.content_type
    properties.UserProperty = list(event.attributes)
    return properties


def _packet_size(topic: str, payload: bytes, v5: bool, properties: Properties | None) -> int:
    """Bytes of a PUBLISH with QoS 1 (MQTT 5.0, 2.1 and 3.3.2; MQTT 3.1.1 has no properties)."""
    extra = 0 if not v5 else 1 if properties is None else len(properties.pack())  # type: ignore[no-untyped-call]
    rest = 2 + len(topic.encode()) + 2 + extra + len(payload)
    return 1 + next(size for size in (1, 2, 3, 4, 5) if rest < 128**size) + rest
