"""Exports: the two lists against random trees, and the commands against a control socket that speaks the contract."""

import argparse
import contextlib
import json
import os
import pty
import socketserver
import subprocess
import threading

import orjson
import pytest
from daemon_process import CLI, ROOT, environment, snapfeed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from partitions import tmpfs
from test_compare import operated
from trees import Tree, attr

from comparer.compare import baseline, compare
from comparer.errors import DamageError, OperatorError
from comparer.model import Change, FileType, Ident, Name, Op
from feed.around import Around
from feed.encode import encode_change
from feed.export import AROUND, Export, separated
from feed.removal import Outcome, Removal
from watcher import command_export

EXAMPLES = int(os.environ.get("SNAPFEED_EXAMPLES", "150"))


@st.composite
def pairs(draw):
    old = Tree()
    draw(operated(old, 0, 25))
    new = old.copy()
    draw(operated(new, 0, 15))
    return old, new


def exported(old, new, *, limit=3):
    changes = [encode_change(c) for c in compare(old, new, set(old.objects) | set(new.objects))]
    around, export = Around(), Export(baseline=False)
    around.see(changes)
    for change in changes:
        export.add(change)
    while (entries := around.step(new, limit)) is not None:
        for entry in entries:
            export.add_around(entry)
    return export.lists()


def remove(state, path):
    for below in [p for p in state if p == path or p.startswith(path + b"/")]:
        del state[below]


def copy(state, path, new):
    """What a tool does with one path; it cannot put a file where a directory is that holds something."""
    parent = path.rpartition(b"/")[0]
    assert state[parent][1].type is FileType.DIR
    if new[path][1].type is not FileType.DIR:
        assert not any(p.startswith(path + b"/") for p in state), path
    state[path] = new[path]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(pairs(), st.data())
def test_removing_and_copying_makes_the_new_tree(pair, data):
    before, after = (tree.by_path() for tree in pair)
    lists = exported(*pair)
    stop = data.draw(st.integers(0, len(lists.changed)))
    state = dict(before)
    for steps in (stop, len(lists.changed)):  # interrupted once, and done again from the beginning
        for entry in lists.deleted:
            remove(state, entry.path)
        for entry in lists.changed[:steps]:
            copy(state, entry.path, after)
    assert state == after


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(pairs())
def test_the_lists_hold_no_more_than_they_must(pair):
    before, after = (tree.by_path() for tree in pair)
    lists = exported(*pair)
    changed = [entry.path for entry in lists.changed]
    assert len(set(changed)) == len(changed)
    assert changed == sorted(changed, key=lambda p: p.split(b"/") if p else [])
    differing = {p for p in after if before.get(p) != after[p]}
    needed = differing | {p.rpartition(b"/")[0] for p in differing}
    links = {}
    for path, (ident, _) in after.items():
        links.setdefault(ident, set()).add(path)
    touched = {after[p][0] for p in changed}
    beside = {p for ident, paths in links.items() if ident in touched and len(paths) > 1 for p in paths}
    beside |= {p.rpartition(b"/")[0] for p in beside}
    assert differing <= set(changed) <= needed | beside
    for entry in lists.deleted:
        now = after.get(entry.path)
        assert entry.path in before
        assert now is None or now[0] != before[entry.path][0]
        assert not any(entry.path.startswith(other.path + b"/") for other in lists.deleted)
    gone = [p for p in before if p not in after]
    assert all(any(p == e.path or p.startswith(e.path + b"/") for e in lists.deleted) for p in gone)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(pairs())
def test_a_baseline_is_everything(pair):
    export = Export(baseline=True)
    for change in baseline(pair[1]):
        export.add(encode_change(change))
    lists = export.lists()
    assert sorted(e.path for e in lists.changed) == sorted(pair[1].by_path())
    assert lists.deleted == []


def tree(*paths):
    """A tree with these paths; those that end with a slash are directories. Gives it and the identities."""
    made, known = Tree(), {b"": Tree().root}
    for path in paths:
        above, _, name = path.rstrip(b"/").rpartition(b"/")
        kind = FileType.DIR if path.endswith(b"/") else FileType.FILE
        known[path.rstrip(b"/")] = made.create(known[above], name, kind)
    return made, known


