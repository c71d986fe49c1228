"""Sizes and durations as people write them. Pure."""

import re

from comparer.errors import OperatorError

_SIZE = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "T": 1 << 40,
}
_SIZE |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_DURATION = {"ms": 0.001, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*\Z")
LARGEST = 1 << 53  # bytes: what JSON numbers hold exactly
LONGEST = 366 * 86400.0
LEAST_BARE_VOLUME = 4096  # bytes, one block


def parse_size(text: str | int, where: str = "size") -> int:
    """Bytes, at least 1. Raises OperatorError naming `where`."""
    match = _NUMBER.match(str(text)) if not isinstance(text, bool) else None
    factor = _SIZE.get(match[2].upper()) if match else None
    if match is None or factor is None or not 1 <= float(match[1]) * factor <= LARGEST:
        raise OperatorError(
            f"{where}: {text!r} is not a size; write a number with B, KiB, MiB, GiB or TiB, such as 64MiB (8192TiB at most)"
        )
    return int(match[1]) * factor if match[1].isdigit() else int(float(match[1]) * factor)


def parse_threshold(text: str | int, where: str = "io_threshold") -> int:
    """The size of a written volume, in bytes. Raises OperatorError, also for a small number without its unit: one forgotten."""
    size = parse_size(text, where)
    if size < LEAST_BARE_VOLUME and str(text).strip().isdigit():
        raise OperatorError(
            f"{where}: {text!r} is {size} bytes; write the unit as well: 64MiB, or {size}B if that is meant"
        )
    return size


def parse_duration(text: str | float, where: str = "duration") -> float:
    """Seconds, more than 0. Raises OperatorError naming `where`."""
    match = _NUMBER.match(str(text)) if not isinstance(text, bool) else None
    factor = _DURATION.get(match[2] or "s") if match else None
    if match is None or factor is None or not 0 < float(match[1]) * factor <= LONGEST:
        raise OperatorError(f"{where}: {text!r} is not a duration; write a number with ms, s, min, h or d, such as 60s")
    return float(match[1]) * factor


def format_size(size: int) -> str:
    """`1.5 MiB`."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(round(amount, 1)) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount == int(amount) else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def format_duration(seconds: float) -> str:
    """`90 s`, `2.5 h`."""
    if seconds < 120:
        return f"{seconds:g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.4g} h"


def counted(number: int, what: str) -> str:
    """`1 change`, `2 changes`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
