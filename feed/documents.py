"""What goes over the wire, as types: the one place that says which fields each document has and what may be in them.

mypy holds the code that writes documents to these types, `feed.schema` makes the published JSON Schemas of them, and what each
field means stands in docs/feed.md. `Rules` are JSON Schema keywords (2020-12) that a Python type cannot say. A set of words that
may grow within `snapfeed/1` (docs/feed.md, Versions) is `examples`, one that may not is `enum`.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from comparer.model import FileType, Op, Quality

FORMAT = "snapfeed/1"
CHANGED = frozenset({"data", "size", "mode", "owner", "times", "xattr", "links"})
WITH_FROM = frozenset({Op.RENAME, Op.LINK})
WITH_CHANGED = frozenset({Op.MODIFY, Op.RENAME})


class Rules:
    """JSON Schema keywords of a value, for `Annotated`. Compared by identity, so that types stay hashable."""

    def __init__(self, about: str = "", **keywords: Any) -> None:
        self.keywords = {"description": about, **keywords} if about else keywords


def _one_of(words: Iterable[str], about: str = "") -> Rules:
    """A closed set: another word would be another format."""
    return Rules(about, enum=[str(word) for word in words])


def _such_as(words: Iterable[str], about: str = "") -> Rules:
    """An open set: a reader takes a word it does not know."""
    return Rules(about, minLength=1, examples=[str(word) for word in words])


Name = Annotated[str, Rules(pattern="^[A-Za-z0-9_-]{1,64}$")]
Text = Annotated[str, Rules(minLength=1)]
Count = Annotated[int, Rules(minimum=0)]
Seconds = Annotated[float, Rules("seconds", minimum=0)]
Word = Annotated[int, Rules(minimum=0, maximum=2**32 - 1)]
Unsigned = Annotated[str, Rules("a decimal number", pattern="^(0|[1-9][0-9]{0,19})$")]
Signed = Annotated[str, Rules("a decimal number", pattern="^(0|-?[1-9][0-9]{0,19})$")]
Base64 = Annotated[str, Rules("bytes in base64", pattern="^[A-Za-z0-9+/]*={0,2}$", contentEncoding="base64")]
Path = Annotated[
    str, Rules("from the partition's root; empty: the root itself", pattern=r"^([^/\x00]+(/[^/\x00]+)*)?$")
]
Target = Annotated[str, Rules("what a symbolic link points to", pattern=r"^[^\x00]+$")]
_PAIR = [{"type": "integer", "minimum": 0}, {"type": "integer", "minimum": 1}]
Range = Annotated[list[Count], Rules("offset and length in bytes", prefixItems=_PAIR, items=False, minItems=2)]
Epoch = Annotated[str, Rules("UUID of the partition's system file", minLength=1)]
Consistency = Annotated[str, _such_as(("subvolume", "per-file", "metadata"))]
Trigger = Annotated[str, _such_as(("command", "volume", "time", "start", "reconcile"))]
Format = Annotated[str, Rules(const=FORMAT)]


class AttributesDocument(TypedDict):
    """The attributes of an object."""

    size: Unsigned
    blocks: Unsigned
    mode: Annotated[int, Rules("permission bits", minimum=0, maximum=0o7777)]
    uid: Word
    gid: Word
    nlink: Word
    mtime_ns: Signed
    ctime_ns: Signed
    btime_ns: Signed | None
    rdev: Unsigned | None
    xattrs: NotRequired[dict[str, Base64]]
    xattrs_b64: NotRequired[dict[Base64, Base64]]


# Not the class syntax: `from` is a keyword of Python. What depends on `op` and `type` is in feed.schema.
ChangeDocument = TypedDict(
    "ChangeDocument",
    {
        "op": Annotated[str, _one_of(Op)],
        "type": Annotated[str, _one_of(FileType)],
        "id": Annotated[str, Rules("<inode>.<generation>", pattern=r"^[0-9]{1,20}\.[0-9]{1,20}$")],
        "path": Path,
        "path_b64": NotRequired[Base64],
        "from": NotRequired[Path],
        "from_b64": NotRequired[Base64],
        "changed": NotRequired[Annotated[list[Annotated[str, _such_as(sorted(CHANGED))]], Rules(uniqueItems=True)]],
        "before": AttributesDocument | None,
        "after": AttributesDocument | None,
        "target": NotRequired[Target],
        "target_b64": NotRequired[Base64],
        "ranges": NotRequired[list[Range]],
        "ranges_quality": NotRequired[Annotated[str, _one_of(Quality)]],
        "cleared": NotRequired[list[Range]],
        "content": Path | None,
        "content_b64": NotRequired[Base64],
        "omitted_xattrs": NotRequired[Annotated[list[Text], Rules(minItems=1, uniqueItems=True)]],
    },
)


class EnvelopeDocument(TypedDict):
    """What all pages of a diff say about it."""

    format: Format
    host: Name
    partition: Name
    uuid: Text
    epoch: Epoch
    seq: Count
    parent: Annotated[Count | None, Rules("null in a baseline")]
    time_ns: Unsigned
    trigger: Trigger
    volume: Count
    consistency: Consistency
    snapshot: Path | None
    baseline: NotRequired[Literal[True]]


class PageDocument(EnvelopeDocument):
    """A page of a diff, or of a baseline."""

    page: Annotated[int, Rules("from 1", minimum=1)]
    pages: Annotated[int, Rules(minimum=1)]
    changes: list[ChangeDocument]


class StatusDocument(TypedDict):
    """Whether the daemon is there: retained, and its last will."""

    state: Annotated[str, _one_of(("online", "offline"))]
    version: Text
    since: Annotated[
        str, Rules("UTC", format="date-time", pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")
    ]


class ThresholdsDocument(TypedDict):
    """What makes a snapshot due."""

    io: Annotated[int, Rules("bytes", minimum=0)]
    time: Annotated[float, Rules("seconds", minimum=0)]


class CapabilitiesDocument(TypedDict):
    """How a partition is watched, kept and measured."""

    events: Annotated[str, _such_as(("fanotify", "inotify"))] | None
    snapshots: Annotated[str, _such_as(("btrfs", "ficlone", "metadata"))] | None
    meters: list[Text]


class LastDocument(TypedDict):
    """The last snapshot or heartbeat."""

    trigger: Trigger
    seq: Count | None
    time_ns: Unsigned
    changes: Count
    volume: Count
    seconds: Annotated[float, Rules(minimum=0)]
    bytes_read: Count
    skipped: Annotated[str, _such_as(("no change",), "why there was no snapshot")] | None


class PublishedDocument(TypedDict):
    """The page that the broker acknowledged last."""

    seq: Count
    page: Count


class ConsumerDocument(TypedDict):
    """A consumer that acknowledges what it has applied."""

    consumer: Name
    seq: Annotated[Count | None, Rules("what it has; null: nothing yet")]
    lag: Annotated[int, Rules("snapshots it has not acknowledged", minimum=0)]
    age_s: Annotated[int, Rules("seconds since it was heard of", minimum=0)]
    holds: Annotated[bool, Rules("whether snapshots are kept for it")]
    sending: Annotated[str | None, _such_as(("replay", "baseline"), "what is being sent to it")]


class JournalLimitsDocument(TypedDict):
    """What bounds the journal: seconds, and bytes as stored."""

    age: Seconds
    bytes: Count


class JournalDocument(TypedDict):
    """The journal: its oldest and its newest diff, and its bytes."""

    oldest: Count
    newest: Count
    bytes: Count
    limits: JournalLimitsDocument


class HoldDocument(TypedDict):
    """How many snapshots are kept for a consumer beside those of retention, and for how many seconds after it was heard of."""

    snapshots: Count
    age: Seconds


class StateDocument(TypedDict):
    """The state of a partition, retained."""

    format: Format
    partition: Name
    state: Annotated[str, _such_as(("starting", "watching", "scanning", "unmounted", "failed"))]
    reason: str | None
    uuid: Text | None
    fs: Text
    mount: Text
    kind: Annotated[str, _such_as(("partition", "directory"))]
    epoch: Epoch | None
    head: Count | None
    thresholds: ThresholdsDocument
    keep: Count
    volume: Count
    capabilities: CapabilitiesDocument
    consistency: Consistency | None
    last: LastDocument | None
    progress: Count | None
    excluded: list[str]
    backlog: Count
    published: NotRequired[PublishedDocument | None]
    consumers: list[ConsumerDocument]
    journal: JournalDocument
    hold: HoldDocument
    feed_error: str | None
    notes: list[str]


class SnapshotData(TypedDict):
    """A snapshot was taken, or none was needed."""

    partition: Name
    epoch: Epoch | None
    seq: Count
    changes: Count
    volume: Count
    trigger: Trigger


class ThresholdsData(TypedDict):
    """The thresholds of a partition, from now on."""

    partition: Name
    io_threshold: Annotated[int, Rules("bytes", minimum=0)]
    time_threshold: Annotated[float, Rules("seconds", minimum=0)]


# `from` is a keyword of Python here and below.
ReplayData = TypedDict(
    "ReplayData",
    {
        "partition": Name,
        "epoch": Epoch,
        "from": Count,
        "seq": Annotated[int, Rules("the snapshot that the replay leads to", minimum=0)],
        "diffs": Annotated[int, Rules("0: nothing is missing", minimum=0)],
        "topic": Annotated[str, Rules("where the pages come", minLength=1)],
    },
)
ReplayData.__doc__ = "Diffs will be sent again."


class GapData(TypedDict):
    """Why a replay is not possible: the journal does not reach back, or the epoch is another. The remedy is a baseline."""

    gap: Literal[True]
    partition: Name
    epoch: Epoch | None
    oldest: Annotated[Count | None, Rules("the oldest snapshot one can replay since")]
    seq: Count | None


class BaselineData(TypedDict):
    """A baseline will be sent."""

    partition: Name
    epoch: Epoch
    seq: Count
    topic: Annotated[str, Rules("where the pages come", minLength=1)]


class AckData(TypedDict):
    """An acknowledgement was written down."""

    partition: Name
    consumer: Name
    epoch: Epoch
    seq: Count


class PositionData(TypedDict):
    """Why a position cannot be acknowledged: the partition's epoch is another, or it is not that far. Where it is."""

    partition: Name
    epoch: Epoch
    seq: Count


