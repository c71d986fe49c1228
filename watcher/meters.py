"""Volume meters: how many bytes were written to a partition. Events say when to look, the meter says how much.

| kind       | buffered    | direct   | mmap        | counts                                              |
|------------|-------------|----------|-------------|-----------------------------------------------------|
| `xfs`      | exact       | exact    | not counted | at once                                             |
| `blockdev` | counted     | counted  | counted     | at writeback, journal and metadata included         |
| `ext4`     | counted     | counted  | counted     | new space at once, the rest at writeback; metadata included |
| `btrfs`    | counted     | counted  | counted     | buffered writes at once, the rest at writeback; metadata included |
| `growth`   | new space   | new space| new space   | at once; overwriting in place is not seen           |
"""

import errno
import os
from collections.abc import Callable, Iterable
from typing import Literal, Protocol

SECTOR = 512  # the unit of /sys/dev/block/*/stat, whatever the device's sectors are


class Meter(Protocol):
    """One partition's written bytes. A reading is a few system calls, cheap enough for once a second."""

    @property
    def kind(self) -> str:
        """`xfs`, `btrfs`, `ext4`, `blockdev` or `growth`."""

    def read(self) -> int:
        """Bytes written since some fixed time in the past, never going down; raises OSError if the source is gone."""

    @property
    def immediate(self) -> bool:
        """True if a write counts at once (XFS statistics), False if at writeback (block devices)."""

    @property
    def settles(self) -> Literal["begun", "captured", "done"]:
        """Which moment of a snapshot divides what belongs to it from what belongs to the next one.

        `begun`: its beginning, less our own writes (a write counts at once). `captured`: when it had its data, which it flushed.
        `done`: its end, because what is counted late, and what our own commit costs the device, cannot be told apart.
        """

    @property
    def waiting(self) -> int:
        """How many bytes of the last reading are in memory still, and came after the snapshot, which flushes (btrfs)."""


class XfsMeter:
    """/sys/fs/xfs/DEV/stats/stats, line `xpc`, 2nd value: xs_write_bytes. `device`: the kernel's name, as `sda1`, `dm-3`."""

    kind = "xfs"
    immediate = True
    settles: Literal["begun", "captured", "done"] = "begun"
    waiting = 0

    def __init__(self, device: str) -> None:
        self._path = f"/sys/fs/xfs/{device}/stats/stats"
        self._sum = _Rising()
        self.read()

    def read(self) -> int:
        for line in _text(self._path).splitlines():
            if line.startswith("xpc "):
                return self._sum.at("", _number(line, 2))
        raise OSError(errno.ENODATA, "no line xpc", self._path)


class Ext4Meter:
    """/sys/fs/ext4/DEV: session_write_kbytes, written since the mount, and delayed_allocation_blocks, still in memory.

    `device`: the kernel's name; `block_size`: bytes.
    """

    kind = "ext4"
    immediate = False
    settles: Literal["begun", "captured", "done"] = "done"
    waiting = 0

    def __init__(self, device: str, block_size: int = 4096) -> None:
        self._path = f"/sys/fs/ext4/{device}/"
        self._block_size = block_size
        self._sum = _Rising()
        self._pending = _Pending()
        self.read()

    def read(self) -> int:
        written = self._sum.at("", _number(_text(self._path + "session_write_kbytes"), 0) * 1024)
        delayed = _number(_text(self._path + "delayed_allocation_blocks"), 0) * self._block_size
        return self._pending.on_top_of(written, delayed)


class BtrfsMeter:
    """The sectors its devices wrote (BlockMeter), and what waits in memory: /sys/fs/btrfs/FSID/allocation/data/bytes_may_use."""

    kind = "btrfs"
    immediate = False
    settles: Literal["begun", "captured", "done"] = "captured"
    waiting = 0

    def __init__(self, directory: str) -> None:
        self._path = f"{directory}/allocation/data/bytes_may_use"
        self._devices = BlockMeter(f"{directory}/devices", all_below=True)
        self._pending = _Pending()
        self.read()

    def read(self) -> int:
        written = self._devices.read()
        self.waiting = _number(_text(self._path), 0)
        return self._pending.on_top_of(written, self.waiting)


class BlockMeter:
    """The 7th value (sectors written) of the `stat` of one block device, or of all the devices in a directory of sysfs.

    The directory form is for btrfs (/sys/fs/btrfs/FSID/devices): devices may come and go while it is mounted.
    """

    kind = "blockdev"
    immediate = False
    settles: Literal["begun", "captured", "done"] = "done"
    waiting = 0

    def __init__(self, path: str, *, all_below: bool = False) -> None:
        self._path = path
        self._all_below = all_below
        self._sum = _Rising()
        self.read()

    def read(self) -> int:
        total = self._sum.total
        for device in os.listdir(self._path) if self._all_below else ["."]:
            try:
                text = _text(f"{self._path}/{device}/stat")
            except OSError:
                if not self._all_below:
                    raise
                continue  # a device removed or missing: the others go on
            total = self._sum.at(device, _number(text, 6) * SECTOR)
        return total


class GrowthMeter:
    """What statvfs(3) says is used: each growth between two readings is added up, what is freed is not taken off."""

    kind = "growth"
    immediate = True
    settles: Literal["begun", "captured", "done"] = "begun"
    waiting = 0

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._sum = _Rising()
        self._dev = os.stat(root).st_dev
        self.read()

    def read(self) -> int:
        if os.stat(self._root).st_dev != self._dev:
            raise OSError(errno.ENODEV, "another file system is mounted there", self._root)
        found = os.statvfs(self._root)
        return self._sum.at("", (found.f_blocks - found.f_bfree) * found.f_frsize, falls=True)


