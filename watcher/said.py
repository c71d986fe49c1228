"""Paths and errors as one line for people, nothing unescaped."""

import os

from feed.escape import printable


def printable_path(path: bytes) -> str:
    """A path for JSON and people: as it is if that is harmless, else escaped."""
    text = path.decode("utf-8", "surrogateescape")
    return text if text.isprintable() else printable(path)


def describe(error: BaseException) -> str:
    """An error for people, in one line, nothing unescaped."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        shown = f": {printable(os.fsencode(name))}" if isinstance(name, (str, bytes)) else ""
        return f"{error.strerror}{shown}"
    text = str(error) or type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
