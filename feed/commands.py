"""Commands: what may be asked, checked before anything is done; answers; at most once; not too often. Pure."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from cachetools import LRUCache

from comparer.errors import OperatorError
from feed.documents import AnswerDocument

LARGEST = 4096
DEEPEST = 8
LARGEST_INTEGER = 2**53
_OPENING, _CLOSING, _QUOTE, _BACKSLASH = b"[{", b"]}", ord('"'), ord("\\")


class CommandError(OperatorError):
    """The command cannot be carried out as it stands; the text goes into the answer. `id`: the command's, if it could be read.

    `data`: what the answer says beside the error, if it can help.
    """

    def __init__(self, text: str, identifier: str | None = None, data: Any = None) -> None:
        super().__init__(text)
        self.id = identifier
        self.data = data


@dataclass(frozen=True, slots=True)
class Command:
    """A valid command. `fields` holds what the verb allows beside `id` and `partition`."""

    verb: str
    id: str
    partition: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Field:
    """What a field of a command may be. `kinds` are those of JSON; texts have 1 to `longest` characters and match `pattern` as a
    whole; integers are 0 to LARGEST_INTEGER; objects have these `fields` and no others. feed.schema publishes these tables.
    """

    kinds: tuple[str, ...]
    required: bool = False
    longest: int = 1024
    pattern: str | None = None
    fields: "Mapping[str, Field] | None" = None


_TEXT, _NUMBER = ("string",), ("integer",)
_CONSUMER = Field(_TEXT, required=True, longest=64, pattern="[A-Za-z0-9_-]{1,64}")
_THRESHOLD = Field(("string", "integer", "null"))
_POSITION: Mapping[str, Field] = {"epoch": Field(_TEXT, required=True), "seq": Field(_NUMBER, required=True)}
# Every command has these; the others are for a host that demands signatures.
COMMON: Mapping[str, Field] = {"id": Field(_TEXT, required=True, longest=128), "partition": Field((*_TEXT, "null"))}
SIGNATURE: Mapping[str, Field] = {
    "expires": Field(_NUMBER),
    "signature": Field(_TEXT, longest=64, pattern="[0-9a-f]{64}"),
}
VERBS: Mapping[str, Mapping[str, Field]] = {
    "snapshot": {},
    "state": {},
    "replay": {"since": Field(("object",), required=True, fields=_POSITION), "consumer": _CONSUMER},
    "baseline": {"consumer": _CONSUMER},
    "ack": {"consumer": _CONSUMER, **_POSITION},
    "thresholds": {"io_threshold": _THRESHOLD, "time_threshold": _THRESHOLD},
}
# Part of the contract, but at the control socket only.
LOCAL_VERBS: Mapping[str, Mapping[str, Field]] = {
    "export": {
        "partition": Field(_TEXT, required=True),
        "consumer": Field(_TEXT, longest=64, pattern=_CONSUMER.pattern),
        "from": Field(_NUMBER),
        "epoch": Field(_TEXT),
        "around": Field(("boolean",)),
    },
}
_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    dict: "object",
    list: "array",
}


def _unsigned(_document: Mapping[str, Any]) -> str | None:
    return None


def parse_command(verb: str, payload: bytes, check: Callable[[Mapping[str, Any]], str | None] = _unsigned) -> Command:
    """Check a command and return it. Raises CommandError.

    `check` says what is wrong with its signature, None if nothing is (feed.signing).

    Size (at most 4 KiB) and depth are checked before the JSON is parsed. Fields that are not in the table are refused: a
    misspelt field that is ignored would do something else than what was asked.
    """
    check_size(payload)
    try:
        document = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise CommandError(f"the command is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise CommandError(f"the command is {_NAMES[type(document)]}, expected an object with `id`")
    identifier = document.pop("id", None)
    longest = COMMON["id"].longest
    if not isinstance(identifier, str) or not 1 <= len(identifier) <= longest:
        raise CommandError(f"`id` must be a string of 1 to {longest} characters")
    why = check({"id": identifier, **document})
    if why is not None:
        raise CommandError(why, identifier)
    for name in SIGNATURE:
        document.pop(name, None)
    try:
        return _command(verb, identifier, document)
    except CommandError as error:
        raise CommandError(str(error), identifier) from None


def check_size(payload: bytes) -> None:
    """Before it is parsed. Raises CommandError."""
    if len(payload) > LARGEST:
        raise CommandError(f"the command has {len(payload)} bytes; at most {LARGEST} are taken")
    if _depth(payload) > DEEPEST:
        raise CommandError(f"the command is nested deeper than {DEEPEST} levels")


def _command(verb: str, identifier: str, document: dict[str, Any]) -> Command:
    table = VERBS.get(verb)
    if table is None:
        raise CommandError(f"unknown verb {verb!r:.80}; known are {', '.join(VERBS)}")
    partition = document.pop("partition", None)
    if partition is not None and not isinstance(partition, str):
        raise CommandError("`partition` must be a string")
    if partition is not None and not 1 <= len(partition) <= COMMON["partition"].longest:
        raise CommandError(f"`partition` must have 1 to {COMMON['partition'].longest} characters")
    _check(document, table, verb)
    return Command(verb, identifier, partition, document)


def _check(document: dict[str, Any], table: Mapping[str, Field], where: str) -> None:
    for name in table:
        if table[name].required and name not in document:
            raise CommandError(f"`{where}` needs the field `{name}`")
    for name, value in document.items():
        if name not in table:
            allowed = ", ".join(table) or "none"
            raise CommandError(f"`{where}` has no field {name!r:.80}; allowed beside `id` and `partition`: {allowed}")
        kind, rule = _NAMES[type(value)], table[name]
        if kind not in rule.kinds:
            raise CommandError(f"`{name}` is {kind}, expected {' or '.join(rule.kinds)}")
        if isinstance(value, str) and not 1 <= len(value) <= rule.longest:
            raise CommandError(f"`{name}` must have 1 to {rule.longest} characters")
        if isinstance(value, str) and rule.pattern is not None and not re.fullmatch(rule.pattern, value):
            raise CommandError(f"`{name}` is {value!r:.80}, expected {rule.pattern}")
        if isinstance(value, dict) and rule.fields is not None:
            _check(value, rule.fields, name)
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


def readable_id(payload: bytes) -> str | None:
    """The `id` of a command that is refused before it is looked at, for the answer; None where none can be read."""
    if len(payload) > LARGEST:
        return None
    try:
        document = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    identifier = document.get("id") if isinstance(document, dict) else None
    return identifier if isinstance(identifier, str) and 1 <= len(identifier) <= COMMON["id"].longest else None


def answer(identifier: str | None, data: Any = None, error: str | None = None) -> bytes:
    """An answer: `{"id", "status", "error", "data"}`. `error` makes it an error; `identifier` is None where there was none."""
    status = "ok" if error is None else "error"
    document: AnswerDocument = {"id": identifier, "status": status, "error": error, "data": data}
    return orjson.dumps(document)


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