ExportData = TypedDict(
    "ExportData",
    {
        "partition": Name,
        "mount": Text,
        "epoch": Epoch,
        "from": Annotated[Count | None, Rules("null: a baseline")],
        "seq": Count,
        "snapshot": Path | None,
        "consistency": Consistency,
        "baseline": bool,
    },
)
ExportData.__doc__ = "What the changes that follow lead from and to."


class AnswerDocument(TypedDict):
    """An answer to a command."""

    id: str | None
    status: Annotated[str, _one_of(("ok", "error"))]
    error: str | None
    data: Any  # ANSWERS and REFUSALS say what, for each verb


class MoreDocument(TypedDict):
    """One of several answers at the control socket; the last one has a `status`."""

    id: str | None
    more: Literal[True]
    data: Any


# What a good answer to each verb has as `data`, and a refusal, where that has any; and what comes in several lines.
ANSWERS: Mapping[str, Any] = {
    "snapshot": SnapshotData | list[SnapshotData],
    "state": StateDocument | list[StateDocument],
    "replay": ReplayData,
    "baseline": BaselineData,
    "ack": AckData,
    "thresholds": list[ThresholdsData],
}
REFUSALS: Mapping[str, Any] = {"replay": GapData, "ack": PositionData}
SEVERAL: Mapping[str, Any] = {"export": ExportData | list[ChangeDocument]}
