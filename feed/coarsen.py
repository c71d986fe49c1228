"""Making one encoded change small enough for a page without losing that it happened.

A file can have hundreds of thousands of changed ranges and 64 KiB of extended attributes. What does not fit is said less
exactly, and that it is: first ranges are merged (`ranges_quality` becomes `superset`), then extended attributes are left
out and named in `omitted_xattrs` (`["*"]` where even the names are too much).
"""

from itertools import pairwise
from typing import Any

import orjson

from comparer.errors import OperatorError
from comparer.model import Quality
from feed.escape import printable

_RANGE = 44  # the longest range in JSON: two numbers of 64 bits, brackets, commas


def coarsen(change: bytes, limit: int) -> bytes:
    """The same change in at most `limit` bytes. Raises OperatorError, naming the path, if it cannot be had."""
    document: dict[str, Any] = orjson.loads(change)
    for step in (_merge_ranges, _omit_xattrs, _merge_ranges, _omit_names):
        step(document, limit)
        encoded = orjson.dumps(document)
        if len(encoded) <= limit:
            return encoded
    path = printable(str(document.get("path")).encode())
    raise OperatorError(f"the change of {path} does not fit a page of {limit} bytes; raise [broker] max_packet")


def merge(ranges: list[list[int]], count: int) -> list[list[int]]:
    """Cover `[offset, length]` ranges by at most `count`, closing the smallest gaps first. `count` is at least 1."""
    joined: list[list[int]] = []
    for offset, length in sorted(ranges):
        if joined and offset <= joined[-1][0] + joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], offset + length - joined[-1][0])
        else:
            joined.append([offset, length])
    if len(joined) <= count:
        return joined
    gaps = [after[0] - before[0] - before[1] for before, after in pairwise(joined)]
    kept = set(sorted(range(len(gaps)), key=gaps.__getitem__, reverse=True)[: count - 1])
    covered = [joined[0][:]]
    for index, (offset, length) in enumerate(joined[1:]):
        if index in kept:
            covered.append([offset, length])
        else:
            covered[-1][1] = offset + length - covered[-1][0]
    return covered


def _merge_ranges(document: dict[str, Any], limit: int) -> None:
    """Cleared ranges become changed ones: a `cleared` that covers too much would say of live data that it is gone."""
    every = document.get("ranges", []) + document.get("cleared", [])
    if not every:
        return
    document["ranges"], document["cleared"] = [], []
    if document["ranges_quality"] == Quality.EXACT:
        document["ranges_quality"] = Quality.SUPERSET.value
    document["ranges"] = merge(every, max(1, (limit - len(orjson.dumps(document))) // _RANGE))


def _omit_xattrs(document: dict[str, Any], limit: int) -> None:  # noqa: ARG001 -- the signature of a step
    names: dict[str, None] = {}
    for side in ("before", "after"):
        attributes = document.get(side)
        if attributes:
            names |= dict.fromkeys(attributes.pop("xattrs", {})) | dict.fromkeys(attributes.pop("xattrs_b64", {}))
    if names:
        document["omitted_xattrs"] = list(names)


def _omit_names(document: dict[str, Any], limit: int) -> None:  # noqa: ARG001
    if "omitted_xattrs" in document:
        document["omitted_xattrs"] = ["*"]
