"""XFS_IOC_BULKSTAT: the metadata of all inodes, in the order of their numbers, without a path walk.

Layouts and numbers: fs/xfs/libxfs/xfs_fs.h (package xfslibs-dev), struct xfs_bulk_ireq and xfs_bulkstat, version 5;
ioctl_xfs_bulkstat(2); behaviour: fs/xfs/xfs_itable.c. Needs CAP_SYS_ADMIN. It says what statx says, but for two things: the
size of a file whose appended bytes are not written back yet is the old one (the size on the disk), and looking this way does not
make the kernel give the next change a finer time stamp. Inodes without a name (removed while open) are among them, with nlink 0;
quota and real-time inodes are not.
"""

import errno
import fcntl
import functools
import hashlib
import struct
from array import array
from bisect import bisect_left
from collections.abc import Container, Iterator
from typing import NamedTuple

from . import batch
from .libc import ior

_IREQ = struct.Struct("=QIIII40x")  # struct xfs_bulk_ireq: ino flags icount ocount agno reserved
# struct xfs_bulkstat: ino size blocks xflags atime | mtime ctime btime | gen uid gid projectid atime_nsec | mtime_nsec ctime_nsec
# btime_nsec blksize rdev | cowextsize extsize | nlink | extents aextents version | forkoff | sick checked | mode | pad2 extents64
_BULKSTAT = struct.Struct("=QQQ16xqqqIII8xIIIII8xI10xH4xH58x")
XFS_IOC_BULKSTAT = ior(ord("X"), 127, _IREQ.size)
BATCH = 4096  # records
REFUSED = (errno.ENOTTY, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP)  # EINVAL: through a mount with mapped ids
MINOR_BITS = 18  # bs_rdev: sysv_encode_dev()


class Bulkstat(NamedTuple):
    """The members of struct xfs_bulkstat that are used, in their order: `blocks` in units of `blksize` bytes, times (s, ns)."""

    ino: int
    size: int
    blocks: int
    mtime: int
    ctime: int
    btime: int
    gen: int
    uid: int
    gid: int
    mtime_nsec: int
    ctime_nsec: int
    btime_nsec: int
    blksize: int
    rdev: int
    nlink: int
    forkoff: int  # bytes; 0: no room for extended attributes, so there are none
    mode: int


ROW = struct.Struct("=11q")  # ino gen mode size blocks (bytes) uid gid btime_ns nlink mtime_ns ctime_ns
_UNSIGNED_ROW = struct.Struct("=11Q")
_MODULO = 1 << 64
_G = 1_000_000_000


class Rows(NamedTuple):
    """What the metadata table holds of some inodes: ROW after ROW. The largest change time and the largest of all, in seconds."""

    data: bytearray
    newest: int
    latest: int

    def several(self, start: int, count: int, at_once: int) -> Iterator[tuple[int, ...]]:
        """The members of `count` rows from row `start` on, those of `at_once` rows after each other; it must divide `count`."""
        return _joined(at_once).iter_unpack(memoryview(self.data)[start * ROW.size : (start + count) * ROW.size])


Record = tuple[int, ...]  # the members of Bulkstat, in a tuple that costs a third to make


class Records:
    """Some bulkstat records, as the kernel laid them out: the words (of 8 bytes) `start` to `stop` of an array.

    Those of `bulkstat_batches` are valid until the next ones are asked for.
    """

    __slots__ = ("count", "start", "stop", "words")

    def __init__(self, words: "array[int]", start: int, stop: int) -> None:
        self.words, self.start, self.stop = words, start, stop
        self.count = (stop - start) // _WORDS

    @classmethod
    def of(cls, raw: bytes) -> "Records":
        words = array("Q", raw)
        return cls(words, 0, len(words))

    @property
    def raw(self) -> memoryview:
        """Bytes."""
        return memoryview(self.words)[self.start : self.stop].cast("B")

    def __iter__(self) -> Iterator[Record]:
        """Each record's members, in the order of Bulkstat."""
        return _BULKSTAT.iter_unpack(self.raw)

    def numbers(self) -> memoryview:
        """The inode numbers, ascending, as a sequence."""
        return memoryview(self.words)[self.start : self.stop : _WORDS]

    def rows(self) -> "Rows":
        """Rows for the metadata table; times in nanoseconds, modulo 64 bits."""
        if batch.available():
            return Rows(*batch.rows(self.words, 8 * self.start, self.count, ROW.size))
        data = bytearray()
        newest = latest = -_MODULO
        for record in map(Bulkstat._make, self):
            mtime, ctime, btime = record.mtime, record.ctime, record.btime
            data += _UNSIGNED_ROW.pack(
                record.ino,
                record.gen,
                record.mode,
                record.size,
                record.blocks * record.blksize % _MODULO,
                record.uid,
                record.gid,
                (btime * _G + record.btime_nsec) % _MODULO,
                record.nlink,
                (mtime * _G + record.mtime_nsec) % _MODULO,
                (ctime * _G + record.ctime_nsec) % _MODULO,
            )
            newest, latest = max(newest, ctime), max(latest, mtime, ctime, btime)
        return Rows(data, newest, latest)

    def without_attributes(self) -> list[int]:
        """The inodes that have no room for extended attributes."""
        rooms = self.raw.cast("H")[_FORKOFF :: 4 * _WORDS].tolist()
        if all(rooms):
            return []
        return [ino for ino, room in zip(self.numbers(), rooms, strict=True) if not room]

    def part(self, start: int, stop: int) -> "Records":
        """Records `start` to `stop`, in the same memory."""
        return Records(self.words, self.start + start * _WORDS, self.start + stop * _WORDS)

    def without(self, numbers: Container[int]) -> "Records":
        """Those of other inodes, in memory of their own."""
        kept = [at for at, ino in enumerate(self.numbers()) if ino not in numbers]
        return Records.of(b"".join(self.part(at, at + 1).copy() for at in kept))

    def copy(self) -> bytes:
        return bytes(self.raw)

    def fingerprint(self) -> bytes:
        """SHA-256 of what changes with every change, and of nothing that changes without one (access time, block counts).

        That is inode number, generation and change time; and what xfs_repair may set right without a change time: size and link
        count. Column by column, each of all records: without the library in C an array's slice is a loop in C (a memoryview's is
        slower); a column costs 10 ns for an inode, when bulkstat itself takes 450 ns.
        """
        digest = hashlib.sha256(usedforsecurity=False)
        if batch.available():
            digest.update(batch.columns(self.words, 8 * self.start, _BULKSTAT.size, self.count, _FINGER))
            return digest.digest()
        for word in _FINGER_WORDS:
            digest.update(self.words[self.start + word : self.stop : _WORDS])
        halves = self.raw.cast("I")
        for half in _FINGER_HALVES:
            digest.update(halves[half :: 2 * _WORDS].tobytes())
        return digest.digest()


