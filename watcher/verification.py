"""`snapfeed verify` carried out: in the daemon, or by the command itself where none runs."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from comparer.dirty import Dirty
from comparer.errors import OperatorError, TransientError
from feed.escape import printable
from feed.pages import chunk_limit
from snapshotter.database import translated
from snapshotter.held import held
from snapshotter.verify import Disagreement, nameless, verify
from snapshotter.visit import Visit

from .pipeline import Pipeline
from .said import describe
from .work import Order, sweep, take

_KEEP_ALL = 1 << 30
_EVERY = 0.5  # seconds between two reports of progress


class _StoppedError(Exception):
    pass


def document(found: Disagreement) -> dict[str, Any]:
    """One disagreement; `path` as feed.escape.printable writes it, which a shell reads back as the same bytes."""
    return {
        "path": printable(found.path),
        "what": found.what,
        "detail": found.detail,
        "meanwhile": found.meanwhile,
    }


def compare(visit: Visit, taken_ns: int, put: Callable[[dict[str, Any]], None]) -> None:
    """Compare the head snapshot with what is there: `put` gets each disagreement, progress now and then, and the summary last.

    Raises OSError for what cannot be read, OperatorError if there is no snapshot, DamageError.
    """
    head = visit.file.head()
    if head is None:
        raise OperatorError("there is no snapshot yet")
    looked, real, meanwhile, said = 0, 0, 0, time.monotonic()

    def progress(entries: int) -> None:
        nonlocal looked, said
        looked = entries
        if time.monotonic() - said >= _EVERY:
            said = time.monotonic()
            put({"progress": entries})

    with translated(visit.file.path), held(visit, head) as (view, _):
        for found in verify(visit.tree, view, taken_ns, progress, nameless(view)):
            real += not found.meanwhile
            meanwhile += found.meanwhile
            put(document(found))
    put({"seq": head, "entries": looked, "disagreements": real, "meanwhile": meanwhile})


def directly(visit: Visit, put: Callable[[dict[str, Any]], None]) -> None:
    """Without a daemon: take a snapshot, which is a reconcile, then compare. Raises as `compare` and `take`."""
    sweep(visit)
    taken_ns = time.time_ns()
    order = Order("command", Dirty(lost="no daemon was watching"), 0, taken_ns, _KEEP_ALL, chunk_limit())
    take(visit, order, Dirty, lambda _entries: None)
    compare(visit, taken_ns, put)


async def watched(pipeline: Pipeline) -> AsyncIterator[dict[str, Any]]:
    """In the daemon: take a snapshot as for a command, then compare in the partition's thread. Raises SnapfeedError."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    stopped = threading.Event()
    taken_ns = time.time_ns()
    await pipeline.snapshot()

    def put(item: dict[str, Any]) -> None:
        if stopped.is_set():
            raise _StoppedError
        loop.call_soon_threadsafe(queue.put_nowait, item)

    task = asyncio.ensure_future(pipeline.in_visit(lambda visit: compare(visit, taken_ns, put)))
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (item := await queue.get()) is not None:
            yield item
        await task
    except OSError as error:
        raise TransientError(f"{pipeline.name}: {describe(error)}") from error
    finally:
        stopped.set()
        if not task.done():  # whoever asked has gone
            with contextlib.suppress(BaseException):
                await task
