"""What of the feed a replica is going to do: the changes of a diff, checked; and those that a baseline comes to. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from comparer.compare import compare
from comparer.errors import DamageError
from comparer.model import UNKNOWN_RANGES, Attr, ByteRanges, Change, FileType, Ident, Name, Op, View
from feed.encode import decode_change, decode_name, encode_change
from feed.escape import printable
from feed.replica_content import check_kept
from feed.replica_tree import check_path

_LARGEST = (1 << 63) - 1
_MOST_IDS = 1 << 32


@dataclass(frozen=True, slots=True)
class Told:
    """A change, and what the feed says beside it: where the content is, and which extended attributes it left out."""

    change: Change
    content: bytes | None
    omitted: tuple[str, ...]
    document: Mapping[str, Any]

    @property
    def writes(self) -> bool:
        """Whether a file's content differs after it."""
        change = self.change
        if change.type is not FileType.FILE or change.op not in {Op.MODIFY, Op.RENAME}:
            return False
        return change.ranges is not None or "data" in change.changed or "size" in change.changed


def read(document: Mapping[str, Any]) -> Told:
    """Raises DamageError if it is no change, or one that nobody may make: a path that leads astray, numbers out of range."""
    change = decode_change(document)
    omitted = document.get("omitted_xattrs") or []
    try:
        content = decode_name(document, "content")
    except (ValueError, TypeError) as error:
        raise DamageError(f"not a change of the feed: content: {error}") from error
    if not isinstance(omitted, list) or not all(isinstance(name, str) for name in omitted):
        raise DamageError("not a change of the feed: `omitted_xattrs` is no list of texts")
    told = Told(change, content, tuple(omitted), document)
    check_path(change.path)
    if change.from_path is not None:
        check_path(change.from_path)
    if content is not None:
        check_kept(content, "content")
    for attr in (change.before, change.after):
        if attr is not None:
            _check_attr(change, attr)
    return told


def _check_attr(change: Change, attr: Attr) -> None:
    good = (
        0 <= attr.size <= _LARGEST
        and 0 <= attr.blocks <= _LARGEST
        and 0 <= attr.mode <= 0o7777
        and 0 <= attr.uid < _MOST_IDS
        and 0 <= attr.gid < _MOST_IDS
        and 0 <= attr.nlink <= _LARGEST
        and all(abs(t) <= _LARGEST for t in (attr.mtime_ns, attr.ctime_ns, attr.btime_ns or 0))
        and 0 <= (attr.rdev or 0) < 1 << 64
        and not any(b"\0" in name or not name for name, _ in attr.xattrs)
        and all(offset + length <= _LARGEST for offset, length in (change.ranges.written if change.ranges else ()))
        and all(offset + length <= _LARGEST for offset, length in (change.ranges.cleared if change.ranges else ()))
        and (attr.target is None or b"\0" not in attr.target)
        and (change.type is not FileType.SYMLINK or change.op is Op.DELETE or bool(attr.target))
        and min(change.ident) >= 0
    )
    if not good:
        raise DamageError(
            f"{change.op.value} {printable(change.path)}: attributes that no object can have; nothing was written"
        )