@functools.cache
def _joined(count: int) -> struct.Struct:
    return struct.Struct("=" + ROW.format.removeprefix("=") * count)


_WORDS = _BULKSTAT.size // 8
_CTIME = 6
_FORKOFF = 63  # of 2 bytes
_FINGER_WORDS = (0, 1, _CTIME, 8, 11)  # of 8 bytes: ino, size, ctime, gen and uid, ctime_nsec and btime_nsec
_FINGER_HALVES = (28,)  # of 4 bytes: nlink
_FINGER = (*((8 * word, 8) for word in _FINGER_WORDS), *((4 * half, 4) for half in _FINGER_HALVES))  # (offset, width)


def bulkstat_batches(fd: int, first_ino: int = 0, count: int = BATCH) -> Iterator[Records]:
    """Records of all inodes from number `first_ino` on, up to `count` at a time (192 bytes each), in one buffer.

    `fd` is any descriptor on the file system, not O_PATH. Raises OSError: EPERM, ENOTTY (not XFS, or before Linux 5.5), EINVAL,
    EUCLEAN or EIO (an inode that cannot be read; those before it have been given).
    """
    words = array("Q", bytes(_IREQ.size + count * _BULKSTAT.size))
    first = _IREQ.size // 8
    ino = first_ino
    while True:
        _IREQ.pack_into(words, 0, ino, 0, count, 0, 0)
        fcntl.ioctl(fd, XFS_IOC_BULKSTAT, words, True)
        ino, _, _, filled, _ = _IREQ.unpack_from(words)
        if not filled:
            return
        yield Records(words, first, first + filled * _WORDS)


def bulkstat_runs(fd: int, bits: int, count: int = BATCH) -> Iterator[tuple[int, Records]]:
    """The records of all inodes in runs of 1 << `bits` numbers: (number of the run, its records); empty runs are left out.

    As `bulkstat_batches`. What a batch has of a run that may go on is moved to the front of the buffer, and the next batch is
    read right behind it: the kernel's header lies over the end of it meanwhile.
    """
    words = array("Q", bytes(_IREQ.size + ((1 << bits) + count) * _BULKSTAT.size))
    whole, first = memoryview(words), _IREQ.size // 8
    ino = left = 0
    while True:
        header = left * _WORDS
        covered = words[header : header + first]
        _IREQ.pack_into(words, 8 * header, ino, 0, count, 0, 0)
        with whole[header:] as target:
            fcntl.ioctl(fd, XFS_IOC_BULKSTAT, target, True)
        ino, _, _, filled, _ = _IREQ.unpack_from(words, 8 * header)
        words[header : header + first] = covered
        total = left + filled
        records = Records(words, first, first + total * _WORDS)
        numbers = records.numbers()
        if not filled:
            if total:
                yield numbers[0] >> bits, records
            return
        start, last = 0, numbers[-1] >> bits
        while (run := numbers[start] >> bits) != last:
            stop = bisect_left(numbers, run + 1 << bits, start)
            yield run, records.part(start, stop)
            start = stop
        left = total - start
        whole[first : first + left * _WORDS] = whole[records.start + start * _WORDS : records.stop]


def bulkstat(fd: int, first_ino: int = 0, count: int = BATCH) -> Iterator[Record]:
    """As `bulkstat_batches`, record by record (the members of Bulkstat)."""
    for records in bulkstat_batches(fd, first_ino, count):
        yield from records


def bulkstat_single(fd: int, ino: int) -> Bulkstat | None:
    """One inode's record, None if there is no such inode. Raises OSError as `bulkstat_batches`."""
    for record in bulkstat(fd, ino, 1):
        return Bulkstat(*record) if record[0] == ino else None
    return None
