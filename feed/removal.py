"""Removing listed paths from a copy, by directory descriptors, so that nothing outside of it is ever touched.

Who made the copy may have been shown a symbolic link where the list means a directory: a user of the source exchanged the two
while a live tree was read. So paths are walked component by component with O_NOFOLLOW; what lies behind a symbolic link, or on
another file system, is not the copy's. Paths are bytes, relative to the copy's directory.
"""

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self

from comparer.errors import DamageError, OperatorError

from .escape import printable
from .replica_tree import SYSTEM, parts

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOUNTED = "another file system is mounted there; unmount it"
_MOVED = "it was moved while it was being removed; do it again"


class Outcome(StrEnum):
    REMOVED = "removed"  # in a dry run: it would be
    GONE = "gone"  # nothing has that path
    LINK = "link"  # nothing has it either: a symbolic link stands where one of its directories was
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one path; `at` is the symbolic link (LINK) or what could not be removed (FAILED), `error` why not."""

    path: bytes
    outcome: Outcome
    at: bytes | None = None
    error: str | None = None


class _BehindLinkError(Exception):
    """`args[0]` is the path of the symbolic link."""


def listed(data: bytes) -> list[bytes]:
    """The paths of a list, each of which ends with a NUL. Raises DamageError for one that leads astray, or a cut-off list."""
    if data and not data.endswith(b"\0"):
        raise DamageError(
            "the list does not end with a NUL: it was cut off, or is no list of an export; nothing was removed"
        )
    paths = data.split(b"\0")[:-1]
    for path in paths:
        if not path or parts(path, "path")[0] == SYSTEM:
            raise DamageError(f"path {printable(path)} in the list is no path of a copy's; nothing was removed")
    return paths


class Removal:
    """Raises OperatorError for a directory that cannot be opened."""

    def __init__(self, top: bytes, *, dry_run: bool = False) -> None:
        self._dry_run = dry_run
        self._held: tuple[bytes, int] | None = None  # the directory of the last path: neighbours come together
        try:
            self._top = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise OperatorError(f"{printable(top)}: {error.strerror}; give the directory of the copy") from error
        self._device = os.fstat(self._top).st_dev

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget()
        os.close(self._top)

    def remove(self, path: bytes) -> Result:
        """Remove what has a path (see `listed`), with all that is below it. What is gone is fine."""
        above, _, name = path.rpartition(b"/")
        try:
            fd = self._directory(above)
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except _BehindLinkError as behind:
            return Result(path, Outcome.LINK, at=behind.args[0])
        except (FileNotFoundError, NotADirectoryError):  # also a file where a directory was
            return Result(path, Outcome.GONE)
        except OSError as error:
            return _failed(path, error)
        try:
            if stat.S_ISDIR(found.st_mode):
                if found.st_dev != self._device:
                    raise OSError(errno.EXDEV, _MOUNTED, path)
                if not self._dry_run:
                    self._remove_tree(fd, name, path)
            elif not self._dry_run:
                os.unlink(name, dir_fd=fd)
        except _BehindLinkError as behind:  # somebody else is at work in the copy
            return Result(path, Outcome.FAILED, at=behind.args[0], error=_MOVED)
        except OSError as error:
            return _failed(path, error)
        return Result(path, Outcome.REMOVED)

    def _forget(self) -> None:
        if self._held is not None:
            os.close(self._held[1])
            self._held = None

    def _directory(self, path: bytes) -> int:
        """A descriptor, ours until the next call. Raises _BehindLinkError, or OSError with the path of the component."""
        if not path:
            return self._top
        if self._held is not None and self._held[0] == path:
            return self._held[1]
        self._forget()
        fd, end = os.dup(self._top), 0
        try:
            for part in path.split(b"/"):
                end += len(part) + (end > 0)
                below = self._enter(fd, part, path[:end])
                os.close(fd)
                fd = below
        except BaseException:
            os.close(fd)
            raise
        self._held = (path, fd)
        return fd

    def _enter(self, fd: int, name: bytes, path: bytes) -> int:
        """Open the directory `name` in `fd`; `path` is its path from the top."""
        try:
            below = os.open(name, _DIRECTORY, dir_fd=fd)
        except OSError as error:
            if error.errno in {errno.ENOTDIR, errno.ELOOP} and stat.S_ISLNK(
                os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
            ):
                raise _BehindLinkError(path) from None
            raise OSError(error.errno, error.strerror, path) from error
        if os.fstat(below).st_dev != self._device:
            os.close(below)
            raise OSError(errno.EXDEV, _MOUNTED, path)
        return below

    def _remove_tree(self, above: int, name: bytes, path: bytes) -> None:
        """A directory of any depth, with one descriptor: down by names, and up by `..`, which must be where it came from."""
        fd = self._enter(above, name, path)
        trail: list[
            tuple[bytes, tuple[int, int], list[bytes]]
        ] = []  # name, the directory it is in, directories left there
        left = self._empty(fd, path)
        try:
            while True:
                if left:
                    below = left.pop()
                    trail.append((below, _identity(fd), left))
                    path = path + b"/" + below
                    deeper = self._enter(fd, below, path)
                    os.close(fd)
                    fd = deeper
                    left = self._empty(fd, path)
                elif trail:
                    below, identity, left = trail.pop()
                    up = os.open(b"..", _DIRECTORY, dir_fd=fd)
                    os.close(fd)
                    fd = up
                    if _identity(fd) != identity:
                        raise OSError(errno.ESTALE, _MOVED, path)
                    _rmdir(fd, below, path)
                    path = path[: -len(below) - 1]
                else:
                    break
        finally:
            os.close(fd)
        _rmdir(above, name, path)

    def _empty(self, fd: int, path: bytes) -> list[bytes]:
        """Remove all but directories from a directory; returns those."""
        directories = []
        for name in map(os.fsencode, os.listdir(fd)):
            try:
                os.unlink(name, dir_fd=fd)
            except FileNotFoundError:
                pass
            except OSError as error:
                with contextlib.suppress(FileNotFoundError):
                    if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                        directories.append(name)
                        continue
                raise OSError(error.errno, error.strerror, path + b"/" + name) from error
        return directories


def _failed(path: bytes, error: OSError) -> Result:
    """The error names what is in the way by its path, or `path` itself by its last name, a descriptor, or not at all."""
    named = error.filename if isinstance(error.filename, bytes) and error.filename != os.path.basename(path) else path
    return Result(path, Outcome.FAILED, at=named, error=error.strerror)


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _rmdir(fd: int, name: bytes, path: bytes) -> None:
    try:
        os.rmdir(name, dir_fd=fd)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
