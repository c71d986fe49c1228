"""The command line's arguments: what each command takes, its help, and what is refused before anything is done."""

import argparse
import os
import re
from collections.abc import Callable

from comparer.errors import OperatorError
from feed.broker import valid_filter

from . import __version__
from .config import SOCKET
from .units import parse_duration, parse_threshold


def _volume(text: str) -> int:
    try:
        return parse_threshold(text)
    except OperatorError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except OperatorError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {least}")
        return int(text)

    return number


def _threshold(text: str) -> str:
    """Checked, and left as written: the daemon reads it."""
    _duration(text)
    return text


def _add_thresholds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--io-threshold",
        type=_volume,
        default="64MiB",
        metavar="SIZE",
        help="written volume that asks for a snapshot (64MiB)",
    )
    parser.add_argument(
        "--time-threshold",
        type=_duration,
        default="60s",
        metavar="TIME",
        help="time after which one is taken anyway (60s)",
    )


def _add_socket(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket",
        default=os.environ.get("SNAPFEED_SOCKET", SOCKET),
        metavar="PATH",
        help="the daemon's control socket (SNAPFEED_SOCKET, else /run/snapfeed/control.sock)",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")


def _add_broker(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--broker",
        metavar="URL",
        help=f"mqtt://host[:port], or mqtts:// for TLS; a login goes into the configuration (default: {default})",
    )


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a topic; write 1 to 64 of A-Z a-z 0-9 _ -")
    return text


def _filter(text: str) -> str:
    if not valid_filter(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no topic filter; write one such as 'snapfeed/+/+/changes'")
    return text


def _partition(text: str) -> str:
    """A name or UUID as it is; a path from here as the daemon, which is elsewhere, understands it."""
    return os.path.abspath(text) if "/" in text or text in (".", "..") else text


def _add_partition(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("partition", type=_partition, metavar="PARTITION", help="its name, mount point or UUID")


def wrong(options: argparse.Namespace) -> str | None:
    """What is wrong with options that are right each for itself."""
    if options.command == "diff" and options.first > options.last:
        return f"A is the older snapshot; write `diff {options.partition} {options.last} {options.first}`"
    if options.command == "tail" and options.position and not options.consumer:
        return "--position: whose? Give --consumer NAME as well"
    if options.command == "replicate" and not options.verify and options.partition is None:
        return "--partition: give the partition's name in topics (`snapfeed status` shows it)"
    return None


def _add_export(command: Callable[..., argparse.ArgumentParser]) -> None:
    made = command(
        "export", "command_export.export", "list the paths that a backup must look at, and those that are gone",
        "snapfeed export data --consumer nightly --output /var/lib/backup/data      (docs/backup.md)",
        "snapfeed export /data --since 41 --changed --null | cpio --null -o > increment.cpio",
        "snapfeed export data --consumer nightly --json",
    )  # fmt: skip
    _add_partition(made)
    made.add_argument(
        "--consumer", type=_name, metavar="NAME", help="since what NAME acknowledged; the snapshots are kept for it"
    )
    made.add_argument("--since", type=_number(0), metavar="SEQ", help="since this snapshot")
    made.add_argument("--baseline", action="store_true", help="everything, whatever was acknowledged")
    made.add_argument(
        "--output",
        metavar="DIR",
        help="write `changed`, `deleted`, `tree` and `position.json`; one not acknowledged is kept",
    )
    made.add_argument("--changed", action="store_true", help="print the paths to look at")
    made.add_argument("--deleted", action="store_true", help="print the paths that are gone, with all below them")
    made.add_argument("--null", action="store_true", help="print a NUL after each path on a terminal, too")
    _add_socket(made)
    _add_json(made)

    made = command(
        "ack", "command_export.ack", "say that a consumer has dealt with an export, so that the next one begins there",
        "snapfeed ack data --consumer nightly --position /var/lib/backup/data/position.json",
        "snapfeed ack data --consumer nightly --seq 42 --epoch 6f0c2b7e-98b1-4a53-8f6f-0f8f3a1f7a55",
    )  # fmt: skip
    _add_partition(made)
    made.add_argument("--consumer", type=_name, required=True, metavar="NAME", help="the export's --consumer")
    made.add_argument("--seq", type=_number(0), metavar="N", help="the export's `seq`")
    made.add_argument("--epoch", metavar="UUID", help="its `epoch`")
    made.add_argument("--position", metavar="FILE", help="its position.json; removed when the daemon has noted it")
    _add_socket(made)
    _add_json(made)

    made = command(
        "remove-listed", "command_remove.remove_listed",
        "remove from a copy what an export's list says is gone, and never what is outside the copy",
        "snapfeed remove-listed /backup/data /var/lib/backup/data/deleted",
        "ssh backup.example snapfeed remove-listed /backup/data - < /var/lib/backup/data/deleted",
        "snapfeed remove-listed --dry-run /backup/data deleted",
    )  # fmt: skip
    made.add_argument("directory", metavar="DIR", help="the copy: what the listed paths are relative to")
    made.add_argument(
        "list", metavar="LIST", help="`deleted` of an export: paths that end with a NUL; - is the standard input"
    )
    made.add_argument("--dry-run", action="store_true", help="print what would be removed, remove nothing")
    _add_json(made)


def build() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="snapfeed",
        description="A change feed for ordinary Linux file systems: what changed, exactly, seconds after it did.",
        epilog="Begin with `snapfeed init MOUNTPOINT`, then `snapfeed run`, then `snapfeed tail`. Exit codes: 0 done,"
        " 1 it went wrong (stderr says what, and what to do), 2 wrongly called.",
    )
    parser.add_argument("--version", action="version", version=f"snapfeed {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: str, text: str, *examples: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  {line}" for line in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run, parser=made)
        return made

    made = command(
        "format", "command_disk.format_device", "make a file system on a device, mounted once to adopt it",
        "snapfeed format /dev/sdb1 --fs xfs --mount /data",
        "snapfeed format /dev/sdc --fs btrfs --label backup --io-threshold 256MiB --time-threshold 5min --yes",
        "snapfeed format /dev/sdb1 --fs xfs --dry-run      (say what it would do)",
    )  # fmt: skip
    made.add_argument("device", metavar="DEVICE", help="a block device that is not mounted")
    made.add_argument("--fs", required=True, choices=("xfs", "btrfs"), help="the file system to make, with reflink")
    _add_thresholds(made)
    made.add_argument("--label", help="the file system's label; also the partition's name in topics")
    made.add_argument("--mount", metavar="DIR", help="leave it mounted there")
    made.add_argument("--yes", action="store_true", help="do not ask")
    made.add_argument("--force", action="store_true", help="also if the device holds something: IT IS LOST")
    made.add_argument("--dry-run", action="store_true", help="check everything, change nothing")
    _add_json(made)

    made = command(
        "init", "command_disk.init", "adopt a mounted file system without touching its data",
        "snapfeed init /data", "snapfeed init /srv --io-threshold 1GiB --time-threshold 10min",
        "snapfeed init --directory ~/work      (one directory, without root)",
    )  # fmt: skip
    made.add_argument("mountpoint", metavar="MOUNTPOINT", help="where the file system is mounted; or see --directory")
    _add_thresholds(made)
    made.add_argument("--directory", action="store_true", help="adopt just this directory, which is no mount point")
    _add_json(made)

    made = command(
        "run", "command_run.run", "the daemon, in the foreground",
        "snapfeed run", "snapfeed run /data /srv", "snapfeed run --config /etc/snapfeed.toml --broker mqtt://broker.lan",
    )  # fmt: skip
    made.add_argument(
        "mountpoints",
        nargs="*",
        metavar="MOUNTPOINT",
        help="an adopted partition (default: those of the configuration, else every one that is mounted)",
    )
    made.add_argument(
        "--config",
        metavar="FILE",
        help="the configuration (default: none, not even /etc/snapfeed.toml; every setting has a default)",
    )
    _add_broker(made, "the configuration's, else the embedded broker")
    made.add_argument("--socket", metavar="PATH", help="the control socket (SNAPFEED_SOCKET, else the config's)")
    made.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="(info)")

    made = command(
        "snapshot", "command_ask.snapshot", "take a snapshot now; returns when it is committed",
        "snapfeed snapshot", "snapfeed snapshot data --json", "snapfeed snapshot /data /srv",
    )  # fmt: skip
    made.add_argument(
        "partitions",
        nargs="*",
        type=_partition,
        metavar="PARTITION",
        help="its name, mount point or UUID (default: all)",
    )
    _add_socket(made)
    _add_json(made)

    made = command(
        "reconcile",
        "command_ask.reconcile",
        "compare all metadata of a partition, instead of what events point at, and publish what differs",
        "snapfeed reconcile data",
    )
    _add_partition(made)
    _add_socket(made)
    _add_json(made)

    made = command(
        "thresholds",
        "command_ask.thresholds",
        "show or change a partition's thresholds, in its system file",
        "snapfeed thresholds data",
        "snapfeed thresholds /data --io-threshold 1GiB --time-threshold 10min",
    )
    _add_partition(made)
    made.add_argument(
        "--io-threshold", type=_volume, metavar="SIZE", help="the written volume that asks for a snapshot, from now on"
    )
    made.add_argument(
        "--time-threshold",
        type=_threshold,
        metavar="TIME",
        help="the time after which one is taken anyway, from now on",
    )
    _add_socket(made)
    _add_json(made)

    made = command(
        "status", "command_ask.status", "what the daemon is doing", "snapfeed status", "snapfeed status --json"
    )
    _add_socket(made)
    _add_json(made)

    made = command("snapshots", "command_ask.snapshots", "the snapshots a partition keeps", "snapfeed snapshots data")
    _add_partition(made)
    _add_socket(made)
    _add_json(made)

    made = command(
        "consumers", "command_ask.consumers", "the consumers of a partition, and how far behind they are",
        "snapfeed consumers data", "snapfeed consumers data --forget restic      (it is gone for good: keep nothing for it)",
    )  # fmt: skip
    _add_partition(made)
    made.add_argument("--forget", metavar="NAME", help="forget a consumer, and keep nothing for it any more")
    _add_socket(made)
    _add_json(made)

    made = command(
        "diff", "command_ask.diff", "the changes between two kept snapshots",
        "snapfeed diff data 41 42", "snapfeed diff /data 40 42 --json",
    )  # fmt: skip
    _add_partition(made)
    made.add_argument("first", metavar="A", type=_number(0), help="the older snapshot's number")
    made.add_argument("last", metavar="B", type=_number(0), help="the newer one's")
    _add_socket(made)
    _add_json(made)

    made = command(
        "verify",
        "command_verify.verify",
        "take a snapshot, and compare it with everything that is there; exit 1 if they disagree",
        "snapfeed verify data",
        "snapfeed verify /data --json",
    )
    _add_partition(made)
    _add_socket(made)
    _add_json(made)

    _add_export(command)

    made = command(
        "tail", "command_tail.tail", "print changes as they arrive at the broker",
        "snapfeed tail", "snapfeed tail --broker mqtt://broker.lan 'snapfeed/edge7/+/changes'", "snapfeed tail --json",
        "snapfeed tail --config /etc/snapfeed.toml --consumer audit   (nothing is missed, also not while it does not run)",
    )  # fmt: skip
    made.add_argument("filter", nargs="?", type=_filter, metavar="FILTER", help="topic filter (<base>/+/+/changes)")
    made.add_argument("--config", metavar="FILE", help="take [broker] from there: address, login, certificates")
    _add_broker(made, "the configuration's, else that of the daemon here, else mqtt://127.0.0.1:1883")
    made.add_argument(
        "--consumer",
        type=_name,
        metavar="NAME",
        help="begin where this consumer stopped, with a baseline if it never ran; what is missing is asked for. With the"
        " broker's access list as shipped (etc/mosquitto/acl) NAME must be the login's user name",
    )
    made.add_argument("--position", metavar="FILE", help="where that is kept (~/.local/state/snapfeed/tail-NAME.json)")
    _add_socket(made)
    made.add_argument("--count", type=_number(1), metavar="N", help="stop after N diffs")
    _add_json(made)

    made = command(
        "replicate", "command_replicate.replicate", "keep a directory an exact copy of a partition",
        "snapfeed replicate --broker mqtt://broker.lan --host edge7 --partition data --source /data /backup/data",
        "snapfeed replicate --broker mqtt://broker.lan --host edge7 --partition data --once /backup/names   (no content)",
        "snapfeed replicate --verify --source /data /backup/data",
    )  # fmt: skip
    made.add_argument(
        "destination", metavar="DEST", help="an empty directory, or the replica; all in it is the replica's"
    )
    made.add_argument("--partition", type=_name, metavar="P", help="the partition's name in topics")
    made.add_argument(
        "--host", type=_name, metavar="H", help="the host's name in topics (the configuration's, else this host's)"
    )
    made.add_argument(
        "--source", metavar="MOUNT", help="where the partition is mounted; without it no content is copied"
    )
    made.add_argument("--config", metavar="FILE", help="the [broker] of this configuration: login, TLS, base")
    _add_broker(made, "the configuration's, else mqtt://127.0.0.1:1883")
    made.add_argument(
        "--consumer",
        type=_name,
        metavar="NAME",
        help="what the daemon knows this replica by (made of host and DEST). With the broker's access list as shipped"
        " (etc/mosquitto/acl) it must be the login's user name",
    )
    made.add_argument("--once", action="store_true", help="end when the partition's head is reached")
    made.add_argument("--verify", action="store_true", help="compare DEST with what it must be; exit 1 if it is not")
    _add_json(made)

    made = command(
        "check-config",
        "command_run.check_config",
        "check a configuration file",
        "snapfeed check-config /etc/snapfeed.toml",
    )
    made.add_argument("file", metavar="FILE", help="the configuration, such as /etc/snapfeed.toml")
    _add_json(made)
    return parser
