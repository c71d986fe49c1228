"""The configuration file: TOML, every key checked; what is wrong is an error that says where, and what is allowed."""

import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from comparer.errors import OperatorError
from feed.broker import NAME, BrokerConfig, check, slug, topics
from feed.signing import read_secret
from snapshotter.retention import Limits

from .units import parse_duration, parse_size, parse_threshold

SOCKET = "/run/snapfeed/control.sock"
STATE_DIR = "/var/lib/snapfeed"
KEEP = 16
RESERVED = frozenset({"status", "request", "response"})  # topics of the host, where partitions' stand


@dataclass(frozen=True, slots=True)
class PartitionConfig:
    """One `[[partition]]`: what overrides the thresholds in its system file."""

    mount: str
    name: str | None = None
    io_threshold: int | None = None
    time_threshold: float | None = None
    keep: int | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """`broker` None: start the embedded one. Thresholds None: what the system file says. `reconcile`: seconds between checks.

    `draft`: [broker] as it stands, with a url or without; for a url from the command line.
    """

    broker: BrokerConfig | None = None
    draft: BrokerConfig = field(default_factory=BrokerConfig)
    host: str | None = None
    base: str | None = None
    socket: str = SOCKET
    io_threshold: int | None = None
    time_threshold: float | None = None
    keep: int = KEEP
    reconcile: float = 86400.0
    max_extents: int = 50_000
    exclude: tuple[str, ...] = ()
    unlimited_queue: bool = True
    limits: Limits = field(default_factory=Limits)
    secret: bytes | None = field(default=None, repr=False)
    state_dir: str | None = None
    partitions: tuple[PartitionConfig, ...] = field(default_factory=tuple)

    def where_state_is(self) -> str:
        """The directory of what the daemon itself remembers: configured, systemd's, or beside a socket of one's own."""
        if self.state_dir is not None:
            return self.state_dir
        given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
        return given or (STATE_DIR if self.socket == SOCKET else os.path.dirname(self.socket) or ".")

    def of(self, mount: str) -> PartitionConfig:
        """What is configured for a mount point."""
        return next(
            (p for p in self.partitions if mount in (p.mount, os.path.realpath(p.mount))), PartitionConfig(mount)
        )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise OperatorError(f"{where}: {value!r} is not allowed; write a text in quotes")
    return value


def _mount(value: Any, where: str) -> str:
    text = _text(value, where)
    if not text.startswith("/"):
        raise OperatorError(f"{where}: {value!r} is not an absolute path")
    return os.path.normpath(text)


def _name(value: Any, where: str) -> str:
    text = _text(value, where)
    if not NAME.fullmatch(text) or text in RESERVED:
        but = f", but not {', '.join(sorted(RESERVED))}" if text in RESERVED else ""
        raise OperatorError(f"{where}: {value!r} is not allowed; write 1 to 64 of A-Z a-z 0-9 _ -{but}")
    return text