def test_a_renamed_directory_brings_along_what_is_in_it():
    old, _ = tree(b"d/", b"d/e/", b"d/e/f", b"other")
    new = old.copy()
    new.rename(Name(old.root, b"d"), Name(old.root, b"n"))
    lists = exported(old, new)
    assert [(e.path, e.type, e.op) for e in lists.changed] == [
        (b"", "dir", AROUND), (b"n", "dir", "rename"), (b"n/e", "dir", AROUND), (b"n/e/f", "file", AROUND),
    ]  # fmt: skip
    assert [(e.path, e.type, e.op) for e in lists.deleted] == [(b"d", "dir", "rename")]


def test_a_directory_in_the_place_of_another_is_removed_first():
    """Nothing tells what was in the one that left: all of it goes, and all of the other comes."""
    old, _ = tree(b"a/", b"a/old", b"b/", b"b/new")
    new = old.copy()
    new.exchange(Name(old.root, b"a"), Name(old.root, b"b"))
    lists = exported(old, new)
    assert [e.path for e in lists.deleted] == [b"a", b"b"]
    assert [e.path for e in lists.changed] == [b"", b"a", b"a/new", b"b", b"b/old"]


def test_a_file_in_the_place_of_another_is_just_copied():
    old, _ = tree(b"a", b"b")
    new = old.copy()
    new.rename(Name(old.root, b"b"), Name(old.root, b"a"))
    lists = exported(old, new)
    assert [e.path for e in lists.deleted] == [b"b"]
    assert [e.path for e in lists.changed] == [b"", b"a"]


def test_every_name_of_a_changed_file_is_listed():
    old, known = tree(b"a", b"d/", b"d/e/")
    old.link(known[b"a"], Name(known[b"d/e"], b"b"))
    new = old.copy()
    new.objects[known[b"a"]] = attr(nlink=2, mtime_ns=7)
    assert [e.path for e in exported(old, new).changed] == [b"", b"a", b"d/e", b"d/e/b"]


def test_what_lies_in_a_directory_follows_it_at_once():
    """Byte by byte `a-` would come between `a` and `a/x`: who sets a directory's times on leaving it is misled."""
    old, _ = tree()
    new, _ = tree(b"a-", b"a/", b"a/x")
    assert [e.path for e in exported(old, new).changed] == [b"", b"a", b"a/x", b"a-"]


def test_names_are_bytes():
    names = [b"-rf", b"#x", b";y", b"new\nline", b"\xff\xfe", b"a b", b"*", b"x" * 255]
    old, _ = tree()
    new, _ = tree(*names)
    assert sorted(b"".join(separated(exported(old, new).changed)).split(b"\0")) == sorted([b"", b".", *names])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (Change(Op.CREATE, Ident(9, 0), FileType.FILE, b"f", after=attr()), "there already"),
        (Change(Op.DELETE, Ident(9, 0), FileType.DIR, b"", before=attr()), "the root"),
        (Change(Op.MODIFY, Ident(9, 0), FileType.FILE, b"d/x", before=attr(), after=attr()), "does not follow"),
    ],
)
def test_what_cannot_be_followed_is_damage(change, told):
    export = Export(baseline=False)
    export.add(encode_change(Change(Op.CREATE, Ident(2, 0), FileType.FILE, b"f", after=attr())))
    export.add(encode_change(Change(Op.CREATE, Ident(3, 0), FileType.DIR, b"d", after=attr())))
    with pytest.raises(DamageError, match=told):
        export.add(encode_change(change))


@pytest.mark.parametrize("document", [{}, {"op": "create", "type": "file"}, {"op": "x", "type": "file", "path": "f"}])
def test_what_is_no_change_is_damage(document):
    with pytest.raises(DamageError):
        Export(baseline=False).add(document)


# ---- the commands


