"""Making a connection to a broker: which protocol version it speaks, what it refuses and why, as advice for people."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import aiomqtt
import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from comparer.errors import OperatorError
from feed.broker import BrokerConfig, address, tls_context
from feed.connection import Connection, Limits, LinkError, SilentError

_HUNG_UP = -1
# Unsupported version in MQTT 3.1.1 (table 3.1) and 5.0 (table 3-1); protocol error and malformed packet; or no answer at all.
_NOT_FIVE = frozenset({0x01, 0x84, 0x82, 0x81, _HUNG_UP})
RETAIN_NOT_SUPPORTED = 0x9A
QOS_NOT_SUPPORTED = 0x9B


async def _close(connection: Connection) -> None:
    try:
        with contextlib.suppress(aiomqtt.MqttError):
            await connection.__aexit__(None, None, None)
    finally:
        connection.cut()


class Dialer:
    """Connects to one broker, and remembers which protocol version it speaks. Raises OperatorError for unusable TLS files."""

    def __init__(self, config: BrokerConfig, identifier: str, limits: Limits | None = None) -> None:
        self.config = config
        self.identifier = identifier
        self._limits = limits or Limits()
        self._retain = True  # whether the broker took or offered retained messages when it was last heard
        self._sure = True  # whether the broker said which version it speaks
        self._address = address(config.url)
        self._version = config.protocol
        tls_context(config)  # an unusable file is an error now, not in a loop later

    @contextlib.asynccontextmanager
    async def open_client(self, will: aiomqtt.Will | None = None) -> AsyncIterator[Connection]:
        """A connection for the body, MQTT 5 if the broker speaks it. Left by an exception it is cut, otherwise closed well.

        Raises LinkError when it cannot be had.
        """
        connection = await self._dial(will)
        try:
            yield connection
        except BaseException:
            connection.cut()
            raise
        await _close(connection)

    async def _dial(self, will: aiomqtt.Will | None) -> Connection:
        version = self._version or await self._probe()
        try:
            if will is not None and not self._retain:
                will = replace(will, retain=False)
            connection = await self._attempt(version, will, self.config.username)
        except LinkError as error:
            self._version = self.config.protocol  # perhaps another broker answers there by now
            self._retain = error.reason != RETAIN_NOT_SUPPORTED
            raise
        self._version = version if self._sure else self.config.protocol
        return connection

    async def _probe(self) -> int:
        """Whether the broker speaks MQTT 5: a connection without last will and login, thrown away again.

        amqtt reads the properties of an MQTT 5 CONNECT as the client identifier and what follows as text lengths: with a will
        or a user name in it, it waits for bytes that never come. Without them it answers 0x01, unacceptable protocol version, as
        NATS does. A broker that refuses the missing login understood the question. One that hangs up may not have, or it is just
        stopping: it is asked twice, and again next time, because with MQTT 3.1.1 a refused page looks like a taken one.
        """
        for again in (True, False):
            try:
                connection = await self._attempt(5, None, None)
            except LinkError as error:
                if error.reason is None:
                    raise  # nobody there
                self._sure = error.reason != _HUNG_UP
                if self._sure or not again:
                    return 4 if error.reason in _NOT_FIVE else 5
            else:
                self._sure = True
                await _close(connection)
                break
        return 5

    async def _attempt(self, version: int, will: aiomqtt.Will | None, username: str | None) -> Connection:
        config = self.config
        try:
            context = tls_context(config)  # read each time: certificates are renewed under a running daemon
        except OperatorError as error:
            raise LinkError(str(error)) from None
        connection = Connection(
            self._address.host,
            self._address.port,
            username=username,
            password=None if username is None else config.password,
            identifier=self.identifier,
            protocol=aiomqtt.ProtocolVersion.V5 if version == 5 else aiomqtt.ProtocolVersion.V311,
            clean_session=None if version == 5 else True,
            clean_start=True if version == 5 else paho.MQTT_CLEAN_START_FIRST_ONLY,
            will=will,
            keepalive=config.keepalive,
            limits=self._limits,
            tls_context=context,
            max_inflight_messages=65_535,  # the window is ours
            max_queued_incoming_messages=100_000,  # and INBOX bytes
            properties=self._properties() if version == 5 and will is not None else None,
        )
        try:
            await connection.__aenter__()
        except (aiomqtt.MqttError, UnicodeError) as error:  # UnicodeError: a host name that cannot be looked up
            connection.cut()
            raise self._explained(error) from None
        except BaseException:
            connection.cut()
            raise
        connection.watch()
        self._retain = connection.retains
        if connection.maximum_qos < 1:
            connection.cut()
            raise self._without_qos()
        return connection

    def _properties(self) -> Properties | None:
        """What the CONNECT asks for; the probe asks for nothing."""
        if self._limits.incoming is None:
            return None
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = self._limits.incoming
        return properties

    def _without_qos(self, reason: int | None = None) -> LinkError:
        text = "takes QoS 0 only and so acknowledges nothing: what arrived there could not be known, and diffs would be lost"
        return LinkError(f"broker {self.config.url} {text}; allow QoS 1 there (max_qos), or use another broker", reason)

    def _explained(self, error: Exception) -> LinkError:
        where = f"broker {self.config.url}"
        if "CERTIFICATE" in str(error):
            remedy = "check [broker] ca_file and the host name in url"
            if "key usage" in str(error).lower() or "key identifier" in str(error).lower():
                remedy = "Python 3.13 and newer demand it: make the certificates anew, as in docs/install.md"
            return LinkError(f"{where}: {error}; {remedy}")
        if isinstance(error, SilentError):
            return LinkError(f"{where}: {error}; is this an MQTT port, and does it want TLS (mqtts://)?", _HUNG_UP)
        if not isinstance(error, aiomqtt.MqttCodeError) or error.rc is None:
            return LinkError(f"{where} is not reachable: {error}; is it running, is [broker] url right?")
        code = error.rc.value if isinstance(error.rc, ReasonCode) else int(error.rc)
        if code in {0x86, 0x87, 4, 5}:
            text = f"{where} refuses the login ({error.rc}); check [broker] username and password_file, and the broker's users"
            return LinkError(text, code)
        if code == QOS_NOT_SUPPORTED:
            return self._without_qos(code)
        return LinkError(f"{where} refuses the connection ({error.rc})", code)
