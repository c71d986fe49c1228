"""Telling the daemons how far a consumer is. Pure: events in, requests out, time an argument (seconds of any clock).

Best effort: an acknowledgement that is lost costs nothing but the daemon keeping more than it must. At most one is under way for
each partition, and no more than one is begun in `every` seconds; the latest position wins. One host gets no more than 5 a
second, as it takes 20 commands a second from everybody.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from feed.ask import Ask
from feed.commands import RateLimit
from feed.positions import Position

_LONGEST = 60.0
_RATE, _BURST = 5.0, 10


@dataclass(slots=True)
class _Ack:
    committed: Position
    told: Position | None = None
    sent: Position | None = None
    id: str | None = None
    deadline: float = 0.0
    not_before: float = 0.0
    failures: int = 0


class Acks:
    def __init__(self, consumer: str, new_id: Callable[[], str], every: float = 1.0, patience: float = 10.0) -> None:
        self._consumer = consumer
        self._new_id = new_id
        self._every, self._patience = every, patience
        self._connected = False
        self._acks: dict[tuple[str, str], _Ack] = {}
        self._ids: dict[str, _Ack] = {}
        self._rates: dict[str, RateLimit] = {}

    def commit(self, host: str, partition: str, position: Position, now: float) -> list[Ask]:
        """The consumer is there."""
        ack = self._acks.setdefault((host, partition), _Ack(position))
        ack.committed = position
        return self._due(host, partition, ack, now)

    def connected(self, now: float) -> list[Ask]:
        self._connected = True
        for ack in self._acks.values():
            ack.not_before = now
        return self.tick(now)

    def disconnected(self) -> None:
        self._connected = False
        for ack in self._acks.values():
            self._drop(ack)

    def answered(self, identifier: str, now: float, document: Mapping[str, Any] | None = None) -> None:
        """A daemon has answered, or (None) none has heard.

        A position that it will not have is no better the next time; what was refused for anything else, such as coming
        too fast, is said again.
        """
        ack = self._ids.get(identifier)
        if ack is None:
            return
        if document is not None and _decided(document):
            ack.told, ack.failures = ack.sent, 0
        else:
            self._failed(ack, now)
        self._drop(ack)

    def tick(self, now: float) -> list[Ask]:
        """What is due."""
        found = []
        longest_waiting_first = sorted(self._acks.items(), key=lambda one: one[1].not_before)
        for (host, partition), ack in longest_waiting_first:
            if ack.id is not None and now >= ack.deadline:
                self._failed(ack, now)
                self._drop(ack)
            found += self._due(host, partition, ack, now)
        return found

    def _due(self, host: str, partition: str, ack: _Ack, now: float) -> list[Ask]:
        if not self._connected or ack.id is not None or ack.committed == ack.told or now < ack.not_before:
            return []
        if not self._rates.setdefault(host, RateLimit(_RATE, _BURST)).allow(now):
            return []
        ack.id, ack.sent = self._new_id(), ack.committed
        ack.deadline, ack.not_before = now + self._patience, now + self._every
        self._ids[ack.id] = ack
        epoch, seq = ack.committed
        who = {"id": ack.id, "partition": partition, "consumer": self._consumer}
        return [Ask(host, "ack", {**who, "epoch": epoch, "seq": seq})]

    def _failed(self, ack: _Ack, now: float) -> None:
        ack.not_before = now + min(_LONGEST, self._every * 2**ack.failures)
        ack.failures = min(ack.failures + 1, 16)

    def _drop(self, ack: _Ack) -> None:
        if ack.id is not None:
            del self._ids[ack.id]
            ack.id = None


def _decided(document: Mapping[str, Any]) -> bool:
    """Whether an answer is about the position: it is known now, or the daemon says where the partition is instead."""
    data = document.get("data")
    return document.get("status") == "ok" or (isinstance(data, dict) and {"epoch", "seq"} <= data.keys())
