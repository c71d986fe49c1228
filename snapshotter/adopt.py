"""Making a partition ours: the system directory and the system file; setting a damaged system file aside."""

import contextlib
import os
import uuid
from collections.abc import Iterator

from comparer.errors import OperatorError

from . import witness
from .backends.base import SYSTEM_DIR
from .backends.btrfs import BtrfsBackend
from .linux.lock import locked
from .partition import PSEUDO, Partition, is_adopted
from .root import open_system
from .systemfile import SYSTEM_FILE, Settings, SystemFile

IO_THRESHOLD = 64 << 20  # bytes
TIME_THRESHOLD = 60.0  # seconds
_FRESH = b"-new"
_ASIDE = b"damaged-"
_SUFFIXES = (b"", b"-wal", b"-shm", b"-journal")


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
    settings = _settings(partition, now_ns, io_threshold, time_threshold)
    with _telling(partition):
        root = os.open(partition.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _system_directory(partition, root)
        finally:
            os.close(root)
        with locked(os.path.dirname(partition.system_file)) as directory:
            if is_adopted(partition.path):
                raise OperatorError(f"{shown!r} was adopted by somebody else at the same time")
            os.rename(_fresh(partition, settings), partition.system_file)
            os.fsync(directory)
    return settings


@contextlib.contextmanager
def _telling(partition: Partition) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "run as root" if isinstance(error, PermissionError) else "mount it writable and with space left"
        shown = os.fsdecode(partition.path)
        raise OperatorError(f"{shown!r}: cannot create the system directory: {error.strerror}; {remedy}") from error


def _fresh(partition: Partition, settings: Settings) -> bytes:
    """A whole system file beside the place where it belongs, so that one who is killed leaves a whole one there or none.

    Its witness is there before it is: a file that is to be set aside is not believed from then on.
    """
    fresh = partition.system_file + _FRESH
    for suffix in _SUFFIXES:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh + suffix)
    SystemFile.create(fresh, settings).close()
    witness.write(os.path.dirname(partition.system_file), witness.Witness(settings.epoch, 0))
    return fresh


def _settings(partition: Partition, now_ns: int, io_threshold: int, time_threshold: float) -> Settings:
    epoch, named = str(uuid.uuid4()), partition.uuid or str(uuid.uuid4())
    return Settings(epoch, named, partition.kind, io_threshold, time_threshold, now_ns)


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

    Returns the new settings and the path of the old file. Raises OperatorError. There is a system file at every moment: without
    one, a daemon that starts again would take the partition for one that was never adopted.
    """
    root = os.open(partition.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(open_system(root, os.fsdecode(partition.path), strict=partition.kind == "partition"))
    finally:
        os.close(root)
    file, directory = partition.system_file, os.path.dirname(partition.system_file)
    settings = _settings(partition, now_ns, io_threshold, time_threshold)
    with _telling(partition), locked(directory) as fd:
        aside = _aside(partition, now_ns)
        fresh = _fresh(partition, settings)
        for suffix in _SUFFIXES[1:]:  # a log that lay beside the new file would be taken for its own
            with contextlib.suppress(FileNotFoundError):
                os.rename(file + suffix, os.path.join(aside, SYSTEM_FILE + suffix))
        _keep(file, os.path.join(aside, SYSTEM_FILE))
        os.rename(fresh, file)
        os.fsync(fd)
    return settings, os.fsdecode(aside)


def _keep(file: bytes, aside: bytes) -> None:
    """Give a file a second name; where that cannot be, another one."""
    try:
        os.link(file, aside, follow_symlinks=False)
    except FileExistsError:
        pass  # by one who was killed
    except FileNotFoundError:
        pass  # somebody took it away
    except OSError:
        os.rename(file, aside)


def _aside(partition: Partition, now_ns: int) -> bytes:
    """The directory that one who was killed had begun to fill, else a new one."""
    directory = os.path.dirname(partition.system_file)
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        if name.startswith(_ASIDE) and os.path.isdir(path) and not os.path.islink(path):
            kept = os.path.join(path, SYSTEM_FILE)
            if not os.path.lexists(kept) or _same(kept, partition.system_file):
                return path
    path = os.path.join(directory, _ASIDE + b"%d" % now_ns)
    os.mkdir(path, 0o700)
    return path


def _same(one: bytes, other: bytes) -> bool:
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except FileNotFoundError:
        return False
