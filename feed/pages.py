"""Changes to pages: chunks that fit a packet, the envelope around them, and the way back.

Pure, and by joining bytes: a change is encoded once and never again on its way to the broker. A *chunk* is what the journal
keeps: JSON objects joined by commas. A *page payload* is an envelope with a chunk's objects as `changes`. Sizes are bytes.

A packet is the payload plus the topic plus some bytes of header. `HEADROOM` is what chunks leave free of a packet for
all of that when they are cut for the journal, at a time when neither topic nor page number are known.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from comparer.errors import DamageError, OperatorError
from feed.coarsen import coarsen
from feed.documents import FORMAT, EnvelopeDocument

PACKET = 131_072
HEADROOM = 3072
SMALLEST_PACKET = 8192
_FIXED_HEADER = 16  # type and length 5, topic length 2, packet identifier 2, no properties 1 (MQTT 5.0, 2.1 and 3.3.2)


@dataclass(frozen=True, slots=True)
class Chunk:
    """JSON objects of changes joined by `,`, and how many they are."""

    count: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all pages of a diff say about it; the fields are those of feed.documents, but `time_ns` is an integer."""

    host: str
    partition: str
    uuid: str
    epoch: str
    seq: int
    parent: int | None
    time_ns: int
    trigger: str
    volume: int
    consistency: str
    snapshot: str | None
    baseline: bool = False
    format: str = FORMAT

    def head(self) -> bytes:
        """The envelope as the beginning of a page's JSON, without the closing brace."""
        document: EnvelopeDocument = {
            "format": self.format,
            "host": self.host,
            "partition": self.partition,
            "uuid": self.uuid,
            "epoch": self.epoch,
            "seq": self.seq,
            "parent": self.parent,
            "time_ns": str(self.time_ns),
            "trigger": self.trigger,
            "volume": self.volume,
            "consistency": self.consistency,
            "snapshot": self.snapshot,
        }
        if self.baseline:
            document["baseline"] = True
        return orjson.dumps(document)[:-1]


@dataclass(frozen=True, slots=True)
class Page:
    """A page as a consumer reads it; `changes` are JSON objects, `feed.encode.decode_change` makes changes of them."""

    envelope: Envelope
    page: int
    pages: int
    changes: list[dict[str, Any]]


def chunk_limit(packet: int = PACKET) -> int:
    """How large a chunk may be for its page to fit a packet, whatever the topic and the envelope are."""
    if packet < SMALLEST_PACKET:
        raise OperatorError(f"max_packet: {packet} bytes are too few; allowed are {SMALLEST_PACKET} and more")
    return packet - HEADROOM


def payload_limit(packet: int, topic: str, properties: int = 0) -> int:
    """How large a payload may be for its PUBLISH, with so many bytes of properties, to fit a packet of the broker."""
    return packet - _FIXED_HEADER - len(topic.encode()) - properties


def chunks(changes: Iterable[bytes], limit: int) -> Iterator[Chunk]:
    """Cut encoded changes, in order, into chunks of at most `limit` bytes.

    A change that alone exceeds the limit is coarsened (feed.coarsen). Raises OperatorError, naming the path, if that fails.
    """
    held: list[bytes] = []
    size = 0
    for change in changes:
        fitting = change if len(change) <= limit else coarsen(change, limit)
        if held and size + 1 + len(fitting) > limit:
            yield Chunk(len(held), b",".join(held))
            held, size = [], 0
        size += len(fitting) + (1 if held else 0)
        held.append(fitting)
    if held:
        yield Chunk(len(held), b",".join(held))


def resplit(chunk: Chunk, limit: int) -> list[Chunk]:
    """The same changes in chunks of at most `limit` bytes: for a broker that takes less than the journal was cut for."""
    if len(chunk.data) <= limit:
        return [chunk]
    try:
        changes = orjson.loads(b"[" + chunk.data + b"]")
    except orjson.JSONDecodeError as error:
        raise DamageError(f"a chunk of the journal is not JSON: {error}") from error
    return list(chunks(map(orjson.dumps, changes), limit))


def page_payload(envelope: Envelope, page: int, pages: int, chunk: bytes) -> bytes:
    """The payload of page `page` of `pages` (both from 1)."""
    return b'%b,"page":%d,"pages":%d,"changes":[%b]}' % (envelope.head(), page, pages, chunk)


def payloads(envelope: Envelope, diff: Iterable[Chunk], limit: int) -> list[bytes]:
    """All page payloads of a diff, each of at most `limit` bytes, chunks cut again where needed.

    The numbers of the pages depend on the limit: when it changes between two connections, a diff has to be sent from
    its first page again (a consumer tells by `pages`). A diff without changes is one page.
    """
    room = limit - len(page_payload(envelope, 10**9, 10**9, b""))
    if room < 1:
        raise OperatorError(f"partition {envelope.partition}: pages of {limit} bytes are too small; raise max_packet")
    cut = [piece for chunk in diff for piece in resplit(chunk, room)] or [Chunk(0, b"")]
    return [page_payload(envelope, number, len(cut), piece.data) for number, piece in enumerate(cut, start=1)]


def parse_page(payload: bytes) -> Page:
    """Read a page. Unknown fields are ignored. Raises DamageError, saying what is wrong, if it is none."""
    try:
        document = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise DamageError(f"not a page: not JSON ({error})") from error
    if not isinstance(document, dict):
        raise DamageError(f"not a page: {type(document).__name__} instead of an object")
    if document.get("format") != FORMAT:
        raise DamageError(f"not a page this version reads: format {document.get('format')!r:.64}, expected {FORMAT!r}")
    changes = _field(document, "changes", list)
    if not all(isinstance(change, dict) for change in changes):
        raise DamageError("not a page: `changes` holds something that is no object")
    page, pages = _number(document, "page", 1), _number(document, "pages", 1)
    if page > pages:
        raise DamageError(f"not a page: page {page} of {pages}")
    time_ns = _field(document, "time_ns", str)
    if not (time_ns.isascii() and time_ns.isdigit() and len(time_ns) <= 20):
        raise DamageError("not a page: `time_ns` is no decimal number")
    envelope = Envelope(
        host=_field(document, "host", str),
        partition=_field(document, "partition", str),
        uuid=_field(document, "uuid", str),
        epoch=_field(document, "epoch", str),
        seq=_number(document, "seq", 0),
        parent=None if document.get("parent") is None else _number(document, "parent", 0),
        time_ns=int(time_ns),
        trigger=_field(document, "trigger", str),
        volume=_number(document, "volume", 0),
        consistency=_field(document, "consistency", str),
        snapshot=None if document.get("snapshot") is None else _field(document, "snapshot", str),
        baseline=document.get("baseline") is True,
    )
    return Page(envelope, page, pages, changes)


def _field(document: dict[str, Any], name: str, kind: type) -> Any:
    value = document.get(name)
    if not isinstance(value, kind):
        raise DamageError(f"not a page: `{name}` is {type(value).__name__}, expected {kind.__name__}")
    return value


def _number(document: dict[str, Any], name: str, least: int) -> int:
    value = document.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DamageError(f"not a page: `{name}` is no integer of {least} or more")
    return value
