"""Who may import whom (ARCHITECTURE.md), read from the source; and that the reader of the source sees what it should.

Also one thing that works in newer versions of Python only, and that no tool knows of.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "comparer": frozenset(),
    "snapshotter": frozenset({"comparer"}),
    "feed": frozenset({"comparer"}),
    "watcher": frozenset({"comparer", "snapshotter", "feed"}),
}
# ctypes and fcntl: one module per kernel interface, all in one place. inotify's is the one behind pyinotify, for FIONREAD.
KERNEL_PLACE = "snapshotter/linux/"
KERNEL_EXCEPTIONS = frozenset({"watcher/sources/inotify_watches.py"})
KERNEL_ONLY = frozenset({"ctypes", "fcntl"})
ASYNC_PLACES = ("watcher/", "feed/")
ASYNC_ONLY = frozenset({"asyncio", "aiomqtt", "selectors"})
COMPUTED = "(computed)"
ASYNC_SYNTAX = (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)
# comparer is values in, values out.
IMPURE = frozenset(
    "datetime io logging os pathlib random secrets shutil socket sqlite3 subprocess sys tempfile threading time".split()
)


class Import(NamedTuple):
    line: int
    module: str

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports(path: str, tree: ast.Module) -> Iterator[Import]:
    """All modules that the source of `path` (from the project's root) imports, anywhere in it, relative ones made absolute."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (Import(node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, level=0):
                yield Import(node.lineno, module or "")
            case ast.ImportFrom(module=module, level=level):
                assert level <= len(package), f"{path}:{node.lineno}: an import from above the package"
                base = package[: len(package) - level + 1]
                yield Import(node.lineno, ".".join([*base, *([module] if module else [])]))
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"), args=[name, *_]
            ):
                yield Import(node.lineno, name.value if isinstance(name, ast.Constant) else COMPUTED)
            case _:
                pass


def violations(path: str, source: str) -> list[str]:
    """What in one file's source breaks the rule, each with its place."""
    tree = ast.parse(source)
    package = path.partition("/")[0]
    found: list[tuple[int, str]] = []
    for one in imports(path, tree):
        if one.top in MAY_IMPORT and one.top != package and one.top not in MAY_IMPORT[package]:
            found.append((one.line, f"{package} may not import {one.module}"))
        if one.top in KERNEL_ONLY and not path.startswith(KERNEL_PLACE) and path not in KERNEL_EXCEPTIONS:
            found.append((one.line, f"{one.top} is for {KERNEL_PLACE} only"))
        if one.top in ASYNC_ONLY and not path.startswith(ASYNC_PLACES):
            found.append((one.line, f"{one.top} is for watcher and feed only"))
        if one.top in IMPURE and package == "comparer":
            found.append((one.line, f"comparer is pure: no {one.top}"))
        if one.module == COMPUTED:
            found.append((one.line, "an import of a computed name cannot be checked"))
    for clause in (handler for n in ast.walk(tree) if isinstance(n, ast.TryStar) for handler in n.handlers):
        found += [
            (n.lineno, "raised in `except*` it is in a group of its own before Python 3.11.4")
            for n in ast.walk(clause)
            if isinstance(n, ast.Raise)
        ]
    if not path.startswith(ASYNC_PLACES):
        found += [
            (n.lineno, "async is for watcher and feed only") for n in ast.walk(tree) if isinstance(n, ASYNC_SYNTAX)
        ]
    return [f"{path}:{line}: {text}" for line, text in sorted(found)]


def sources() -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix() for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")
    )


def test_every_package_is_there():
    assert {path.partition("/")[0] for path in sources()} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", sources())
def test_the_import_rule(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_the_exceptions_are_still_needed():
    needless = [
        path
        for path in KERNEL_EXCEPTIONS
        if not KERNEL_ONLY & {one.top for one in imports(path, ast.parse((ROOT / path).read_text(encoding="utf-8")))}
    ]
    assert needless == []


@pytest.mark.parametrize(
    ("path", "source", "told"),
    [
        ("comparer/x.py", "import snapshotter.table", "may not import snapshotter.table"),
        ("comparer/x.py", "from feed.pages import Page", "may not import feed.pages"),
        ("comparer/x.py", "def f():\n    import os", "2: comparer is pure: no os"),
        ("comparer/x.py", "from time import time", "comparer is pure: no time"),
        ("comparer/x.py", "import sqlite3, socket", "comparer is pure: no socket"),
        ("comparer/x.py", "import subprocess as s", "comparer is pure: no subprocess"),
        ("snapshotter/x.py", "import feed", "may not import feed"),
        ("snapshotter/backends/x.py", "from watcher import triggers", "may not import watcher"),
        ("feed/x.py", "if True:\n    from snapshotter.linux import statx", "2: feed may not import snapshotter.linux"),
        ("feed/x.py", "import importlib\nimportlib.import_module('watcher.cli')", "may not import watcher.cli"),
        ("feed/x.py", "__import__('wat' + 'cher')", "computed"),
        ("snapshotter/live.py", "import ctypes", "ctypes is for snapshotter/linux/"),
        ("watcher/sources/fanotify.py", "from fcntl import ioctl", "fcntl is for snapshotter/linux/"),
        ("snapshotter/x.py", "async def f(): ...", "async is for watcher and feed only"),
        ("snapshotter/linux/x.py", "import asyncio", "asyncio is for watcher and feed only"),
        ("feed/x.py", "try:\n    f()\nexcept* OSError as e:\n    raise ValueError from None", "4: raised in `except*`"),
        ("comparer/x.py", "def f():\n    async def g():\n        await h()", "3: async is for watcher and feed only"),
    ],
)
def test_a_violation_is_seen(path, source, told):
    assert any(told in text for text in violations(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("comparer/x.py", "import struct\nfrom .model import Ident\nfrom comparer import errors"),
        (
            "snapshotter/backends/x.py",
            "import os\nfrom ..linux import btrfs\nfrom . import base\nfrom comparer.model import Ident",
        ),
        ("snapshotter/linux/x.py", "import ctypes, fcntl"),
        ("feed/x.py", "import asyncio\nasync def f(): await g()"),
        ("watcher/x.py", "import feed, snapshotter.table, comparer"),
    ],
)
def test_what_is_allowed_is_not_reported(path, source):
    assert violations(path, source) == []


def test_relative_imports_are_resolved():
    source = "from . import a\nfrom .b import c\nfrom ..d import e"
    found = [one.module for one in imports("snapshotter/linux/x.py", ast.parse(source))]
    assert found == ["snapshotter.linux", "snapshotter.linux.b", "snapshotter.d"]