class Fake:
    """A control socket: the contract's answers for a partition without a daemon."""

    def __init__(self, socket, mount):
        self.socket, self.mount = socket, mount
        self.acknowledged, self.head, self.epoch, self.snapshots = {}, 41, "e-1", True
        self.changes, self.around, self.asked = [], [], []

    def answer(self, document):
        verb = document["verb"]
        self.asked.append(document)
        if verb == "ack":
            self.acknowledged[document["consumer"]] = document["seq"]
            yield {key: document[key] for key in ("partition", "consumer", "epoch", "seq")}
            return
        since = document.get("from", self.acknowledged.get(document.get("consumer")))
        yield {
            "partition": "data", "mount": str(self.mount), "epoch": self.epoch, "from": since, "seq": self.head,
            "snapshot": f".snapfeed/snapshots/{self.head}" if self.snapshots else None, "consistency": "subvolume",
            "baseline": since is None, "later": "ignored",
        }  # fmt: skip
        yield self.changes
        if self.around is not None:
            yield {"around": self.around}

    def take(self, seq):
        """A snapshot, with a tree of its own."""
        self.head = seq
        (self.mount / f".snapfeed/snapshots/{seq}").mkdir(parents=True)

    def run(self, *arguments, **options):
        return snapfeed(*arguments, env=environment(SNAPFEED_SOCKET=str(self.socket)), **options)


