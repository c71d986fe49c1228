"""Making a file system on a device, with everything snapfeed wants, and refusing to destroy anything by mistake."""

import errno
import os
import shutil
import stat
import subprocess
import time

from comparer.errors import OperatorError

from .linux.mountinfo import mounts

MKFS = {
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
_PACKAGE = {"xfs": "xfsprogs", "btrfs": "btrfs-progs"}
_PATIENCE = 2.0  # seconds
_LABEL = {"xfs": 12, "btrfs": 255}  # bytes


def check_device(device: str) -> str:
    """The device's real path. Raises OperatorError: no block device, mounted, in use as swap, no permission."""
    real = os.path.realpath(device)
    try:
        found = os.stat(real)
    except OSError as error:
        raise OperatorError(
            f"{device}: {error.strerror}; give the path of a block device, such as /dev/sdb1"
        ) from error
    if not stat.S_ISBLK(found.st_mode):
        raise OperatorError(
            f"{device} is not a block device; give one such as /dev/sdb1 (for an image file: losetup first)"
        )
    where = mounted_at(real, found.st_rdev)
    if where is not None:
        raise OperatorError(f"{device} is mounted at {where}: a mounted device is never formatted; unmount it first")
    try:
        _open_alone(real)
    except PermissionError as error:
        raise OperatorError(f"{device}: no permission; run as root") from error
    except OSError as error:
        raise OperatorError(f"{device} is in use by the system ({error.strerror}); release it first") from error
    return real


def _open_alone(real: str) -> None:
    """Nobody else has it; somebody who only looks (a scan for file systems) is waited for. Raises OSError."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            os.close(os.open(real, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= end:
                raise
            time.sleep(0.05)
        else:
            return


def mounted_at(real: str, rdev: int) -> str | None:
    """Where a device is mounted, by path or by device number; None if it is not."""
    number = f"{os.major(rdev)}:{os.minor(rdev)}"
    for mount in mounts():
        if mount.dev == number or os.path.realpath(mount.source) == os.fsencode(real):
            return os.fsdecode(mount.path)
    return None


def contents(real: str) -> str | None:
    """What a device holds, for people; None if it is blank as far as one can tell. Raises OperatorError."""
    try:
        done = subprocess.run(
            ["blkid", "--probe", "--output", "export", real],
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise OperatorError(
            "blkid is missing, so it cannot be told what is on the device; install util-linux"
        ) from error
    if done.returncode == 2:  # nothing found, as blkid(8) says
        return None
    if done.returncode == 0:
        found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        if not found.keys() & {"TYPE", "PTTYPE", "USAGE"}:
            return None  # what is said is of its entry in the partition table
        kind = found.get("TYPE") or f"{found.get('PTTYPE', 'unknown')} partition table"
        label = f", label {found['LABEL']!r}" if "LABEL" in found else ""
        return f"{kind}{label}"
    return "something that blkid cannot tell for certain"


def check_tools(fs: str, label: str | None) -> None:
    """Raises OperatorError."""
    if shutil.which(MKFS[fs][0]) is None:
        raise OperatorError(f"{MKFS[fs][0]} is missing; install {_PACKAGE[fs]}")
    if label is not None and len(label.encode()) > _LABEL[fs]:
        raise OperatorError(f"--label: {label!r} is longer than the {_LABEL[fs]} bytes {fs} has for it")


def make(real: str, fs: str, label: str | None) -> None:
    """Run mkfs. Raises OperatorError with what it said."""
    done = subprocess.run(
        [*MKFS[fs], *(["-L", label] if label else []), real],
        capture_output=True,
        check=False,
        text=True,
        errors="replace",
    )
    if done.returncode:
        said = next((line.strip() for line in done.stderr.splitlines() if line.strip()), "no word of it")
        raise OperatorError(f"{MKFS[fs][0]} failed on {real}: {said}")


def check_mount(directory: str) -> None:
    """Whether something can be mounted there. Raises OperatorError."""
    if os.path.lexists(directory) and not os.path.isdir(directory):
        raise OperatorError(f"--mount: {directory} is not a directory; nothing was changed; give a directory")
    if os.path.ismount(directory):
        raise OperatorError(
            f"--mount: something is mounted at {directory}; nothing was changed; give another directory"
        )


def mount(real: str, fs: str, directory: str) -> None:
    """Mount it, making the directory if it is missing. Raises OperatorError."""
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise OperatorError(f"--mount: {directory}: {error.strerror}") from error
    done = subprocess.run(
        ["mount", "-t", fs, real, directory], capture_output=True, check=False, text=True, errors="replace"
    )
    if done.returncode:
        raise OperatorError(f"mount failed: {done.stderr.strip()}")


def unmount(directory: str) -> None:
    """Raises OperatorError."""
    done = subprocess.run(["umount", directory], capture_output=True, check=False, text=True, errors="replace")
    if done.returncode:
        raise OperatorError(f"umount failed: {done.stderr.strip()}")
