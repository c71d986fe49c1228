"""What a consumer does to lose nothing: when a diff is handed on, when one waits, what is asked of the daemon. Pure.

Events in, actions out; time is an argument, in seconds of any clock that only grows. The rules, for each partition:

- A diff is handed on if it goes from where we are: its epoch is ours and its `parent` our seq. It does not matter on which
  topic it came, or whether it was asked for. One that leads to where we are already is a duplicate. Any other waits, and
  `replay` is asked for.
- A baseline is handed on if it is further than we are in our epoch, or if we are nowhere, or if its epoch is the one that the
  daemon said is current. Only an answer of the daemon makes us leave an epoch: a message may be an old one.
- `replay` is asked for since where we are; `baseline` if we are nowhere, or if the daemon said `gap` of where we are.
- A request is done when we are where its answer says that it leads to. What came before it was sent and still waits then is
  covered by it, and dropped; what came later and still waits is a gap of its own.
- A request without an answer, or without progress, is given up after a while and made again, with another id.
- After each (re)connection every partition is asked about, as nobody knows what passed meanwhile.
- A retained state that is ahead of us for some time without a diff: the last ones were lost on the way; asked for.

Memory: what waits is bounded; beyond that it is dropped, and asked for again after the request under way. A diff that is
being put together is not, as it is handed on as a whole.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from feed.ask import Ask
from feed.assembler import Collector, Diff
from feed.commands import RateLimit
from feed.escape import printable
from feed.pages import Page
from feed.positions import Position, position_of

ROOM = 64 << 20
_QUIET_FAILURES = 3
_RATE, _BURST = 8.0, 20  # requests a second to one host, which takes 20 commands a second, 50 at once, from everybody


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. How long to wait: for an answer, and for the next page (both twice as long after each failure, at most `longest`);
    until a state that is ahead of us means a loss; before trying again (between 0 and `first`, twice that, ... at most `cap`).
    `acks`: the least time between two acknowledgements of a partition.
    """

    answer: float = 10.0
    stall: float = 30.0
    longest: float = 300.0
    behind: float = 10.0
    first: float = 1.0
    cap: float = 60.0
    acks: float = 1.0


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand this diff on; it is the next one of its partition."""

    diff: Diff


@dataclass(frozen=True, slots=True)
class Warn:
    """Something that a person should know; the text is safe to print."""

    text: str


Action = Deliver | Ask | Warn


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A diff that cannot be handed on yet; `serial` tells whether it came before or after a request was sent."""

    diff: Diff
    size: int
    serial: int


@dataclass(slots=True)
class _Request:
    """What was asked, when we were at `since`. `target`: where its answer says that it leads; None: not answered yet.

    `topic`: where pages were promised; None where none are to come. `heard`: some came, or there is a reason why not.
    """

    id: str
    verb: str
    since: Position | None
    serial: int
    deadline: float
    target: Position | None = None
    topic: str | None = None
    heard: bool = False


@dataclass(slots=True)
class _Behind:
    """A position that the daemon had reached, and when we should be there."""

    position: Position
    due: float


@dataclass(slots=True)
class _Stream:
    host: str
    partition: str
    position: Position | None
    current: str | None = None  # the epoch, as the daemon answered last
    gap_at: Position | None = None  # a replay since this was answered by `gap`
    live: Collector = field(default_factory=Collector)
    replayed: Collector = field(default_factory=Collector)
    waiting: dict[tuple[str, int | None], _Waiting] = field(default_factory=dict)
    overflowed: bool = False
    wanted: bool = True
    retry_at: float = 0.0
    failures: int = 0
    request: _Request | None = None
    complaint: str | None = None
    mood: tuple[object, object] | None = None
    behind: _Behind | None = None
    newest: _Behind | None = None

    @property
    def name(self) -> str:
        return printable(f"{self.host}/{self.partition}".encode())


def _promised(verb: str, data: Any) -> str | None:
    """The topic, safe to print, on which an answer says that pages are to come; None if there are none."""
    topic = data.get("topic") if isinstance(data, dict) else None
    if not isinstance(topic, str) or (verb == "replay" and not data.get("diffs")):
        return None
    return printable(topic.encode(errors="replace")[:500])


