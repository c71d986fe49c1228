"""The scripts of docs/backup.md, run as they stand: on real partitions, over several runs, one of which fails.

What they make is compared with the snapshot by the oracle, and what they looked at is counted by strace.
"""

import io
import os
import re
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import oracle
import pytest
from daemon_process import ROOT, daemon
from partitions import partition, require, run
from workload import HOSTILE

pytestmark = pytest.mark.kernel
SCRIPTS = {
    match[1]: match[0]
    for match in re.finditer(
        r"(?:#!/bin/bash\n)?# ([a-z-]+\.sh): .*?(?=```)", (ROOT / "docs/backup.md").read_text(), re.DOTALL
    )
}
STILL = 100  # files that nothing ever touches, in as many directories
LOOKS = "trace=open,openat,openat2,lstat,stat,newfstatat,statx,readlink,readlinkat,getdents64"


def test_all_recipes_are_found():
    assert sorted(SCRIPTS) == [
        "borg-restore.sh", "borg.sh", "restic-increments-restore.sh", "restic-increments.sh", "restic.sh", "rsync.sh",
        "snapfeed-source.sh",
    ]  # fmt: skip
    assert (ROOT / "docs/backup.md").read_text().count("```sh\n") == len(SCRIPTS)


class World:
    """A partition with a daemon, the scripts of the recipes, and a place for what they make."""

    def __init__(self, part, served, directory: Path) -> None:
        self.part, self.served, self.directory = part, served, directory
        self.top = part.path
        self.restores = 0
        for name, text in SCRIPTS.items():
            (directory / name).write_text(text)
        command = directory / "bin/snapfeed"
        command.parent.mkdir()
        # with a file `refused` beside it no `ack` succeeds; a script `exchange` runs once, after an export
        command.write_text(f"""#!/bin/sh
[ "$1" != ack ] || [ ! -e "$LIB/refused" ] || exit 1
{sys.executable} -m watcher.cli "$@" || exit
[ "$1" != export ] || [ ! -e "$LIB/exchange" ] || {{ mv "$LIB/exchange" "$LIB/exchanged"; sh -e "$LIB/exchanged"; }}
""")
        command.chmod(0o755)
        self.env = {
            **os.environ, "PYTHONPATH": str(ROOT), "SNAPFEED_SOCKET": str(served.socket), "LIB": str(directory),
            "PATH": f"{command.parent}:{os.environ['PATH']}", "PARTITION": str(part.path), "WORK": str(directory / "work"),
            "TREE": str(directory / "trees"), "DESTINATION": str(directory / "copy"), "BORG_REPO": str(directory / "borg"),
            "RESTIC_REPOSITORY": str(directory / "restic"), "RESTIC_PASSWORD": "x", "XDG_CACHE_HOME": str(directory / "cache"),
            "BORG_BASE_DIR": str(directory), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes", "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        (directory / "copy").mkdir()

    def script(self, name: str, *arguments, check: bool = True) -> subprocess.CompletedProcess:
        command = ["bash", self.directory / name, *arguments]
        return run(*command, check=check, env=self.env)

    def traced(self, name: str) -> tuple[int, int]:
        """Run a script; how many calls looked at something below the tree, and how many of those at what never changed."""
        log = self.directory / "trace"
        traced = ["strace", "-f", "--seccomp-bpf", "-qq", "-y", "-s", "300", "-e", LOOKS, "-o", log]
        run(*traced, "bash", self.directory / name, env=self.env)
        seen = [path for line in log.read_text(errors="surrogateescape").splitlines() if (path := self.looked_at(line))]
        return len(seen), sum("still" in path for path in seen)

    def looked_at(self, line: str) -> str | None:
        """The path below the tree that a line of strace's is about."""
        match = re.search(r"\w+\((?:(?:AT_FDCWD|\d+)<(.*?)>)?(?:, )?(?:\"(.*?)\")?", line)
        path = os.path.join(match[1] or "", match[2] or "") if match else ""
        return path if path.startswith(f"{self.directory}/trees/") else None

    def snapshot_state(self) -> dict:
        """The newest snapshot as a walk finds it: on btrfs the snapshot, elsewhere the partition, which rests meanwhile."""
        if self.part.fs == "btrfs":
            return comparable(self.top / f".snapfeed/snapshots/{self.served.partition()['head']}")
        return comparable(self.top)

    def restored(self, script: str) -> Path:
        """A new directory with what a restore script makes."""
        self.restores += 1
        target = self.directory / f"restored-{self.restores}"
        target.mkdir()
        self.script(script, target)
        return target


def same(made: dict, wanted: dict) -> None:
    """Fails naming what differs: the path, and both values of what is not equal."""
    differing = [
        (path, key, made.get(path, {}).get(key), wanted.get(path, {}).get(key))
        for path in sorted(made.keys() | wanted.keys())
        for key in sorted(made.get(path, {}).keys() | wanted.get(path, {}).keys())
        if made.get(path, {}).get(key) != wanted.get(path, {}).get(key)
    ]
    assert not differing, differing[:20]


def comparable(top) -> dict:
    """Everything that a copy can have: content, and hard links as sets of paths, instead of inode numbers; no change times."""
    found, names = {}, {}
    walked = oracle.walk(top)
    for path, entry in walked.items():
        names.setdefault(entry["ino"], set()).add(path)
    for path, entry in walked.items():
        kept = {k: entry[k] for k in ("type", "mode", "uid", "gid", "mtime_ns", "rdev", "xattrs", "target")}
        if entry["type"] == "file":
            kept |= {"content": (Path(os.fsdecode(top)) / os.fsdecode(path)).read_bytes()}
        if entry["type"] != "dir":
            kept["names"] = names[entry["ino"]]
        if path:  # the root's times are also the system directory's doing
            found[path] = kept
    return found


@pytest.fixture(params=["btrfs", "xfs"])
def world(request, tmp_path):
    for tool in ("rsync", "restic", "borg", "jq", "strace", "unshare"):
        require(run("which", tool, check=False).returncode == 0, tool)
    with partition(request.param, tmp_path) as part, daemon(tmp_path, part.path) as served:
        yield World(part, served, tmp_path)


# ---- work, in rounds


def below(top: Path, name: bytes) -> bytes:
    return os.path.join(os.fsencode(top), name)


def write(path: bytes, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def first(top: Path) -> None:
    """The tree of the first run: what never changes, what will, and every hostile name."""
    for number in range(STILL):
        directory = top / f"still/{number}"
        directory.mkdir(parents=True)
        (directory / "still-file").write_bytes(b"still")
    for name in HOSTILE:
        write(below(top, name), name)
    for directory in (b"moved/deep/er", b"swap1/in", b"swap2/out", b"gone/a/b", b"links", b"empty", b"replaced"):
        os.makedirs(below(top, directory))
    for file in (
        b"moved/deep/er/f",
        b"swap1/in/one",
        b"swap2/out/two",
        b"gone/a/b/c",
        b"links/x",
        b"replaced/r",
        b"plain",
        b"twin",
    ):
        write(below(top, file), file * 100)
    os.link(below(top, b"links/x"), below(top, b"links-y"))
    os.symlink(b"/etc/hostname", below(top, b"points"))
    os.mkdir(below(top, b"times"))
    os.utime(below(top, b"times"), ns=(10**18, 10**18))
    os.mkfifo(below(top, b"fifo"))
    os.mknod(below(top, b"device"), stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.setxattr(below(top, b"plain"), b"user.note", b"\x00\xff")
    os.chown(below(top, b"plain"), 1234, 4321)


def second(top: Path) -> None:
    """Everything that is hard for who knows paths only."""
    os.rename(below(top, b"moved"), below(top, b"empty/arrived"))
    for old, new in ((b"swap1", b"swap"), (b"swap2", b"swap1"), (b"swap", b"swap2")):
        os.rename(below(top, old), below(top, new))
    run("rm", "-r", top / "gone")
    write(below(top, b"links/x"), b"through one of its names")
    os.rename(below(top, b"replaced"), below(top, b"was-replaced"))
    write(below(top, b"replaced"), b"a file where a directory was")
    os.unlink(below(top, b"points"))
    os.makedirs(below(top, b"points/now/a/directory"))
    before = os.stat(below(top, b"twin"))
    write(below(top, b"twin"), b"TWIN" * 100)  # of the same size, and of the same time
    os.utime(below(top, b"twin"), ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(below(top, b"times"), ns=(10**18, 10**18 + 1))
    for name in HOSTILE[::2]:
        os.unlink(below(top, name))
    for name in HOSTILE[1::2]:
        with open(below(top, name), "ab") as file:
            file.write(b"more")
    os.mkdir(below(top, b"-dir\n#"))
    for name in HOSTILE:
        write(below(top, b"-dir\n#/" + name), b"new")
    os.chmod(below(top, b"swap1"), 0o700)
    os.setxattr(below(top, b"swap1"), b"user.only", b"this")


def third(top: Path) -> None:
    os.rename(below(top, b"empty/arrived/deep"), below(top, b"moved"))
    os.rename(below(top, b"-dir\n#"), below(top, b";dir"))
    os.unlink(below(top, b"links-y"))
    run("rm", "-r", top / "points")
    os.symlink(b"..", below(top, b"points"))
    with open(below(top, b"plain"), "ab") as file:
        file.write(b"x")


# What is run where: enough to have each on one of them, and what reads live trees on XFS.
TOOLS = {"btrfs": ("rsync.sh", "borg.sh", "restic-increments.sh"), "xfs": ("rsync.sh", "borg.sh", "restic.sh")}
FAILING = {"btrfs": ("borg.sh",), "xfs": ("rsync.sh",)}


def test_the_recipes_over_several_runs(world):
    """The copy equals the snapshot each time, and so does what is restored in the end from a baseline and its increments.

    Of what never changed nothing is looked at. A run that was not acknowledged is done again, though the tree is another.
    """
    tools = TOOLS[world.part.fs]
    run("borg", "init", "--encryption=none", env=world.env)
    run("restic", "init", env=world.env)
    for _ in range(2):  # a consumer that was heard of and has acknowledged nothing still gets everything
        assert world.served.ask("export", partition=str(world.top), consumer="mirror")[0]["baseline"]
    first(world.top)
    for script in tools:
        world.script(script)
    same(comparable(world.directory / "copy"), world.snapshot_state())

    second(world.top)
    for script in tools:
        total, still = world.traced(script)
        print(f"{world.part.fs}, {script}: {total} looks below the tree, {still} of them at what never changed")
        assert total > 0
        assert still > 2 * STILL if script == "restic.sh" else still == 0
    check(world, [script for script in tools if script not in FAILING[world.part.fs] or script == "rsync.sh"])

    third(world.top)
    (world.directory / "refused").touch()
    for script in FAILING[world.part.fs]:
        assert world.script(script, check=False).returncode != 0
    (world.directory / "refused").unlink()
    os.rename(below(world.top, b"moved"), below(world.top, b"moved-again"))
    for script in FAILING[world.part.fs]:
        assert b"unfinished" in world.script(script).stderr
        world.script(script)
    check(world, FAILING[world.part.fs])


def check(world, tools):
    """What the tools have made of the newest snapshot is that."""
    state = world.snapshot_state()
    for script in tools:
        if script == "rsync.sh":
            made = world.directory / "copy"
        elif script == "restic.sh":
            made = world.directory / "restored-restic"
            run("restic", "restore", "latest", "--tag", "restic", "--target", made, env=world.env)
        else:
            made = world.restored(script.replace(".sh", "-restore.sh"))
        same(comparable(made), state)


# ---- a user of the source who exchanges a directory for a symbolic link, while a live tree is read


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def victim(tmp_path) -> Iterator[Path]:
    """A directory outside of all; that nothing in it was written or removed is checked in the end."""
    top = tmp_path / "victim"
    for name in ("etc/passwd", "etc/f", "sub/kept"):
        put(top / name, "precious")
    before = oracle.walk(top)
    yield top
    assert (top / "etc/f").read_text() == "precious"
    assert oracle.walk(top) == before


def attacked(world, script: str, victim: Path) -> int:
    """Run a script; between its export and its reading x becomes a link to the victim. Its exit code."""
    x, away = world.top / "x", world.top / "x.away"
    put(world.directory / "exchange", f"mv {x} {away}; ln -s {victim} {x}")
    code = world.script(script, check=False).returncode
    assert x.is_symlink()
    x.unlink()
    away.rename(x)
    return code


@pytest.mark.parametrize("world", ["xfs"], indirect=True)
@pytest.mark.parametrize("script", ["rsync.sh", "borg.sh", "restic-increments.sh"])
def test_a_directory_exchanged_for_a_link_leads_nowhere(world, victim, script):
    """A run that is attacked has a link where the next lists know a directory: with paths behind it, to remove and to write."""
    run("borg", "init", "--encryption=none", env=world.env)
    run("restic", "init", env=world.env)

    def made() -> Path:
        return (
            world.directory / "copy" if script == "rsync.sh" else world.restored(script.replace(".sh", "-restore.sh"))
        )

    x = world.top / "x"
    put(x / "etc/f", "ours")
    put(x / "sub/g", "ours")
    assert attacked(world, script, victim) == 0
    assert (made() / "x").readlink() == victim
    run("rm", "-r", x / "etc")
    put(x / "sub/g", "new")
    put(x / "sub/h/i", "new")
    said = world.script(script).stderr.decode()
    copy = made()
    if script == "rsync.sh":
        assert "x/etc: left alone, x is a symbolic link" in said
    assert (copy / "x").is_dir()
    assert not (copy / "x").is_symlink()
    assert ((copy / "x/sub/g").read_text(), (copy / "x/sub/h/i").read_text()) == ("new", "new")

    put(x / "sub/g", "newer")  # the copy has a directory now, and the link comes
    code = attacked(world, script, victim)
    if script == "rsync.sh":  # it fails, and is done again
        assert code == 23
        assert b"unfinished" in world.script(script).stderr
        assert (made() / "x/sub/g").read_text() == "newer"
    else:
        assert code == 0
        made()


class Chain:
    """Archives as a race leaves them, which one cannot win at will: the restore scripts take them for runs of the recipes."""

    def __init__(self, tool: str, directory: Path) -> None:
        self.tool, self.directory, self.runs = tool, directory, 0
        for name, text in SCRIPTS.items():
            (directory / name).write_text(text)
        self.consumer = {"borg": "borg", "restic": "increments"}[tool]
        put(
            directory / "bin/snapfeed", f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m watcher.cli "$@"\n'
        ).chmod(0o755)
        self.env = {
            **os.environ, "PATH": f"{directory}/bin:{os.environ['PATH']}", "BORG_REPO": str(directory / "borg"),
            "BORG_BASE_DIR": str(directory), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "RESTIC_REPOSITORY": str(directory / "restic"), "RESTIC_PASSWORD": "x", "XDG_CACHE_HOME": str(directory / "cache"),
        }  # fmt: skip
        run(tool, "init", *(["--encryption=none"] if tool == "borg" else []), env=self.env)

    def add(self, deleted: list[str], members: list[tuple[str, str | None]]) -> None:
        """One run. A member is a path with a link's target, or None: a directory if it ends with a slash, else a file."""
        archive = self.directory / "members.tar"
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
            for path, target in members:
                member = tarfile.TarInfo(path.rstrip("/"))
                member.mode = 0o755
                if target is not None:
                    member.type, member.linkname = tarfile.SYMTYPE, target
                elif path.endswith("/"):
                    member.type = tarfile.DIRTYPE
                member.size = 3 if member.isreg() else 0
                tar.addfile(member, io.BytesIO(b"new") if member.isreg() else None)
        name = f"{self.consumer}-6f0c2b7e-98b1-4a53-8f6f-0f8f3a1f7a55-{self.runs or 'null'}-{self.runs + 1}"
        self.runs += 1
        gone = put(self.directory / "deleted", "".join(f"{path}\0" for path in deleted))
        if self.tool == "borg":
            run(
                "borg",
                "create",
                "--stdin-name",
                "deleted",
                f"::{name}.deleted",
                "-",
                input=gone.read_bytes(),
                env=self.env,
            )
            run("borg", "import-tar", f"::{name}", archive, env=self.env)
            return
        tags = ("--tag", f"{self.consumer},{name}")
        run(
            "restic",
            "backup",
            "--stdin",
            "--stdin-filename",
            "changed.tar",
            *tags,
            input=archive.read_bytes(),
            env=self.env,
        )
        run(
            "restic", "backup", "--tag", f"{self.consumer},{name},complete", "deleted", cwd=self.directory, env=self.env
        )

    def restore(self, given: str, top: Path) -> subprocess.CompletedProcess:
        script = {"borg": "borg-restore.sh", "restic": "restic-increments-restore.sh"}[self.tool]
        return run("bash", self.directory / script, given, check=False, cwd=top, env=self.env)


@pytest.mark.parametrize("given", ["here", "."])
@pytest.mark.parametrize("tool", ["borg", "restic"])
def test_a_chain_with_links_where_directories_are_meant_is_restored_inside(tool, given, tmp_path, victim):
    """Links of an earlier archive and of the same one, absolute and to one another, on the way to what is removed and written."""
    for needed in (tool, "unshare", "jq"):
        require(run("which", needed, check=False).returncode == 0, needed)
    require(os.geteuid() == 0, "root")
    chain = Chain(tool, tmp_path)
    chain.add([], [("x", str(victim)), ("y", str(victim)), ("here", None), ("same/", None), ("z", "x")])
    chain.add(["x/etc", "x/etc/passwd", "z/sub"], [("here", None)])
    chain.add(
        [],
        [
            ("same/l", str(victim)),
            ("same/l/etc/", None),
            ("same/l/etc/f", None),
            ("same/m", "../y"),
            ("same/m/etc/f", None),
        ],
    )
    chain.add([], [("x/etc/f", None), ("x/sub/", None), ("z/etc/f", None), ("z/etc", str(victim)), ("y/etc/", None)])
    chain.add(["here"], [("y/", None), ("y/etc/", None), ("y/etc/f", None), ("there", None)])
    top = tmp_path / "restored/here"
    top.mkdir(parents=True)
    done = chain.restore(*(("here", top.parent) if given == "here" else (".", top)))
    assert (done.returncode, b"something could not be restored" in done.stderr) == (1, True), done.stderr
    assert b"x/etc: left alone, x is a symbolic link" in done.stderr
    assert (top / "x").readlink() == victim
    assert ((top / "y/etc/f").read_bytes(), (top / "there").exists(), (top / "here").exists()) == (b"new", True, False)


@pytest.mark.parametrize("world", ["btrfs", "xfs"], indirect=True)
def test_what_borg_could_not_store_is_not_acknowledged(world):
    run("borg", "init", "--encryption=none", env=world.env)
    put(world.top / "f", "f")
    borg = run("which", "borg").stdout.decode().strip()
    stands_in = put(
        world.directory / "bin/borg",
        f"""#!/bin/sh
case "$*" in *--paths-from-stdin*) exit 2;; esac
exec {borg} "$@"
""",
    )
    stands_in.chmod(0o755)
    assert world.script("borg.sh", check=False).returncode == 1
    assert (world.directory / "work/borg/position.json").exists()
    stands_in.unlink()
    world.script("borg.sh")
    assert (world.restored("borg-restore.sh") / "f").read_text() == "f"
