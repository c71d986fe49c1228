"""A replica's directory against what the replica knows: a walk of both, and content against the source, byte by byte."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from comparer.model import Attr, FileType, Ident, file_type
from feed.escape import printable
from feed.replica_content import Source, closing
from feed.replica_state import ReplicaState
from feed.replica_tree import LABELS, AstrayError, Tree

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Disagreement:
    """`what`: missing, extra, type, attributes, link, content, stale, flaw. `path` from the root; `detail` is for people."""

    what: str
    path: bytes
    detail: str
    ident: Ident | None = None
    other: bytes | None = None  # of `link` and `missing`: another path of the same object that is there


def disagreements(tree: Tree, state: ReplicaState) -> Iterator[Disagreement]:
    """Names, types and attributes, from the top down. Whoever mends one at once will see what is below it compared."""
    if state["root"] is None:
        return
    root = state.root
    seen: dict[Ident, tuple[int, bytes]] = {}
    stack = [(b"", root)]
    attr = state.attr(root)
    if attr is not None and (detail := _differences(tree, b"", attr)):
        yield Disagreement("attributes", b"", detail, root)
    while stack:
        path, ident = stack.pop()
        known = dict(state.children(ident))
        prefix = path + b"/" if path else b""
        for name in sorted({*known, *tree.entries(path)}):
            below = prefix + name
            if name not in known:
                yield Disagreement("extra", below, "it is not the feed's")
                continue
            child = known[name]
            held = state.known(child)
            if held is None or held.absent:
                continue
            yield from _compare(tree, below, child, held.attr, seen)
            if held.attr.type is FileType.DIR:
                found = tree.look(below)
                if found is not None and file_type(found.st_mode) is FileType.DIR:
                    stack.append((below, child))


def _compare(
    tree: Tree, path: bytes, ident: Ident, attr: Attr, seen: dict[Ident, tuple[int, bytes]]
) -> Iterator[Disagreement]:
    found = tree.look(path)
    first = seen.get(ident)
    if found is None:
        yield Disagreement("missing", path, f"a {attr.type.value} must be there", ident, first and first[1])
    elif (kind := file_type(found.st_mode)) is not attr.type:
        yield Disagreement("type", path, f"a {kind.value}, must be a {attr.type.value}", ident, first and first[1])
    elif first is not None and found.st_ino != first[0]:
        yield Disagreement("link", path, f"must be the same file as {printable(first[1])}", ident, first[1])
    elif first is None and (detail := _differences(tree, path, attr)):
        yield Disagreement("attributes", path, detail, ident)
    if first is None and (found := tree.look(path)) is not None:
        seen[ident] = (found.st_ino, path)


def _differences(tree: Tree, path: bytes, attr: Attr) -> str:
    found = tree.look(path)
    if found is None:
        return "gone"
    pairs = [("mtime", found.st_mtime_ns, attr.mtime_ns)]
    if attr.type is not FileType.SYMLINK:
        pairs.append(("mode", found.st_mode & 0o7777, tree.mode(attr)))
    if tree.root:
        pairs += [("uid", found.st_uid, attr.uid), ("gid", found.st_gid, attr.gid)]
    if attr.type is FileType.FILE:
        pairs.append(("size", found.st_size, attr.size))
    if attr.type in {FileType.CHAR, FileType.BLOCK}:
        pairs.append(("rdev", found.st_rdev, attr.rdev or 0))
    if attr.type is not FileType.DIR:
        pairs.append(("links", found.st_nlink, attr.nlink))
    texts = [f"{what} {here:#o}, must be {there:#o}" if what == "mode" else f"{what} {here}, must be {there}"
             for what, here, there in pairs if here != there]  # fmt: skip
    fd, name = tree.place(path)
    if attr.type is FileType.SYMLINK and (target := os.readlink(name, dir_fd=fd)) != attr.target:
        texts.append(f"target {printable(target)}, must be {printable(attr.target or b'')}")
    here, there = tree.xattrs(path), dict(attr.xattrs)
    differing = [k for k in sorted({*here, *there}) if here.get(k) != there.get(k) and (k not in LABELS or k in there)]
    texts += [f"extended attribute {printable(key)}" for key in differing]
    return "; ".join(texts)


def shortcomings(state: ReplicaState) -> Iterator[Disagreement]:
    """What the replica itself knows to lack."""
    for ident in state.idents("stale"):
        for path in state.paths(ident)[:1]:
            yield Disagreement("stale", path, "its content is not that of this state", ident)
    for ident, flaw in state.flaws():
        for path in state.paths(ident)[:1]:
            yield Disagreement("flaw", path, flaw, ident)


@dataclass(slots=True)
class ContentCheck:
    """How much content was compared, and how many files there was nothing to compare with."""

    files: int = 0
    bytes: int = 0
    unknown: int = 0


def content(tree: Tree, state: ReplicaState, source: Source, check: ContentCheck) -> Iterator[Disagreement]:
    """The content of every file that is not stale, with the snapshot's or, if that has expired, with the unchanged live file."""
    for ident in state.idents("type = 'file' AND NOT stale AND NOT absent AND size > 0"):
        known = state.known(ident)
        paths = state.paths(ident)
        if known is None or not paths:
            continue
        path = paths[0]
        fd = source.kept(known.content, known.attr)
        with closing(source.live(path, ident, known.attr) if fd is None else fd) as there:
            if there is None:
                check.unknown += 1
                continue
            with closing(_opened(tree, paths)) as here:
                if here is None:
                    continue  # told as missing
                check.files += 1
                offset = _first_difference(here, there, check)
            if offset is not None:
                yield Disagreement("content", path, f"differs from the source at byte {offset}", ident)


def _opened(tree: Tree, paths: list[bytes]) -> int | None:
    """A file by the first of its names that leads to one here."""
    for path in paths:
        with contextlib.suppress(AstrayError, OSError):
            if (fd := tree.open_file(path, os.O_RDONLY)) is not None:
                return fd
    return None


def _first_difference(here: int, there: int, check: ContentCheck) -> int | None:
    offset = 0
    while True:
        ours, theirs = os.pread(here, _CHUNK, offset), os.pread(there, _CHUNK, offset)
        check.bytes += len(theirs)
        if ours != theirs:
            both = zip(ours, theirs, strict=False)
            return offset + next((i for i, (a, b) in enumerate(both) if a != b), min(len(ours), len(theirs)))
        if not ours:
            return None
        offset += len(ours)
