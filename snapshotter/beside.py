"""A second thread for part of a piece of work: what is asked for goes on while the first one does something else."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")


class Beside:
    """Does what it is given, one thing after the other, in a thread of its own; or at once, in the caller's.

    The latter if `wanted` is False, which is for what the two would only wait for each other with, and if no thread can be made.
    At the end of the context all is done.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._executor = ThreadPoolExecutor(1) if wanted else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown()

    def submit(self, function: Callable[..., T], *arguments: object) -> "Future[T]":
        if self._executor is not None:
            try:
                return self._executor.submit(function, *arguments)
            except RuntimeError:  # as many threads as may be
                self._executor.shutdown(cancel_futures=True)
                self._executor = None
        done: Future[T] = Future()
        try:
            done.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001 - for whoever asks for the result
            done.set_exception(error)
        return done
