"""docs/schema against the code and against real traffic: everything on the wire is valid, what is no such document is not."""

import contextlib
import copy
import json
import os
import socket
import sys
from dataclasses import replace

import orjson
import pytest
from broker_processes import ROOT, collector, mosquitto
from daemon_process import HOST, daemon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from partitions import run, wait_until
from test_compare import operated
from test_encode import XATTRS, ranges
from trees import Tree
from workload import HOSTILE, Worker

from comparer.compare import baseline, compare
from comparer.model import Attr, ByteRanges, Change, FileType, Ident, Op, Range
from feed.broker import topics
from feed.commands import LOCAL_VERBS, VERBS, CommandError, answer, parse_command
from feed.documents import CHANGED
from feed.encode import encode_bytes
from feed.pages import Envelope, chunks, payloads
from feed.schema import files, main, schemas, stale
from watcher.state import Last, State
from watcher.triggers import Trigger

COMMITTED = ROOT / "docs/schema"
SCHEMAS = {name: schema for name, schema in schemas().items() if name != "asyncapi"}
SOME = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def closed(schema):
    """The same schema as strict with us as we must be: no field and no word that it does not name."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: closed(one) for name, one in value.items()} if key in {"properties", "$defs"} else closed(value)
        for key, value in schema.items()
    }
    if schema.get("type") == "object" and "properties" in schema:
        made["additionalProperties"] = False
    if "examples" in schema:
        made["enum"] = [*schema["examples"], *([None] if "null" in schema["type"] else [])]
    return made


def part(name, definition=None):
    schema = SCHEMAS[name]
    return schema if definition is None else {"$defs": schema["$defs"], "$ref": f"#/$defs/{definition}"}


_ANSWERS = [name for name in SCHEMAS["answer"]["$defs"] if name.startswith("answer.") or name == "refusal"]
PARTS = {name: part(name) for name in SCHEMAS} | {name: part("answer", name) for name in _ANSWERS}
OPEN = {name: Draft202012Validator(schema) for name, schema in PARTS.items()}
CLOSED = {name: Draft202012Validator(closed(schema)) for name, schema in PARTS.items()}


def valid(name, document):
    """Fail with what is wrong if a document of ours breaks the published schema, or has something that is not in it."""
    for validator in (OPEN[name], CLOSED[name]):
        for error in validator.iter_errors(document):
            raise AssertionError(f"{name}: {error.json_path}: {error.message[:300]}")


def refused(name, document):
    return not OPEN[name].is_valid(document)


# ---- the files


def test_the_committed_files_are_what_the_code_makes():
    assert stale(str(COMMITTED)) == []


def test_check_finds_what_is_old_and_a_run_mends_it(tmp_path, capsys):
    place = tmp_path / "schema"
    assert main(["--check", str(place)]) == 1
    assert main([str(place)]) == 0
    assert main(["--check", str(place)]) == 0
    (place / "page.json").write_text("{}")
    (place / "command.dance.json").write_text("{}")
    (place / "state.json").unlink()
    capsys.readouterr()
    assert main(["--check", str(place)]) == 1
    assert [line.partition(":")[0].rpartition("/")[2] for line in capsys.readouterr().out.splitlines()] == [
        "command.dance.json",
        "page.json",
        "state.json",
    ]
    assert main([str(place)]) == 0
    assert {path.name: path.read_bytes() for path in place.iterdir()} == files()


def test_it_runs_as_a_module():
    run(sys.executable, "-m", "feed.schema", "--check", cwd=ROOT)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one(name):
    Draft202012Validator.check_schema(SCHEMAS[name])


def references(document):
    if isinstance(document, dict):
        if isinstance(document.get("$ref"), str):
            yield document["$ref"]
        for value in document.values():
            yield from references(value)
    elif isinstance(document, list):
        for value in document:
            yield from references(value)


def test_every_reference_leads_somewhere():
    made = {f"./{name}": orjson.loads(content) for name, content in files().items()}
    found = 0
    for name, document in made.items():
        for reference in references(document):
            file, _, pointer = reference.partition("#")
            place = made[file or name]
            for step in filter(None, pointer.split("/")):
                place = place[step]
            assert isinstance(place, dict)
            found += 1
    assert found > 50


def test_asyncapi_has_the_topics_of_the_feed():
    document = schemas()["asyncapi"]
    filled = {
        channel["address"].format(base="snapfeed", host="edge7", partition="data", consumer="copy")
        for channel in document["channels"].values()
    }
    names = topics("snapfeed", "edge7")
    expected = {names.status, names.state("data"), names.changes("data"), names.replay("data", "copy")}
    expected |= {names.response(verb) for verb in VERBS}
    expected |= {f"snapfeed/edge7/request/{verb}" for verb in VERBS}
    assert filled == expected
    received = {name for name, one in document["operations"].items() if one["action"] == "receive"}
    assert received == {f"request.{verb}" for verb in VERBS}
    retained = {name for name, one in document["operations"].items() if one["bindings"]["mqtt"]["retain"]}
    assert retained == {"status", "state"}
    for channel in document["channels"].values():
        assert [f"{{{name}}}" in channel["address"] for name in channel["parameters"]]


def test_the_triggers_are_those_of_the_daemon():
    known = SCHEMAS["page"]["properties"]["trigger"]["examples"]
    assert set(known) == {trigger.value for trigger in Trigger}
    assert set(SCHEMAS["page"]["$defs"]["Change"]["properties"]["changed"]["items"]["examples"]) == CHANGED


# ---- pages of made changes


COMPONENT = st.binary(min_size=1, max_size=12).map(lambda name: bytes(b for b in name if b not in b"\0/") or b"\xff")
COMPONENT |= st.sampled_from([*HOSTILE, b'","changes":[', "\u2028".encode(), b"\xed\xa0\x80", b"..a", b"\x7f\r\n"])
PATH = st.lists(COMPONENT, min_size=1, max_size=4).map(b"/".join)
U32, U64, NS = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1)


@st.composite
def changes(draw):
    """A change of any kind with any attributes, as a comparison can make it."""
    kind, op = draw(st.sampled_from(FileType)), draw(st.sampled_from(Op))
    target = draw(COMPONENT) if kind is FileType.SYMLINK else None

    def attr():
        numbers = draw(st.tuples(U64, U64, st.integers(0, 0o7777), U32, U32, U32, NS, NS))
        more = draw(st.tuples(st.none() | NS, st.none() | U64))
        return Attr(kind, *numbers, *more, draw(XATTRS), target)

    before = attr() if op is not Op.CREATE and (op is Op.DELETE or draw(st.booleans())) else None
    after = attr() if op is not Op.DELETE and (before is None or op is not Op.UNLINK or draw(st.booleans())) else None
    changed = tuple(sorted(draw(st.sets(st.sampled_from(sorted(CHANGED)))))) if op in {Op.MODIFY, Op.RENAME} else ()
    from_path = draw(PATH) if op in {Op.RENAME, Op.LINK} else None
    ident = Ident(draw(U64), draw(U32))
    return Change(op, ident, kind, draw(PATH), from_path, changed, before, after, draw(st.none() | ranges()))


def envelope(**more):
    fields = {
        "host": "edge7", "partition": "data", "uuid": "u", "epoch": "e", "seq": 2, "parent": 1, "time_ns": 10**18,
        "trigger": "time", "volume": 0, "consistency": "per-file", "snapshot": None,
    }  # fmt: skip
    return Envelope(**fields | more)


def pages_of(encoded, limit=6000, **more):
    return [orjson.loads(page) for page in payloads(envelope(**more), chunks(encoded, limit), 10**5)]


@SOME
@given(st.lists(st.tuples(changes(), st.none() | PATH), max_size=8))
def test_pages_of_any_changes_are_valid(made):
    for page in pages_of([encode_bytes(change, content) for change, content in made]):
        valid("page", page)


@SOME
@given(st.data())
def test_pages_of_any_comparison_are_valid(data):
    old = Tree()
    data.draw(operated(old, 0, 15))
    new = old.copy()
    data.draw(operated(new, 1, 15))
    for tree in (old, new):
        for ident, attr in tree.objects.items():
            if attr.type is FileType.SYMLINK:
                tree.objects[ident] = replace(attr, target=b"where \xff")
    diff = [encode_bytes(change) for change in compare(old, new, old.objects.keys() | new.objects.keys())]
    for page in pages_of(diff):
        valid("page", page)
    for page in pages_of(map(encode_bytes, baseline(new)), parent=None, baseline=True):
        valid("page", page)


def test_what_was_coarsened_is_valid():
    xattrs = tuple((b"user.%03d\xff" % n, b"v" * 1000) for n in range(60))
    attr = Attr(FileType.FILE, 1, 0, 0o644, 0, 0, 1, 0, 0, xattrs=xattrs)
    many = ByteRanges(tuple(Range(n * 8192, 4096) for n in range(5000)), (Range(10**9, 4096),))
    change = Change(Op.MODIFY, Ident(1, 1), FileType.FILE, b"x", None, ("data",), attr, attr, many)
    (page,) = pages_of([encode_bytes(change)], 8000)
    assert {"omitted_xattrs", "ranges"} <= page["changes"][0].keys()
    valid("page", page)


# ---- not vacuous


def rich_page():
    """A page with every field of the format in it but `baseline`."""
    xattrs = ((b"user.a", b"1"), (b"user.\xff", b"2"))
    attr = Attr(FileType.FILE, 5, 4096, 0o644, 1, 2, 1, 10**18, 10**18, 10**18, None, xattrs)
    link = Attr(FileType.SYMLINK, 5, 0, 0o777, 1, 2, 1, -1, 0, None, 5, target=b"\xff")
    written = ByteRanges((Range(0, 5),), (Range(8, 2),))
    made = [
        (Change(Op.RENAME, Ident(1, 2), FileType.FILE, b"a\xff", b"b\xff", ("data",), attr, attr, written), b"c\xff"),
        (Change(Op.CREATE, Ident(3, 2), FileType.SYMLINK, b"d", after=link), None),
        (Change(Op.DELETE, Ident(4, 2), FileType.FILE, b"e", before=attr), None),
    ]
    (page,) = pages_of([encode_bytes(*one) for one in made])
    page["changes"][2]["omitted_xattrs"] = ["*"]
    return page


def rich_state():
    state = State(
        "data", "/data", "xfs", "u", "watching", None, "partition", "e", 4, source="fanotify", backend="ficlone"
    )
    state.consistency, state.last, state.meters, state.excluded = "per-file", Last("time", 1, 1), ("xfs",), ("sub",)
    consumer = {"consumer": "copy", "seq": 3, "lag": 1, "age_s": 5, "holds": True, "sending": None}
    return {**state.document(0), "published": {"seq": 4, "page": 1}, "consumers": [consumer]}


SNAPSHOT = {"partition": "data", "epoch": "e", "seq": 3, "changes": 0, "volume": 0, "trigger": "command"}
ANSWERED = {
    "snapshot": [SNAPSHOT, [SNAPSHOT], []],
    "state": [rich_state(), [rich_state()]],
    "thresholds": [[{"partition": "data", "io_threshold": 1, "time_threshold": 2.5}]],
    "replay": [
        {"partition": "data", "epoch": "e", "from": 1, "seq": 3, "diffs": 2, "topic": "snapfeed/edge7/data/replay/c"}
    ],
    "baseline": [{"partition": "data", "epoch": "e", "seq": 3, "topic": "snapfeed/edge7/data/replay/c"}],
    "ack": [{"partition": "data", "consumer": "c", "epoch": "e", "seq": 3}],
}
GAP = {"gap": True, "partition": "data", "epoch": "e", "oldest": 2, "seq": 3}
STATUS = {"state": "online", "version": "1", "since": "2026-03-14T09:26:53Z"}
EXPORTED = {
    "partition": "data", "mount": "/data", "epoch": "e", "from": None, "seq": 4, "snapshot": None, "consistency": "metadata",
    "baseline": True,
}  # fmt: skip


def samples():
    yield "page", rich_page()
    yield "state", rich_state()
    yield "status", STATUS
    for verb, several in ANSWERED.items():
        for data in several:
            yield f"answer.{verb}", orjson.loads(answer("1", data))
        yield f"answer.{verb}", orjson.loads(answer(None, error="no"))
    yield "answer.replay", {**orjson.loads(answer("1", GAP, "gap: too old"))}
    where = {"partition": "data", "epoch": "e", "seq": 3}
    yield "answer.ack", orjson.loads(answer("1", where, "snapshot 9 does not exist yet"))
    yield "answer.export", {"id": "1", "more": True, "data": EXPORTED}
    yield "answer.export", {"id": "1", "more": True, "data": rich_page()["changes"]}
    yield "answer.export", orjson.loads(answer("1"))


SAMPLES = list(samples())


def places(document, at=()):
    """Every place in a document, as a path of keys and indices."""
    for key in document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ():
        yield (*at, key)
        yield from places(document[key], (*at, key))


def altered(document, place, alter):
    """A copy with one thing done to the container at `place[:-1]` and the key `place[-1]`."""
    made = copy.deepcopy(document)
    container = made
    for key in place[:-1]:
        container = container[key]
    alter(container, place[-1])
    return made


OPTIONAL = {
    "path_b64", "from_b64", "target_b64", "content_b64", "xattrs", "xattrs_b64", "omitted_xattrs", "published",
    "user.a", "dXNlci7/",
}  # fmt: skip


@pytest.mark.parametrize(("name", "document"), SAMPLES)
def test_a_sample_is_valid_and_more_fields_are_nothing(name, document):
    valid(name, document)
    if name.startswith("answer."):
        valid("answer", document)
    more = copy.deepcopy(document)
    for place in [(), *places(document)]:
        at = more
        for key in place:
            at = at[key]
        if isinstance(at, dict) and place[-1:] != ("xattrs",) and place[-1:] != ("xattrs_b64",):
            at["later"] = [{"x": 1}]
    assert OPEN[name].is_valid(more)
    assert not CLOSED[name].is_valid(more)


@pytest.mark.parametrize(("name", "document"), SAMPLES)
def test_a_missing_field_is_seen(name, document):
    tried = 0
    for place in places(document):
        if isinstance(place[-1], str) and place[-1] not in OPTIONAL:
            assert refused(name, altered(document, place, lambda at, key: at.pop(key))), place
            tried += 1
    assert tried >= 3


@pytest.mark.parametrize(("name", "document"), SAMPLES)
def test_a_wrong_type_is_seen(name, document):
    for place in places(document):
        for wrong in (
            {"wrong": True},
            5.5 if place[-1] not in {"time", "seconds", "age", "time_threshold"} else "5.5",
        ):
            assert refused(name, altered(document, place, lambda at, key, to=wrong: at.__setitem__(key, to))), place


CHANGE = ("changes", 0)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("format",), "snapfeed/2"),
        (("host",), "a/b"),
        (("partition",), "x" * 65),
        (("page",), 0),
        (("pages",), 0),
        (("seq",), -1),
        (("seq",), "2"),
        (("parent",), None),
        (("baseline",), True),
        (("baseline",), False),
        (("time_ns",), "1e9"),
        (("time_ns",), 10**18),
        (("snapshot",), "/absolute"),
        ((*CHANGE, "op"), "copy"),
        ((*CHANGE, "op"), "create"),
        ((*CHANGE, "op"), "delete"),
        ((*CHANGE, "op"), "modify"),
        ((*CHANGE, "type"), "door"),
        ((*CHANGE, "type"), "symlink"),
        ((*CHANGE, "id"), "1"),
        ((*CHANGE, "id"), "1.2.3"),
        ((*CHANGE, "path"), "/a"),
        ((*CHANGE, "path"), "a//b"),
        ((*CHANGE, "path"), "a\0b"),
        ((*CHANGE, "path_b64"), "a-b"),
        ((*CHANGE, "changed"), ["data", "data"]),
        ((*CHANGE, "ranges"), [[0]]),
        ((*CHANGE, "ranges"), [[0, 0]]),
        ((*CHANGE, "ranges"), [[-1, 5]]),
        ((*CHANGE, "ranges"), [[0, 5, 7]]),
        ((*CHANGE, "ranges"), [["0", "5"]]),
        ((*CHANGE, "ranges_quality"), "likely"),
        ((*CHANGE, "after"), None),
        ((*CHANGE, "after", "size"), 5),
        ((*CHANGE, "after", "size"), "-5"),
        ((*CHANGE, "after", "size"), "05"),
        ((*CHANGE, "after", "size"), "9" * 30),
        ((*CHANGE, "after", "mode"), 0o100644),
        ((*CHANGE, "after", "uid"), -1),
        ((*CHANGE, "after", "mtime_ns"), "1.5"),
        ((*CHANGE, "after", "xattrs"), {"user.a": "no base64"}),
        (("changes", 1, "before"), rich_page()["changes"][0]["before"]),
        (("changes", 1, "from"), "a"),
        (("changes", 2, "after"), rich_page()["changes"][0]["after"]),
        (("changes", 2, "target"), "a"),
        (("changes", 2, "changed"), []),
    ],
)
def test_what_no_page_may_say(place, value):
    assert refused("page", altered(rich_page(), place, lambda at, key: at.__setitem__(key, value)))


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("status", {**STATUS, "state": "perhaps"}),
        ("status", {**STATUS, "since": "yesterday"}),
        ("state", {**rich_state(), "thresholds": {"io": 5}}),
        ("answer.snapshot", {"id": "1", "status": "ok", "error": None, "data": ANSWERED["ack"][0]}),
        ("answer.ack", {"id": "1", "status": "ok", "error": None, "data": SNAPSHOT}),
        ("answer.ack", {"id": "1", "status": "ok", "error": "no", "data": ANSWERED["ack"][0]}),
        ("answer.ack", {"id": "1", "status": "error", "error": None, "data": None}),
        ("answer.ack", {"id": "1", "status": "error", "error": "", "data": None}),
        ("answer.ack", {"id": "1", "status": "error", "error": "no", "data": {"gap": True, "seq": 3}}),
        ("answer.replay", {"id": "1", "status": "ok", "error": None, "data": GAP}),
        ("answer.replay", {"id": "1", "status": "error", "error": "no", "data": {**GAP, "gap": False}}),
        ("answer", {"id": "1", "status": "ok", "error": None, "data": {"anything": 1}}),
        ("answer", {"id": 1, "status": "error", "error": "no", "data": None}),
        ("answer.export", {"id": "1", "more": True, "data": [{"op": "create"}]}),
    ],
)
def test_what_no_other_document_may_say(name, document):
    assert refused(name, document)


def test_words_that_may_grow_are_taken():
    page = rich_page()
    page |= {"trigger": "moon", "consistency": "whole-host"}
    page["changes"][0]["changed"] = ["flags"]
    assert OPEN["page"].is_valid(page)
    assert not CLOSED["page"].is_valid(page)


# ---- commands


NEARLY = {
    "id": st.just("1") | st.text(max_size=3) | st.just("x" * 128) | st.just("x" * 129),
    "partition": st.sampled_from(["data", "", None, "x" * 1024, "x" * 1025, 5]),
    "since": st.just({"epoch": "e", "seq": 1})
    | st.fixed_dictionaries(
        {}, optional={"epoch": st.sampled_from(["e", "", 5]), "seq": st.sampled_from([0, -1, 2**53, 2**53 + 1, "1"])}
    )
    | st.just({"epoch": "e", "seq": 1, "more": 1}),
    "consumer": st.sampled_from(["copy", "a b", "", "x" * 64, "x" * 65, None]),
    "epoch": st.sampled_from(["e", "", None]),
    "seq": st.sampled_from([0, 5, 1.5, True, -1, 2**53, 2**63]),
    "io_threshold": st.sampled_from(["1GiB", 5, -1, None, [], ""]),
    "time_threshold": st.sampled_from(["1h", 5, -1, None, {}]),
}
SURPLUS = st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.text(max_size=8), max_size=1)


@settings(max_examples=800, deadline=None)
@given(st.sampled_from(sorted(VERBS)), st.data())
def test_a_command_is_valid_exactly_if_it_is_taken(verb, data):
    wanted = {"id", *VERBS[verb]} | data.draw(st.sets(st.sampled_from(sorted(NEARLY)), max_size=1))
    if data.draw(st.integers(0, 5)) == 0:
        wanted.discard(data.draw(st.sampled_from(sorted(wanted))))
    document = {name: data.draw(NEARLY[name]) for name in sorted(wanted)}
    if data.draw(st.integers(0, 5)) == 0:
        document |= data.draw(SURPLUS)
    if document.keys() & {"expires", "signature"}:
        return
    taken = True
    try:
        parse_command(verb, orjson.dumps(document))
    except CommandError:
        taken = False
    assert OPEN[f"command.{verb}"].is_valid(document) == taken, document


def test_signed_commands_and_the_export():
    signed = {"id": "1", "partition": "data", "expires": 1795351234, "signature": "0" * 64}
    assert OPEN["command.snapshot"].is_valid(signed)
    assert refused("command.snapshot", {**signed, "signature": "0" * 63})
    assert refused("command.snapshot", {**signed, "expires": "tomorrow"})
    export = {"verb": "export", "id": "1", "partition": "data", "consumer": "copy", "from": 4}
    assert set(LOCAL_VERBS) == {"export"}
    assert OPEN["command.export"].is_valid(export)
    assert refused("command.export", {**export, "verb": "exports"})
    assert refused("command.export", {**export, "force": True})


# ---- real traffic


def subject(topic):
    """The schema of what goes over a topic; None for what is not ours."""
    words = topic.removeprefix(f"snapfeed/{HOST}/").split("/")
    match words:
        case ["status"]:
            return "status"
        case ["request", verb]:
            return f"command.{verb}" if verb in VERBS else None
        case ["response", verb]:
            return f"answer.{verb}" if verb in VERBS else "refusal"
        case [_, "state"]:
            return "state"
        case [_, "changes"] | [_, "replay", _]:
            return "page"
    raise AssertionError(topic)


def hostile_tree(top):
    for number, name in enumerate([*HOSTILE, b'","changes":[', b"\xed\xa0\x80", "größe\u2028".encode()]):
        path = os.path.join(top, name)
        os.mkdir(path)
        with open(os.path.join(path, name), "wb") as file:
            file.write(b"x" * number)
        os.symlink(name + b"/\xff", os.path.join(path, b"link"))
        os.link(os.path.join(path, name), os.path.join(path, b"further"))
    os.mkfifo(os.path.join(top, b"fifo\n"))
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(top)
        try:
            bound.bind("socket \x1b")
        finally:
            os.chdir(here)
    with contextlib.suppress(OSError):
        os.mknod(os.path.join(top, b"null"), 0o20666, os.makedev(1, 3))
    os.setxattr(os.path.join(top, b"-rf"), b"trusted.x\xff", b"\0\xff")


@pytest.mark.kernel
def test_all_that_goes_over_the_wire_is_valid(part, tmp_path):
    top = os.fsencode(part.path)
    part.path.joinpath("before").write_text("x")
    with (
        mosquitto(tmp_path) as broker,
        collector(broker, "snapfeed/#") as seen,
        daemon(tmp_path, part.path, broker=broker.url) as snapfeed,
    ):
        wait_until(lambda: snapfeed.partition()["head"], "the first snapshot")
        wait_until(lambda: snapfeed.status()["broker"]["connected"], "the broker")
        label, epoch = (snapfeed.partition()[key] for key in ("partition", "epoch"))
        hostile_tree(top)
        snapfeed.snapshot()
        worker = Worker(top, 7, reflink=part.fs != "ext4")
        for _ in range(6):
            for _ in range(60):
                worker.step()
            head = snapfeed.snapshot()["seq"]

        def answers(verb):
            return seen.messages(f"snapfeed/{HOST}/response/{verb}")

        def asked(verb, **fields):
            count = len(answers(verb))
            broker.publish(f"snapfeed/{HOST}/request/{verb}", json.dumps({"id": f"{verb}{count}", **fields}))
            return json.loads(wait_until(lambda: answers(verb)[count:], f"the answer to {verb}")[0].payload)

        assert asked("snapshot", partition=label)["status"] == "ok"
        assert isinstance(asked("snapshot")["data"], list)
        assert asked("snapshot", partition="nowhere")["status"] == "error"
        assert asked("state", partition=label)["data"]["head"] == head
        assert isinstance(asked("state")["data"], list)
        assert asked("thresholds", partition=label, io_threshold="2GiB", time_threshold=7200)["status"] == "ok"
        asked("baseline", partition=label, consumer="copy")
        asked("replay", partition=label, consumer="copy", since={"epoch": epoch, "seq": 1})
        asked("replay", partition=label, consumer="copy", since={"epoch": "another", "seq": 1})
        asked("ack", partition=label, consumer="copy", epoch=epoch, seq=head)
        assert asked("dance")["status"] == "error"
        wait_until(lambda: snapfeed.published(head), "the last diff is published")
        snapfeed.stop()
        wait_until(
            lambda: json.loads(seen.messages(f"snapfeed/{HOST}/status")[-1].payload)["state"] == "offline", "the end"
        )
        messages = seen.messages()
    counted = {}
    written = set()
    for message in messages:
        name = subject(message.topic)
        if name is None or not message.payload:
            continue
        document = json.loads(message.payload)
        valid(name, document)
        counted[name] = counted.get(name, 0) + 1
        if name == "page":
            written |= {change["op"] for change in document["changes"]}
            written |= {key for change in document["changes"] for key in change}
    assert {*SCHEMAS} - counted.keys() <= {"answer", "command.export"}
    assert {f"answer.{verb}" for verb in VERBS} <= counted.keys()
    assert counted["page"] >= 8
    # what the traffic had: every kind of step, names that are not UTF-8, links
    assert set(Op) | {"path_b64", "from_b64", "target", "target_b64", "changed", "from"} <= written
