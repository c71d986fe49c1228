"""`snapfeed format` and `snapfeed init`."""

import argparse
import contextlib
import os
import sys
import tempfile
import time

from comparer.errors import OperatorError
from snapshotter import format as formatting
from snapshotter.adopt import adopt
from snapshotter.linux.namespaces import private_mounts
from snapshotter.partition import Partition, partition_at
from snapshotter.systemfile import Settings

from .config import SOCKET
from .control import ask
from .render import json_line
from .said import printable_path
from .units import format_duration, format_size


def format_device(options: argparse.Namespace) -> int:
    """Make, mount, adopt; what destroys asks first."""
    device = formatting.check_device(options.device)
    formatting.check_tools(options.fs, options.label)
    if options.mount:
        formatting.check_mount(options.mount)
    held = formatting.contents(device)
    if held is not None and not options.force:
        raise OperatorError(f"{options.device} holds {held}; nothing was changed; --force destroys it")
    what = f"{options.device}: {options.fs} with reflink" + (f", destroying {held}" if held else "")
    if options.dry_run:
        _say_plan(options, what, _bytes(device))
        return 0
    if not options.yes and not _confirmed(f"Format {what}?"):
        raise OperatorError("nothing was changed; answer `yes`, or give --yes")
    formatting.make(device, options.fs, options.label)
    settings, partition = _adopted_in_private(device, options)
    if options.mount:
        formatting.mount(device, options.fs, options.mount)
        partition = partition_at(options.mount)
    _say(options, partition, settings, options.device)
    return 0


def _adopted_in_private(device: str, options: argparse.Namespace) -> tuple[Settings, Partition]:
    """Mounted where nobody sees it, on top of the directory for temporary files: whoever is killed meanwhile leaves no mount.

    Raises OperatorError.
    """
    place = os.path.realpath(tempfile.gettempdir())
    try:
        with private_mounts():
            formatting.mount(device, options.fs, place)
            try:
                partition = partition_at(place)
                return adopt(partition, time.time_ns(), options.io_threshold, options.time_threshold), partition
            finally:
                formatting.unmount(place)
    except OSError as error:
        raise OperatorError(f"{device}: formatted, but cannot be mounted: {error.strerror}; run as root") from error


def _bytes(device: str) -> int:
    """The size of a block device. Raises OperatorError."""
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.lseek(descriptor, 0, os.SEEK_END)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OperatorError(f"{device}: {error.strerror}; run as root, and give a device that can be read") from error


def _say_plan(options: argparse.Namespace, what: str, size: int) -> None:
    if options.json:
        facts = {
            "dry_run": True,
            "device": options.device,
            "bytes": size,
            "fs": options.fs,
            "label": options.label,
            "mount": options.mount,
            "io_threshold": options.io_threshold,
            "time_threshold": options.time_threshold,
        }
        print(json_line(facts))
        return
    label = "no label" if options.label is None else f"label {options.label!r}"
    mount = "not left mounted" if options.mount is None else f"mounted at {options.mount}"
    limits = f"thresholds {format_size(options.io_threshold)}, {format_duration(options.time_threshold)}"
    print(f"would format {what}; {format_size(size)}, {label}, {mount}, {limits}")


def _confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        return False
    return input(f"{question} Type yes: ").strip() == "yes"


def init(options: argparse.Namespace) -> int:
    partition = partition_at(options.mountpoint, directory=options.directory)
    settings = adopt(partition, time.time_ns(), options.io_threshold, options.time_threshold)
    _say(options, partition, settings, None)
    return 0


def _tell_daemon() -> None:
    """A daemon that runs begins with the new partition at once; none running is nobody's fault."""
    with contextlib.suppress(OperatorError, OSError):
        list(ask(os.environ.get("SNAPFEED_SOCKET", SOCKET), "rescan", timeout=5))


def _say(options: argparse.Namespace, partition: Partition, settings: Settings, device: str | None) -> None:
    mounted = device is None or bool(options.mount)
    if mounted:
        _tell_daemon()
    mount = printable_path(partition.path) if mounted else None
    if options.json:
        facts = {
            "device": device,
            "mount": mount,
            "fs": partition.fs_type,
            "uuid": settings.uuid,
            "epoch": settings.epoch,
            "io_threshold": settings.io_threshold,
            "time_threshold": settings.time_threshold,
        }
        print(json_line(facts))
        return
    place = mount or f"{device} (mount it to use it)"
    print(
        f"adopted {place}: {partition.fs_type} {settings.uuid}, thresholds {format_size(settings.io_threshold)},"
        f" {format_duration(settings.time_threshold)}"
    )
    if os.geteuid() != 0:
        print("note: without root it is watched with inotify, and its snapshots hold metadata only")
