"""File names as text that a terminal, a log line or a shell can take."""

import unicodedata

_SHORT = {0x07: "\\a", 0x08: "\\b", 0x09: "\\t", 0x0A: "\\n", 0x0B: "\\v", 0x0C: "\\f", 0x0D: "\\r", 0x1B: "\\e"}
# Letters that need no quotes in any POSIX shell, wherever they stand but for a leading `-` or `~`.
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789%+,-./:=@_")
# Control, format (bidi marks and zero-width letters are here), surrogate, private, unassigned, line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def _visible(char: str) -> bool:
    return char.isascii() or (
        unicodedata.category(char) not in _HIDDEN and (not char.isspace()) and not _combines(char)
    )


def _combines(char: str) -> bool:
    """Enclosing marks and variation selectors change what stands beside them; ordinary accents do not mislead."""
    return unicodedata.category(char) == "Me" or 0xFE00 <= ord(char) <= 0xFE0F or 0xE0100 <= ord(char) <= 0xE01EF


def printable(path: bytes) -> str:
    r"""A path as one readable word that a POSIX shell (with `$'...'`) reads back as the same bytes.

    A harmless name stays as it is; blanks and punctuation get single quotes; control characters, bidirectional and
    other invisible marks and bytes that are not UTF-8 are written as escapes inside `$'...'`. The result holds no
    control character, no line break and nothing that changes the direction of text. The empty path (a partition's
    root) is `''`.
    """
    if path and not path.startswith((b"-", b"~")) and _PLAIN.issuperset(path):
        return path.decode("ascii")
    text = path.decode("utf-8", "surrogateescape")
    if all(_visible(char) and not char < " " and char != "\x7f" for char in text):
        if "'" not in text:
            return f"'{text}'"
        if '"' not in text and not any(char in text for char in "$`\\!"):
            return f'"{text}"'
    return "$'" + "".join(map(_escaped, text)) + "'"


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as surrogateescape carries it
        return f"\\x{code - 0xDC00:02x}"
    if char in "'\\":
        return "\\" + char
    if code in _SHORT:
        return _SHORT[code]
    if code < 0x20 or code == 0x7F:
        return f"\\x{code:02x}"
    if _visible(char):
        return char
    return "".join(f"\\x{byte:02x}" for byte in char.encode())
