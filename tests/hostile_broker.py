"""A scripted MQTT 5 broker for what real ones do rarely: refuse a publish, allow one at a time, take tiny packets only."""

import asyncio
import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Publish:
    topic: str
    payload: bytes
    packet: int  # bytes of the whole packet


class HostileBroker:
    """Answers each PUBLISH with `reason(publish)`: a PUBACK reason, or None for no answer. `received` has all of them.

    `receive_maximum` and `max_packet` go into the CONNACK; a larger packet ends the connection with 0x95, as the standard says.
    `release` lets held PUBACKs go; `most` is how many publishes were ever unanswered at once.
    """

    def __init__(
        self,
        reason: Callable[[Publish], int | None] = lambda _: 0,
        receive_maximum: int | None = None,
        max_packet: int | None = None,
        announce: bool = True,
    ) -> None:
        self.reason = reason
        self.received: list[Publish] = []
        self.connections = 0
        self.most = 0
        self._waiting = 0
        self._receive_maximum, self._max_packet, self._announce = receive_maximum, max_packet, announce

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"mqtt://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._writers = set()
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        self._writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                first = (await reader.readexactly(1))[0]
                length, shift = 0, 0
                while True:
                    byte = (await reader.readexactly(1))[0]
                    length |= (byte & 0x7F) << shift
                    shift += 7
                    if byte < 0x80:
                        break
                body = await reader.readexactly(length)
                if not await self._answer(writer, first, body, 1 + shift // 7 + length):
                    break
        writer.close()

    async def _answer(self, writer, first: int, body: bytes, packet: int) -> bool:
        kind = first >> 4
        if self._max_packet is not None and packet > self._max_packet:
            writer.write(b"\xe0\x02\x95\x00")
            return False
        if kind == 1:
            properties = b"" if self._receive_maximum is None else b"\x21" + struct.pack("!H", self._receive_maximum)
            if self._max_packet is not None and self._announce:
                properties += b"\x27" + struct.pack("!I", self._max_packet)
            writer.write(bytes([0x20, 3 + len(properties), 0, 0, len(properties)]) + properties)
        elif kind == 3:
            (size,) = struct.unpack_from("!H", body)
            topic, identifier = body[2 : 2 + size].decode(), body[2 + size : 4 + size]
            skip, shift, length = 4 + size, 0, 0
            while True:  # the length of the properties, a variable byte integer as the packet's own
                length |= (body[skip] & 0x7F) << shift
                skip, shift = skip + 1, shift + 7
                if body[skip - 1] < 0x80:
                    break
            skip += length
            message = Publish(topic, body[skip:], packet)
            self.received.append(message)
            self._waiting += 1
            self.most = max(self.most, self._waiting)
            asyncio.get_running_loop().call_soon(self._acknowledge, writer, identifier, message)
        elif kind == 8:
            writer.write(b"\x90\x04" + body[:2] + b"\x00\x01")
        elif kind == 12:
            writer.write(b"\xd0\x00")
        elif kind == 14:
            return False
        return True

    def _acknowledge(self, writer, identifier: bytes, message: Publish) -> None:
        reason = self.reason(message)
        if reason is not None:
            self._waiting -= 1
            writer.write(b"\x40\x04" + identifier + bytes([reason, 0]))
