"""A consumer of the feed, written from the text of the wire format alone: JSON in, an exact model of the partition out.

It knows nothing but the pages. It is strict: a page out of order, a gap, a change that does not fit what went before it, is
an error. Pages that arrive again are dropped by their key, but must be what they were.
"""

import base64
import json
import os
from dataclasses import dataclass, field

import oracle


class FeedError(AssertionError):
    """The feed broke one of its promises."""


def name(change: dict, key: str) -> bytes | None:
    """A name's bytes: `<key>_b64` where there is one, else the text of `key`."""
    if f"{key}_b64" in change:
        return base64.b64decode(change[f"{key}_b64"], validate=True)
    return None if change.get(key) is None else change[key].encode()


def check(condition: bool, what: str) -> None:
    if not condition:
        raise FeedError(what)


@dataclass
class Thing:
    """An object of the file system, whatever its names."""

    type: str
    after: dict
    target: bytes | None


@dataclass
class Consumer:
    """`take` pages in the order of arrival; `compare` what they make with the partition.

    `diffs`: the complete diffs applied, as (seq, trigger, changes). `head`: (epoch, seq) of the last one.
    """

    head: tuple[str, int] | None = None
    diffs: list[dict] = field(default_factory=list)
    things: dict[str, Thing] = field(default_factory=dict)
    names: dict[bytes, str] = field(default_factory=dict)
    _seen: dict[tuple[str, int, int], tuple[int, list]] = field(default_factory=dict)
    _open: list[dict] = field(default_factory=list)
    _before: dict[str, dict] = field(default_factory=dict)
    _root: str | None = None
    duplicates: int = 0

    # ---- pages

    def feed(self, payloads) -> None:
        for payload in payloads:
            self.take(json.loads(payload))

    def take(self, page: dict) -> None:
        check(page["format"] == "snapfeed/1", f"format {page['format']}")
        key = (page["epoch"], page["seq"], page["page"])
        content = (page["pages"], page["changes"])
        if key in self._seen:
            check(self._seen[key] == content, f"{key} was used again for something else")
            self.duplicates += 1
            return
        check(1 <= page["page"] <= page["pages"], f"page {page['page']} of {page['pages']}")
        if page["page"] == 1:
            check(not self._open, f"{key} begins before the diff ahead of it is complete")
            self._begins(page)
        else:
            check(bool(self._open), f"{key}, but not the page before it")
            last = self._open[-1]
            expected = (last["epoch"], last["seq"], last["page"] + 1, last["pages"])
            check((*key, page["pages"]) == expected, f"{key} of {page['pages']} instead of {expected}")
            same = ("parent", "time_ns", "trigger", "volume", "consistency", "snapshot", "uuid")
            check(all(page[k] == last[k] for k in same), f"{key}: another envelope than the page before")
        self._seen[key] = content
        self._open.append(page)
        if page["page"] == page["pages"]:
            pages, self._open = self._open, []
            self._apply([change for one in pages for change in one["changes"]])
            self.head = (page["epoch"], page["seq"])
            self.diffs.append({**page, "changes": [change for one in pages for change in one["changes"]]})

    def _begins(self, page: dict) -> None:
        if page.get("baseline"):
            check(page["parent"] is None, "a baseline with a parent")
            check(self.head is None or self.head[0] != page["epoch"], "a second baseline of the same epoch")
            self.things, self.names, self._root = {}, {}, None
        else:
            expected = self.head
            found = (page["epoch"], page["parent"])
            check(expected == found, f"a gap: holding {expected}, got a diff from {found} to {page['seq']}")
            check(page["seq"] > page["parent"], f"seq {page['seq']} after {page['parent']}")

    # ---- changes

    def _apply(self, changes: list[dict]) -> None:
        self._before = {ident: thing.after for ident, thing in self.things.items()}
        for change in changes:
            try:
                self._one(change)
            except (FeedError, KeyError) as error:
                raise FeedError(f"{error!r} at {change}") from error

    def _one(self, change: dict) -> None:
        path, ident, op = name(change, "path"), change["id"], change["op"]
        check(path == b"" or path.split(b"/")[0] != b".snapfeed", "a change of the system directory")
        check("\x00" not in change["path"], "a NUL in a path")
        if path == b"":
            self._root_changes(change, ident)
            return
        if op == "create":
            check(path not in self.names, "its name is taken")
            check(ident not in self.things, "its id lives already")
            check(change["before"] is None, "created, but it was something before")
            self._inside(path)
            self.things[ident] = Thing(change["type"], {}, name(change, "target"))
            self.names[path] = ident
        elif op == "link":
            check(path not in self.names, "its name is taken")
            check(self.names.get(name(change, "from")) == ident, "`from` is not one of its names")
            self._inside(path)
            self.names[path] = ident
        elif op in ("unlink", "delete"):
            check(self.names.get(path) == ident, "it has not that name")
            check(not any(p.startswith(path + b"/") for p in self.names), "it is not empty")
            del self.names[path]
            lives = ident in self.names.values()
            check(lives == (op == "unlink"), "other names" if lives else "its last name")
            if op == "delete":
                check(change["after"] is None, "deleted, but it is something after")
                self._had(ident, change)
                del self.things[ident]
                return
        elif op == "rename":
            self._rename(name(change, "from"), path, ident)
        else:
            check(op == "modify", f"op {op}")
            check(self.names.get(path) == ident, "it has not that name")
        thing = self.things[ident]
        check(thing.type == change["type"], f"type {change['type']} of what is a {thing.type}")
        if change["after"] is not None:
            check(op != "modify" or change["before"] is not None, "modified, and nothing before")
            self._had(ident, change)
            thing.after = change["after"]

    def _root_changes(self, change: dict, ident: str) -> None:
        allowed = ("modify", "create") if self._root is None else ("modify",)
        check(change["op"] in allowed, "the root can only be modified")
        check(change["type"] == "dir", "a root that is no directory")
        self._root = self._root or ident
        check(self._root == ident, "another root")
        self.names[b""] = ident
        self.things[ident] = Thing("dir", change["after"], None)

    def _had(self, ident: str, change: dict) -> None:
        """`before` is what the object was as of the diff's parent, whatever this diff said of it already."""
        if change["before"] is not None:
            # `blocks` is the file system's bookkeeping and changes without a change: delayed or speculative allocation
            known = {**self._before[ident], "blocks": change["before"]["blocks"]}
            check(change["before"] == known, f"`before` is not what it was: {known}")

    def _rename(self, old: bytes, new: bytes, ident: str) -> None:
        check(self.names.get(old) == ident, "`from` is not its name")
        check(new not in self.names, "its new name is taken")
        check(not new.startswith(old + b"/"), "a directory inside itself")
        self._inside(new)
        for path in [p for p in self.names if p == old or p.startswith(old + b"/")]:
            self.names[new + path[len(old) :]] = self.names.pop(path)

    def _inside(self, path: bytes) -> None:
        parent = path.rpartition(b"/")[0]
        if parent:
            check(parent in self.names, f"no directory {parent!r}")
            check(self.things[self.names[parent]].type == "dir", f"{parent!r} is no directory")

    # ---- judging

    def state(self) -> dict[bytes, dict]:
        """What a walk of the partition should find."""
        return {path: self._described(ident) for path, ident in self.names.items()}

    def _described(self, ident: str) -> dict:
        thing = self.things[ident]
        after = thing.after
        found = {"type": thing.type, "target": thing.target, "rdev": None, "ino": int(ident.split(".", maxsplit=1)[0])}
        found |= {key: after[key] for key in ("mode", "uid", "gid", "nlink")}
        found |= {key: int(after[key]) for key in ("size", "mtime_ns", "ctime_ns")}
        found["xattrs"] = {key: base64.b64decode(value) for key, value in after.get("xattrs", {}).items()}
        for key, value in after.get("xattrs_b64", {}).items():
            found["xattrs"][os.fsdecode(base64.b64decode(key))] = base64.b64decode(value)
        if thing.type in ("char", "block"):
            found["rdev"] = int(after["rdev"])
        return found

    def compare(self, top) -> None:
        """Raises FeedError where the model differs from a walk of `top`. The root counts once the feed told of it."""
        walked, held = oracle.walk(top), self.state()
        if b"" not in held:
            del walked[b""]
        for path in sorted(walked.keys() | held.keys()):
            there, here = walked.get(path), held.get(path)
            # the root's size, links and change time are also the system directory's doing
            if there != here and not (path == b"" and _but_system(there) == _but_system(here)):
                differs = sorted(k for k in there if there[k] != here[k]) if there and here else "exists in one only"
                raise FeedError(f"{path!r} differs ({differs}): on disk {there}, by the feed {here}")
        links: dict[int, set[bytes]] = {}
        for path, entry in walked.items():
            links.setdefault(entry["ino"], set()).add(path)
        for names in links.values():
            check(len({self.names[p] for p in names}) == 1, f"one object on disk, several by the feed: {names}")


def _but_system(entry: dict | None) -> dict | None:
    """The root without what the system directory does to it."""
    return None if entry is None else {k: entry[k] for k in ("type", "mode", "uid", "gid", "mtime_ns", "ino", "xattrs")}
