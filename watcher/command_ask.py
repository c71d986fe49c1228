"""`snapfeed snapshot`, `status`, `snapshots`, `diff`: what is asked of the daemon; the last two also without one."""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import orjson

from comparer.errors import OperatorError
from feed.encode import decode_change
from feed.escape import printable
from feed.pages import chunk_limit
from snapshotter.partition import Partition, adopted, is_adopted, partition_at
from snapshotter.visit import Visit

from .control import NoDaemonError, ask
from .render import change_line, json_line
from .service import check_span, snapshot_row
from .spans import squashed_pages
from .units import counted, format_duration, format_size


def _print(document: Any) -> None:
    print(json_line(document), flush=True)


def snapshot(options: argparse.Namespace) -> int:
    names = options.partitions
    if not names:
        (found,) = ask(options.socket, "status", timeout=10)
        names = [p["partition"] for p in found["partitions"] if p["state"] != "unmounted"]
        for p in found["partitions"]:
            if p["state"] == "unmounted":
                print(f"snapfeed snapshot: {p['partition']} is left out: not mounted", file=sys.stderr)
    code = 0
    for name in names:
        try:
            (data,) = ask(options.socket, "snapshot", partition=name)
        except NoDaemonError:
            raise
        except OperatorError as error:  # one partition's trouble is not the others'
            print(f"snapfeed snapshot: {error}", file=sys.stderr)
            code = 1
            continue
        _show_snapshot(data, as_json=options.json)
    return code


def _show_snapshot(data: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        _print(data)
    elif data["changes"]:
        what = f"{counted(data['changes'], 'change')}, {format_size(data['volume'])} written"
        print(f"{data['partition']}: snapshot {data['seq']}, {what}")
    else:
        print(f"{data['partition']}: nothing changed since snapshot {data['seq']}")


def reconcile(options: argparse.Namespace) -> int:
    for data in ask(options.socket, "reconcile", partition=options.partition):
        _show_snapshot(data, as_json=options.json)
    return 0


def thresholds(options: argparse.Namespace) -> int:
    given = {"io_threshold": options.io_threshold, "time_threshold": options.time_threshold}
    fields = {key: value for key, value in given.items() if value is not None}
    (answers,) = ask(options.socket, "thresholds", partition=options.partition, **fields)
    for data in answers:
        if options.json:
            _print(data)
        else:
            size, seconds = format_size(data["io_threshold"]), format_duration(data["time_threshold"])
            print(f"{data['partition']}: io threshold {size}, time threshold {seconds}")
    return 0


def status(options: argparse.Namespace) -> int:
    (found,) = ask(options.socket, "status", timeout=10)
    if options.json:
        _print(found)
    else:
        _show_status(found)
    return 1 if any(p["state"] == "failed" for p in found["partitions"]) else 0


def _show_status(found: dict[str, Any]) -> None:
    broker = found["broker"]
    link = "connected" if broker["connected"] else f"not connected ({broker['error'] or 'connecting'})"
    own = " (embedded)" if broker["embedded"] else ""
    print(f"snapfeed {found['version']} on {found['host']}, up {format_duration(round(time.time() - found['since']))}")
    print(f"broker    {broker['url']}{own}: {link}")
    print(f"memory    {format_size(found['resident'])}")
    for p in found["partitions"]:
        reason = f" ({p['reason']})" if p["reason"] else ""
        can = p["capabilities"]
        print(f"\n{p['partition']}  {p['state']}{reason}")
        print(f"  mount      {p['mount']} ({p['fs']}, {p['uuid']})")
        print(f"  snapshots  {can['snapshots'] or '-'}, head {p['head']}, epoch {p['epoch']}")
        print(
            f"  events     {can['events'] or 'none: looks by comparing everything'}, meters {', '.join(can['meters']) or '-'}"
        )
        limits = p["thresholds"]
        print(
            f"  volume     {format_size(p['volume'])} of {format_size(limits['io'])}, time {format_duration(limits['time'])}"
        )
        if p["progress"] is not None:
            print(f"  working    {p['progress']} entries looked at")
        last = p["last"]
        if last is not None:
            what = (
                last["skipped"]
                or f"snapshot {last['seq']}, {counted(last['changes'], 'change')} in {last['seconds'] * 1000:.1f} ms"
            )
            print(f"  last       {last['trigger']}: {what}")
        for number, c in enumerate(p["consumers"]):
            print(f"  {'' if number else 'consumers':<9}  {c['consumer']} ({c['lag']} behind)")
        if p["backlog"]:
            print(
                f"  backlog    {counted(p['backlog'], 'diff')} to publish, journal {format_size(p['journal']['bytes'])}"
            )
        if p["feed_error"]:
            print(f"  feed       {p['feed_error']}")
        if p["excluded"]:
            print(f"  excluded   {', '.join(p['excluded'])}")
        for note in p["notes"]:
            print(f"  note       {note}")


def snapshots(options: argparse.Namespace) -> int:
    rows = list(_or_directly(options, "snapshots", partition=options.partition))
    for row in rows:
        if options.json:
            _print(row)
            continue
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(row["time_ns"]) / 1e9))
        print(
            f"{row['seq']:>8}  {when}  {row['trigger']:<9} {row['changes']:>9} change{' ' if row['changes'] == 1 else 's'}"
            f"  {format_size(row['volume']):>10} written"
        )
    if not rows and not options.json:
        print("no snapshots yet")
    return 0


