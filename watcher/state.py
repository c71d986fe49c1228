"""What is said of a partition: its state, as published (retained) and as `snapfeed status` shows it. Plain values."""

from dataclasses import dataclass, field

from feed.documents import FORMAT, ConsumerDocument, LastDocument, StateDocument
from snapshotter.retention import Limits


@dataclass(slots=True)
class Last:
    """The last thing that happened: a snapshot, or a heartbeat (`skipped` says why no snapshot)."""

    trigger: str
    seq: int | None
    time_ns: int
    changes: int = 0
    volume: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class Consumer:
    """What a consumer has by its own word (None: nothing yet), when it was heard of last.

    `sending`: what is being sent to it (`replay`, `baseline`).
    """

    name: str
    seq: int | None
    time_ns: int
    sending: str | None = None

    def document(self, head: int | None, now_ns: int, limits: Limits) -> ConsumerDocument:
        age = max(0.0, (now_ns - self.time_ns) / 1e9)
        return {
            "consumer": self.name,
            "seq": self.seq,
            "lag": max(0, (head or 0) - (self.seq or 0)),
            "age_s": round(age),
            "holds": age < limits.hold_age,
            "sending": self.sending,
        }


@dataclass(slots=True)
class State:
    """`state`: starting, watching, scanning (no events: compares everything), unmounted, failed; `reason` for the last two."""

    name: str
    mount: str
    fs: str
    uuid: str | None
    state: str = "starting"
    reason: str | None = None
    kind: str = "partition"
    epoch: str | None = None
    head: int | None = None
    io_threshold: int = 0
    time_threshold: float = 0.0
    keep: int = 0
    volume: int = 0
    source: str | None = None
    backend: str | None = None
    consistency: str | None = None
    meters: tuple[str, ...] = ()
    last: Last | None = None
    progress: int | None = None
    excluded: tuple[str, ...] = ()
    backlog: int = 0
    feed_error: str | None = None
    consumers: tuple[Consumer, ...] = ()
    journal: tuple[int, int, int] = (0, 0, 0)  # oldest diff, newest, bytes
    limits: Limits = field(default_factory=Limits)
    notes: list[str] = field(default_factory=list)

    def document(self, now_ns: int) -> StateDocument:
        """As docs/feed.md describes the state topic."""
        limits = self.limits
        last: LastDocument | None = None
        if self.last is not None:
            last = {
                "trigger": self.last.trigger,
                "seq": self.last.seq,
                "time_ns": str(self.last.time_ns),
                "changes": self.last.changes,
                "volume": self.last.volume,
                "seconds": round(self.last.seconds, 6),
                "bytes_read": self.last.bytes_read,
                "skipped": self.last.skipped,
            }
        return {
            "format": FORMAT,
            "partition": self.name,
            "state": self.state,
            "reason": self.reason,
            "uuid": self.uuid,
            "fs": self.fs,
            "mount": self.mount,
            "kind": self.kind,
            "epoch": self.epoch,
            "head": self.head,
            "thresholds": {"io": self.io_threshold, "time": self.time_threshold},
            "keep": self.keep,
            "volume": self.volume,
            "capabilities": {"events": self.source, "snapshots": self.backend, "meters": list(self.meters)},
            "consistency": self.consistency,
            "last": last,
            "progress": self.progress,
            "excluded": list(self.excluded),
            "backlog": self.backlog,
            "feed_error": self.feed_error,
            "consumers": [c.document(self.head, now_ns, limits) for c in self.consumers],
            "journal": {
                "oldest": self.journal[0],
                "newest": self.journal[1],
                "bytes": self.journal[2],
                "limits": {"age": limits.age, "bytes": limits.bytes},
            },
            "hold": {"snapshots": limits.hold_snapshots, "age": limits.hold_age},
            "notes": self.notes,
        }
