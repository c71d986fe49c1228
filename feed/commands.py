"""Commands: what may be asked, checked before anything is done; answers; at most once; not too often. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from cachetools import LRUCache

from comparer.errors import OperatorError

LARGEST = 4096
DEEPEST = 8
LARGEST_INTEGER = 2**53
_LONGEST_ID = 128
_LONGEST_TEXT = 1024
_OPENING, _CLOSING, _QUOTE, _BACKSLASH = b"[{", b"]}", ord('"'), ord("\\")


class CommandError(OperatorError):
    """The command cannot be carried out as it stands; the text goes into the answer. `id`: the command's, if it could be read."""

    def __init__(self, text: str, identifier: str | None = None) -> None:
        super().__init__(text)
        self.id = identifier


@dataclass(frozen=True, slots=True)
class Command:
    """A valid command. `fields` holds what the verb allows beside `id` and `partition`."""

    verb: str
    id: str
    partition: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Field:
    kinds: tuple[str, ...]
    required: bool = False


_TEXT, _NUMBER = ("string",), ("integer",)
_CONSUMER = _Field(_TEXT, required=True)
_THRESHOLD = _Field(("string", "integer", "null"))
VERBS: Mapping[str, Mapping[str, _Field]] = {
    "snapshot": {},
    "state": {},
    "replay": {"since": _Field(("object",), required=True), "consumer": _CONSUMER},
    "baseline": {"consumer": _CONSUMER},
    "ack": {"consumer": _CONSUMER, "epoch": _Field(_TEXT, required=True), "seq": _Field(_NUMBER, required=True)},
    "thresholds": {"io_threshold": _THRESHOLD, "time_threshold": _THRESHOLD},
}
_POSITION: Mapping[str, _Field] = {"epoch": _Field(_TEXT, required=True), "seq": _Field(_NUMBER, required=True)}
_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    dict: "object",
    list: "array",
}


def parse_command(verb: str, payload: bytes) -> Command:
    """Check a command and return it. Raises CommandError.

    Size (at most 4 KiB) and depth are checked before the JSON is parsed. Fields that are not in the table are refused: a
    misspelt field that is ignored would do something else than what was asked.
    """
    if len(payload) > LARGEST:
        raise CommandError(f"the command has {len(payload)} bytes; at most {LARGEST} are taken")
    if _depth(payload) > DEEPEST:
        raise CommandError(f"the command is nested deeper than {DEEPEST} levels")
    try:
        document = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise CommandError(f"the command is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise CommandError(f"the command is {_NAMES[type(document)]}, expected an object with `id`")
    identifier = document.pop("id", None)
    if not isinstance(identifier, str) or not 1 <= len(identifier) <= _LONGEST_ID:
        raise CommandError(f"`id` must be a string of 1 to {_LONGEST_ID} characters")
    try:
        return _command(verb, identifier, document)
    except CommandError as error:
        raise CommandError(str(error), identifier) from None


def _command(verb: str, identifier: str, document: dict[str, Any]) -> Command:
    table = VERBS.get(verb)
    if table is None:
        raise CommandError(f"unknown verb {verb!r:.80}; known are {', '.join(VERBS)}")
    partition = document.pop("partition", None)
    if partition is not None and not isinstance(partition, str):
        raise CommandError("`partition` must be a string")
    if partition is not None and not 1 <= len(partition) <= _LONGEST_TEXT:
        raise CommandError(f"`partition` must have 1 to {_LONGEST_TEXT} characters")
    _check(document, table, verb)
    if verb == "replay":
        _check(document["since"], _POSITION, "since")
    return Command(verb, identifier, partition, document)


def _check(document: dict[str, Any], table: Mapping[str, _Field], where: str) -> None:
    for name in table:
        if table[name].required and name not in document:
            raise CommandError(f"`{where}` needs the field `{name}`")
    for name, value in document.items():
        if name not in table:
            allowed = ", ".join(table) or "none"
            raise CommandError(f"`{where}` has no field {name!r:.80}; allowed beside `id` and `partition`: {allowed}")
        kind = _NAMES[type(value)]
        if kind not in table[name].kinds:
            raise CommandError(f"`{name}` is {kind}, expected {' or '.join(table[name].kinds)}")
        if isinstance(value, str) and not 1 <= len(value) <= _LONGEST_TEXT:
            raise CommandError(f"`{name}` must have 1 to {_LONGEST_TEXT} characters")
        if isinstance(value, int) and not 0 <= value <= LARGEST_INTEGER:
            raise CommandError(f"`{name}` must lie between 0 and {LARGEST_INTEGER}")


def _depth(payload: bytes) -> int:
    """How deep arrays and objects are nested, brackets inside strings not counted."""
    depth = deepest = 0
    inside = skip = False
    for byte in payload:
        if skip:
            skip = False
        elif inside:
            skip = byte == _BACKSLASH
            inside = byte != _QUOTE
        elif byte == _QUOTE:
            inside = True
        elif byte in _OPENING:
            depth += 1
            deepest = max(deepest, depth)
        elif byte in _CLOSING:
            depth -= 1
    return deepest


def answer(identifier: str | None, data: Any = None, error: str | None = None) -> bytes:
    """An answer: `{"id", "status", "error", "data"}`. `error` makes it one; `identifier` is None where the command had none."""
    status = "ok" if error is None else "error"
    return orjson.dumps({"id": identifier, "status": status, "error": error, "data": data})


class Executed:
    """The answers of commands that were carried out, by (verb, id), so that a repeated one is answered and not done again.

    Bounded: the `size` last used are kept. None as an answer: it is being carried out.
    """

    def __init__(self, size: int = 1024) -> None:
        self._answers: LRUCache[tuple[str, str], bytes | None] = LRUCache(size)

    def begin(self, command: Command) -> bool:
        """Note that a command is being carried out; False if it already was or is."""
        key = (command.verb, command.id)
        if key in self._answers:
            return False
        self._answers[key] = None
        return True

    def finish(self, command: Command, reply: bytes) -> None:
        self._answers[command.verb, command.id] = reply

    def forget(self, command: Command) -> None:
        """A command failed before it did anything: the same id may try again."""
        self._answers.pop((command.verb, command.id), None)

    def reply(self, command: Command) -> bytes | None:
        """The answer given then; None if there is none, or none yet."""
        return self._answers.get((command.verb, command.id))


class RateLimit:
    """A token bucket: `rate` commands a second, `burst` at once. Time is an argument, in seconds of a monotonic clock."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, float(burst)
        self._tokens = float(burst)
        self._at: float | None = None

    def allow(self, now: float) -> bool:
        """Take a token; False if there is none."""
        if self._at is not None and now > self._at:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        if self._at is None or now > self._at:
            self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
