"""Which event source a partition gets: fanotify where it is permitted and possible, else inotify, else none."""

from collections.abc import Callable

from snapshotter.partition import Partition

from .base import EventSource, SourceError
from .fanotify import FanotifySource
from .inotify import InotifySource


def make_source(
    partition: Partition, wake: Callable[[], None], *, unlimited: bool = True
) -> tuple[EventSource | None, str | None]:
    """A started source, and why it is not a better one (None: it is the best there is).

    `unlimited`: fanotify's queue may grow without bound; else it overflows at fs.fanotify.max_queued_events.
    """
    why: str | None = None
    if partition.kind == "partition":
        fanotify = FanotifySource(partition.path, device=partition.source or None, unlimited=unlimited)
        try:
            fanotify.start(wake)
        except SourceError as error:
            why = str(error)
            fanotify.close()
        else:
            return fanotify, None
    inotify = InotifySource(partition.path)
    try:
        inotify.start(wake)
    except SourceError as error:
        inotify.close()
        return None, f"{why}; {error}" if why else str(error)
    return inotify, why
