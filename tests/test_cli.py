"""The command `snapfeed` as a person meets it: what it refuses and how it says so, what it prints, its exit codes."""

import argparse
import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import unicodedata
from pathlib import Path

import pytest
from daemon_process import CLI, ROOT, adopt, daemon, environment, facts, snapfeed
from partitions import loop_device, partition, run, wait_until

from watcher import command_ask
from watcher.arguments import build
from watcher.cli import imported, main
from watcher.missing import explained

COMMANDS = ["format", "init", "run", "snapshot", "status", "snapshots", "diff", "tail", "check-config", "remove-listed"]
NOWHERE = ("--socket", "/nonexistent/control.sock")
HOSTILE = [
    b"new\nline",
    b"\x1b[31mred",
    b"\xff\xfe",
    b"-rf",
    b"\r",
    b"\x9b2J",
    b"\xc2\x9b2J",
    b"\x7f",
    "\u202etxt".encode(),
    b"$(id)",
]


def refused(*arguments, code=1, **options) -> str:
    """A command that must fail with `code`: what it says, which is no traceback, and nothing on stdout."""
    done = snapfeed(*arguments, check=False, **options)
    assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
    return done.stderr


def harmless(text: str) -> bool:
    """Nothing in it but line breaks and what a terminal shows as it is."""
    return all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for c in text)


# ---- no partition needed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"examples:\n  snapfeed {command}" in text
    assert max(map(len, text[text.index("examples:") :].splitlines())) <= 120


def test_every_command_can_be_imported():
    (commands,) = (action for action in build()._actions if isinstance(action, argparse._SubParsersAction))
    assert set(commands.choices) > set(COMMANDS)
    for made in commands.choices.values():
        assert callable(imported(made.get_default("run")))


