"""The C library, one error check, and ioctl numbers computed as in <asm-generic/ioctl.h>."""

import contextlib
import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)

_NRBITS, _TYPEBITS, _SIZEBITS = 8, 8, 14
_NRSHIFT = 0
_TYPESHIFT = _NRSHIFT + _NRBITS
_SIZESHIFT = _TYPESHIFT + _TYPEBITS
_DIRSHIFT = _SIZESHIFT + _SIZEBITS
_WRITE, _READ = 1, 2


def check(result: int, what: str | bytes | None = None) -> int:
    """Return `result`, or raise the OSError that errno names if it is negative."""
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), what)
    return result


M_ARENA_MAX = -8  # <malloc.h>


def single_heap() -> None:
    """One heap for all threads from now on: mallopt(3). Nothing where the C library has none (musl).

    glibc gives each thread its own, and what is free in one between two blocks in use stays with it. Most of what we allocate is
    allocated by one thread at a time anyway.
    """
    with contextlib.suppress(AttributeError):
        libc.mallopt(M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Give what is free in the heap back to the kernel: malloc_trim(3). Nothing where the C library has none (musl)."""
    with contextlib.suppress(AttributeError):
        libc.malloc_trim(0)


def _ioc(direction: int, magic: int, number: int, size: int) -> int:
    return direction << _DIRSHIFT | magic << _TYPESHIFT | number << _NRSHIFT | size << _SIZESHIFT


def io(magic: int, number: int) -> int:
    """_IO(magic, number)."""
    return _ioc(0, magic, number, 0)


def ior(magic: int, number: int, size: int) -> int:
    """_IOR(magic, number, type of `size` bytes)."""
    return _ioc(_READ, magic, number, size)


def iow(magic: int, number: int, size: int) -> int:
    """_IOW(magic, number, type of `size` bytes)."""
    return _ioc(_WRITE, magic, number, size)


def iowr(magic: int, number: int, size: int) -> int:
    """_IOWR(magic, number, type of `size` bytes)."""
    return _ioc(_READ | _WRITE, magic, number, size)
