"""One change as the feed writes it, and back: a `Change`, a JSON object, orjson bytes.

Names are bytes. A name that is valid UTF-8 is written as it is; otherwise its field holds a readable stand-in and
`<field>_b64` holds the bytes in base64 (`path`, `from`, `target`, `content`). Extended attributes whose *names* are not UTF-8
would collide as stand-ins, being keys: they go into a second object, `xattrs_b64`, with the name in base64 as the key.

Nanoseconds, `size`, `blocks` and `rdev` are always decimal strings. Offsets and lengths in `ranges` and `cleared` are JSON
integers: no file system in use holds a file of 2^53 bytes (ext4 16 TiB, XFS and the kernel's own loff_t 8 EiB, of which
8 PiB are far beyond what exists), and ranges are what consumers compute with.
"""

from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any

import orjson

from comparer.errors import DamageError
from comparer.model import Attr, ByteRanges, Change, FileType, Ident, Op, Quality, Range
from feed.documents import WITH_CHANGED, AttributesDocument


def encode_name(document: dict[str, Any], field: str, name: bytes) -> None:
    """Write a name into a document: `field`, and `<field>_b64` if the bytes are not UTF-8."""
    try:
        document[field] = name.decode()
    except UnicodeDecodeError:
        document[field] = name.decode("utf-8", "backslashreplace")
        document[field + "_b64"] = b64encode(name).decode("ascii")


def encode_attr(attr: Attr) -> AttributesDocument:
    """The attributes of an object as `before` and `after` carry them; its type and target stand beside them in the change."""
    document: AttributesDocument = {
        "size": str(attr.size),
        "blocks": str(attr.blocks),
        "mode": attr.mode,
        "uid": attr.uid,
        "gid": attr.gid,
        "nlink": attr.nlink,
        "mtime_ns": str(attr.mtime_ns),
        "ctime_ns": str(attr.ctime_ns),
        "btime_ns": None if attr.btime_ns is None else str(attr.btime_ns),
        "rdev": None if attr.rdev is None else str(attr.rdev),
    }
    if attr.xattrs:
        readable: dict[str, str] = {}
        other: dict[str, str] = {}
        for name, value in attr.xattrs:
            text = b64encode(value).decode("ascii")
            try:
                readable[name.decode()] = text
            except UnicodeDecodeError:
                other[b64encode(name).decode("ascii")] = text
        document["xattrs"] = readable
        if other:
            document["xattrs_b64"] = other
    return document


def encode_change(change: Change, content: bytes | None = None) -> dict[str, Any]:
    """A change as a JSON-able object (feed.documents.ChangeDocument), fields in the order of docs/feed.md.

    `content` is the path, from the partition's root, of the file as of this snapshot; None if none is kept. The types in
    `before` and `after` must be the change's own, and a symlink's target the same in both (Linux cannot change one).
    """
    document: dict[str, Any] = {"op": change.op.value, "type": change.type.value, "id": str(change.ident)}
    encode_name(document, "path", change.path)
    if change.from_path is not None:
        encode_name(document, "from", change.from_path)
    if change.op in WITH_CHANGED:
        document["changed"] = list(change.changed)
    document["before"] = None if change.before is None else encode_attr(change.before)
    document["after"] = None if change.after is None else encode_attr(change.after)
    if change.type is FileType.SYMLINK:
        attr = change.after or change.before
        if attr is not None and attr.target is not None:
            encode_name(document, "target", attr.target)
    if change.ranges is not None:
        document["ranges"] = [[offset, length] for offset, length in change.ranges.written]
        document["ranges_quality"] = change.ranges.quality.value
        document["cleared"] = [[offset, length] for offset, length in change.ranges.cleared]
    if content is None:
        document["content"] = None
    else:
        encode_name(document, "content", content)
    return document


def encode_bytes(change: Change, content: bytes | None = None) -> bytes:
    """A change as the bytes of one JSON object, as chunks are made of."""
    return orjson.dumps(encode_change(change, content))


def decode_change(document: Mapping[str, Any]) -> Change:
    """The change that a JSON object of the feed stands for. Unknown fields are ignored. Raises DamageError if it is none."""
    try:
        return _change(document)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        what = f"lacks the field {error}" if isinstance(error, KeyError) else str(error)
        raise DamageError(f"not a change of the feed: {what}") from error


def decode_name(document: Mapping[str, Any], field: str) -> bytes | None:
    """The bytes of a name in a document; None if it has none or null. Raises ValueError or TypeError for anything else."""
    exact = document.get(field + "_b64")
    if exact is not None:
        return b64decode(_text(exact), validate=True)
    readable = document.get(field)
    return None if readable is None else _text(readable).encode()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a string must be")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{type(value).__name__} where an integer must be")
    return value


def _decimal(value: Any) -> int:
    """A decimal string of at most 64 bits; the length is looked at first, as int() of a long text is slow."""
    text = _text(value)
    if len(text) > 21 or not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit():
        raise ValueError("a string that is no decimal number of 64 bits")
    return int(text)


def _optional(value: Any) -> int | None:
    return None if value is None else _decimal(value)


def _ranges(value: Any) -> tuple[Range, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{type(value).__name__} where ranges must be")
    found = tuple(Range(_integer(offset), _integer(length)) for offset, length in value)
    end = 0
    for offset, length in found:
        if offset < end or length <= 0:
            raise ValueError("ranges that are empty, unsorted or overlap")
        end = offset + length
    return found


def _xattrs(document: Mapping[str, Any]) -> tuple[tuple[bytes, bytes], ...]:
    readable, other = document.get("xattrs") or {}, document.get("xattrs_b64") or {}
    pairs = [(name.encode(), b64decode(_text(value), validate=True)) for name, value in readable.items()]
    pairs += [(b64decode(name, validate=True), b64decode(_text(value), validate=True)) for name, value in other.items()]
    return tuple(sorted(pairs))


def _attr(document: Any, kind: FileType, target: bytes | None) -> Attr | None:
    if document is None:
        return None
    if not isinstance(document, dict):
        raise TypeError(f"{type(document).__name__} where attributes must be")
    return Attr(
        type=kind,
        size=_decimal(document["size"]),
        blocks=_decimal(document["blocks"]),
        mode=_integer(document["mode"]),
        uid=_integer(document["uid"]),
        gid=_integer(document["gid"]),
        nlink=_integer(document["nlink"]),
        mtime_ns=_decimal(document["mtime_ns"]),
        ctime_ns=_decimal(document["ctime_ns"]),
        btime_ns=_optional(document.get("btime_ns")),
        rdev=_optional(document.get("rdev")),
        xattrs=_xattrs(document),
        target=target,
    )


def _change(document: Mapping[str, Any]) -> Change:
    kind = FileType(document["type"])
    ino, _, gen = _text(document["id"]).partition(".")
    path = decode_name(document, "path")
    if path is None:
        raise KeyError("path")
    changed = document.get("changed") or []
    if not isinstance(changed, list):
        raise TypeError("`changed` is not a list")
    target = decode_name(document, "target")
    ranges = None
    if document.get("ranges_quality") is not None:
        written, cleared = document.get("ranges") or [], document.get("cleared") or []
        ranges = ByteRanges(_ranges(written), _ranges(cleared), Quality(document["ranges_quality"]))
    return Change(
        op=Op(document["op"]),
        ident=Ident(_decimal(ino), _decimal(gen)),
        type=kind,
        path=path,
        from_path=decode_name(document, "from"),
        changed=tuple(_text(word) for word in changed),
        before=_attr(document.get("before"), kind, target),
        after=_attr(document.get("after"), kind, target),
        ranges=ranges,
    )
