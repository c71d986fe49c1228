"""The real daemon, with how long its phases take: python -m bench.phases FILE run ...

Appends a line of JSON to FILE for each snapshot: {"seq", "trigger", "changes", "seconds", and "fill", "compared", "clones",
"journal", "ranges": seconds in each phase; each with "_cpu": those on a processor}; and for each diff published
{"published": seq, "first", "last": when its first page was asked for and when its last one was acknowledged, CLOCK_MONOTONIC}.
What is measured is a handful of calls for each snapshot and one for each file with ranges, at a microsecond each.
"""

import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import snapshotter.visit
import watcher.outbox
import watcher.pipeline
import watcher.work
from snapshotter.backends.ficlone import FicloneBackend
from snapshotter.scan import Scan
from watcher.cli import main

_took: Counter[str] = Counter()


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:
        started, used = time.perf_counter(), time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            _took[name] += time.perf_counter() - started
            _took[f"{name}_cpu"] += time.thread_time() - used

    return measured


def install(path: str) -> None:
    def write(document: dict[str, Any]) -> None:
        with open(path, "a", encoding="ascii") as file:
            file.write(json.dumps(document) + "\n")

    scan = snapshotter.visit.BULKSTAT
    snapshotter.visit.BULKSTAT = Scan(timed("fill", scan.fill), timed("compared", scan.differences))
    for name, method in (("clones", "_take_everything"), ("ranges", "_ranges")):
        setattr(FicloneBackend, method, timed(name, getattr(FicloneBackend, method)))
    watcher.work._journal = timed("journal", watcher.work._journal)
    take = watcher.pipeline.take

    @functools.wraps(take)
    def taken(*args: Any, **kwargs: Any) -> Any:
        _took.clear()
        used = time.thread_time()
        done = take(*args, **kwargs)
        _took["seconds_cpu"] = time.thread_time() - used
        facts = {"seq": done.seq, "trigger": str(done.trigger), "changes": done.changes, "seconds": done.seconds}
        write({**facts, **_took})
        return done

    watcher.pipeline.take = taken

    outbox = watcher.outbox.JournalOutbox
    fetch, acknowledge = outbox.fetch, outbox.acknowledge
    first: dict[int, float] = {}
    last_pages: dict[tuple[int, int], bool] = {}

    @functools.wraps(fetch)
    async def fetched(self: Any, *args: Any) -> Any:
        asked = time.monotonic()
        pages = await fetch(self, *args)
        for page in pages:
            first.setdefault(page.position.seq, asked)
            if page.last:
                last_pages[page.position] = True
        return pages

    @functools.wraps(acknowledge)
    async def acknowledged(self: Any, position: Any) -> None:
        if last_pages.pop(position, False):
            write({"published": position.seq, "first": first.pop(position.seq), "last": time.monotonic()})
        await acknowledge(self, position)

    outbox.fetch, outbox.acknowledge = fetched, acknowledged


if __name__ == "__main__":
    install(sys.argv[1])
    sys.argv[1:] = sys.argv[2:]
    sys.exit(main())