class _Rising:
    """Adds up the increases of counters. What a counter shows first adds nothing; one that was set back starts at 0."""

    def __init__(self) -> None:
        self.total = 0
        self._last: dict[str, int] = {}

    def at(self, counter: str, value: int, *, falls: bool = False) -> int:
        """`counter` shows `value` now; `falls`: going down is no reset but ordinary. The total."""
        last = self._last.get(counter, value)
        self._last[counter] = value
        self.total += value - last if value >= last else (0 if falls else value)
        return self.total


class _Pending:
    """What is written and what is still to be: the sum dips while data is on its way to the device, the total does not."""

    def __init__(self) -> None:
        self._total = 0

    def on_top_of(self, written: int, pending: int) -> int:
        self._total = max(self._total, written + pending)
        return self._total


def _text(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _number(line: str, index: int) -> int:
    try:
        return int(line.split()[index])
    except (IndexError, ValueError):
        raise OSError(errno.ENODATA, f"no number in place {index} of {line[:80]!r}") from None


def meters_for(fs_type: str, source_device: str, root: bytes) -> list[Meter]:
    """The meters that work for a mounted file system: at least `growth`. Raises OSError if `root` cannot be looked at.

    `source_device`: the device of the mount table; used where the root's device number does not tell (btrfs).
    """
    number = os.stat(root).st_dev
    if not os.path.isdir(_by_number(number)):
        try:
            number = os.stat(source_device).st_rdev
        except OSError:
            number = 0
    block = _by_number(number)
    device = os.path.basename(os.path.realpath(block))
    attempts: list[Callable[[], Meter]] = []
    if fs_type == "xfs":
        attempts = [lambda: XfsMeter(device), lambda: BlockMeter(block)]
    elif fs_type == "btrfs":
        attempts = [lambda: BtrfsMeter(_btrfs_directory(device))]
    elif fs_type == "ext4":
        attempts = [lambda: Ext4Meter(device, os.statvfs(root).f_frsize)]
    found = _working(attempts) or _working([lambda: BlockMeter(block)])
    return found or [GrowthMeter(root)]


def _by_number(number: int) -> str:
    return f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"


def _btrfs_directory(device: str) -> str:
    """The sysfs directory of the btrfs that `device` is one of. Raises OSError: ENOENT."""
    base = "/sys/fs/btrfs"
    for fsid in os.listdir(base):
        if os.path.exists(f"{base}/{fsid}/devices/{device}"):
            return f"{base}/{fsid}"
    raise OSError(errno.ENOENT, "no btrfs on this device", device)


def _working(attempts: Iterable[Callable[[], Meter]]) -> list[Meter]:
    found = []
    for attempt in attempts:
        try:
            found.append(attempt())
        except OSError:
            continue
    return found


class Volume:
    """The bytes written to a partition since its last snapshot: the larger of what its meters say, never the sum.

    `begin` before a snapshot, then `settle` (it succeeded, or found nothing new) or `abandon` (it came to nothing). What was
    written before one that found nothing new asks for no other one, but is in the volume of the next that is made. A meter
    whose source is gone is dropped and said so in `notes`; what it had counted until then stays. With none left `kinds` is empty.
    """

    def __init__(self, meters: Iterable[Meter]) -> None:
        self.notes: list[str] = []
        self._meters = list(meters)
        self._base = self._readings()
        self._begun: dict[Meter, int] | None = None
        self._floor = 0
        self._made = dict(self._base)  # where the last snapshot that was made began
        self._since_made = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the meters that still work."""
        return tuple(meter.kind for meter in self._meters)

    def advance(self) -> int:
        """Bytes written since the last `settle` (or since this was made); it does not go down in between."""
        counted = (now - self._base[meter] for meter, now in self._readings().items())
        self._floor = max(self._floor, *counted, 0)
        return self._floor

    def begin(self) -> int:
        """A snapshot begins: what is written from now on belongs to the next one.

        Returns the bytes written since the last one that was made.
        """
        self._begun = self._readings()
        counted = (now - self._made[meter] for meter, now in self._begun.items())
        self._since_made = max(self._since_made, self._floor, *counted, 0)
        return self._since_made

    def captured(self) -> None:
        """The snapshot has its data: what a sync of its own wrote belongs to it, what waits in memory by now does not."""
        if self._begun is None:
            raise ValueError("captured without begin")
        self._begun.update((m, now - m.waiting) for m, now in self._readings().items() if m.settles == "captured")

    def settle(self, own: int, *, made: bool = True, before: int = 0) -> None:
        """The snapshot begun is done, with `own` bytes written for it by ourselves, and `before` it since the last `settle`.

        What was written since belongs to the next one; each meter says since when. Raises ValueError without a `begin`.
        """
        if self._begun is None:
            raise ValueError("settle without begin")
        for meter, now in self._readings().items():
            self._base[meter] = now if meter.settles == "done" else min(now, self._begun.get(meter, now) + own)
            if not made:
                self._made[meter] = min(now, self._made[meter] + before + own)
        self._begun = None
        self._floor = 0
        if made:
            self._made = dict(self._base)
        self._since_made = 0 if made else max(0, self._since_made - before)

    def abandon(self) -> None:
        """The snapshot begun came to nothing: what was counted before goes on counting."""
        self._begun = None

    def _readings(self) -> dict[Meter, int]:
        found = {}
        for meter in self._meters:
            try:
                found[meter] = meter.read()
            except OSError as error:
                self.notes.append(f"meter {meter.kind} dropped: {error}")
        self._meters = list(found)
        return found
