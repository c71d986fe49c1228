"""docs/feed.md against the code: its examples can be read, and its tables name exactly the fields that are written."""

import re

import orjson
from broker_processes import ROOT

from comparer.model import Attr, ByteRanges, Change, FileType, Ident, Op, Range
from feed.cloudevents import event
from feed.commands import LOCAL_VERBS, VERBS, answer, parse_command
from feed.documents import CHANGED
from feed.encode import decode_change, encode_attr, encode_change
from feed.pages import Envelope, parse_page
from feed.schema import files
from watcher.state import Last, State

TEXT = (ROOT / "docs/feed.md").read_text(encoding="utf-8")
EXAMPLES = [orjson.loads(text) for text in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)]


def table(heading):
    """The names in the first column of the tables of a section."""
    section = re.split(r"^#+ ", TEXT.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def example(field):
    (found,) = (one for one in EXAMPLES if field in one)
    return found


def attr(**more):
    return Attr(FileType.FILE, 1, 1, 1, 1, 1, 1, 1, 1, xattrs=((b"user.a", b"b"), (b"user.\xff", b"b")), **more)


def test_the_page_is_one():
    parse_page(orjson.dumps(example("changes")))


def test_the_change_is_one():
    decode_change(example("op"))


def test_the_command_and_its_answer_are_ones():
    command = parse_command("snapshot", orjson.dumps(next(one for one in EXAMPLES if set(one) == {"id", "partition"})))
    assert set(example("data")) == set(orjson.loads(answer(command.id)))


def test_every_field_of_a_page_is_described():
    written = orjson.loads(Envelope("h", "p", "u", "e", 1, None, 1, "t", 1, "c", None, baseline=True).head() + b"}")
    assert table("A page") == set(written) | {"page", "pages", "changes"}


def test_every_field_of_a_change_is_described():
    ranges = ByteRanges((Range(0, 1),))
    change = Change(Op.RENAME, Ident(1, 1), FileType.FILE, b"p", b"f", ("data",), attr(), attr(), ranges)
    link = Change(Op.CREATE, Ident(1, 1), FileType.SYMLINK, b"p", after=Attr(FileType.SYMLINK, *[1] * 8, target=b"t"))
    written = set(encode_change(change)) | set(encode_change(link))
    assert table("A change") == written | {"omitted_xattrs"} | {op.value for op in Op} | {"op"}
    assert all(f"`{word}`" in TEXT for word in CHANGED)


def test_every_attribute_is_described():
    assert table("Attributes") == set(encode_attr(attr()))


def test_every_field_of_a_state_is_described():
    state = State("data", "/data", "xfs", None, last=Last("time", 1, 1))
    assert table("The state of a partition") == set(state.document(0)) | {"published"}


def test_every_verb_is_described():
    assert table("Commands") == set(VERBS)


def test_every_schema_is_described():
    verbs = (*VERBS, *LOCAL_VERBS)
    described = {name.replace("<verb>", verb) for name in table("Schemas") for verb in verbs}
    assert described == set(files())


def test_every_attribute_of_an_event_is_described():
    page = orjson.dumps(example("changes"))
    assert table("CloudEvents") == {name for name, _ in event(page, "changes").attributes} | {"datacontenttype"}
