"""Where a consumer is: for each partition of each host the (epoch, seq) of the last diff that it has applied."""

import contextlib
import os
import tempfile
from typing import Any, Protocol

import orjson

from comparer.errors import DamageError, OperatorError

_FORMAT = "snapfeed-positions/1"
Position = tuple[str, int]


class Positions(Protocol):
    """Keeps positions over restarts. Both may block; they are called in a thread, one call at a time."""

    def load(self, host: str, partition: str) -> tuple[str, int] | None:
        """(epoch, seq) that was stored last; None if there is none."""

    def store(self, host: str, partition: str, epoch: str, seq: int) -> None:
        """Durable when this returns. A consumer that keeps its result in a database stores both in one transaction."""


class MemoryPositions:
    """Positions that are gone with the process: the next one begins with a baseline."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Position] = {}

    def load(self, host: str, partition: str) -> tuple[str, int] | None:
        return self._known.get((host, partition))

    def store(self, host: str, partition: str, epoch: str, seq: int) -> None:
        self._known[host, partition] = (epoch, seq)


class FilePositions:
    """One JSON file, written as a whole beside itself and renamed, each time. For one process at a time.

    A missing file means: no positions yet. Raises OperatorError if it cannot be read or written, at once where its directory
    is none or cannot be written; DamageError if it holds something else.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._known = self._read()
        directory = os.path.dirname(os.path.realpath(path))
        if not os.path.isdir(directory) or not os.access(directory, os.W_OK | os.X_OK):
            why = "cannot be written" if os.path.isdir(directory) else "is no directory"
            raise OperatorError(
                f"{path!r}: positions cannot be kept there: {directory!r} {why}; its directory must exist and be writable"
            )

    def load(self, host: str, partition: str) -> tuple[str, int] | None:
        return self._known.get((host, partition))

    def store(self, host: str, partition: str, epoch: str, seq: int) -> None:
        known = {**self._known, (host, partition): (epoch, seq)}
        try:
            self._write(known)
        except OSError as error:
            raise OperatorError(
                f"{self._path!r}: the position cannot be stored: {error.strerror}; its directory must exist and be writable"
            ) from error
        self._known = known

    def _read(self) -> dict[tuple[str, str], Position]:
        try:
            with open(self._path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise OperatorError(f"{self._path!r}: {error.strerror}; give the path of a file for positions") from error
        try:
            return _decoded(orjson.loads(data))
        except (orjson.JSONDecodeError, DamageError) as error:
            raise DamageError(
                f"{self._path!r} holds no positions ({error}); without it the consumer begins with a baseline"
            ) from error

    def _write(self, known: dict[tuple[str, str], Position]) -> None:
        document: dict[str, dict[str, Any]] = {}
        for (host, partition), (epoch, seq) in sorted(known.items()):
            document.setdefault(host, {})[partition] = {"epoch": epoch, "seq": seq}
        text = orjson.dumps({"format": _FORMAT, "positions": document}, option=orjson.OPT_INDENT_2) + b"\n"
        place = os.path.realpath(self._path)  # a symlink stays one
        directory = os.path.dirname(place)
        descriptor, beside = tempfile.mkstemp(prefix=f".{os.path.basename(place)}.", dir=directory)
        try:
            with open(descriptor, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            os.rename(beside, place)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
        entry = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


def _decoded(document: Any) -> dict[tuple[str, str], Position]:
    """Raises DamageError."""
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise DamageError(f"its format is not {_FORMAT}")
    known: dict[tuple[str, str], Position] = {}
    for host, partitions in _object(document.get("positions")).items():
        for partition, position in _object(partitions).items():
            found = position_of(position)
            if found is None:
                raise DamageError("a position is not an epoch and a seq")
            known[host, partition] = found
    return known


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DamageError("`positions` is not hosts with partitions")
    return value


def position_of(document: Any) -> Position | None:
    """The (epoch, seq) in a JSON object that has both; None if it has not."""
    if not isinstance(document, dict):
        return None
    epoch, seq = document.get("epoch"), document.get("seq")
    if not isinstance(epoch, str) or not epoch or isinstance(seq, bool) or not isinstance(seq, int) or seq < 0:
        return None
    return epoch, seq
