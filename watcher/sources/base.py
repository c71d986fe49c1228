"""The contract of an event source.

Events are hints: a source promises to say *where to look*, never what happened. When it cannot promise even that (queue
overflow, a watch it could not place), it says so with `Dirty.lost`, and the partition is reconciled.
"""

from collections.abc import Callable
from typing import Protocol

from comparer.dirty import Dirty


class SourceError(Exception):
    """A source cannot watch here: no permission, no kernel support. The text says what is missing."""


class EventSource(Protocol):
    """Watches one partition.

    Life: made, `start`ed in a running event loop, `take`n from many times (in that loop's thread), `close`d (any number
    of times).
    """

    @property
    def kind(self) -> str:
        """`fanotify` or `inotify`."""

    @property
    def pending(self) -> bool:
        """Whether a `take` now would return something (no system call)."""

    def start(self, wake: Callable[[], None]) -> None:
        """Start watching; raises SourceError. When it returns, no later change goes unseen.

        `wake` is called in the loop's thread after events were read: at once for the first after a quiet time, then
        batched (KERNEL.md: batching is what makes following cheap).
        """

    def leave_out(self, directory: int) -> None:
        """No events of what is in an open directory are wanted any more, since it is ours. They may come all the same.

        In any thread.
        """

    def take(self) -> Dirty:
        """Drain the kernel's queue without blocking, and return (and forget) all that was collected.

        All that happened on the partition before this call is in the result or in an earlier one.
        """

    def close(self) -> None:
        """Stop watching and free the descriptor."""
