"""`snapfeed export` and `snapfeed ack`: what changed, as lists for tools that work with paths; and: it was dealt with."""

import argparse
import contextlib
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import orjson

from comparer.errors import DamageError, OperatorError
from feed.encode import encode_name
from feed.escape import printable
from feed.export import Entry, Export, Lists, relative, separated

from .control import ask
from .render import json_line

POSITION, CHANGED, DELETED, TREE = b"position.json", b"changed", b"deleted", b"tree"
_KEPT = ("partition", "epoch", "from", "seq", "snapshot", "mount", "consistency", "baseline")
Position = dict[str, Any]


def export(options: argparse.Namespace) -> int:
    if options.output is not None and (options.changed or options.deleted or options.json or options.null):
        raise OperatorError("--output writes both lists; leave out --changed, --deleted, --json and --null")
    if options.output is None and not (options.changed or options.deleted or options.json):
        raise OperatorError("say what to print: --changed, --deleted or --json; or give a directory with --output")
    if options.changed and options.deleted and not options.json:
        raise OperatorError("--changed and --deleted would be mixed up; ask for one of them, or for --json")
    if options.baseline and options.since is not None:
        raise OperatorError("--baseline is everything, --since what changed; give one of them")
    answers = _ask(options)
    if options.baseline and options.consumer is not None:
        answers = _everything(options, answers)
    position = _position(next(answers, None), options.consumer)
    if options.output is None:
        _print(_lists(answers, baseline=position["baseline"]), options)
        _say(position, options)
        return 0
    directory = os.fsencode(options.output)
    try:
        _refuse_others(directory, position)
        found = _unfinished(directory, position) if options.since is None and not options.baseline else None
        if found is not None:
            print(f"snapfeed export: {_span(found)}: unfinished, left as it is", file=sys.stderr)
            return 0
        if _left_behind(directory, position):
            # It may be half done, and what led there cannot be had again: only everything will do.
            answers = _everything(options, answers)
            position = _position(next(answers, None), options.consumer)
        lists = _lists(answers, baseline=position["baseline"])
        _write_all(directory, position, lists)
    except OSError as error:
        raise OperatorError(f"{options.output}: {error.strerror}") from error
    _say(position, options)
    return 0


def ack(options: argparse.Namespace) -> int:
    if options.position is None:
        if options.seq is None or options.epoch is None:
            raise OperatorError("say up to where: --seq and --epoch, or --position FILE")
        epoch, seq = options.epoch, options.seq
    else:
        if options.seq is not None or options.epoch is not None:
            raise OperatorError("--position says it all; leave out --seq and --epoch")
        position = _read(os.fsencode(options.position))
        if position is None:
            raise OperatorError(
                f"{options.position}: no such file; it is there from `snapfeed export --output` to `ack`"
            )
        if position.get("consumer") != options.consumer:
            whose = f"the consumer {position['consumer']!a}" if position.get("consumer") else "no consumer"
            raise OperatorError(f"{options.position} was made for {whose}; say --consumer, or --seq and --epoch")
        epoch, seq = position["epoch"], position["seq"]
    (data,) = ask(options.socket, "ack", partition=options.partition, consumer=options.consumer, epoch=epoch, seq=seq)
    if options.position is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(options.position)
    if options.json:
        print(json_line(data), flush=True)
    return 0


# ---- asking


def _ask(options: argparse.Namespace) -> Iterator[Any]:
    fields: dict[str, Any] = {"partition": options.partition, "around": True}
    if options.consumer is not None:
        fields["consumer"] = options.consumer
    if options.since is not None:
        fields["from"] = options.since
    return ask(options.socket, "export", **fields)


def _everything(options: argparse.Namespace, answers: Iterator[Any]) -> Iterator[Any]:
    """A baseline instead of `answers`, for a consumer that `answers` were for: snapshots are kept for it from there on."""
    next(answers, None)
    if isinstance(answers, Generator):
        answers.close()
    return ask(options.socket, "export", partition=options.partition)


def _position(data: Any, consumer: str | None) -> Position:
    if not isinstance(data, dict) or not set(_KEPT) <= data.keys():
        raise DamageError("the daemon's answer to `export` does not begin with a position")
    return {key: data[key] for key in _KEPT} | {"consumer": consumer}


def _lists(answers: Iterable[Any], *, baseline: bool) -> Lists:
    """The rest of the answers: lists of changes, then {"around": entries} until the end."""
    whole, complete = Export(baseline=baseline), baseline
    for data in answers:
        if isinstance(data, list):
            for document in data:
                whole.add(document)
        elif isinstance(data, dict) and isinstance(data.get("around"), list):
            complete = True
            for document in data["around"]:
                whole.add_around(document)
    if not complete:
        raise DamageError("the daemon did not say what lies in renamed directories")
    return whole.lists()


