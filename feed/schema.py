"""The format described for strangers: JSON Schemas (2020-12) of all documents and an AsyncAPI 3.0 document of the topics.

    python -m feed.schema [--check] [DIR]

writes them to DIR (docs/schema), or with --check says which of the files there are not what the code makes, and exits 1. Nothing
is described here a second time: fields come from the types in feed.documents, commands from the tables in feed.commands, topics
from feed.broker. Each schema stands for itself; other schemas are referred to by the AsyncAPI document only.
"""

import argparse
import os
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

import orjson

from comparer.model import FileType, Op
from feed.broker import NAME, Topics
from feed.cloudevents import CONTENT_TYPE, described
from feed.commands import COMMON, LARGEST, LARGEST_INTEGER, LOCAL_VERBS, SIGNATURE, VERBS, Field
from feed.documents import (
    ANSWERS,
    FORMAT,
    REFUSALS,
    SEVERAL,
    WITH_CHANGED,
    WITH_FROM,
    AnswerDocument,
    ChangeDocument,
    MoreDocument,
    PageDocument,
    Rules,
    StateDocument,
    StatusDocument,
)

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN: Mapping[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


# ---- types


def value(hint: Any, definitions: Schema) -> Schema:
    """The schema of a type; what it refers to is put into `definitions`. Raises TypeError for a type that JSON does not have."""
    if hint is Any:
        return {}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if is_typeddict(hint):
        name = hint.__name__.removesuffix("Document")
        if name not in definitions:
            definitions[name] = {}  # it may refer to itself
            definitions[name] = document(hint, definitions)
        return {"$ref": f"#/$defs/{name}"}
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = value(arguments[0], definitions)
        for rules in arguments[1:]:
            if isinstance(rules, Rules):
                found = found | rules.keywords
        return found
    if origin is Union or origin is types.UnionType:
        return _any_of([value(one, definitions) for one in arguments])
    if origin is Literal:
        return {"const": arguments[0]} if len(arguments) == 1 else {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": value(arguments[0], definitions)}
    if origin is dict:
        key = value(arguments[0], definitions)
        names = {} if key == {"type": "string"} else {"propertyNames": key}
        return {"type": "object", **names, "additionalProperties": value(arguments[1], definitions)}
    if origin is NotRequired:
        return value(arguments[0], definitions)
    raise TypeError(f"{hint!r} has no JSON Schema")


def _any_of(schemas: list[Schema]) -> Schema:
    """One of several; a plain value or null is said in one word where that says the same."""
    null = {"type": "null"}
    others = [one for one in schemas if one != null]
    if len(others) == 1 and null in schemas and isinstance(others[0].get("type"), str) and "enum" not in others[0]:
        return {**others[0], "type": [others[0]["type"], "null"]}
    return {"anyOf": schemas}


def document(kind: Any, definitions: Schema) -> Schema:
    """The schema of an object with the fields of a TypedDict. Fields that are not in it are allowed: readers ignore them."""
    hints = get_type_hints(kind, include_extras=True)
    found: Schema = {"type": "object"}
    if kind.__doc__ and not kind.__doc__.startswith("dict("):
        found["description"] = kind.__doc__
    found["required"] = [name for name in hints if name in kind.__required_keys__]
    found["properties"] = {name: value(hint, definitions) for name, hint in hints.items()}
    if kind is ChangeDocument:
        found |= {"dependentRequired": _together(hints), "allOf": list(_change_rules())}
    if kind is PageDocument:
        found["if"] = _has("baseline")
        found["then"], found["else"] = _field("parent", "null"), _field("parent", "integer")
    return found


def _together(hints: Mapping[str, Any]) -> Schema:
    """Fields of a change that need others: the bytes of a name its readable stand-in, ranges what they are worth."""
    names = {name: [name.removesuffix("_b64")] for name in hints if name.endswith("_b64")}
    ranges = ("ranges", "ranges_quality", "cleared")
    return names | {name: [other for other in ranges if other != name] for name in ranges}


def _change_rules() -> Iterator[Schema]:
    """What depends on `op` and `type`."""
    yield _when("op", WITH_FROM, _has("from"), otherwise={"not": _has("from")})
    yield _when("op", WITH_CHANGED, _has("changed"), otherwise={"not": _has("changed")})
    yield _when("op", {Op.CREATE}, {"allOf": [_field("before", "null"), _field("after", "object")]})
    yield _when("op", {Op.DELETE}, {"allOf": [_field("before", "object"), _field("after", "null")]})
    yield _when("op", {Op.MODIFY, Op.RENAME}, _field("after", "object"))
    yield _when("type", {FileType.SYMLINK}, _has("target"), otherwise={"not": _has("target")})


def _when(
    name: str, words: "frozenset[Op] | set[Op] | set[FileType]", then: Schema, otherwise: Schema | None = None
) -> Schema:
    chosen = {"properties": {name: {"enum": sorted(str(word) for word in words)}}, **_has(name)}
    return {"if": chosen, "then": then} | ({} if otherwise is None else {"else": otherwise})


def _has(name: str) -> Schema:
    return {"required": [name]}


def _field(name: str, kind: str) -> Schema:
    return {"properties": {name: {"type": kind}}}


def _whole(name: str, title: str, kind: Any) -> Schema:
    definitions: Schema = {}
    return _file(name, title, document(kind, definitions), definitions)


def _file(name: str, title: str, schema: Schema, definitions: Schema) -> Schema:
    head = {"$schema": DIALECT, "$id": f"urn:{FORMAT.replace('/', ':')}:{name}", "title": title}
    return head | schema | ({"$defs": definitions} if definitions else {})


# ---- commands and answers


def _command_field(field: Field) -> Schema:
    kinds = list(field.kinds)
    found: Schema = {"type": kinds[0] if len(kinds) == 1 else kinds}
    if "string" in kinds:
        found |= {"minLength": 1, "maxLength": field.longest}
    if field.pattern is not None:
        found["pattern"] = f"^{field.pattern}$"
    if "integer" in kinds:
        found |= {"minimum": 0, "maximum": LARGEST_INTEGER}
    if field.fields is not None:
        found |= _fields(field.fields)
    return found


def _fields(table: Mapping[str, Field]) -> Schema:
    """Of a command no other fields are taken: one that is misspelt must not do something else than what was meant."""
    found: Schema = {"required": [name for name, field in table.items() if field.required]}
    found["properties"] = {name: _command_field(field) for name, field in table.items()}
    return found | {"additionalProperties": False}


def command(verb: str) -> Schema:
    """The schema of a command. That it has at most 4 KiB in all is not in it."""
    about = f"A command; at most {LARGEST} bytes. `expires` and `signature` are for a host that demands signatures."
    if verb in LOCAL_VERBS:
        about = "A command of the control socket, one line."
        table = {"verb": Field(("string",), required=True, pattern=verb), **COMMON, **LOCAL_VERBS[verb]}
    else:
        table = {**COMMON, **VERBS[verb], **SIGNATURE}
    return _file(f"command.{verb}", verb, {"description": about, "type": "object", **_fields(table)}, {})


def answers() -> Schema:
    """The schema of an answer to any verb; `$defs/<verb>` is the one to that verb, `$defs/refusal` fits them all."""
    definitions: Schema = {}
    for verb, kind in ANSWERS.items():
        good = _answer(_ok(value(kind, definitions)))
        bad = _answer(_refused(value(REFUSALS[verb], definitions)) if verb in REFUSALS else _refused())
        definitions[f"answer.{verb}"] = {"anyOf": [good, bad]}
    for verb, kind in SEVERAL.items():
        last = [_answer(_ok({"type": "null"})), _answer(_refused())]
        definitions[f"answer.{verb}"] = {"anyOf": [_answer({"data": value(kind, definitions)}, MoreDocument), *last]}
    definitions["refusal"] = _answer(_refused())
    one = {"anyOf": [{"$ref": f"#/$defs/answer.{verb}"} for verb in (*ANSWERS, *SEVERAL)]}
    return _file("answer", "answer", one, definitions)


def _answer(fields: Schema, kind: Any = AnswerDocument) -> Schema:
    found = document(kind, {})
    return found | {"properties": found["properties"] | fields}


def _ok(data: Schema) -> Schema:
    return {"status": {"const": "ok"}, "error": {"type": "null"}, "data": data}


def _refused(data: Schema | None = None) -> Schema:
    nothing = {"type": "null"}
    told = nothing if data is None else {"anyOf": [nothing, data]}
    return {"status": {"const": "error"}, "error": {"type": "string", "minLength": 1}, "data": told}


# ---- topics


def asyncapi() -> Schema:
    """The AsyncAPI 3.0 document: from the daemon's side, so `send` is what it publishes, `receive` are commands."""
    channels: Schema = {}
    operations: Schema = {}
    messages: Schema = {}
    page = _message("page", "page.json", headers=described())
    for name, address, messages_, retained, about in (
        ("status", _TOPICS.status, {"status": _message("status", "status.json")}, True, "Whether the daemon is there."),
        ("state", _TOPICS.state("P"), {"state": _message("state", "state.json")}, True, "The state of a partition."),
        ("changes", _TOPICS.changes("P"), {"page": page}, False, "The pages of each diff, in order."),
        ("replay", _TOPICS.replay("P", "C"), {"page": page}, False, "Pages that one consumer asked for."),
    ):
        messages |= messages_
        channels[name] = _channel(address, messages_, about)
        operations[name] = _operation("send", name, retained=retained)
    for verb in VERBS:
        request = _message(f"request.{verb}", f"command.{verb}.json")
        response = _message(f"response.{verb}", f"answer.json#/$defs/answer.{verb}")
        messages |= {f"request.{verb}": request, f"response.{verb}": response}
        at = _TOPICS.requests.removesuffix("+") + verb
        channels[f"request.{verb}"] = _channel(at, {f"request.{verb}": request}, f"The command `{verb}`.")
        answered = {f"response.{verb}": response}
        channels[f"response.{verb}"] = _channel(_TOPICS.response(verb), answered, f"Answers to `{verb}`.")
        operations[f"request.{verb}"] = _operation("receive", f"request.{verb}", retained=False)
        operations[f"request.{verb}"]["reply"] = {"channel": {"$ref": f"#/channels/response.{verb}"}}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": FORMAT, "version": FORMAT.rpartition("/")[2] + ".0.0", "description": _ABOUT},
        "defaultContentType": CONTENT_TYPE,
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "parameters": _PARAMETERS},
    }