def _count(least: int, most: int) -> Callable[[Any, str], int]:
    def checked(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise OperatorError(f"{where}: {value!r} is not allowed; write a number from {least} to {most}")
        return value

    return checked


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise OperatorError(f"{where}: {value!r} is not allowed; write true or false")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise OperatorError(f'{where}: {value!r} is not allowed; write a list of texts, such as ["/mnt/*"]')
    return tuple(_text(item, where) for item in value)


Checks = Mapping[str, Callable[[Any, str], Any]]
_BROKER: Checks = {
    "url": _text, "username": _text, "password_file": _text, "ca_file": _text, "cert_file": _text, "key_file": _text,
    "base": _text, "host": _name, "max_packet": _count(8192, 268_435_455),
}  # fmt: skip
_CONTROL: Checks = {"socket": _mount, "state_dir": _mount}
_JOURNAL: Checks = {"age": parse_duration, "bytes": parse_size}
_CONSUMERS: Checks = {"hold_snapshots": _count(0, 1_000_000), "hold_age": parse_duration}
_COMMANDS: Checks = {"secret_file": _mount}
_DEFAULTS: Checks = {
    "io_threshold": parse_threshold,
    "time_threshold": parse_duration,
    "keep": _count(2, 10_000),
    "reconcile": parse_duration,
    "max_extents": _count(1, 1_000_000_000),
}
_WATCH: Checks = {"exclude": _texts, "unlimited_queue": _flag}
_PARTITION: Checks = {
    "mount": _mount,
    "name": _name,
    "io_threshold": parse_threshold,
    "time_threshold": parse_duration,
    "keep": _count(2, 10_000),
}
_TABLES: Mapping[str, Checks] = {
    "broker": _BROKER,
    "control": _CONTROL,
    "defaults": _DEFAULTS,
    "watch": _WATCH,
    "journal": _JOURNAL,
    "consumers": _CONSUMERS,
    "commands": _COMMANDS,
}


def _checked(table: Any, checks: Checks, where: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise OperatorError(f"{where}: must be a table, written [{where}]")
    for key in table:
        if key not in checks:
            raise OperatorError(f"{where}.{key}: unknown key; known are {', '.join(checks)}")
    return {key: checks[key](value, f"{where}.{key}") for key, value in table.items()}


def parse(text: str, name: str = "config") -> Config:
    """Raises OperatorError beginning with `name`."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        remedy = "texts stand in quotes, a table is written [table]; etc/snapfeed.toml has every key, explained"
        raise OperatorError(f"{name}: not TOML: {error}; {remedy}") from error
    try:
        return _parse(document)
    except OperatorError as error:
        raise OperatorError(f"{name}: {error}") from error


def _parse(document: dict[str, Any]) -> Config:
    for key in document:
        if key not in (*_TABLES, "partition"):
            raise OperatorError(f"{key}: unknown table; known are {', '.join(_TABLES)} and [[partition]]")
    tables = {name: _checked(document.get(name, {}), checks, name) for name, checks in _TABLES.items()}
    listed = document.get("partition", [])
    if not isinstance(listed, list):
        raise OperatorError("partition: must be a list of tables, written [[partition]]")
    partitions = []
    for number, table in enumerate(listed, 1):
        checked = _checked(table, _PARTITION, f"partition[{number}]")
        if "mount" not in checked:
            raise OperatorError(f"partition[{number}]: `mount` is missing")
        partitions.append(PartitionConfig(**checked))
    for what in ("mount", "name"):
        values = [v for p in partitions if (v := getattr(p, what)) is not None]
        twice = next((v for v in values if values.count(v) > 1), None)
        if twice is not None:
            raise OperatorError(f"partition.{what}: {twice!r} is given twice")
    broker = tables["broker"]
    draft = broker_config(broker)
    topics(draft.base, draft.host)
    return Config(
        broker=check(draft) if "url" in broker else None,
        draft=draft,
        host=broker.get("host"),
        base=broker.get("base"),
        **tables["control"],
        **tables["defaults"],
        **tables["watch"],
        limits=Limits(**tables["journal"], **tables["consumers"]),
        secret=read_secret(tables["commands"]["secret_file"]) if tables["commands"] else None,
        partitions=tuple(partitions),
    )


def broker_config(given: dict[str, Any]) -> BrokerConfig:
    """Reads the password file; the fields are not checked against one another. Raises OperatorError."""
    fields = dict(given)
    path = fields.pop("password_file", None)
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:
                fields["password"] = file.read().rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise OperatorError(
                f"broker.password_file: {path!r}: {reason}; give the path of a readable file that holds the password"
            ) from error
    for key in ("ca_file", "cert_file", "key_file"):
        if key in fields and not os.access(fields[key], os.R_OK):
            raise OperatorError(f"broker.{key}: {fields[key]!r} cannot be read; give the path of a readable file")
    return BrokerConfig(**fields)


def load(path: str) -> Config:
    """Raises OperatorError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise OperatorError(f"{path}: {reason}; give the path of a readable configuration file") from error
    return parse(text, path)


def doubts(path: str) -> list[str]:
    """What is odd about a configuration that is valid: secrets that everybody can read, mount points that are not there.

    Raises OperatorError if it is not valid.
    """
    load(path)
    with open(path, "rb") as file:
        document = tomllib.load(file)
    found = []
    for table, key in (("broker", "password_file"), ("broker", "key_file"), ("commands", "secret_file")):
        secret = document.get(table, {}).get(key)
        if secret is not None and os.stat(secret).st_mode & stat.S_IROTH:
            found.append(f"{table}.{key}: {secret!r} can be read by everybody on this machine; chmod 600 it")
    for number, partition in enumerate(document.get("partition", []), 1):
        mount = partition["mount"]
        if not os.path.isdir(mount):
            found.append(f"partition[{number}].mount: there is no directory {mount!r}; is the path right?")
    return found


def partition_name(configured: str | None, label: str | None, mount: str) -> str:
    """The name in topics: configured, else the label, else the mount point."""
    if configured:
        return configured
    name = slug(label) if label else slug(mount.strip("/") or "root")
    return f"{name}-fs" if name in RESERVED else name
