"""A scripted MQTT 3.1.1 and 5 broker for what real ones do rarely, strict about what the client sends.

    async with HostileBroker([Script(disconnect=(3, 0x8B)), Script()]) as broker:
        ...

Each connection follows a script, the last one all further connections. What the standard forbids a client (identifiers in use,
more unacknowledged publishes than Receive Maximum, packets too large, anything before the CONNACK, ...) is kept in `violations`
and fails the test when the broker is left.
"""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = range(1, 8)
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT = range(8, 15)
_TEXTS, _PAIRS, _BINARY = {0x03, 0x08, 0x12, 0x15, 0x1A, 0x1C, 0x1F}, {0x26}, {0x09, 0x16}
_FOURS, _TWOS = {0x02, 0x11, 0x18, 0x27}, {0x13, 0x21, 0x22, 0x23}
_TOPIC_ALIAS = 0x23


@dataclass(frozen=True)
class Publish:
    """What a client published. `packet` is bytes of the whole packet, `connection` counts from 0."""

    topic: str
    payload: bytes
    packet: int
    connection: int = 0
    retain: bool = False
    properties: tuple[tuple[int, object], ...] = ()


@dataclass(frozen=True)
class Command:
    """What the broker publishes to the client once it has subscribed."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    response: str | None = None
    correlation: bytes | None = None


@dataclass
class Script:
    """How one connection goes. Counts of pages are counts of PUBLISH packets on `.../changes`.

    connack     a reason; "none" (accepts, says nothing), "half" (cut in half), "hangup", "twice", or bytes to send instead
    properties  of the CONNACK, encoded; those below are encoded, and enforced, too
    announce    whether the CONNACK says max_packet; a larger packet is answered by DISCONNECT 0x95 if it does not
    reason      of a publish's PUBACK, or None for no answer
    suback      a reason, or None for a SUBACK without any
    acks        "each", "reordered" (in threes, last one first), "twice", "unknown" (others before), "early" (those to come, too)
    after, then what happens when that many pages have come: a DISCONNECT reason, "drop", "mute" (answers pings only),
                "deaf" (stops reading), or bytes to send
    """

    connack: int | str | bytes = 0
    session_present: bool = False
    receive_maximum: int | None = None
    max_packet: int | None = None
    announce: bool = True
    maximum_qos: int | None = None
    retain_available: int | None = None
    wildcards: int | None = None
    keep_alive: int | None = None
    properties: bytes = b""
    reason: Callable[[Publish], int | None] = lambda _: 0
    acks: str = "each"
    after: int | None = None
    then: int | str | bytes = "drop"
    suback: int | None = 1
    commands: Sequence[Command] = ()
    slow: bool = False

    def connack_packet(self, v5: bool, reason: int) -> bytes:
        extra = self.properties
        for code, kind, value in (
            (0x21, "!BH", self.receive_maximum),
            (0x27, "!BI", self.max_packet if self.announce else None),
            (0x24, "!BB", self.maximum_qos),
            (0x25, "!BB", self.retain_available),
            (0x28, "!BB", self.wildcards),
            (0x13, "!BH", self.keep_alive),
        ):
            if value is not None:
                extra += struct.pack(kind, code, value)
        body = bytes([self.session_present and not reason, reason])
        return packet(CONNACK << 4, body + (length(len(extra)) + extra if v5 else b""))


class HostileBroker:
    """`received` has all publishes, `good` those that got a PUBACK below 0x80; `most` were unanswered at once on a connection."""

    def __init__(self, scripts: Sequence[Script] = (Script(),)) -> None:
        self.scripts = list(scripts)
        self.received: list[Publish] = []
        self.good: list[Publish] = []
        self.violations: list[str] = []
        self.connections = 0
        self.subscriptions: list[str] = []
        self.puback_from_client = 0
        self.most = 0
        self._open: set[asyncio.Task] = set()

    async def __aenter__(self):
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # little fits in when a script stops reading
        self._server = await asyncio.start_server(self._accepted, sock=listening, limit=1 << 16)
        self.url = f"mqtt://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, kind, *_):
        self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        if kind is None:
            assert not self.violations, self.violations[:5]

    def kind(self) -> None:
        """From the next connection on nothing is wrong; connections there are end."""
        self.scripts = [Script()]
        for task in self._open:
            task.cancel()

    async def _accepted(self, reader, writer):
        task = asyncio.current_task()
        self._open.add(task)
        number, self.connections = self.connections, self.connections + 1
        session = _Session(self, number, self.scripts[min(number, len(self.scripts) - 1)], reader, writer)
        try:
            await session.run()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError, _HangUp):
            pass
        except Exception as error:  # noqa: BLE001 - nothing of a session may go unseen
            self.violations.append(f"connection {number}: {error!r}")
        finally:
            self._open.discard(task)
            writer.transport.abort() if session.deaf else writer.close()


class _HangUp(Exception):  # noqa: N818 - no error: the script says so
    """The end of a connection."""


@dataclass
class _Session:
    broker: HostileBroker
    number: int
    script: Script
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    v5: bool = True
    connected: bool = False
    muted: bool = False
    deaf: bool = False
    pages: int = 0
    waiting: dict[int, Publish] = field(default_factory=dict)  # by identifier: not acknowledged
    held: deque[int] = field(default_factory=deque)
    ours: dict[int, int] = field(default_factory=dict)  # identifiers of what we published: what we wait for

    def wrong(self, text: str) -> None:
        self.broker.violations.append(f"connection {self.number}: {text}")

    def send(self, data: bytes) -> None:
        if not self.slow(data):
            self.writer.write(data)

    def slow(self, data: bytes) -> bool:
        if self.script.slow:
            self._trickle += data
        return self.script.slow

    async def run(self) -> None:
        self._trickle = bytearray()
        trickling = asyncio.create_task(self._trickles())
        try:
            while True:
                patience = self.script.keep_alive and self.script.keep_alive * 1.5 + 0.1
                try:
                    async with asyncio.timeout(patience or None):
                        first, body, size = await self._read()
                except TimeoutError:
                    self.wrong(f"silent for more than 1.5 times the keep-alive of {self.script.keep_alive} s")
                    return
                await self._handle(first, body, size)
        finally:
            trickling.cancel()

    async def _trickles(self) -> None:
        """Send what waits one byte at a time, each in a segment of its own."""
        while True:
            await asyncio.sleep(0.0005)
            if self._trickle:
                self.writer.write(bytes([self._trickle.pop(0)]))

    async def _read(self) -> tuple[int, bytes, int]:
        first = (await self.reader.readexactly(1))[0]
        number, shift = 0, 0
        while True:
            byte = (await self.reader.readexactly(1))[0]
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 21:
                self.wrong("a remaining length of more than four bytes")
                raise _HangUp
        return first, await self.reader.readexactly(number), 1 + shift // 7 + number

    async def _handle(self, first: int, body: bytes, size: int) -> None:
        kind, flags = first >> 4, first & 15
        if not self.connected and kind != CONNECT:
            self.wrong(f"packet type {kind} before the CONNACK")
        if kind != PUBLISH and flags != (2 if kind in {SUBSCRIBE, UNSUBSCRIBE, PUBREL} else 0):
            self.wrong(f"packet type {kind} with flags {flags}")
        if kind != CONNECT and self.script.max_packet is not None and size > self.script.max_packet:
            if self.script.announce:
                self.wrong(f"a packet of {size} bytes; {self.script.max_packet} were announced")
            self._goodbye(0x95)
        if kind == CONNECT:
            await self._connect(body)
        elif kind == PUBLISH:
            await self._publish(flags, body, size)
        elif kind == SUBSCRIBE:
            self._subscribe(body)
        elif kind in {PUBACK, PUBREC, PUBCOMP}:
            self._answered(kind, int.from_bytes(body[:2]))
        elif kind == PINGREQ:
            self.send(b"\xd0\x00")
        elif kind == DISCONNECT:
            raise _HangUp
        else:
            self.wrong(f"packet type {kind}")

    # ---- CONNECT

    async def _connect(self, body: bytes) -> None:
        if self.connected:
            self.wrong("a second CONNECT")
        name, rest = _text(body)
        level, flags = rest[0], rest[1]
        self.v5 = level == 5
        if not self.v5:  # there these cannot be said, so nobody can be blamed for not keeping them
            unsaid = dict.fromkeys(("receive_maximum", "maximum_qos", "retain_available", "wildcards", "keep_alive"))
            self.script = replace(self.script, announce=False, **unsaid)
        if name != "MQTT" or level not in {4, 5} or flags & 1:
            self.wrong(f"CONNECT for {name!r} level {level}, flags {flags:#x}")
        if self.script.maximum_qos is not None and flags & 4 and (flags >> 3) & 3 > self.script.maximum_qos:
            await self._refuse(0x9B)
        if self.script.retain_available == 0 and flags & 0x20:
            await self._refuse(0x9A)
        answer = self.script.connack
        if answer == "none":
            await asyncio.sleep(3600)
        if answer == "hangup":
            raise _HangUp
        if isinstance(answer, bytes):
            self.writer.write(answer)
            self.connected = True
            return
        if isinstance(answer, int) and answer:
            await self._refuse(answer)
        good = self.script.connack_packet(self.v5, 0)
        if answer == "half":
            self.writer.write(good[: len(good) // 2])
            await self.writer.drain()
            raise _HangUp
        self.send(good * (2 if answer == "twice" else 1))
        self.connected = True

    async def _refuse(self, reason: int) -> None:
        old = {0x84: 1, 0x85: 2, 0x88: 3, 0x86: 4, 0x87: 5}
        self.writer.write(self.script.connack_packet(self.v5, reason if self.v5 else old.get(reason, 5)))
        await self.writer.drain()
        raise _HangUp

    # ---- PUBLISH to us

    async def _publish(self, flags: int, body: bytes, size: int) -> None:
        qos, retain = flags >> 1 & 3, bool(flags & 1)
        topic, rest = _text(body)
        identifier = int.from_bytes(rest[:2]) if qos else 0
        rest = rest[2:] if qos else rest
        properties, rest = _properties(rest) if self.v5 else ((), rest)
        message = Publish(topic, rest, size, self.number, retain, properties)
        self._judge(message, qos, flags, identifier)
        self.broker.received.append(message)
        self.waiting[identifier] = message
        self.broker.most = max(self.broker.most, len(self.waiting))
        page = topic.endswith("/changes")
        self.pages += page
        if page and self.script.after is not None and self.pages > self.script.after:
            await self._turn()
        if not self.muted:
            asyncio.get_running_loop().call_soon(self._acknowledge, identifier)

    def _judge(self, message: Publish, qos: int, flags: int, identifier: int) -> None:
        if not message.topic or set(message.topic) & {"+", "#", "\0"}:
            self.wrong(f"a publish on {message.topic!r}")
        if qos != 1 or (self.script.maximum_qos is not None and qos > self.script.maximum_qos):
            self.wrong(f"a publish with QoS {qos}")
        if flags & 8:
            self.wrong("DUP set on what was not sent on this connection before")
        if message.retain and self.script.retain_available == 0:
            self.wrong("retained, though that is not available")
        if identifier == 0 or identifier in self.waiting:
            self.wrong(f"packet identifier {identifier} is in use")
        if any(code == _TOPIC_ALIAS for code, _ in message.properties):
            self.wrong("a topic alias above Topic Alias Maximum 0")
        if len(self.waiting) >= (self.script.receive_maximum or 65_535):
            self.wrong(f"more than {self.script.receive_maximum} publishes at once")

    async def _turn(self) -> None:
        """The page came that ends the peace."""
        then = self.script.then
        if isinstance(then, int):
            self._goodbye(then)
        elif isinstance(then, bytes):
            self.writer.write(then)
            await asyncio.sleep(3600)
        elif then == "mute":
            self.muted = True
            return
        elif then == "deaf":
            self.deaf = True
            self.reader._transport.pause_reading()
            await asyncio.sleep(3600)
        raise _HangUp

    def _goodbye(self, reason: int) -> None:
        if self.v5:
            self.writer.write(bytes([DISCONNECT << 4, 2, reason, 0]))
        raise _HangUp

    def _acknowledge(self, identifier: int) -> None:
        if self.script.acks == "reordered" and self.waiting.get(identifier, None):
            self.held.append(identifier)
            if len(self.held) == 3 or len(self.held) >= (self.script.receive_maximum or 3):
                self._release()
            else:
                asyncio.get_running_loop().call_later(0.005, self._release)
            return
        self._puback(identifier)

    def _release(self) -> None:
        while self.held:
            self._puback(self.held.pop())

    def _puback(self, identifier: int) -> None:
        message = self.waiting.get(identifier)
        reason = None if message is None else self.script.reason(message)
        if reason is not None and reason >= 0x80 and not self.v5:
            reason = None  # a PUBACK of MQTT 3.1.1 cannot refuse
        if message is None or reason is None or self.writer.is_closing():
            return
        del self.waiting[identifier]
        if reason < 0x80:
            self.broker.good.append(message)
        if self.script.acks == "unknown":
            self.send(self._ack(40_000 + identifier % 1000, 0))
        if self.script.acks == "early":
            for ahead in range(21, 200):  # beyond any window: what has left the client may be acknowledged unread
                self.send(self._ack(max(self.waiting, default=identifier) + ahead, 0))
        self.send(self._ack(identifier, reason) * (2 if self.script.acks == "twice" else 1))

    def _ack(self, identifier: int, reason: int) -> bytes:
        return packet(PUBACK << 4, struct.pack("!H", identifier) + (bytes([reason, 0]) if self.v5 else b""))

    # ---- SUBSCRIBE, and what we publish

    def _subscribe(self, body: bytes) -> None:
        identifier, rest = body[:2], body[2:]
        if self.v5:
            _, rest = _properties(rest)
        wanted, _ = _text(rest)
        self.broker.subscriptions.append(wanted)
        if self.script.wildcards == 0 and set(wanted) & {"+", "#"}:
            self.wrong(f"a subscription of {wanted}, though wildcards are not available")
        code = self.script.suback
        if code is not None and code >= 0x80 and not self.v5:
            code = 0x80
        self.send(
            packet(SUBACK << 4, identifier + (b"\0" if self.v5 else b"") + (b"" if code is None else bytes([code])))
        )
        if code is not None and code < 0x80:
            for number, command in enumerate(self.script.commands, 1):
                self._command(number, command)

    def _command(self, identifier: int, command: Command) -> None:
        extra = b""
        if command.response is not None:
            extra += b"\x08" + _sized(command.response.encode())
        if command.correlation is not None:
            extra += b"\x09" + _sized(command.correlation)
        body = _sized(command.topic.encode()) + (struct.pack("!H", identifier) if command.qos else b"")
        body += (length(len(extra)) + extra if self.v5 else b"") + command.payload
        self.ours[identifier] = PUBREC if command.qos == 2 else PUBACK
        self.send(packet(PUBLISH << 4 | command.qos << 1 | command.retain, body))

    def _answered(self, kind: int, identifier: int) -> None:
        if self.ours.get(identifier) != kind:
            self.wrong(f"packet type {kind} for identifier {identifier}, which does not wait for it")
            return
        if kind == PUBREC:
            self.ours[identifier] = PUBCOMP
            self.send(packet(PUBREL << 4 | 2, struct.pack("!H", identifier)))
            return
        del self.ours[identifier]
        self.broker.puback_from_client += 1


def packet(first: int, body: bytes) -> bytes:
    return bytes([first]) + length(len(body)) + body


def length(number: int) -> bytes:
    """A variable byte integer."""
    encoded = bytearray()
    while True:
        number, low = number >> 7, number & 0x7F
        encoded.append(low | (0x80 if number else 0))
        if not number:
            return bytes(encoded)


def _sized(data: bytes) -> bytes:
    return struct.pack("!H", len(data)) + data


def _text(body: bytes) -> tuple[str, bytes]:
    (size,) = struct.unpack_from("!H", body)
    return body[2 : 2 + size].decode(), body[2 + size :]


def _properties(body: bytes) -> tuple[tuple[tuple[int, object], ...], bytes]:
    """(identifier, value) of each property, and what follows them (MQTT 5.0, 2.2.2.2)."""
    size, at, shift = 0, 0, 0
    while True:
        byte = body[at]
        size |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    rest, after = body[at : at + size], body[at + size :]
    found: list[tuple[int, object]] = []
    while rest:
        code, rest = rest[0], rest[1:]
        if code in _PAIRS:
            name, rest = _text(rest)
            value, rest = _text(rest)
            found.append((code, (name, value)))
        elif code in _TEXTS:
            text, rest = _text(rest)
            found.append((code, text))
        else:
            wide = 4 if code in _FOURS else 2 if code in _TWOS else 1
            if code in _BINARY:
                wide = 2 + int.from_bytes(rest[:2])
            found.append((code, rest[wide - wide if code not in _BINARY else 2 : wide]))
            rest = rest[wide:]
    return tuple(found), after
