"""What commands print: changes for people, one line each, and JSON; nothing of a file's name unescaped."""

import json
from typing import Any

from comparer.model import ByteRanges, Change, Op, Quality
from feed.escape import printable

from .units import format_size

MARK = {Op.CREATE: "+", Op.DELETE: "-", Op.MODIFY: "~", Op.RENAME: ">", Op.LINK: "=", Op.UNLINK: "x"}


def json_line(document: Any) -> str:
    """A document as one line of JSON in printable ASCII.

    JSON itself leaves DEL, C1 and bidirectional controls as they are, and a terminal obeys them.
    """
    return json.dumps(document, separators=(",", ":")).replace("\x7f", "\\u007f")


def change_line(change: Change) -> str:
    """`~ file  log/app.log  [data size times] 4 KiB in 1 range`."""
    path = printable(change.path) if change.path else "."
    if change.from_path is not None:
        arrow = "->" if change.op is Op.RENAME else "is also"
        path = f"{printable(change.from_path)} {arrow} {path}"
    if change.type == "dir" and change.path:
        path += "/"
    parts = [f"{MARK[change.op]} {change.op:<6} {change.type:<7} {path}"]
    if change.op is Op.CREATE and change.type == "file" and change.after is not None:
        parts.append(format_size(change.after.size))
    if change.changed:
        parts.append(f"[{' '.join(change.changed)}]")
    if change.ranges is not None:
        parts.append(ranges(change.ranges))
    return "  ".join(part for part in parts if part)


def ranges(found: ByteRanges) -> str:
    """`12 KiB in 3 ranges, 4 KiB cleared`; `ranges unknown`."""
    if found.quality is Quality.UNKNOWN:
        return "ranges unknown"
    texts = []
    if found.written:
        count = len(found.written)
        texts.append(f"{format_size(sum(r.length for r in found.written))} in {count} range{'s' if count > 1 else ''}")
    if found.cleared:
        texts.append(f"{format_size(sum(r.length for r in found.cleared))} cleared")
    if texts and found.quality is Quality.SUPERSET:
        texts.append("at most")
    return ", ".join(texts)
