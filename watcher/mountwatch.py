"""Mounts that come and go: /proc/self/mountinfo is pollable (POLLPRI), proc_pid_mountinfo(5)."""

import asyncio
import select
from collections.abc import Callable

from snapshotter.linux.mountinfo import MOUNTINFO


class MountWatch:
    """Calls `changed` in the loop's thread whenever the mount table changed."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._file = open(MOUNTINFO, "rb", buffering=0)  # noqa: SIM115 - lives as long as this object
        # the file is always readable; the inner epoll passes on only the change
        self._epoll = select.epoll()
        self._epoll.register(self._file.fileno(), select.EPOLLPRI)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._epoll.fileno(), self._ready)

    def _ready(self) -> None:
        self._epoll.poll(0)  # takes the event
        self._changed()

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._file.close()