class Described:
    """The state that a baseline describes, as a view. Raises DamageError if it is none: every step must fit those before."""

    def __init__(self, given: Iterable[Told]) -> None:
        self.attrs: dict[Ident, Attr] = {}
        self._root: Ident | None = None
        self._names: dict[Ident, list[Name]] = {}
        self._children: dict[Ident, dict[bytes, Ident]] = {}
        self._directories: dict[bytes, Ident] = {}
        for told in given:
            self._add(told.change)

    def _add(self, change: Change) -> None:
        if change.after is None or change.op not in {Op.MODIFY, Op.CREATE, Op.LINK}:
            raise _misfit(change, "in a baseline there is only what is there")
        if (change.path == b"") != (self._root is None) or (change.path == b"") != (change.op is Op.MODIFY):
            raise _misfit(change, "a baseline begins with the root, and has it once")
        if change.path == b"":
            if change.type is not FileType.DIR:
                raise _misfit(change, "the root is a directory")
            self._root = change.ident
        else:
            directory, _, last = change.path.rpartition(b"/")
            parent = self._directories.get(directory)
            if parent is None:
                raise _misfit(change, "what it is in is no directory")
            if last in self._children[parent]:
                raise _misfit(change, "the name is taken")
            known = self.attrs.get(change.ident)
            if (known is None) != (change.op is Op.CREATE) or (known is not None and known.type is not change.type):
                raise _misfit(change, "its id means something else")
            if known is not None and change.type is FileType.DIR:
                raise _misfit(change, "a directory has one name")
            self._children[parent][last] = change.ident
            self._names.setdefault(change.ident, []).append(Name(parent, last))
        self.attrs[change.ident] = change.after
        if change.type is FileType.DIR:
            self._directories[change.path] = change.ident
            self._children[change.ident] = {}

    @property
    def root(self) -> Ident:
        if self._root is None:
            raise DamageError("a baseline without a root")
        return self._root

    def attr(self, ident: Ident) -> Attr | None:
        return self.attrs.get(ident)

    def names(self, ident: Ident) -> list[Name]:
        return self._names.get(ident, [])

    def child(self, parent: Ident, name: bytes) -> Ident | None:
        return self._children.get(parent, {}).get(name)

    def children(self, parent: Ident) -> Iterable[tuple[bytes, Ident]]:
        return self._children.get(parent, {}).items()


class _Bare:
    """The root of a view, and nothing in it."""

    def __init__(self, view: View) -> None:
        self.root = view.root
        self._attr = view.attr(view.root)

    def attr(self, ident: Ident) -> Attr | None:
        return self._attr if ident == self.root else None

    def names(self, _ident: Ident) -> tuple[Name, ...]:
        return ()

    def child(self, _parent: Ident, _name: bytes) -> Ident | None:
        return None

    def children(self, _parent: Ident) -> tuple[tuple[bytes, Ident], ...]:
        return ()


def _misfit(change: Change, why: str) -> DamageError:
    return DamageError(f"{change.op.value} {printable(change.path)}: {why}; nothing was written")


def emptied(view: View, known: Iterable[Ident]) -> Iterator[dict[str, Any]]:
    """The changes that remove all but the root."""
    return (encode_change(change) for change in compare(view, _Bare(view), [i for i in known if i != view.root]))


def comparable(view: View, known: Iterable[Ident], wanted: Described) -> bool:
    """Whether an id means the same in both states, as far as can be seen: of another file system it would not."""
    if view.root != wanted.root:
        return False
    for ident in known:
        here, there = view.attr(ident), wanted.attr(ident)
        if here is not None and there is not None and (here.type, here.target) != (there.type, there.target):
            return False
    return True


def converged(view: View, known: Iterable[Ident], given: list[Told], wanted: Described) -> Iterator[dict[str, Any]]:
    """The changes from what is here to what a baseline describes. A file of the same id, size and times is the same."""
    told = {one.change.ident: one for one in given}

    def ranges(ident: Ident) -> ByteRanges | None:
        here, there = view.attr(ident), wanted.attr(ident)
        if here is None or there is None:
            return None
        return None if _content_key(here) == _content_key(there) else UNKNOWN_RANGES

    def differs(ident: Ident) -> bool:
        return view.attr(ident) != wanted.attr(ident) or set(view.names(ident)) != set(wanted.names(ident))

    touched = [ident for ident in {*known, *wanted.attrs} if differs(ident)]
    for change in compare(view, wanted, touched, ranges):
        one = told.get(change.ident)
        document = encode_change(change, None if one is None or change.after is None else one.content)
        if one is not None and one.omitted:
            document["omitted_xattrs"] = list(one.omitted)
        yield document


def _content_key(attr: Attr) -> tuple[int, int, int]:
    return attr.size, attr.mtime_ns, attr.ctime_ns
