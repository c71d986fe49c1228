"""`snapfeed remove-listed`: removes from a copy what an export says is gone, and never anything outside the copy."""

import argparse
import os
import sys
from collections import Counter
from typing import Any

from comparer.errors import OperatorError
from feed.encode import encode_name
from feed.escape import printable
from feed.removal import Outcome, Removal, Result, listed

from .render import json_line


def remove_listed(options: argparse.Namespace) -> int:
    paths = listed(_read(options.list))
    counts: Counter[Outcome] = Counter()
    with Removal(os.fsencode(options.directory), dry_run=options.dry_run) as removal:
        for path in paths:
            result = removal.remove(path)
            counts[result.outcome] += 1
            _tell(result, options)
    sys.stdout.flush()
    words = {
        Outcome.REMOVED: "would be removed" if options.dry_run else "removed", Outcome.GONE: "gone already",
        Outcome.LINK: "behind a symbolic link, so gone already", Outcome.FAILED: "could not be removed",
    }  # fmt: skip
    said = ", ".join(f"{counts[outcome]} {words[outcome]}" for outcome in Outcome if counts[outcome])
    print(f"snapfeed remove-listed: {said or 'nothing is listed'}", file=sys.stderr)
    return 1 if counts[Outcome.FAILED] else 0


def _read(source: str) -> bytes:
    try:
        if source == "-":
            return sys.stdin.buffer.read()
        with open(source, "rb") as file:
            return file.read()
    except OSError as error:
        raise OperatorError(
            f"{printable(os.fsencode(source))}: {error.strerror}; give the `deleted` of an export"
        ) from error


def _tell(result: Result, options: argparse.Namespace) -> None:
    """A path on stdout with --json or in a dry run, what is out of the ordinary on stderr."""
    if options.json:
        document: dict[str, Any] = {}
        encode_name(document, "path", result.path)
        document |= {"outcome": result.outcome.value, "dry_run": options.dry_run}
        if result.at is not None:
            encode_name(document, "at", result.at)
        print(json_line(document | {"error": result.error}))
    elif result.outcome is Outcome.REMOVED and options.dry_run:
        print(printable(result.path))
    if result.outcome is Outcome.LINK:
        text = f"{printable(result.path)}: left alone, {printable(result.at or b'')} is a symbolic link"
        print(f"snapfeed remove-listed: {text}", file=sys.stderr)
    elif result.outcome is Outcome.FAILED:
        print(f"snapfeed remove-listed: {printable(result.at or b'')}: {result.error}", file=sys.stderr)