@pytest.fixture
def fake(tmp_path):
    made = Fake(tmp_path / "control.sock", tmp_path / "mount")

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            document = orjson.loads(self.rfile.readline())
            with contextlib.suppress(ConnectionError):  # who wants a baseline instead goes away after the beginning
                for data in made.answer(document):
                    self.wfile.write(orjson.dumps({"id": document["id"], "more": True, "data": data}) + b"\n")
                self.wfile.write(orjson.dumps({"id": document["id"], "status": "ok", "error": None}) + b"\n")

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    with Server(str(made.socket), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        made.take(41)
        made.acknowledged["c"] = 40
        made.changes = [
            encode_change(Change(Op.CREATE, Ident(2, 0), FileType.FILE, b"new\xff\n", after=attr())),
            encode_change(Change(Op.DELETE, Ident(3, 0), FileType.FILE, b"-gone", before=attr())),
        ]
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()


def test_lists_are_printed(fake):
    env = environment(SNAPFEED_SOCKET=str(fake.socket))
    raw = [*CLI, "export", "data", "--consumer", "c", "--changed"]
    assert (
        subprocess.run(raw, cwd=ROOT, env=env, timeout=60, check=True, capture_output=True).stdout == b".\0new\xff\n\0"
    )
    done = fake.run("export", "data", "--consumer", "c", "--deleted")
    assert done.stderr == (
        "snapfeed export: data: snapshot 40 to snapshot 41; when done: snapfeed ack data --consumer c --seq 41 --epoch e-1\n"
    )
    assert fake.run("export", "data", "--since", "40", "--deleted", "--null").stdout == "-gone\0"
    assert fake.asked[-1]["from"] == 40
    assert "consumer" not in fake.asked[-1]
    assert fake.asked[-1]["around"] is True
    found = [json.loads(line) for line in fake.run("export", "data", "--consumer", "c", "--json").stdout.splitlines()]
    assert found == [
        {"path": "", "deleted": False, "type": "dir", "op": "around"},
        {"path": "new\\xff\n", "path_b64": "bmV3/wo=", "deleted": False, "type": "file", "op": "create"},
        {"path": "-gone", "deleted": True, "type": "file", "op": "delete"},
    ]


def test_a_terminal_gets_no_byte_of_a_name_unescaped(fake):
    leader, follower = pty.openpty()
    done = subprocess.run(
        [*CLI, "export", "data", "--consumer", "c", "--changed"], stdout=follower, stderr=subprocess.DEVNULL, cwd=ROOT,
        env=environment(SNAPFEED_SOCKET=str(fake.socket)), timeout=60, check=False,
    )  # fmt: skip
    os.close(follower)
    assert done.returncode == 0
    assert os.read(leader, 1000) == b".\r\n$'new\\xff\\n'\r\n"
    os.close(leader)


def test_a_directory_is_written_and_acknowledged(fake, tmp_path):
    out = tmp_path / "out"
    fake.run("export", "data", "--consumer", "c", "--output", out)
    assert (out / "changed").read_bytes() == b".\0new\xff\n\0"
    assert (out / "deleted").read_bytes() == b"-gone\0"
    assert os.readlink(out / "tree") == str(fake.mount / ".snapfeed/snapshots/41")
    assert json.loads((out / "position.json").read_text()) == {
        "partition": "data", "epoch": "e-1", "from": 40, "seq": 41, "snapshot": ".snapfeed/snapshots/41", "baseline": False,
        "mount": str(fake.mount), "consistency": "subvolume", "consumer": "c",
    }  # fmt: skip
    assert sorted(p.name for p in out.iterdir()) == ["changed", "deleted", "position.json", "tree"]
    other = fake.run("ack", "data", "--consumer", "d", "--position", out / "position.json", check=False)
    assert (other.returncode, "made for the consumer 'c'" in other.stderr) == (1, True)
    fake.run("ack", "data", "--consumer", "c", "--position", out / "position.json")
    assert fake.acknowledged["c"] == 41
    assert not (out / "position.json").exists()


def position(out):
    found = json.loads((out / "position.json").read_text())
    return found["from"], found["seq"]


def test_what_was_not_acknowledged_is_left_as_it_is(fake, tmp_path):
    out = tmp_path / "out"
    export = ("export", "data", "--consumer", "c", "--output", out)
    fake.run(*export)
    lists = (out / "changed").read_bytes()
    fake.take(42)
    fake.changes = []
    assert "unfinished" in fake.run(*export).stderr
    assert (position(out), (out / "changed").read_bytes()) == ((40, 41), lists)
    fake.run("ack", "data", "--consumer", "c", "--position", out / "position.json")
    fake.run(*export)
    assert (position(out), (out / "changed").read_bytes()) == ((41, 42), b"")


@pytest.mark.parametrize("by", ["its tree is gone", "somebody else acknowledged", "another epoch"])
def test_what_cannot_be_done_again_is_followed_by_everything(fake, tmp_path, by):
    """Newer lists would not undo what the unfinished run did; and a baseline that is not finished is no diff's beginning."""
    out = tmp_path / "out"
    export = ("export", "data", "--consumer", "c", "--output", out)
    fake.run(*export)
    fake.take(42)
    if by == "its tree is gone":
        (fake.mount / ".snapfeed/snapshots/41").rmdir()
    elif by == "another epoch":
        fake.epoch = "e-2"
    else:
        fake.acknowledged["c"] = 39
    fake.run(*export)
    assert position(out) == (None, 42)
    fake.take(43)
    fake.run(*export)
    assert position(out) == (None, 43)
    fake.run("ack", "data", "--consumer", "c", "--position", out / "position.json")
    fake.take(44)
    fake.run(*export)
    assert position(out) == (43, 44)


def test_one_acknowledged_by_number_is_over(fake, tmp_path):
    out = tmp_path / "out"
    fake.run("export", "data", "--consumer", "c", "--output", out)
    fake.run("ack", "data", "--consumer", "c", "--seq", "41", "--epoch", "e-1")
    fake.take(42)
    fake.run("export", "data", "--consumer", "c", "--output", out)
    assert position(out) == (41, 42)


def test_a_live_tree_is_the_mount(fake, tmp_path):
    fake.snapshots = False
    fake.run("export", "data", "--consumer", "c", "--output", tmp_path / "out")
    assert os.readlink(tmp_path / "out/tree") == f"{fake.mount}/"


def test_a_baseline_on_demand_is_kept_for_the_consumer(fake, tmp_path):
    fake.run("export", "data", "--consumer", "c", "--baseline", "--output", tmp_path / "out")
    assert position(tmp_path / "out") == (None, 41)
    assert [document.get("consumer") for document in fake.asked] == ["c", None]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("export", "data"), 1, "say what to print"),
        (("export", "data", "--output", "x", "--changed"), 1, "--output writes both"),
        (("export", "data", "--changed", "--deleted"), 1, "mixed up"),
        (("export", "data", "--changed", "--baseline", "--since", "1"), 1, "one of them"),
        (("export", "data", "--changed", "--consumer", "a/b"), 2, "no name for a topic"),
        (("ack", "data", "--consumer", "c"), 1, "--seq and --epoch"),
        (("ack", "data", "--consumer", "c", "--position", "/nonexistent/p"), 1, "no such file"),
        (("ack", "data", "--consumer", "c", "--position", "/dev/null"), 1, "is no position"),
        (("ack", "data", "--consumer", "c", "--seq", "1", "--position", "/dev/null"), 1, "says it all"),
    ],
)
def test_wrong_calls(fake, arguments, code, told):
    done = fake.run(*arguments, check=False)
    assert (done.returncode, told in done.stderr) == (code, True), done.stderr