def consumers(options: argparse.Namespace) -> int:
    if options.forget is not None:
        list(ask(options.socket, "forget", partition=options.partition, consumer=options.forget))
        if not options.json:
            print(f"{printable(options.forget.encode())} is forgotten: nothing is kept for it any more")
        return 0
    (found,) = ask(options.socket, "state", partition=options.partition)
    for row in found["consumers"]:
        if options.json:
            _print(row)
            continue
        what = f", {row['sending']} under way" if row["sending"] else ""
        has = "has nothing yet" if row["seq"] is None else f"has snapshot {row['seq']}"
        held = "" if row["holds"] else ", holds nothing any more"
        print(f"{row['consumer']}: {has}, lacks {row['lag']}, heard of {format_duration(row['age_s'])} ago{held}{what}")
    if not found["consumers"] and not options.json:
        print("no consumers")
    return 0


def diff(options: argparse.Namespace) -> int:
    fields = {"partition": options.partition, "from": options.first, "to": options.last}
    found = False
    for changes in _or_directly(options, "diff", **fields):
        for change in changes:
            found = True
            if options.json:
                _print(change)
            else:
                print(change_line(decode_change(change)))
    if not found:
        print(f"no changes from snapshot {options.first} to {options.last}", file=sys.stderr)
    return 0


def _or_directly(options: argparse.Namespace, verb: str, **fields: Any) -> Iterator[Any]:
    """Ask the daemon; without one, look into the system file oneself."""
    try:
        yield from ask(options.socket, verb, **fields)
    except NoDaemonError:
        yield from _directly(verb, fields)


def _directly(verb: str, fields: dict[str, Any]) -> Iterator[Any]:
    with Visit(find_partition(fields["partition"])) as visit:
        if verb == "snapshots":
            for row in visit.file.snapshots():
                yield snapshot_row(row)
            return
        check_span(visit.file, fields["from"], fields["to"])
        for chunk in squashed_pages(visit.file, fields["from"], fields["to"], chunk_limit()):
            yield orjson.loads(b"[" + chunk.data + b"]")


def find_partition(name: str) -> Partition:
    """A mounted, adopted partition by mount point or UUID. Raises OperatorError."""
    found = next((p for p in adopted() if p.uuid == name), None)
    if found is not None:
        return found
    if name.startswith("/"):
        partition = partition_at(name, directory=True)
        if is_adopted(partition.path):
            return partition
        raise OperatorError(f"{name} is not adopted; run `snapfeed init {name}`")
    raise OperatorError(f"no daemon runs, so {name!a} cannot be looked up by name; give a mount point or UUID")
