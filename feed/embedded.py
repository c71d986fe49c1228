"""The embedded broker: amqtt on the loopback interface, for a trial and for a host that has no broker. MQTT 3.1.1 only.

It keeps nothing: retained messages and sessions end with the daemon. The journal is elsewhere, so nothing is lost by that.
"""

import asyncio
import errno
import importlib.util
import logging
import socket
from collections.abc import Iterator
from typing import Any

from comparer.errors import OperatorError, TransientError

_LOG = logging.getLogger("snapfeed.feed")
DEFAULT_PORT = 1883
_TRIES = 100
_LISTENER = "default"
MISSING = "the embedded broker needs the package amqtt"
REMEDY = (
    "install it beside snapfeed with `pip install -r requirements/broker.txt` (the extra `broker` of its source tree:"
    " `pip install '.[broker]'`), or set [broker] url"
)


def installed() -> bool:
    """Whether the embedded broker could be imported."""
    return importlib.util.find_spec("amqtt") is not None


class _Steady(dict[Any, Any]):
    """A dictionary that may change while it is iterated over: iteration is over what it held at the beginning."""

    def __iter__(self) -> Iterator[Any]:
        return iter(list(super().keys()))

    def keys(self) -> Any:
        return list(super().keys())

    def values(self) -> Any:
        return list(super().values())

    def items(self) -> Any:
        return list(super().items())


class EmbeddedBroker:
    """A broker inside this process. Anonymous, so it listens on the loopback interface unless told otherwise.

    `port` None: 1883, or the next free one; 0: any free one; else exactly that one. `url` says where it is after `start`.
    """

    def __init__(self, host: str = "127.0.0.1", port: int | None = None) -> None:
        self._host = host
        self._wanted = port
        self._broker: Any = None
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"mqtt://{self._host}:{self.port}"

    async def start(self) -> None:
        """Listen. Raises OperatorError if the package is missing or the port is taken."""
        try:
            from amqtt.broker import Broker  # noqa: PLC0415 -- an extra, and slow to import
        except ImportError as error:
            raise OperatorError(f"{MISSING} ({error}); {REMEDY}") from None
        # amqtt tells of every packet, and reports each client that leaves as an error with a traceback.
        for name in ("amqtt", "transitions"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        listener = self._bind()
        plugins = {
            "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}
        }  # no $SYS, no packet log
        try:
            self._broker = Broker({"listeners": {_LISTENER: {"type": "external"}}, "plugins": plugins})
            # amqtt 0.12 awaits while it iterates over these. A client that comes or goes meanwhile makes it drop a message
            # without a word, or another client ("dictionary changed size during iteration").
            for name in ("_subscriptions", "_retained_messages", "_sessions"):
                setattr(self._broker, name, _Steady())
            await self._broker.start()
            # Our own socket: amqtt cannot say which port 0 became, and logs a traceback for a port that is taken.
            self._server = await asyncio.start_server(self._serve, sock=listener)
        except BaseException:
            listener.close()
            raise
        self.port = listener.getsockname()[1]
        if self._wanted is None and self.port != DEFAULT_PORT:
            _LOG.warning("port %d is in use; the embedded broker is at %s", DEFAULT_PORT, self.url)

    async def stop(self) -> None:
        """Close all connections and stop listening."""
        if self._server is not None:
            self._server.close()
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        if self._broker is not None:
            await self._broker.shutdown()
        if self._server is not None:
            await self._server.wait_closed()
        self._broker = self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._clients.add(task)
            task.add_done_callback(self._clients.discard)
        try:
            await self._broker.stream_connected(reader, writer, _LISTENER)
        except Exception as error:  # noqa: BLE001 -- amqtt raises into whoever serves: a client's fault ends that client
            _LOG.debug("embedded broker: a client was dropped: %s", error)
        finally:
            writer.close()

    def _bind(self) -> socket.socket:
        first = DEFAULT_PORT if self._wanted is None else self._wanted
        last = first + _TRIES if self._wanted is None else first + 1
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        for port in range(first, min(last, 65_536)):
            listener = socket.socket(family, socket.SOCK_STREAM)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((self._host, port))
                listener.listen(128)
            except OSError as error:
                listener.close()
                if error.errno != errno.EADDRINUSE:
                    raise OperatorError(f"the embedded broker cannot listen on {self._host}:{port}: {error}") from None
            else:
                return listener
        if self._wanted is None:
            raise TransientError(f"no free port from {first} to {last - 1} for the embedded broker; set [broker] url")
        raise OperatorError(f"port {first} on {self._host} is in use; stop what uses it, or set [broker] url")