def test_answers_that_say_too_little_are_an_error_and_write_nothing(fake, tmp_path):
    fake.around = None
    done = fake.run("export", "data", "--consumer", "c", "--output", tmp_path / "out", check=False)
    assert (done.returncode, "renamed directories" in done.stderr) == (1, True)
    assert not (tmp_path / "out").exists()


# ---- removing what is listed


@pytest.fixture
def copy_of(tmp_path):
    """A copy, and beside it what nobody may touch: the copy holds a link to it where a directory was."""
    top, victim = tmp_path / "copy", tmp_path / "victim"
    for directory in (top / "d/e", victim / "etc"):
        directory.mkdir(parents=True)
    (victim / "etc/passwd").write_text("precious")
    for file in ("d/e/f", "d/g", "plain"):
        (top / file).write_text(file)
    (top / "x").symlink_to(victim)
    (top / "d/inside").symlink_to(victim)
    return top


def listing(*paths):
    return b"".join(path + b"\0" for path in paths)


def remove_listed(top, *paths, arguments=(), data=None):
    """(exit code, what is left, documents by path, stderr)"""
    done = subprocess.run(
        [*CLI, "remove-listed", *arguments, "--json", os.fspath(top), "-"],
        input=listing(*paths) if data is None else data, cwd=ROOT, env=environment(), timeout=60, check=False,
        capture_output=True,
    )  # fmt: skip
    documents = {d["path"]: d for d in map(json.loads, done.stdout.splitlines())}
    left = {os.path.relpath(os.path.join(at, n), top) for at, ds, fs in os.walk(top) for n in ds + fs}
    return done.returncode, left, documents, done.stderr.decode()


def test_nothing_behind_a_symbolic_link_is_removed(copy_of, tmp_path):
    for _ in range(2):
        code, left, told, said = remove_listed(copy_of, b"x/etc", b"x/etc/passwd", b"d/e/f")
        assert (code, left) == (0, {"d", "d/e", "d/g", "d/inside", "plain", "x"})
        assert {(p, told[p]["outcome"], told[p].get("at")) for p in ("x/etc", "x/etc/passwd")} == {
            ("x/etc", "link", "x"), ("x/etc/passwd", "link", "x"),
        }  # fmt: skip
        assert "x/etc: left alone, x is a symbolic link\n" in said
    assert (tmp_path / "victim/etc/passwd").read_text() == "precious"


def test_a_listed_link_goes_and_not_what_it_points_to(copy_of, tmp_path):
    code, left, told, _ = remove_listed(copy_of, b"x", b"d", b"never", b"plain/was/a/directory")
    assert (code, left) == (0, {"plain"})
    assert {path: document["outcome"] for path, document in told.items()} == {
        "x": "removed", "d": "removed", "never": "gone", "plain/was/a/directory": "gone",
    }  # fmt: skip
    assert (tmp_path / "victim/etc/passwd").read_text() == "precious"


@pytest.mark.parametrize(
    "data",
    [
        listing(b"plain", b"../victim"), listing(b"plain", b"d/../../victim"), listing(b"plain", b"/etc"), listing(b"plain", b""),
        listing(b"plain", b"d//e"), listing(b"plain", b"d/"), listing(b"plain", b"."), listing(b"plain", b"./d"),
        listing(b"plain", b".snapfeed/system.db"), listing(b"plain", b"y" * 256), b"plain\0d/e", b"plain",
    ],
)  # fmt: skip
def test_a_list_that_leads_astray_or_is_cut_off_removes_nothing(copy_of, data):
    before = remove_listed(copy_of, data=b"")[1]
    code, left, told, said = remove_listed(copy_of, data=data)
    assert (code, left, told) == (1, before, {})
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1


