"""The diff between any two kept snapshots, out of the journal. Plain functions and values over an open system file.

One stored diff is handed out as it is; several are squashed into one. `Span` does its work in steps, each over a system file that
is open for that step only, so that a long answer keeps no mount busy.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from comparer.errors import DamageError, OperatorError, TransientError
from comparer.model import Change, FileType, Op
from comparer.squash import Squash
from feed.encode import decode_change, decode_name, encode_change
from feed.pages import Chunk, chunks
from snapshotter.backends.base import SYSTEM_DIR
from snapshotter.systemfile import DiffRow, SystemFile

_TREES = SYSTEM_DIR + b"/snapshots/"  # `content` in a snapshot's own tree: <seq>/<path>
NOTHING = Chunk(0, b"")


def squashed_pages(file: SystemFile, first: int, last: int, limit: int) -> Iterator[Chunk]:
    """The diff from snapshot `first` to `last` in chunks of at most `limit` bytes. Raises as `Span.step`."""
    span = Span(first, last, limit)
    while (chunk := span.step(file)) is not None:
        if chunk.count:
            yield chunk


class Span:
    """The diff from snapshot `first` to `last`, both numbers of kept snapshots, as chunks of the feed.

    A single stored diff comes in the chunks it is stored in, others in chunks of at most `limit` bytes.
    """

    def __init__(self, first: int, last: int, limit: int) -> None:
        self._at = first
        self._last = last
        self._limit = limit
        self._row: DiffRow | None = None
        self._page = 0  # of `_row`, handed out or read
        self._squashing: _Squashing | None = None
        self._found: Iterator[Chunk] | None = None

    def step(self, file: SystemFile) -> Chunk | None:
        """Do the next piece of work: a chunk, an empty one while there is nothing to hand out yet, None at the end.

        Raises OperatorError if the journal does not lead from the one snapshot to the other, TransientError if a diff was cut
        into other pages meanwhile (ask again), DamageError if the journal holds what it cannot.
        """
        if self._found is not None:
            return next(self._found, None)
        if self._row is None or self._page >= self._row.pages:
            if self._at == self._last:
                if self._squashing is None:
                    return None
                self._found = chunks(self._squashing.changes(self._last), self._limit)
                return NOTHING
            self._next_diff(file)
            return NOTHING
        assert self._row is not None  # noqa: S101 - looked at above
        if self._page and file.diff(self._row.seq) != self._row:
            raise TransientError(f"diff {self._row.seq} was cut into other pages meanwhile; ask again")
        self._page += 1
        count, body = file.page(self._row.seq, self._page)
        if self._squashing is None:
            return Chunk(count, body)
        self._squashing.read(body)
        return NOTHING

    def _next_diff(self, file: SystemFile) -> None:
        row = file.next_diff(self._at + 1)
        if row is None or row.seq > self._last or row.parent not in (self._at, None):
            raise OperatorError(f"the journal does not lead from snapshot {self._at} to {self._last} any more")
        if self._row is None and row.seq != self._last:
            self._squashing = _Squashing()
        self._row, self._page, self._at = row, 0, row.seq


class _Squashing:
    """Stored changes in, encoded changes out; carries what a `Change` does not hold."""

    def __init__(self) -> None:
        self._squash = Squash()
        self._content: dict[
            str, bytes
        ] = {}  # by id: where the content is as of the last change; `_TREES` for any such path
        self._omitted: dict[str, dict[str, None]] = {}  # by id: extended attributes that were left out of a change

    def read(self, body: bytes) -> None:
        """A page's changes as JSON objects joined by commas. Raises DamageError."""
        try:
            documents = orjson.loads(b"[" + body + b"]")
        except orjson.JSONDecodeError as error:
            raise DamageError(f"a page of the journal is not JSON: {error}") from error
        for document in documents:
            change = decode_change(document)
            if change.op is Op.MODIFY and not change.path and change.before is None:  # a baseline
                self._content.clear()
                self._omitted.clear()
            self._squash.add(change)
            try:
                self._remember(change, document)
            except (ValueError, TypeError) as error:
                raise DamageError(f"not a change of the feed: {error}") from error

    def _remember(self, change: Change, document: Mapping[str, Any]) -> None:
        ident = str(change.ident)
        content = None
        if change.type is FileType.FILE and change.after is not None:
            content = decode_name(document, "content")
        if content is None:
            self._content.pop(ident, None)
        else:
            self._content[ident] = _TREES if content.startswith(_TREES) else content
        if document.get("omitted_xattrs"):
            self._omitted.setdefault(ident, {}).update(dict.fromkeys(document["omitted_xattrs"]))

    def changes(self, last: int) -> Iterator[bytes]:
        """The one diff up to snapshot `last`, each change as the bytes of a JSON object."""
        for change in self._squash.changes():
            document = encode_change(change, self._content_of(change, last))
            omitted = self._omitted.get(document["id"])
            if omitted:
                _omit(document, list(omitted))
            yield orjson.dumps(document)

    def _content_of(self, change: Change, last: int) -> bytes | None:
        if change.type is not FileType.FILE or change.after is None:
            return None
        content = self._content.get(str(change.ident))
        if content == _TREES:
            path = self._squash.path(change.ident)
            return None if path is None else b"%b%d/%b" % (_TREES, last, path)
        return content


def _omit(document: dict[str, Any], names: list[str]) -> None:
    """Extended attributes that one of the changes left out are not known: leave all out, as feed.coarsen does, and say so."""
    for side in ("before", "after"):
        if document[side] is not None:
            document[side].pop("xattrs", None)
            document[side].pop("xattrs_b64", None)
    document["omitted_xattrs"] = ["*"] if "*" in names else names
    if "changed" in document and "xattr" not in document["changed"]:
        document["changed"].append("xattr")
