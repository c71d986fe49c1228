"""A daemon of one partition in a few lines, as the contract of the feed has it: a journal, replays, baselines. For tests of
consumers. Its files are numbers: each diff creates some, a baseline creates all; `truth` has what there was at each (epoch, seq).

It is pure: `commit`, `squash`, ... change it; `request` returns an answer and the pages to be sent after it.
"""

from dataclasses import dataclass, field

import orjson

HOST, PARTITION = "edge7", "data"


@dataclass(frozen=True)
class Entry:
    parent: int | None
    seq: int
    files: tuple[int, ...]


@dataclass
class ScriptedDaemon:
    per_page: int = 2
    epoch: str = "e0"
    head: int = 0
    published: int = 0
    files: list[int] = field(default_factory=list)
    journal: list[Entry] = field(default_factory=list)
    truth: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    done: dict[tuple[str, str], dict] = field(default_factory=dict)
    acknowledged: dict[str, tuple[str, int]] = field(default_factory=dict)
    verbs: list[str] = field(default_factory=list)
    _made: int = 0

    def __post_init__(self):
        self.new_epoch()

    # ---- what happens on the disk

    def new_epoch(self, files: int = 3) -> None:
        """The system file was lost: another epoch, which begins with a baseline."""
        self.epoch = f"e{int(self.epoch[1:]) + 1}"
        self.head = self.published = 0
        self.journal, self.files = [], []
        self._add(None, 1, files)

    def commit(self, files: int, skip: int = 0) -> None:
        """A snapshot with so many new files; numbers need not be consecutive."""
        self._add(self.head, self.head + 1 + skip, files)

    def _add(self, parent, seq, count) -> None:
        new = tuple(range(self._made, self._made + count))
        self._made += count
        self.files += new
        self.head = seq
        self.journal.append(Entry(parent, seq, new))
        self.truth[self.epoch, seq] = tuple(self.files)

    def squash(self) -> None:
        """What is not published yet becomes one diff."""
        later = [entry for entry in self.journal if entry.seq > self.published]
        if len(later) > 1 and later[0].parent is not None:
            files = tuple(file for entry in later for file in entry.files)
            kept = [entry for entry in self.journal if entry.seq <= self.published]
            self.journal = [*kept, Entry(later[0].parent, later[-1].seq, files)]

    def trim(self, keep: int) -> None:
        """The journal forgets what is published, but for the last few diffs."""
        known = [entry for entry in self.journal if entry.seq <= self.published]
        later = [entry for entry in self.journal if entry.seq > self.published]
        self.journal = known[len(known) - keep if keep < len(known) else 0 :] + later

    # ---- what it sends

    def publish(self) -> list[bytes]:
        """The pages of the next diff that is not published."""
        entry = next((entry for entry in self.journal if entry.seq > self.published), None)
        if entry is None:
            return []
        self.published = entry.seq
        return self.pages(entry.parent, entry.seq, entry.files, baseline=entry.parent is None)

    def pages(self, parent, seq, files, *, baseline=False) -> list[bytes]:
        cut = [files[at : at + self.per_page] for at in range(0, len(files), self.per_page)] or [()]
        head = {
            "format": "snapfeed/1", "host": HOST, "partition": PARTITION, "uuid": "u", "epoch": self.epoch, "seq": seq,
            "parent": parent, "time_ns": "1", "trigger": "command", "volume": 0, "consistency": "per-file", "snapshot": None,
        }  # fmt: skip
        if baseline:
            head["baseline"] = True
        return [
            orjson.dumps({**head, "page": number, "pages": len(cut), "changes": [{"n": file} for file in part]})
            for number, part in enumerate(cut, 1)
        ]

    def state(self) -> dict:
        backlog = len([entry for entry in self.journal if entry.seq > self.published])
        return {
            "partition": PARTITION,
            "state": "watching",
            "epoch": self.epoch,
            "head": self.head,
            "backlog": backlog,
        }

    # ---- commands

    def request(self, verb: str, document: dict) -> tuple[dict, list[bytes]]:
        """The answer, and the pages that follow it on the replay topic. Once for each id."""
        key = (verb, document["id"])
        if key in self.done:
            return self.done[key], []
        self.verbs.append(verb)
        data, error, pages = self._carry_out(verb, document)
        answer = {"id": document["id"], "status": "ok" if error is None else "error", "error": error, "data": data}
        self.done[key] = answer
        return answer, pages

    def _carry_out(self, verb, document):
        assert document["partition"] == PARTITION
        topic = f"snapfeed/{HOST}/{PARTITION}/replay/{document['consumer']}"
        where = {"partition": PARTITION, "epoch": self.epoch, "seq": self.head, "topic": topic}
        if verb == "ack":
            self.acknowledged[document["consumer"]] = (document["epoch"], document["seq"])
            return {k: document[k] for k in ("partition", "consumer", "epoch", "seq")}, None, []
        if verb == "baseline":
            return where, None, self.pages(None, self.head, tuple(self.files), baseline=True)
        since = document["since"]
        missing = [entry for entry in self.journal if entry.seq > since["seq"]]
        reaches = since["epoch"] == self.epoch and (
            since["seq"] == self.head or (missing and missing[0].parent == since["seq"])
        )
        if not reaches:
            oldest = self.journal[0].parent or self.journal[0].seq if self.journal else self.head
            gap = {
                "gap": True,
                "partition": PARTITION,
                "epoch": self.epoch,
                "oldest": oldest,
                "seq": self.head,
            }
            return gap, "gap: the journal does not reach back to it", []
        pages = [page for entry in missing for page in self.pages(entry.parent, entry.seq, entry.files)]
        return {**where, "from": since["seq"], "diffs": len(missing)}, None, pages


@dataclass
class Ledger:
    """A consumer of that daemon that holds it to its word: every diff must lead from where it is to what there was then."""

    daemon: ScriptedDaemon
    position: tuple[str, int] | None = None
    files: list[int] = field(default_factory=list)
    diffs: int = 0
    baselines: int = 0

    def take(self, diff) -> None:
        envelope = diff.envelope
        new = [document["n"] for document in diff.documents]
        if envelope.baseline:
            if self.position is not None and self.position[0] == envelope.epoch:
                assert envelope.seq > self.position[1], "a baseline leads back"
            self.files = new
            self.baselines += 1
        else:
            assert self.position == (envelope.epoch, envelope.parent), f"{envelope} does not go from {self.position}"
            self.files = self.files + new
        self.diffs += 1
        self.position = (envelope.epoch, envelope.seq)
        assert tuple(self.files) == self.daemon.truth[self.position], f"not what there was at {self.position}"

    def is_there(self) -> bool:
        return self.position == (self.daemon.epoch, self.daemon.head)