def test_a_dry_run_removes_nothing(copy_of):
    before = remove_listed(copy_of, data=b"")[1]
    (copy_of / "new\nline\x1b").mkdir()
    (copy_of / "deleted").write_bytes(listing(b"new\nline\x1b", b"d", b"x/etc", b"never"))
    done = snapfeed("remove-listed", "--dry-run", copy_of, copy_of / "deleted")
    assert done.stdout == "$'new\\nline\\e'\nd\n"
    assert "2 would be removed, 1 gone already, 1 behind a symbolic link" in done.stderr
    assert remove_listed(copy_of, data=b"")[1] == {*before, "deleted", "new\nline\x1b"}
    snapfeed("remove-listed", copy_of, copy_of / "deleted")
    assert remove_listed(copy_of, data=b"")[1] == {"deleted", "plain", "x"}


def test_no_depth_is_too_deep(tmp_path):
    """Deeper than paths may be long, than descriptors may be open, than Python recurses; and broad on every level."""
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(3000):
        for name in (b"deep", b"side"):
            os.mkdir(name, dir_fd=fd)
        os.close(os.open(b"file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        below = os.open(b"deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    with Removal(os.fsencode(tmp_path)) as removal:
        assert removal.remove(b"deep").outcome is Outcome.REMOVED
    assert sorted(os.listdir(tmp_path)) == ["file", "side"]


@pytest.mark.kernel
def test_no_other_file_system_is_entered(tmp_path):
    """Neither as what is listed, nor above it, nor below it; what else is listed goes."""
    (tmp_path / "d").mkdir()
    with tmpfs(tmp_path / "d") as mounted:
        (mounted / "kept").mkdir()
        (tmp_path / "other").touch()
        code, left, told, said = remove_listed(tmp_path, b"d", b"d/tmpfs", b"d/tmpfs/kept", b"other")
        assert (code, left) == (1, {"d", "d/tmpfs", "d/tmpfs/kept"})
        assert {d["at"] for p, d in told.items() if p != "other"} == {"d/tmpfs"}
        assert "3 could not be removed" in said
        assert "another file system is mounted there" in said


def test_a_copy_that_is_none(tmp_path):
    for wrong in ((tmp_path / "none", "/dev/null"), ("/dev/null", "/dev/null"), (tmp_path, tmp_path / "none")):
        done = snapfeed("remove-listed", *wrong, check=False)
        assert done.returncode == 1
        assert "give the" in done.stderr


def test_what_another_has_not_acknowledged_is_not_written_over(tmp_path):
    """Two consumers, one directory: the second is told so; and nobody acknowledges for somebody else."""
    position = {
        "partition": "data", "consumer": "nightly", "epoch": "e", "from": 3, "seq": 4, "snapshot": None, "mount": "/data",
        "consistency": "metadata", "baseline": False,
    }  # fmt: skip
    (tmp_path / "position.json").write_text(json.dumps(position))
    for other in ({"consumer": "other"}, {"consumer": None}, {"partition": "home"}):
        with pytest.raises(OperatorError, match="nightly"):
            command_export._refuse_others(os.fsencode(tmp_path), {**position, **other})
    command_export._refuse_others(os.fsencode(tmp_path), position)
    options = argparse.Namespace(
        position=str(tmp_path / "position.json"), seq=None, epoch=None, consumer="zz", socket="x"
    )
    with pytest.raises(OperatorError, match="was made for the consumer 'nightly'"):
        command_export.ack(options)


def test_a_further_name_of_what_lies_below_a_moved_directory_is_told():
    """A path tool makes the moved file anew; its name elsewhere must become the same file again."""
    tree = Tree()
    old = tree.create(tree.root, b"old", FileType.DIR)
    file = tree.create(old, b"f", FileType.FILE)
    tree.link(file, Name(tree.root, b"keep"))
    moved = tree.copy()
    moved.rename(Name(moved.root, b"old"), Name(moved.root, b"new"))
    changes = list(compare(tree, moved, set(tree.objects)))
    around = Around()
    around.see(encode_change(change) for change in changes)
    found = []
    while (entries := around.step(moved, 100)) is not None:
        found += [entry["path"] for entry in entries]
    assert {"new/f", "keep"} <= set(found)
