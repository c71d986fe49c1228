"""Where the broker is and how topics are called. No I/O but reading certificate files."""

import re
import socket
import ssl
import unicodedata
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from comparer.errors import OperatorError

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_BASE = re.compile(r"[A-Za-z0-9_-]{1,64}(/[A-Za-z0-9_-]{1,64}){0,3}\Z")
_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """A broker, who we are to it, and what it takes. `password` is the secret itself, already read; files are paths.

    `max_packet` is bytes of a whole MQTT packet; `protocol` is 0 (try 5, fall back to 4), 4 (MQTT 3.1.1) or 5;
    `identifier` is the client identifier, `snapfeed-<host>` if empty; `keepalive` is seconds.
    """

    url: str = "mqtt://127.0.0.1:1883"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    base: str = "snapfeed"
    host: str = field(default_factory=lambda: slug(socket.gethostname()))
    max_packet: int = 131_072
    protocol: int = 0
    identifier: str = ""
    keepalive: int = 30


@dataclass(frozen=True, slots=True)
class Address:
    """Host name or IP address, TCP port, and whether TLS is spoken."""

    host: str
    port: int
    tls: bool


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one host, as docs/feed.md names them."""

    base: str
    host: str

    @property
    def status(self) -> str:
        return f"{self.base}/{self.host}/status"

    @property
    def requests(self) -> str:
        """The filter of all commands to this host."""
        return f"{self.base}/{self.host}/request/+"

    def state(self, partition: str) -> str:
        return f"{self.base}/{self.host}/{_name('partition', partition)}/state"

    def changes(self, partition: str) -> str:
        return f"{self.base}/{self.host}/{_name('partition', partition)}/changes"

    def replay(self, partition: str, consumer: str) -> str:
        return f"{self.base}/{self.host}/{_name('partition', partition)}/replay/{_name('consumer', consumer)}"

    def response(self, verb: str) -> str:
        return f"{self.base}/{self.host}/response/{verb}"

    def verb(self, topic: str) -> str:
        """The verb of a command's topic."""
        return topic.rpartition("/")[2]

    def may_respond(self, topic: str) -> bool:
        """Whether a requester may have its answer sent there: no wildcards, not the broker's own topics, not into the feed.

        Control characters are refused too: a strict broker ends the connection that publishes there (MQTT 5.0, 1.5.4).
        """
        if not topic or topic.startswith("$") or set(topic) & {"+", "#"}:
            return False
        if any(unicodedata.category(char) in {"Cc", "Cn", "Cs"} for char in topic):
            return False
        return not topic.startswith(f"{self.base}/") or topic.startswith(f"{self.base}/{self.host}/response/")


def topics(base: str, host: str) -> Topics:
    """The topics of a host. Raises OperatorError for names that cannot stand in a topic on every broker."""
    if not _BASE.match(base):
        raise OperatorError(
            f"[broker] base: {base!r:.80} is not 1 to 4 words of A-Z a-z 0-9 _ - joined by `/`; the usual one is `snapfeed`"
        )
    return Topics(base, _name("[broker] host", host))


def _name(what: str, name: str) -> str:
    if not NAME.match(name):
        raise OperatorError(f"{what}: {name!r:.80} is no name for a topic; use 1 to 64 of A-Z a-z 0-9 _ -")
    return name


def slug(text: str) -> str:
    """A name for topics made from a label, a mount point or a host name: `/srv/data` is `srv-data`; `root` if nothing is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_]+", "-", plain).strip("-")[:64].strip("-") or "root"


def address(url: str) -> Address:
    """Read `mqtt://host[:port]` or `mqtts://host[:port]`. Raises OperatorError that says what is wrong and what is allowed."""
    example = "expected mqtt://host[:port] or mqtts://host[:port]"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise OperatorError(f"[broker] url: {_safe(url)}: {error}; {example}") from None
    if parts.scheme not in _PORTS:
        raise OperatorError(f"[broker] url: {_safe(url)} has no scheme this version knows; {example}")
    if not parts.hostname:
        raise OperatorError(f"[broker] url: {_safe(url)} names no host; {example}")
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise OperatorError(f"[broker] url: {_safe(url)} has more than a host and a port; {example}")
    if parts.username is not None or parts.password is not None:
        raise OperatorError(
            "[broker] url: credentials in the URL would be seen in the process list; use `username`, `password_file`"
        )
    return Address(unquote(parts.hostname), port or _PORTS[parts.scheme], parts.scheme == "mqtts")


def _safe(url: str) -> str:
    """A URL for an error's text: no password, no control characters."""
    return repr(re.sub(r"//[^/@]*@", "//...@", url)[:200])


def check(config: BrokerConfig) -> BrokerConfig:
    """Check everything that can be checked without the broker. Raises OperatorError naming the key."""
    topics(config.base, config.host)
    where = address(config.url)
    if config.protocol not in {0, 4, 5}:
        raise OperatorError(f"[broker] protocol: {config.protocol} is none; 4 is MQTT 3.1.1, 5 is MQTT 5, 0 finds out")
    if config.max_packet < 8192:
        raise OperatorError(f"[broker] max_packet: {config.max_packet} is too small; at least 8192 bytes")
    if config.password is not None and config.username is None:
        raise OperatorError("[broker] username: missing, but there is a password")
    if (config.cert_file is None) != (config.key_file is None):
        raise OperatorError("[broker] cert_file and key_file belong together; one of them is missing")
    if not where.tls and (config.ca_file or config.cert_file):
        raise OperatorError("[broker] ca_file, cert_file and key_file need TLS; make the url mqtts://")
    return config


def tls_context(config: BrokerConfig) -> ssl.SSLContext | None:
    """The TLS context for a broker, None for `mqtt://`. Raises OperatorError naming the file that cannot be used."""
    if not address(config.url).tls:
        return None
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise OperatorError(f"[broker] ca_file: {config.ca_file}: {error}; it must be a readable PEM file") from None
    if config.cert_file is not None:
        try:
            context.load_cert_chain(config.cert_file, config.key_file)
        except (OSError, ssl.SSLError) as error:
            text = f"[broker] cert_file, key_file: {config.cert_file}, {config.key_file}: {error}"
            raise OperatorError(f"{text}; they must be readable PEM files that belong together") from None
    return context


def valid_filter(text: str) -> bool:
    """MQTT 5.0, 4.7.1: `+` and `#` stand alone in their level, `#` in the last one."""
    levels = text.split("/")
    good = all(level in ("+", "#") or not set(level) & {"+", "#"} for level in levels)
    return good and "#" not in levels[:-1] and 0 < len(text.encode()) < 65536 and "\0" not in text