_ABOUT = "What snapfeed publishes over MQTT (3.1.1, or 5 where the broker speaks it); docs/feed.md is the contract."
_TOPICS = Topics("B", "H")  # one-letter stand-ins for the parameters
_LETTERS = {"B": "base", "H": "host", "P": "partition", "C": "consumer"}
_PARAMETERS: Schema = {
    "base": {"default": "snapfeed", "description": "Up to four words joined by `/`."},
    **{
        name: {"description": f"Matches {NAME.pattern.removesuffix(chr(92) + 'Z')}."}
        for name in ("host", "partition", "consumer")
    },
}


def _channel(address: str, messages: Schema, about: str) -> Schema:
    words = [f"{{{_LETTERS[word]}}}" if word in _LETTERS else word for word in address.split("/")]
    names = [word[1:-1] for word in words if word.startswith("{")]
    return {
        "address": "/".join(words),
        "description": about,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
        "parameters": {name: {"$ref": f"#/components/parameters/{name}"} for name in names},
    }


def _operation(action: str, channel: str, *, retained: bool) -> Schema:
    mqtt = {"qos": 1, "retain": retained, "bindingVersion": "0.2.0"}
    return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}, "bindings": {"mqtt": mqtt}}


def _message(name: str, file: str, headers: Schema | None = None) -> Schema:
    payload = {"schemaFormat": "application/schema+json;version=2020-12", "schema": {"$ref": f"./{file}"}}
    return {"name": name, "payload": payload} | ({} if headers is None else {"headers": headers})