def _span(position: Position) -> str:
    begin = "everything" if position["baseline"] else f"snapshot {position['from']}"
    return f"{position['partition']}: {begin} to snapshot {position['seq']}"


def _say(position: Position, options: argparse.Namespace) -> None:
    """What to do afterwards, for people: on stderr."""
    line = f"snapfeed export: {_span(position)}"
    if options.consumer is not None:
        where = f"--seq {position['seq']} --epoch {position['epoch']}"
        if options.output is not None:
            where = f"--position {printable(os.path.join(os.fsencode(options.output), POSITION))}"
        line += f"; when done: snapfeed ack {position['partition']} --consumer {options.consumer} {where}"
    print(line, file=sys.stderr)


# ---- printing


def _print(lists: Lists, options: argparse.Namespace) -> None:
    both = not options.changed and not options.deleted
    chosen = [(False, lists.changed)] if options.changed or both else []
    chosen += [(True, lists.deleted)] if options.deleted or both else []
    for gone, entries in chosen:
        if options.json:
            for entry in entries:
                print(json_line(_document(entry, gone=gone)))
        elif options.null or not sys.stdout.isatty():
            sys.stdout.flush()
            sys.stdout.buffer.writelines(separated(entries))
        else:
            for entry in entries:
                print(printable(relative(entry.path)))
    sys.stdout.flush()


def _document(entry: Entry, *, gone: bool) -> dict[str, Any]:
    document: dict[str, Any] = {}
    encode_name(document, "path", entry.path)
    return {**document, "deleted": gone, "type": entry.type, "op": entry.op}


# ---- the directory


def _read(path: bytes) -> Position | None:
    """A position.json, None if there is none. Raises OperatorError for what is none of ours."""
    try:
        with open(path, "rb") as file:
            document = orjson.loads(file.read())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError:
        document = None
    if not isinstance(document, dict) or not set(_KEPT) <= document.keys():
        raise OperatorError(f"{os.fsdecode(path)} is no position of `snapfeed export`; remove it if it is not needed")
    return document


def _unfinished(directory: bytes, now: Position) -> Position | None:
    """An export that is there and was not acknowledged, if it can still be carried out; `now` is what a new one would be."""
    found = _read(os.path.join(directory, POSITION))
    same = found is not None and all(found[key] == now[key] for key in ("partition", "epoch", "from", "baseline"))
    if found is None or not same or found["baseline"] or found.get("consumer") != now["consumer"]:
        return None
    return found if os.path.isdir(_tree(found)) else None


def _refuse_others(directory: bytes, now: Position) -> None:
    """What another consumer, or another partition, has not acknowledged is not to be written over. Raises OperatorError."""
    found = _read(os.path.join(directory, POSITION))
    if found is None or found.get("consumer") is None:
        return
    if (found["partition"], found["consumer"]) != (now["partition"], now["consumer"]):
        raise OperatorError(
            f"{os.fsdecode(directory)} holds an unfinished export of {found['partition']} for {found['consumer']}; "
            f"acknowledge it, remove its {os.fsdecode(POSITION)}, or give another --output"
        )


def _left_behind(directory: bytes, now: Position) -> bool:
    """Whether the directory has an export of this consumer that was never acknowledged, so that nobody knows how far it went."""
    found = _read(os.path.join(directory, POSITION))
    if found is None or now["baseline"] or found.get("consumer") is None or found["consumer"] != now["consumer"]:
        return False
    return bool((found["epoch"], found["seq"]) != (now["epoch"], now["from"]))


def _tree(position: Position) -> str:
    """Where what has changed is to be read: the snapshot's own tree, or the partition as it is."""
    return os.path.join(position["mount"], position["snapshot"] or "")


def _write_all(directory: bytes, position: Position, lists: Lists) -> None:
    """All files, position.json last: while it is there, the others belong to it."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, POSITION))
    _sync(directory)
    _write(directory, CHANGED, separated(lists.changed))
    _write(directory, DELETED, separated(lists.deleted))
    temporary = os.path.join(directory, TREE + b".new")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(_tree(position), os.fsdecode(temporary))
    os.rename(temporary, os.path.join(directory, TREE))
    _sync(directory)
    _write(directory, POSITION, iter([orjson.dumps(position, option=orjson.OPT_APPEND_NEWLINE)]))
    _sync(directory)


def _write(directory: bytes, name: bytes, parts: Iterator[bytes]) -> None:
    temporary = os.path.join(directory, name + b".new")
    with open(temporary, "wb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o600)) as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, os.path.join(directory, name))


def _sync(directory: bytes) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