class Follower:
    """`add` a partition before giving it pages. `duplicates` counts pages that were there already."""

    def __init__(
        self,
        consumer: str,
        new_id: Callable[[], str],
        timing: Timing | None = None,
        room: int = ROOM,
        uniform: Callable[[float, float], float] | None = None,
    ) -> None:
        self._consumer = consumer
        self._new_id = new_id
        self._timing = timing or Timing()
        self._room = room
        self._uniform = uniform or random.SystemRandom().uniform
        self._connected = False
        self._serial = 0
        self._held = 0
        self._rates: dict[str, RateLimit] = {}
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._requests: dict[str, _Stream] = {}
        self.duplicates = 0

    # ---- what is known

    def knows(self, host: str, partition: str) -> bool:
        return (host, partition) in self._streams

    def position(self, host: str, partition: str) -> Position | None:
        """The last diff that was handed on; None: nothing yet."""
        return self._streams[host, partition].position

    @property
    def held(self) -> int:
        """Bytes of pages that wait."""
        return self._held

    # ---- events

    def add(self, host: str, partition: str, position: Position | None, now: float) -> list[Action]:
        """A partition exists; `position` is what was stored of it."""
        stream = _Stream(host, partition, position, retry_at=now)
        self._streams[host, partition] = stream
        return self._ask(stream, now)

    def connected(self, now: float) -> list[Action]:
        """We are subscribed; what was published until now may have passed us."""
        self._connected = True
        found: list[Action] = []
        for stream in self._streams.values():
            stream.wanted, stream.retry_at = True, now
            found += self._ask(stream, now)
        return found

    def disconnected(self) -> None:
        self._connected = False
        for stream in self._streams.values():
            self._end(stream)
            stream.live.clear()
            stream.replayed.clear()

    def dropped(self, now: float) -> list[Action]:
        """Messages have been dropped on our side, nobody knows which."""
        found: list[Action] = []
        for stream in self._streams.values():
            self._end(stream)
            stream.wanted, stream.retry_at = True, now
            found += self._ask(stream, now)
        return found

    def page(self, page: Page, size: int, now: float, *, live: bool) -> list[Action]:
        """A page of `size` bytes came on `changes` (`live`) or on our replay topic."""
        envelope = page.envelope
        stream = self._streams[envelope.host, envelope.partition]
        if stream.request is not None and not live:
            stream.request.heard = True
            if stream.request.target is not None:
                stream.request.deadline = now + self._patience(self._timing.stall, stream)
        collector = stream.live if live else stream.replayed
        if self._passed(stream, envelope.epoch, envelope.seq) or not collector.add(page, size):
            self.duplicates += 1
            return []
        size = collector.size
        diff = collector.take()
        return [] if diff is None else self._take(stream, diff, size, now, live=live)

    def answered(self, identifier: str, document: dict[str, Any], now: float) -> list[Action]:
        """A daemon's answer; one that is not of a request under way is ignored."""
        stream = self._requests.get(identifier)
        if stream is None or stream.request is None:
            return []
        data = document.get("data")
        target = position_of(data)
        if document.get("status") != "ok":
            if isinstance(data, dict) and data.get("gap") is True and stream.request.verb == "replay":
                epoch = data.get("epoch")
                return self._gap(stream, epoch if isinstance(epoch, str) else None, now)
            return self._refused(stream, str(document.get("error")), now)
        if target is None:
            return self._refused(stream, "the answer names no epoch and seq", now)
        since = stream.request.since
        if stream.request.verb == "replay" and since is not None and target[0] != since[0]:
            return self._gap(stream, target[0], now)
        stream.current = target[0]
        stream.request.target = target
        stream.request.topic = _promised(stream.request.verb, data)
        stream.request.deadline = now + self._patience(self._timing.stall, stream)
        return self._hand_on(stream, now)

    def unheard(self, identifier: str, now: float) -> list[Action]:
        """The broker says that nobody is subscribed to that request."""
        stream = self._requests.get(identifier)
        return [] if stream is None else self._give_up(stream, now)

    def state(self, host: str, partition: str, document: dict[str, Any], now: float) -> list[Action]:
        """The retained state of a partition, new or as it was."""
        stream = self._streams[host, partition]
        mood = (document.get("state"), document.get("epoch"))
        if mood != stream.mood and stream.mood is not None and stream.request is None and stream.wanted:
            stream.failures, stream.retry_at = 0, now  # whatever was refused may be allowed now
        stream.mood = mood
        head = position_of({"epoch": document.get("epoch"), "seq": document.get("head")})
        if head is not None and document.get("backlog") == 0:
            stream.newest = _Behind(head, now + self._timing.behind)
            if stream.behind is None:
                stream.behind = stream.newest
        return self._ask(stream, now)

    def online(self, host: str, now: float) -> None:
        """A daemon has come (back): what was asked of it before is probably lost."""
        for stream in self._streams.values():
            if stream.host != host:
                continue
            soon = now + self._uniform(0.0, self._timing.first)
            stream.failures = 0
            if stream.request is not None:
                patience = self._timing.stall if stream.request.target else self._timing.answer
                stream.request.heard = True  # what was granted ended with the daemon
                stream.request.deadline = min(stream.request.deadline, soon + patience / 2)
            elif stream.wanted:
                stream.retry_at = min(stream.retry_at, soon)

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        found: list[Action] = []
        for stream in sorted(self._streams.values(), key=lambda one: one.retry_at):  # who waits longest, first
            if stream.request is not None and now >= stream.request.deadline:
                found += self._give_up(stream, now)
            while stream.behind is not None and now >= stream.behind.due:
                self._look_behind(stream, now)
            found += self._ask(stream, now)
        return found

    # ---- handing on

    @staticmethod
    def _passed(stream: _Stream, epoch: str, seq: int) -> bool:
        return stream.position is not None and stream.position[0] == epoch and seq <= stream.position[1]

    def _take(self, stream: _Stream, diff: Diff, size: int, now: float, *, live: bool) -> list[Action]:
        """A whole diff that is not behind us."""
        envelope, position = diff.envelope, stream.position
        self._wait(stream, diff, size)
        found = self._hand_on(stream, now)
        if not live and stream.position is position and stream.request is not None and position is not None:
            across = envelope.parent is not None and envelope.parent < position[1] and envelope.epoch == position[0]
            if across and not envelope.baseline:
                # A squashed diff from before where we are to beyond it: this replay does not help, one since here may.
                found += self._give_up(stream, now)
        if stream.waiting and stream.request is None:
            stream.wanted = True
        return found + self._ask(stream, now)

    def _wait(self, stream: _Stream, diff: Diff, size: int) -> None:
        envelope = diff.envelope
        key = (envelope.epoch, None if envelope.baseline else envelope.parent)
        if key[1] is None and not envelope.baseline:
            return  # it goes from nothing, and is no baseline: nobody could ever use it
        already = stream.waiting.get(key)
        if already is not None:
            if already.diff.envelope.seq >= envelope.seq:
                return
            self._held -= already.size
        self._serial += 1
        stream.waiting[key] = _Waiting(diff, size, self._serial)
        self._held += size

    def _hand_on(self, stream: _Stream, now: float) -> list[Action]:
        """All that waits and can go, in order; then see whether the request is done, and whether too much waits."""
        found: list[Action] = []
        while (one := self._next(stream)) is not None:
            envelope = one.diff.envelope
            left = stream.position
            stream.position = (envelope.epoch, envelope.seq)
            found.append(Deliver(one.diff))
            if envelope.baseline:
                self._leave(stream, left)
        request = stream.request
        if request is not None and request.target is not None and self._passed(stream, *request.target):
            self._finished(stream, request, now)
        if self._held > self._room and stream.waiting:
            for key in list(stream.waiting):
                self._forget(stream, key)
            stream.overflowed = True
            if stream.request is None:
                stream.wanted = True
        return found + self._ask(stream, now)

    def _next(self, stream: _Stream) -> _Waiting | None:
        position = stream.position
        keys: list[tuple[str, int | None]] = []
        if position is not None:
            keys += [(position[0], position[1]), (position[0], None)]
        else:
            keys += [key for key in stream.waiting if key[1] is None]
        if stream.current is not None:
            keys.append((stream.current, None))
        for key in keys:
            one = stream.waiting.pop(key, None)
            if one is not None:
                self._held -= one.size
                if not self._passed(stream, one.diff.envelope.epoch, one.diff.envelope.seq):
                    return one
        return None

    def _leave(self, stream: _Stream, left: Position | None) -> None:
        """After a baseline: forget what it covers, and what was of the epoch before."""
        epoch = stream.position[0] if stream.position is not None else None
        stream.current = epoch
        over = None if left is None or left[0] == epoch else left[0]
        for key, one in list(stream.waiting.items()):
            if key[0] == over or self._passed(stream, key[0], one.diff.envelope.seq):
                self._forget(stream, key)

    def _forget(self, stream: _Stream, key: tuple[str, int | None]) -> None:
        self._held -= stream.waiting.pop(key).size

    # ---- asking

    def _ask(self, stream: _Stream, now: float) -> list[Action]:
        """Send what is wanted, if it is time and nothing is under way."""
        if not (self._connected and stream.wanted and stream.request is None and now >= stream.retry_at):
            return []
        if not self._rates.setdefault(stream.host, RateLimit(_RATE, _BURST)).allow(now):
            return []  # at a tick, then
        who: dict[str, Any] = {"id": self._new_id(), "partition": stream.partition, "consumer": self._consumer}
        position = stream.position
        if position is None or position == stream.gap_at:
            verb = "baseline"
        else:
            verb = "replay"
            who["since"] = {"epoch": position[0], "seq": position[1]}
        stream.replayed.clear()
        deadline = now + self._patience(self._timing.answer, stream)
        stream.request = _Request(who["id"], verb, position, self._serial, deadline)
        self._requests[who["id"]] = stream
        return [Ask(stream.host, verb, who)]

    def _patience(self, seconds: float, stream: _Stream) -> float:
        return float(min(self._timing.longest, seconds * 2**stream.failures))

    def _end(self, stream: _Stream) -> _Request | None:
        request, stream.request = stream.request, None
        if request is not None:
            del self._requests[request.id]
        return request

    def _finished(self, stream: _Stream, request: _Request, now: float) -> None:
        self._end(stream)
        for key, one in list(stream.waiting.items()):
            if one.serial <= request.serial or self._passed(stream, key[0], one.diff.envelope.seq):
                self._forget(stream, key)
        stream.wanted = bool(stream.waiting) or stream.overflowed
        stream.overflowed = False
        stream.complaint = None
        if stream.position != request.since or not stream.wanted:
            stream.failures, stream.retry_at = 0, now
        else:
            self._back_off(stream, now)  # it led nowhere, and yet something waits

    def _give_up(self, stream: _Stream, now: float) -> list[Action]:
        """No answer, or no progress."""
        request = self._end(stream)
        if request is not None and stream.position != request.since:
            stream.failures = 0
        stream.wanted = True
        self._back_off(stream, now)
        if request is None:
            return []
        if stream.failures == _QUIET_FAILURES and request.target is None:
            may = f"may this login write request/{request.verb} and read response/{request.verb} (the broker's ACL)?"
            return self._complain(
                stream, f"{stream.name}: no answer to `{request.verb}`; is its daemon running, and {may}"
            )
        if request.topic is not None and not request.heard:
            may = "may this login read it (the broker's ACL), is the consumer's name right?"
            text = f"{stream.name}: `{request.verb}` was granted, but no page arrived on {request.topic}; {may}"
            return self._complain(stream, text)
        return []

    def _refused(self, stream: _Stream, error: str, now: float) -> list[Action]:
        request = self._end(stream)
        stream.wanted = True
        self._back_off(stream, now)
        verb = "request" if request is None else request.verb
        text = f"{stream.name}: `{verb}` is refused: {printable(error.encode(errors='replace')[:500])}; trying again"
        return self._complain(stream, text)

    def _gap(self, stream: _Stream, epoch: str | None, now: float) -> list[Action]:
        """The journal does not lead from where we are. A baseline of the current epoch may be waiting already."""
        self._end(stream)
        stream.current = epoch or stream.current
        stream.gap_at = stream.position
        stream.wanted, stream.retry_at = True, now
        return self._hand_on(stream, now)

    def _back_off(self, stream: _Stream, now: float) -> None:
        bound = min(self._timing.cap, self._timing.first * 2**stream.failures)
        stream.retry_at = now + self._uniform(0.0, bound)
        stream.failures = min(stream.failures + 1, 16)

    @staticmethod
    def _complain(stream: _Stream, text: str) -> list[Action]:
        if text == stream.complaint:
            return []
        stream.complaint = text
        return [Warn(text)]

    def _look_behind(self, stream: _Stream, now: float) -> None:
        """The daemon had published this a while ago: are we there?"""
        told, newest = stream.behind, stream.newest
        if told is None:
            return
        if not self._passed(stream, *told.position) and (stream.request is not None or stream.wanted):
            told.due = now + self._timing.behind  # being asked about already, but perhaps from before that
            return
        stream.behind = newest if newest is not told else None
        if not self._passed(stream, *told.position):
            stream.wanted, stream.retry_at = True, now
