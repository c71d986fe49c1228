"""What long runs found, as lines of JSON in the file that SNAPFEED_REPORT names; nowhere if it names none."""

import json
import os


def report(harness: str, cases: int, **detail: object) -> None:
    """One line: which harness, how many cases, and what was seen."""
    path = os.environ.get("SNAPFEED_REPORT")
    if path:
        with open(path, "a") as file:
            file.write(json.dumps({"harness": harness, "cases": cases, "detail": detail}) + "\n")