def test_help_and_version(capsys):
    done = snapfeed("--help")
    assert {line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ")} >= set(COMMANDS)
    assert snapfeed("--version").stdout.split()[0] == "snapfeed"
    assert "Exit codes: 0 done" in " ".join(done.stdout.split())
    wrongly = (
        [],
        ["diff", "x", "3", "2"],
        ["replicate", "/nonexistent"],
        ["replicate", "/nonexistent", "--partition", "a b"],
        ["tail", "a+/b"],
        ["tail", "--consumer", "a b"],
        ["thresholds", "x", "--io-threshold", "64"],
    )
    for wrong in (
        *wrongly,
        ["nonsense"],
        ["snapshot", "--nonsense"],
        ["diff", "x", "one", "two"],
        ["format", "/dev/null"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "usage:" in captured.err


@pytest.mark.parametrize(
    ("option", "value"), [("--io-threshold", "12 parsecs"), ("--time-threshold", "12 parsecs"), ("--io-threshold", "0")]
)
@pytest.mark.parametrize("command", [["init", "/"], ["format", "/dev/null", "--fs", "xfs"]], ids=["init", "format"])
def test_a_threshold_that_is_none(command, option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, option, value])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert option in said
    assert repr(value) in said
    assert "such as" in said


def _explained(parser):
    """(command, argument) of what has no help text."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, made in action.choices.items():
                yield from ((name, *missing) for missing in _explained(made))
        elif not action.help:
            yield (action.dest,)


def test_every_argument_is_explained():
    assert list(_explained(build())) == []


def test_a_path_from_here_is_one_for_the_daemon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse = build().parse_args
    here = os.getcwd()
    for given, meant in (
        (".", here), ("..", os.path.dirname(here)), ("./a", f"{here}/a"), ("a/b/", f"{here}/a/b"), ("/x/", "/x"),
        ("data", "data"), ("5d17b2a4-28a0-49c9-91cf-e747ce1b052c:256", "5d17b2a4-28a0-49c9-91cf-e747ce1b052c:256"),
    ):  # fmt: skip
        assert parse(["verify", given]).partition == meant
        assert parse(["export", given]).partition == meant
        assert parse(["snapshot", given, given]).partitions == [meant, meant]


@pytest.mark.parametrize(
    ("module", "package"), [("orjson", "orjson"), ("paho", "paho-mqtt"), ("cachetools", "cachetools")]
)
def test_a_missing_package_is_named(module, package):
    script = f"import sys; sys.modules[{module!r}] = None; from watcher.cli import main; sys.exit(main(['run']))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=False,
        timeout=20,
        cwd=ROOT,
        env=environment(),
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in (f"package {package} ", "requirements/run.txt", sys.executable))


def test_what_is_no_package_is_a_bug_and_stays_a_traceback():
    for name in ("watcher.nonsense", "os.nonsense", None):
        with pytest.raises(ModuleNotFoundError):
            explained(ModuleNotFoundError("x", name=name))


def test_unmounted_comes_with_a_remedy(tmp_path):
    path = os.fspath(tmp_path / "c.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b'{"id":"x","status":"error","error":"data: unmounted: not mounted","data":null}\n')

        thread = threading.Thread(target=answer)
        thread.start()
        said = refused("snapshot", "data", "--socket", path)
        thread.join()
    assert "data: unmounted: not mounted; mount it" in said


def test_the_configuration_is_doubted(tmp_path):
    (tmp_path / "secret").write_text("x" * 16)
    (tmp_path / "secret").chmod(0o644)
    file = tmp_path / "c.toml"
    file.write_text(f'[commands]\nsecret_file = "{tmp_path}/secret"\n[[partition]]\nmount = "/nonexistent"\n')
    done = snapfeed("check-config", file)
    assert "good" in done.stdout
    assert all(
        word in done.stderr for word in ("commands.secret_file", "chmod 600", "partition[1].mount", "/nonexistent")
    )
    (found,) = facts("check-config", file)
    assert found["ok"] is True
    assert len([text for text in found["warnings"] if "amqtt" not in text]) == 2
    file.write_text("[nonsense]\n")
    done = snapfeed("check-config", file, "--json", check=False)
    assert done.returncode == 1
    assert "nonsense" in done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is False
    assert "nonsense" in found["error"]


@pytest.mark.parametrize("there", [True, False])
def test_the_embedded_broker_is_missed_where_it_is_needed(there, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("watcher.command_run.installed", lambda: there)
    for text, needed in (("", True), ('[broker]\nurl = "mqtt://x"\n', False)):
        (tmp_path / "c.toml").write_text(text)
        assert main(["check-config", os.fspath(tmp_path / "c.toml")]) == 0
        assert ("requirements/broker.txt" in capsys.readouterr().err) == (needed and not there)


def test_status_has_a_line_for_each_consumer(capsys):
    can = {"snapshots": "ficlone", "events": "fanotify", "meters": []}
    part = {
        "partition": "data", "state": "watching", "reason": None, "capabilities": can, "mount": "/data", "fs": "xfs", "uuid": "u",
        "head": 9, "epoch": "e", "thresholds": {"io": 1 << 20, "time": 60.0}, "volume": 0, "progress": None,
        "last": {"skipped": None, "seq": 9, "changes": 1, "seconds": 0.5, "trigger": "time"},
        "consumers": [{"consumer": f"c{n}", "lag": n} for n in range(3)], "backlog": 1, "journal": {"bytes": 5},
        "feed_error": None, "excluded": [], "notes": [],
    }  # fmt: skip
    broker = {"connected": True, "error": None, "embedded": False, "url": "mqtt://x"}
    command_ask._show_status(
        {"broker": broker, "version": "1", "host": "h", "since": 0, "resident": 1, "partitions": [part]}
    )
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if "consumers" in line)
    assert [line.split() for line in lines[at : at + 3]] == [
        ["consumers", "c0", "(0", "behind)"], ["c1", "(1", "behind)"], ["c2", "(2", "behind)"],
    ]  # fmt: skip
    assert any("1 change in" in line for line in lines)
    assert any("1 diff to publish" in line for line in lines)


def test_the_shipped_configuration_is_good():
    (found,) = facts("check-config", ROOT / "etc" / "snapfeed.toml")
    assert found["ok"] is True
    assert "good" in snapfeed("check-config", ROOT / "etc" / "snapfeed.toml").stdout


def test_a_wrong_configuration(tmp_path):
    file = tmp_path / "wrong.toml"
    for text, *words in (
        ("[defaults]\nio_treshold = 1\n", "defaults.io_treshold", "unknown", "io_threshold"),
        ('[defaults]\ntime_threshold = "12 parsecs"\n', "defaults.time_threshold", "12 parsecs", "60s"),
        ('[broker]\nurl = "http://x"\n', "http://x", "mqtt://"),
        ("[broker\n", "TOML"),
        ("[nonsense]\n", "nonsense", "unknown", "broker"),
    ):
        file.write_text(text)
        for command in (["check-config", file], ["run", "--config", file, *NOWHERE]):
            said = refused(*command)
            assert all(word in said for word in (str(file), *words)), said
    assert "readable" in refused("check-config", tmp_path / "missing.toml")
    assert "readable" in refused("check-config", tmp_path)


def test_no_daemon(tmp_path):
    for command in (["snapshot"], ["status"], ["status", "--json"]):
        said = refused(*command, "--socket", tmp_path / "none.sock")
        assert f"{tmp_path}/none.sock" in said
        assert "snapfeed run" in said
    for command in (["snapshots", "nowhere"], ["diff", "nowhere", "1", "2"]):
        said = refused(*command, "--socket", tmp_path / "none.sock")
        assert "'nowhere'" in said
        assert "mount point" in said
    said = refused("run", "--broker", "nonsense://here", *NOWHERE)
    assert "nonsense://here" in said
    assert "mqtt://" in said


@pytest.mark.parametrize("command", ["init", "run"])
def test_a_mount_point_that_is_none(command, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    socket = ["--socket", tmp_path / "c.sock"] if command == "run" else []
    for name, word in (("file", "not a directory"), ("directory", "not a mount point"), ("missing", "No such file")):
        said = refused(command, tmp_path / name, *socket)
        assert str(tmp_path / name) in said
        assert word in said
        assert "mount point" in said
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]
    assert os.listdir(tmp_path / "directory") == []


# ---- devices


@pytest.mark.kernel
def test_format(tmp_path):
    with loop_device(tmp_path / "image", "400M") as device:
        point = tmp_path / "mounted"
        try:
            assert "yes" in refused("format", device, "--fs", "xfs")  # nobody to ask
            assert "--label" in refused("format", device, "--fs", "xfs", "--yes", "--label", "much too long a label")
            assert "no label, not left mounted" in snapfeed("format", device, "--fs", "xfs", "--dry-run").stdout
            plan = ["--label", "edge", "--mount", point, "--io-threshold", "5MiB", "--dry-run"]
            said = snapfeed("format", device, "--fs", "xfs", *plan).stdout
            for word in ("would format", "400 MiB", "'edge'", f"mounted at {point}", "5 MiB", "60 s"):
                assert word in said
            (found,) = facts("format", device, "--fs", "xfs", *plan)
            assert (found["dry_run"], found["bytes"], found["label"]) == (True, 400 << 20, "edge")
            assert run("blkid", "-p", device, check=False).returncode == 2, "something was written"

            options = [
                "--io-threshold",
                "5MiB",
                "--time-threshold",
                "2min",
                "--label",
                "edge",
                "--mount",
                point,
                "--yes",
            ]
            (found,) = facts("format", device, "--fs", "xfs", *options)
            assert (found["fs"], found["mount"], found["device"]) == ("xfs", str(point), device)
            assert (found["io_threshold"], found["time_threshold"]) == (5 << 20, 120.0)
            assert found["uuid"] in run("blkid", "-p", device).stdout.decode()
            assert stat.S_IMODE((point / ".snapfeed").stat().st_mode) == 0o700
            assert (point / ".snapfeed" / "system.db").exists()
            (point / "source").write_bytes(b"x" * 8192)
            run("cp", "--reflink=always", point / "source", point / "clone")

            for force in ([], ["--force"], ["--force", "--yes"]):
                said = refused("format", device, "--fs", "btrfs", *force)
                assert "mounted" in said
                assert str(point) in said
            assert (point / "source").exists()
            said = refused("init", point)
            assert "adopted already" in said

            run("umount", point)
            said = refused("format", device, "--fs", "btrfs", "--yes")
            assert "xfs" in said
            assert "'edge'" in said
            assert "--force" in said
            assert b"xfs" in run("blkid", "-p", device).stdout

            (found,) = facts("format", device, "--fs", "btrfs", "--yes", "--force")
            assert (found["fs"], found["mount"]) == ("btrfs", None)
            assert f" {device} " not in Path("/proc/self/mounts").read_text()
            assert b"btrfs" in run("blkid", "-p", device).stdout
            run("mount", device, point)
            assert (point / ".snapfeed" / "system.db").exists()
        finally:
            run("umount", point, check=False)

    (tmp_path / "file").write_bytes(b"x" * 4096)
    assert "block device" in refused("format", tmp_path / "file", "--fs", "xfs", "--yes", "--force")
    assert (tmp_path / "file").read_bytes() == b"x" * 4096
    assert "block device" in refused("format", tmp_path / "missing", "--fs", "xfs", "--yes")


@pytest.mark.kernel
def test_init_and_run_ask_for_adoption(ext4):
    (ext4.path / "kept").write_text("x")
    said = refused("run", ext4.path, "--socket", ext4.path.parent / "c.sock")
    assert f"snapfeed init {ext4.path}" in said
    said = refused("snapshots", ext4.path, *NOWHERE)
    assert f"snapfeed init {ext4.path}" in said
    (found,) = facts("init", ext4.path)
    assert (found["fs"], found["io_threshold"], found["time_threshold"]) == ("ext4", 64 << 20, 60.0)
    said = refused("init", ext4.path)
    assert "adopted already" in said
    assert (ext4.path / "kept").read_text() == "x"
    assert snapfeed("snapshots", ext4.path, *NOWHERE).stdout == "no snapshots yet\n"
    assert facts("snapshots", found["uuid"], *NOWHERE) == []
    assert "none" in refused("diff", ext4.path, "1", "2", *NOWHERE)


# ---- another user

AS_NOBODY = """
import os, sys
from watcher import command_ask, command_disk, command_export, command_run, command_tail, command_verify
from watcher.cli import main
# imported before: Python's own files may be unreadable to others
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
sys.exit(main(sys.argv[1:]))
"""


def refused_to_nobody(*arguments) -> str:
    command = [sys.executable, "-c", AS_NOBODY, *arguments]
    done = subprocess.run(command, capture_output=True, check=False, timeout=20, cwd=ROOT, env=environment(), text=True)
    assert done.returncode == 1, (arguments, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.kernel
def test_no_permission():
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)  # where nobody may look; pytest's own directories are root's
        directory = Path(place)
        with partition("xfs", directory) as part:
            assert "root" in refused_to_nobody("init", part.path)
            assert os.listdir(part.path) == []
            adopt(part.path)
            for command in (["init", part.path], ["snapshots", part.path, *NOWHERE]):
                said = refused_to_nobody(*command)
                assert str(part.path) in said
                assert "root" in said, said
            (directory / "open").mkdir()
            (directory / "open").chmod(0o777)
            for socket in ("/run/snapfeed-of-root/c.sock", directory / "open" / "c.sock"):
                said = refused_to_nobody("run", part.path, "--broker", "mqtt://127.0.0.1:1", "--socket", socket)
                assert "root" in said, said
            with daemon(directory, part.path) as snapfeed:
                for command in (["snapshot"], ["status"], ["diff", part.path, "1", "2"]):
                    said = refused_to_nobody(*command, "--socket", snapfeed.socket)
                    assert str(snapfeed.socket) in said
                    assert "root" in said, said
            assert "mounted" in refused_to_nobody("format", part.device, "--fs", "xfs", "--force")
            part.umount()
            assert "root" in refused_to_nobody("format", part.device, "--fs", "xfs", "--force")


# ---- with a daemon


@pytest.mark.kernel
def test_what_is_printed(xfs, tmp_path):
    with daemon(tmp_path, xfs.path) as running:
        wait_until(lambda: running.partition()["head"], "the first snapshot")
        top = os.fsencode(xfs.path)
        for name in HOSTILE:
            with open(os.path.join(top, name), "wb"):
                pass
            os.symlink(name, os.path.join(top, b"link to " + name))
        head = running.snapshot()["seq"]
        os.rename(os.path.join(top, HOSTILE[0]), os.path.join(top, b"moved\n\x1b]0;title\x07"))
        last = running.snapshot()["seq"]
        label, uuid = (running.partition()[k] for k in ("partition", "uuid"))

        # status, snapshots
        (status,) = running.facts("status")
        assert (status["pid"], status["partitions"][0]["head"]) == (running.pid, last)
        shown = running.command("status").stdout
        assert all(str(word) in shown for word in (label, uuid, xfs.path, "watching", "fanotify", status["version"]))
        rows = running.facts("snapshots", label)
        assert [r["seq"] for r in rows] == [1, head, last]
        assert rows == running.facts("snapshots", xfs.path) == running.facts("snapshots", uuid)
        assert rows == running.facts("snapshots", f"{xfs.path}/") == facts("snapshots", f"{xfs.path}/", *NOWHERE)
        assert rows == facts("snapshots", xfs.path, *NOWHERE) == facts("snapshots", uuid, *NOWHERE)
        assert len(running.command("snapshots", label).stdout.splitlines()) == 3

        # diff: the same with and without the daemon
        changes = running.facts("diff", label, "1", str(last))
        assert changes == facts("diff", xfs.path, "1", str(last), *NOWHERE)
        assert {"\x9b2J", "\x7f", "\u202etxt"} <= {change["path"] for change in changes}
        exported = running.facts("export", label, "--since", "1")
        assert {"\x9b2J", "\x7f", "\u202etxt"} <= {one["path"] for one in exported}
        assert running.facts("verify", label)[-1]["disagreements"] == 0
        assert 0 < len(changes) <= sum(r["changes"] for r in rows if r["seq"] > 1)  # squashed: each object once
        shown = running.command("diff", label, "1", str(last)).stdout
        assert harmless(shown)
        assert len(shown.splitlines()) == len(changes)
        assert "$'moved\\n" in shown
        assert running.facts("diff", label, str(last), str(last)) == []
        empty = running.command("diff", label, str(last), str(last))
        assert (empty.stdout, empty.stderr) == ("", f"no changes from snapshot {last} to {last}\n")
        assert running.command("thresholds", label).stdout == f"{label}: io threshold 1 GiB, time threshold 60 min\n"

        # what is not there
        for ask in (lambda *a: refused(*a, env=running.env), lambda *a: refused(*a, *NOWHERE)):
            for span in (("1", "99"), ("99", "100"), ("99", "99")):
                said = ask("diff", xfs.path, *span)
                assert "99" in said
                assert f"1 to {last}" in said
        for command in (["snapshot", "nowhere"], ["snapshots", "nowhere"], ["diff", "nowhere", "1", "2"]):
            said = refused(*command, env=running.env)
            assert "'nowhere'" in said
            assert label in said
        said = refused("snapshots", "\x1b[2Jx", env=running.env)
        assert harmless(said)

        # tail
        with (tmp_path / "tail").open("wb") as output, (tmp_path / "tail.json").open("wb") as documents:
            tails = [
                subprocess.Popen(
                    [*CLI, "tail", *more], stdout=out, stderr=subprocess.DEVNULL, cwd=ROOT, env=running.env
                )
                for more, out in ((["--count", "2"], output), (["--json", "--count", "1"], documents))
            ]
            try:

                def ended():
                    for name in HOSTILE[1:]:
                        path = os.path.join(top, name)
                        os.unlink(path)
                        with open(path, "wb"):
                            pass
                    running.snapshot()
                    return all(t.poll() is not None for t in tails)

                wait_until(ended, "tail has shown its diffs", 15)
            finally:
                for tail in tails:
                    with contextlib.suppress(ProcessLookupError):
                        tail.kill()
                    tail.wait()
            assert [t.returncode for t in tails] == [0, 0]
        shown = (tmp_path / "tail").read_bytes().decode()
        assert harmless(shown)
        assert label in shown
        assert "$'\\e[31mred'" in shown
        (line,) = (tmp_path / "tail.json").read_bytes().splitlines()
        assert b'": ' not in line, "not compact"
        assert set(line) <= set(range(32, 127))
        document = json.loads(line)
        assert (document["partition"], document["uuid"]) == (label, uuid)
        assert {c["op"] for c in document["changes"]} == {"create", "delete", "modify"}
