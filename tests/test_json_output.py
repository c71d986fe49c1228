"""JSON on a terminal: whatever bytes a name has, a command with --json prints characters that a terminal only shows."""

import argparse
import json
import re
from pathlib import Path

import pytest

from feed.export import Entry, Lists
from watcher import command_ask, command_export, command_verify
from watcher.render import json_line

ROOT = Path(__file__).parent.parent
EVIL = [
    "\x9b31mred",
    "\x7f",
    "\u202egpj.exe",
    "\x1b]0;t\x07",
    "\r\n",
    "\u2028",
    "\u2066x",
    "\udcff",
    '"\\',
    "\U000e0041",
]


def shown(capfd) -> list:
    """The documents that were printed."""
    written = capfd.readouterr().out
    assert re.fullmatch("[ -~\n]*", written), ascii(written)
    return [json.loads(line) for line in written.splitlines()]


@pytest.mark.parametrize("name", [*EVIL, *map(chr, range(0x100))])
def test_one_line_of_printable_ascii(name):
    line = json_line({name: [name, {"path": name}], "count": 1})
    assert re.fullmatch("[ -~]+", line), ascii(line)
    assert json.loads(line) == {name: [name, {"path": name}], "count": 1}


def test_no_command_lets_a_terminal_obey_a_name(capfd):
    options = argparse.Namespace(changed=False, deleted=False, json=True, null=False)
    names = [name.encode(errors="surrogateescape") for name in EVIL]
    command_export._print(Lists([Entry(name, "file", "create") for name in names], []), options)
    assert len(shown(capfd)) == len(EVIL)
    command_ask._print({"path": "".join(EVIL)})
    assert shown(capfd) == [{"path": "".join(EVIL)}]
    printer = command_verify._Printer(json=True)
    printer.take({"what": "missing", "path": EVIL[0], "detail": EVIL[2], "meanwhile": False})
    assert shown(capfd)[0]["path"] == EVIL[0]


def test_commands_print_json_in_one_way():
    """Also those that do not exist yet."""
    for path in (ROOT / "watcher").glob("*.py"):
        if path.name != "render.py":
            assert not re.search(r"print\(\s*(or)?json\.dumps|\bjson\.dumps", path.read_text()), path