# ---- files


def schemas() -> dict[str, Schema]:
    """All documents by the name of their file, without `.json`."""
    return {
        "page": _whole("page", "page", PageDocument),
        "state": _whole("state", "state", StateDocument),
        "status": _whole("status", "status", StatusDocument),
        "answer": answers(),
        **{f"command.{verb}": command(verb) for verb in (*VERBS, *LOCAL_VERBS)},
        "asyncapi": asyncapi(),
    }


def files() -> dict[str, bytes]:
    """All documents as files: name and content."""
    return {
        f"{name}.json": orjson.dumps(schema, option=orjson.OPT_INDENT_2) + b"\n" for name, schema in schemas().items()
    }


def stale(directory: str) -> list[str]:
    """What in a directory is not what the code makes: files that are missing, differ, or are no longer made."""
    made = files()
    there = {name for name in os.listdir(directory) if name.endswith(".json")} if os.path.isdir(directory) else set()
    return sorted(there - made.keys()) + [name for name, content in made.items() if _read(directory, name) != content]


def _read(directory: str, name: str) -> bytes | None:
    try:
        with open(os.path.join(directory, name), "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m feed.schema", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a file is not what the code makes"
    )
    parser.add_argument("directory", nargs="?", default="docs/schema", metavar="DIR")
    given = parser.parse_args(arguments)
    old = stale(given.directory)
    if given.check:
        for name in old:
            print(f"{os.path.join(given.directory, name)}: not what the code makes; run python -m feed.schema")
        return 1 if old else 0
    os.makedirs(given.directory, exist_ok=True)
    for name in old:
        content = files().get(name)
        path = os.path.join(given.directory, name)
        if content is None:
            os.unlink(path)
        else:
            with open(path, "wb") as file:
                file.write(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
