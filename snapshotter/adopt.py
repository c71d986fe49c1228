"""Making a partition ours: the system directory and the system file; setting a damaged system file aside."""

import contextlib
import os
import uuid
from dataclasses import replace

from comparer.errors import OperatorError

from . import witness
from .backends.base import SYSTEM_DIR
from .backends.btrfs import BtrfsBackend
from .partition import PSEUDO, Partition, is_adopted
from .systemfile import SYSTEM_FILE, Settings, SystemFile

IO_THRESHOLD = 64 << 20  # bytes
TIME_THRESHOLD = 60.0  # seconds


def adopt(
    partition: Partition, now_ns: int, io_threshold: int = IO_THRESHOLD, time_threshold: float = TIME_THRESHOLD
) -> Settings:
    """Create `.snapfeed/` and its system file; touches nothing else. Raises OperatorError."""
    shown = os.fsdecode(partition.path)
    if is_adopted(partition.path):
        raise OperatorError(f"{shown!r} is adopted already; change its thresholds with `snapfeed thresholds {shown}`")
    if partition.kind == "partition" and partition.fs_type in PSEUDO:
        raise OperatorError(
            f"{shown!r} is a file system of the kernel's own ({partition.fs_type}); give one that holds data"
        )
    settings = Settings(
        str(uuid.uuid4()), partition.uuid or str(uuid.uuid4()), partition.kind, io_threshold, time_threshold, now_ns
    )
    try:
        root = os.open(partition.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _system_directory(partition, root)
        finally:
            os.close(root)
        SystemFile.create(partition.system_file, settings).close()
        witness.write(os.path.dirname(partition.system_file), witness.Witness(settings.epoch, 0))
    except OSError as error:
        remedy = "run as root" if isinstance(error, PermissionError) else "mount it writable and with space left"
        raise OperatorError(f"{shown!r}: cannot create the system directory: {error.strerror}; {remedy}") from error
    return settings


def _system_directory(partition: Partition, root: int) -> None:
    if partition.fs_type == "btrfs" and partition.kind == "partition" and os.geteuid() == 0:
        BtrfsBackend().prepare(root)
        return
    with contextlib.suppress(FileExistsError):
        os.mkdir(SYSTEM_DIR, 0o700, dir_fd=root)
    if os.path.islink(os.path.join(partition.path, SYSTEM_DIR)):
        raise OperatorError(f"{os.fsdecode(partition.path)!r}: .snapfeed is a symbolic link; remove it")


def quarantine(partition: Partition, now_ns: int, io_threshold: int, time_threshold: float) -> tuple[Settings, str]:
    """Set a damaged system file aside (never delete it) and make a new one: a new epoch, to begin with a baseline.

    Returns the new settings and the path of the old file.
    """
    directory = os.path.dirname(partition.system_file)
    aside = os.path.join(directory, b"damaged-%d" % now_ns)
    os.mkdir(aside, 0o700)
    for suffix in (b"", b"-wal", b"-shm", b"-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(partition.system_file + suffix, os.path.join(aside, SYSTEM_FILE + suffix))
    settings = adopt(replace(partition), now_ns, io_threshold, time_threshold)
    return settings, os.fsdecode(aside)
