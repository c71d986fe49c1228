"""Loops over many objects of a partition, each in one call of a small library in C (batch.c), if it was built.

Where it was not (no compiler when the project was installed), `available()` is False and the callers do the same one system call
at a time. So they do for what a call here does not answer for: whatever did not go the usual way is left to them. The calls let
other threads run meanwhile. Layouts are those of batch.c.
"""

import ctypes
import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from typing import NamedTuple

from comparer.extents import Extent
from comparer.model import Ident

from .fiemap import extent
from .handles import Handle
from .statx import STATX_SIZE, Stat, parse

LEAVE_OUT = "SNAPFEED_WITHOUT_LIBRARY"  # environment variable
HANDLES = {(0x81, 12), (1, 8)}  # (type, bytes) of the file handles that it can make; see handles.py
AT_ONCE = 1024  # objects in a call: half a megabyte

_VERSION = 2
_FUNCTIONS = "snapfeed_look snapfeed_clone snapfeed_have_xattrs snapfeed_columns snapfeed_rows".split()
_OTHER = -4096
_LOOKED = struct.Struct(f"=QIi{STATX_SIZE}x")  # struct looked: ino gen error now
_EXTENTS = 8
_CLONED = struct.Struct("=QIiqqqQ")  # struct cloned: ino gen error ctime_s ctime_ns size old,
_COUNTS = struct.Struct("=ii")  # new_count old_count
_EXTENT = struct.Struct("=QQQI4x")  # logical physical length flags
_NEW_MAP = _CLONED.size + _COUNTS.size
_OLD_MAP = _NEW_MAP + _EXTENTS * _EXTENT.size
_CLONED_SIZE = _OLD_MAP + _EXTENTS * _EXTENT.size
_G = 1_000_000_000


def _load() -> ctypes.CDLL | None:
    if os.environ.get(LEAVE_OUT):
        return None
    for suffix in EXTENSION_SUFFIXES:
        path = os.path.join(os.path.dirname(__file__), f"_batch{suffix}")
        if os.path.exists(path):
            try:
                library = ctypes.CDLL(path)
                if ctypes.c_int.in_dll(library, "snapfeed_batch_version").value != _VERSION:
                    return None  # of another version of ours
                for name in _FUNCTIONS:
                    getattr(library, name)
            except (OSError, ValueError, AttributeError):  # built for another machine; no library of ours
                return None
            library.snapfeed_clone.restype = ctypes.c_size_t
            return library
    return None


_library = _load()


def available() -> bool:
    return _library is not None


def can_open(sample: Handle) -> bool:
    """Whether objects of the file system that a handle was seen on can be opened here, by their identity."""
    return _library is not None and (sample.type, len(sample.data)) in HANDLES


class Wanted(NamedTuple):
    """A file to be cloned. Its clone counts if change time and size are still these. `old`: see Request."""

    ident: Ident
    ctime_ns: int
    size: int
    old: int | None = None


class Cloned(NamedTuple):
    """`done`: there is a clone of a file that stood still. The extent maps, if both were wanted and are short.

    `errno`: what FICLONE said. Somebody is to be told before it is done again: an error in writing the file's pages is told once.
    """

    done: bool
    new: list[Extent] | None = None
    old: list[Extent] | None = None
    errno: int = 0


def look(mount_fd: int, sample: Handle, idents: Sequence[Ident]) -> dict[Ident, Stat]:
    """The metadata of those of at most AT_ONCE objects that are files or directories without xattrs, and stood still.

    They are opened (O_PATH) by their handles on the file system of `mount_fd`, on which the handle `sample` was seen.
    """
    assert _library is not None  # noqa: S101 - asked for only if it is available
    buffer = bytearray(len(idents) * _LOOKED.size)
    for number, ident in enumerate(idents):
        _LOOKED.pack_into(buffer, number * _LOOKED.size, *ident, 0)
    _library.snapfeed_look(mount_fd, sample.type, _address(buffer), ctypes.c_size_t(len(idents)))
    first = _LOOKED.size - STATX_SIZE
    # to ext4 generation 0 means any: whoever has the inode number now
    return {
        ident: parse(buffer, number * _LOOKED.size + first)
        for number, (ident, (_, gen, error)) in enumerate(zip(idents, _LOOKED.iter_unpack(buffer), strict=True))
        if not error and gen
    }


