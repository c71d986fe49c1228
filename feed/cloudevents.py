"""Pages as CloudEvents 1.0: the attributes that go beside the payload as MQTT 5 properties (MQTT protocol binding, binary mode).

Pure. The payload is the event's data and stays as it is; `datacontenttype` is the Content Type, every other attribute a user
property of the same name (CloudEvents, mqtt-protocol-binding 3.1). MQTT 3.1.1 has no properties: there pages are no CloudEvents.
"""

import time
from dataclasses import dataclass
from typing import Any

import orjson

from comparer.errors import DamageError

CONTENT_TYPE = "application/json"
TYPE = "io.snapfeed.changes.v1"
SPECVERSION = "1.0"
_BODY = (
    b',"changes":['  # a quote inside a string of the head would be escaped: the first of these is where the head ends
)


@dataclass(frozen=True, slots=True)
class Event:
    """What stands beside the payload of one page: the Content Type and the user properties, in order."""

    content_type: str
    attributes: tuple[tuple[str, str], ...]

    def size(self) -> int:
        """Bytes of the properties in a PUBLISH: their length, Content Type, user properties (MQTT 5.0, 2.2.2, 3.3.2.3)."""
        length = _text(self.content_type) + 1
        length += sum(1 + _text(name) + _text(value) for name, value in self.attributes)
        return length + (1 if length < 128 else 2)


def _text(text: str) -> int:
    return 2 + len(text.encode())


def event(payload: bytes, topic: str) -> Event:
    """The event that a page is when it goes to `topic`. Raises DamageError if the payload is no page.

    `source` and `id` together name a page for ever, as (epoch, seq, page) does. The pages of a baseline that one consumer
    asked for are events of their own: their numbers mean something else in `changes`, so their source is the topic they go to.
    """
    head = _head(payload)
    try:
        source = f"/snapfeed/{head['host']}/{head['partition']}"
        identifier = f"{head['epoch']}/{head['seq']}/{head['page']}"
        uuid, taken = head["uuid"], _rfc3339(int(head["time_ns"]))
    except (KeyError, ValueError, TypeError) as error:
        raise DamageError(f"not a page: {error!r} in its envelope") from error
    prefix, _, consumer = topic.rpartition("/")
    if head.get("baseline") and prefix.endswith(f"/{head['host']}/{head['partition']}/replay"):
        source += f"/replay/{consumer}"
    named = {
        "specversion": SPECVERSION,
        "id": identifier,
        "source": source,
        "type": TYPE,
        "subject": uuid,
        "time": taken,
    }
    return Event(CONTENT_TYPE, tuple(named.items()))


def _head(payload: bytes) -> dict[str, Any]:
    head, body, _ = payload.partition(_BODY)
    try:
        document = orjson.loads(head + b"}") if body else None
    except orjson.JSONDecodeError as error:
        raise DamageError(f"not a page: not JSON ({error})") from error
    if not isinstance(document, dict):
        raise DamageError("not a page: no envelope before its changes")
    return document


def _rfc3339(time_ns: int) -> str:
    """Nanoseconds since 1970 as an RFC 3339 time. Microseconds: more digits are more than many parsers take."""
    seconds, rest = divmod(time_ns, 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1000:06}Z"


_WIDEST = (
    b'{"host":"%b","partition":"%b","uuid":"%b","epoch":"%b","seq":%d,"time_ns":"%d","baseline":true,"page":%d,"changes":[]}'
    % (b"h" * 64, b"p" * 64, b"u" * 64, b"e" * 64, 2**63, 2**63, 10**9)
)
# The most bytes that properties can have; a page leaves them free, as its own numbers are not known when pages are cut.
ROOM = event(_WIDEST, f"/{'h' * 64}/{'p' * 64}/replay/{'c' * 64}").size()


def described() -> dict[str, Any]:
    """The schema of the user properties, for AsyncAPI."""
    return {
        "type": "object",
        "description": "CloudEvents 1.0, binary mode: user properties, with MQTT 5 only.",
        "properties": {
            "specversion": {"type": "string", "const": SPECVERSION},
            "id": {"type": "string", "description": "<epoch>/<seq>/<page>"},
            "source": {"type": "string", "format": "uri-reference", "description": "/snapfeed/<host>/<partition>"},
            "type": {"type": "string", "const": TYPE},
            "subject": {"type": "string", "description": "`uuid` of the page"},
            "time": {"type": "string", "format": "date-time", "description": "`time_ns` of the page"},
        },
    }