class Request:
    """At most AT_ONCE files to be cloned; `clone` may be called by another thread."""

    def __init__(self, files: Sequence[Wanted]) -> None:
        self._count = len(files)
        self._told = any(file.old for file in files)
        self._buffer = bytearray(len(files) * _CLONED_SIZE)
        for number, (ident, ctime_ns, size, old) in enumerate(files):
            seconds, rest = divmod(ctime_ns, _G)
            _CLONED.pack_into(self._buffer, number * _CLONED_SIZE, *ident, 0, seconds, rest, size, old or 0)

    def clone(self, mount_fd: int, sample: Handle, clones: int, directory: int, most_extents: int) -> list[Cloned]:
        """Clone the files as `<inode>.<generation>` in `directory` (immutable), and say which of them that was done for.

        What was not done is to be done again by the caller, who may find something of that name there. A file of more than
        `most_extents` extents is not cloned. Where a file has an `old` one, its extents and those of `<old>/<inode>.<generation>`
        in the directory `clones` are told as well. If there is a second processor for us, a second thread does half of the work.
        """
        assert _library is not None  # noqa: S101 - asked for only if it is available
        count, threads = ctypes.c_size_t(self._count), min(2, len(os.sched_getaffinity(0)))
        buffer = _address(self._buffer)
        done = _library.snapfeed_clone(mount_fd, sample.type, clones, directory, most_extents, buffer, count, threads)
        if done == self._count and not self._told:
            return [_DONE] * self._count
        return [self._answer(number * _CLONED_SIZE) for number in range(self._count)]

    def _answer(self, start: int) -> Cloned:
        error = _CLONED.unpack_from(self._buffer, start)[2]
        if error:
            return Cloned(False, errno=-error) if _OTHER < error < 0 else _NOT_DONE
        new, old = _COUNTS.unpack_from(self._buffer, start + _CLONED.size)
        if new < 0 or old < 0:
            return _DONE
        return Cloned(True, self._extents(start + _NEW_MAP, new), self._extents(start + _OLD_MAP, old))

    def _extents(self, start: int, count: int) -> list[Extent]:
        return [extent(*found) for found in _EXTENT.iter_unpack(self._buffer[start : start + count * _EXTENT.size])]


_NOT_DONE, _DONE = Cloned(False), Cloned(True)


def have_xattrs(names: Sequence[bytes | bytearray]) -> bytes | bytearray:
    """For each name in the calling thread's working directory: 1 if it has extended attributes, 2 if unknown, else 0."""
    assert _library is not None  # noqa: S101 - asked for only if it is available
    answers = bytearray(len(names))
    if names:
        _library.snapfeed_have_xattrs(b"\0".join((*names, b"")), _address(answers), ctypes.c_size_t(len(names)))
    return answers


def columns(records: "array[int]", start: int, stride: int, count: int, wanted: Iterable[tuple[int, int]]) -> bytearray:
    """Columns, one after the other, of `count` records of `stride` bytes that begin at byte `start` of an array.

    `wanted`: a column's offset in a record, and its bytes, 4 or 8.
    """
    assert _library is not None  # noqa: S101 - asked for only if it is available
    pairs = list(wanted)
    out = bytearray(count * sum(width for _, width in pairs))
    flat = (ctypes.c_uint32 * (2 * len(pairs)))(*(number for pair in pairs for number in pair))
    if count:
        _library.snapfeed_columns(
            ctypes.c_void_p(records.buffer_info()[0] + start),
            ctypes.c_size_t(stride),
            ctypes.c_size_t(count),
            flat,
            ctypes.c_size_t(len(pairs)),
            _address(out),
        )
    return out


def rows(records: "array[int]", start: int, count: int, size: int) -> tuple[bytearray, int, int]:
    """(rows of `size` bytes of the table `inode`, the largest change time in seconds, the largest of all times).

    Made of `count` records of bulkstat that begin at byte `start` of an array (xfs.py, Records.rows).
    """
    assert _library is not None  # noqa: S101 - asked for only if it is available
    out, latest = bytearray(count * size), (ctypes.c_int64 * 2)()
    place = ctypes.c_void_p(records.buffer_info()[0] + start)
    _library.snapfeed_rows(place, ctypes.c_size_t(count), _address(out), latest)
    return out, latest[0], latest[1]


def _address(buffer: bytearray) -> "ctypes.Array[ctypes.c_char]":
    return (ctypes.c_char * len(buffer)).from_buffer(buffer)
