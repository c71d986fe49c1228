"""`make demo`: the main job on real partitions, for a person to see; ends by itself, cleans up, fails if something is wrong."""

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import orjson

from comparer.errors import SnapfeedError
from feed.broker import BrokerConfig
from feed.escape import printable
from feed.model import TreeModel
from feed.subscriber import Damage, Diff, Gap, Subscriber

from .render import change_line
from .units import counted, format_size

LIMIT = 110  # seconds for everything
SHOWN = 5  # changes of each diff
TYPES = {
    stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket", stat.S_IFCHR: "char", stat.S_IFBLK: "block",
}  # fmt: skip


class DemoError(Exception):
    """Something did not go as it should; the text says what."""


def say(text: str = "") -> None:
    print(text, flush=True)


def title(text: str) -> None:
    say(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}")


@dataclass
class Seen:
    """What the subscriber got of one partition."""

    model: TreeModel = field(default_factory=TreeModel)
    triggers: Counter[str] = field(default_factory=Counter)
    changes: int = 0
    volume: int = 0
    head: int = 0


class Demo:
    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.socket = os.path.join(directory, "control.sock")
        self.log = os.path.join(directory, "daemon.log")
        self.root = os.geteuid() == 0
        self.partitions: dict[str, str] = {}  # name -> path
        self.seen: dict[str, Seen] = {}
        self.daemon: subprocess.Popen[bytes] | None = None
        self.loops: list[str] = []
        self.mounts: list[str] = []
        self.problems: list[str] = []

    # ---- the parts

    def snapfeed(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "watcher.cli", *arguments],
            capture_output=True, check=False, text=True, errors="replace", env={**os.environ, "SNAPFEED_SOCKET": self.socket},
        )  # fmt: skip
        if done.returncode:
            raise DemoError(f"snapfeed {' '.join(arguments)} exited {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def plan(self) -> None:
        """Decide what can be shown here, and say what is missing."""
        title("What this machine can do")
        missing = self.missing()
        if missing:
            say(f"Without {', '.join(missing)} there are no loop partitions, and no fanotify or reflink snapshots:")
            say("this runs on one directory, watched with inotify, with snapshots of metadata only.")
            self.partitions["directory"] = os.path.join(self.directory, "work")
        else:
            say("One XFS and one btrfs partition in loop images, watched with fanotify, with reflink snapshots.")
            self.partitions = {f"demo-{fs}": os.path.join(self.directory, fs) for fs in ("xfs", "btrfs")}

    def missing(self) -> list[str]:
        tools = [t for t in ("losetup", "mkfs.xfs", "mkfs.btrfs", "mount", "blkid") if shutil.which(t) is None]
        return [
            *([] if self.root else ["root"]),
            *tools,
            *([] if os.path.exists("/dev/loop-control") else ["loop devices"]),
        ]

    def start_daemon(self) -> str:
        """Start it, with the partitions still to come; returns the broker's URL."""
        title("The daemon, with the embedded broker")
        config = os.path.join(self.directory, "snapfeed.toml")
        with open(config, "w", encoding="utf-8") as file:
            file.write(f'[control]\nsocket = "{self.socket}"\n')
            file.writelines(
                f'[[partition]]\nmount = "{path}"\nname = "{name}"\n' for name, path in self.partitions.items()
            )
        command = ["run", "--config", config]
        say(f"$ snapfeed {' '.join(command)}")
        with open(self.log, "wb") as log:
            self.daemon = subprocess.Popen(
                [sys.executable, "-m", "watcher.cli", *command], stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + 20
        while time.monotonic() < end:
            self.alive()
            with contextlib.suppress(DemoError):
                broker = orjson.loads(self.snapfeed("status", "--json"))["broker"]
                if broker["connected"]:
                    say(f"running, broker at {broker['url']}")
                    return str(broker["url"])
        raise DemoError("the daemon did not connect to its broker within 20 s")

    def make_partitions(self) -> None:
        title("Partitions")
        thresholds = ["--io-threshold", "32MiB", "--time-threshold", "3s"]
        for name, path in self.partitions.items():
            if name == "directory":
                os.mkdir(path)
                command = ["init", "--directory", path, *thresholds]
            else:
                fs = name.removeprefix("demo-")
                image = os.path.join(self.directory, f"{fs}.img")
                with open(image, "wb") as file:
                    file.truncate(2 << 30)
                device = run("losetup", "--find", "--show", image).strip()
                self.loops.append(device)
                self.mounts.append(path)
                command = ["format", device, "--fs", fs, "--label", name, "--mount", path, "--yes", *thresholds]
            say(f"$ snapfeed {' '.join(command)}")
            say(self.snapfeed(*command))

    def alive(self) -> None:
        if self.daemon is not None and self.daemon.poll() is not None:
            with open(self.log, encoding="utf-8", errors="replace") as log:
                raise DemoError(f"the daemon ended with {self.daemon.returncode}:\n{log.read()[-3000:]}")

    def head(self, name: str) -> int:
        return self.seen[name].head if name in self.seen else 0

    def by_time(self, name: str) -> int:
        return self.seen[name].triggers["time"] if name in self.seen else 0

    async def subscribe(self, subscriber: Subscriber) -> None:
        """Be a consumer like any other: apply every change, show a few."""
        async for item in subscriber:
            if isinstance(item, Damage):
                raise DemoError(f"an unreadable message: {item.error}")
            if isinstance(item, Gap):
                raise DemoError(f"a gap: {item}")
            self.take(item)

    def take(self, diff: Diff) -> None:
        envelope = diff.envelope
        seen = self.seen.setdefault(envelope.partition, Seen())
        if envelope.baseline:
            seen.model.reset()
        changes = diff.changes()
        for change in changes:
            seen.model.apply(change)
        seen.triggers[envelope.trigger] += 1
        seen.changes += len(changes)
        seen.volume += envelope.volume
        say(
            f"  <- {envelope.partition} snapshot {envelope.seq}, trigger {envelope.trigger}:"
            f" {counted(len(changes), 'change')}, {format_size(envelope.volume)} written"
        )
        for change in changes[:SHOWN]:
            say(f"       {change_line(change)[:140]}")
        if len(changes) > SHOWN:
            say(f"       ... and {len(changes) - SHOWN} more")
        seen.head = envelope.seq

    # ---- the work

    async def work(self) -> None:
        for name in self.partitions:
            await self.until(lambda: self.head(name) > 0, f"the baseline of {name}")  # noqa: B023 - awaited here
        await self.step("Unpack a source tree", unpack)
        await self.command()
        await self.step("Build in it (byte-compile)", build)
        await self.command()
        await self.step("Rename directories, swap two names, link, change modes", rename)
        await self.idle()
        await self.step("Write a large file (256 MiB against a threshold of 32 MiB)", large)
        await self.command()
        await self.step("Edit three blocks of it in place", edit)
        await self.command()
        await self.step("Delete the tree", delete)
        await self.command()

    async def step(self, text: str, do: Callable[[str], None]) -> None:
        title(text)
        for path in self.partitions.values():
            await asyncio.get_running_loop().run_in_executor(None, do, path)

    async def command(self) -> None:
        """Ask for a snapshot, as an application would, and wait until its diff has arrived."""
        output = await asyncio.get_running_loop().run_in_executor(None, self.snapfeed, "snapshot", "--json")
        for line in output.splitlines():
            data = orjson.loads(line)
            name, seq = data["partition"], data["seq"]
            await self.until(lambda: self.head(name) >= seq, f"diff {seq} of {name} arrives")  # noqa: B023 - awaited here

    async def idle(self) -> None:
        """Do nothing: the time threshold passes."""
        say("  (no command: waiting for the time threshold of 3 s)")
        for name in self.partitions:
            if name == "directory":
                # the whole file system's writes are its volume; if others write there, that threshold may have been met first
                with contextlib.suppress(DemoError):
                    await self.until(lambda: self.by_time(name) > 0, "a time trigger", 10)  # noqa: B023 - awaited here
            else:
                await self.until(lambda: self.by_time(name) > 0, f"a time trigger on {name}")  # noqa: B023 - awaited here

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = 40) -> None:
        """Wait for a condition; raises DemoError after `seconds`."""
        end = time.monotonic() + seconds
        while not condition():
            self.alive()
            if time.monotonic() > end:
                raise DemoError(f"not within {seconds:g} s: {what}")
            await asyncio.sleep(0.05)

    # ---- the verdict

    def verdict(self) -> None:
        title("What arrived against what is there")
        for name, path in self.partitions.items():
            seen = self.seen.get(name, Seen())
            wrong = disagreements(seen.model, os.fsencode(path))
            for line in wrong[:10]:
                say(f"  {name}: {line}")
            state = "exactly equal to a walk" if not wrong else f"{len(wrong)} disagreements"
            say(f"  {name}: {len(seen.model.paths)} entries after {seen.changes} changes: {state}")
            if wrong:
                self.problems.append(f"{name}: {len(wrong)} disagreements")
        title("Triggers")
        total: Counter[str] = Counter()
        for name, seen in self.seen.items():
            total += seen.triggers
            say(f"  {name}: " + ", ".join(f"{kind} {count}" for kind, count in sorted(seen.triggers.items())))
        expected = ["volume", "time", "command"]
        if "directory" in self.partitions and not total["time"]:
            say(
                "  no time trigger: others write to the same file system, which counts as volume here, so that came first"
            )
            expected.remove("time")
        self.problems += [f"no {kind} trigger fired" for kind in expected if not total[kind]]
        title("Bytes")
        written = sum(seen.volume for seen in self.seen.values())
        assert self.daemon is not None  # noqa: S101 - it was started
        with open(f"/proc/{self.daemon.pid}/io", encoding="ascii") as file:
            io = dict(line.split(": ") for line in file.read().splitlines())
        read = int(io["rchar"])
        say(f"  written to the partitions: {format_size(written)}")
        say(
            f"  read by the daemon, everything counted (system files, /proc, sockets, its own program): {format_size(read)}"
        )
        if read > written // 4:
            self.problems.append("the daemon read as much as a scan of the data would")

    def clean_up(self) -> None:
        """Leave nothing behind, whatever happened before."""
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.terminate()
            try:
                self.daemon.wait(10)
            except subprocess.TimeoutExpired:
                self.daemon.kill()
                self.daemon.wait()
        for path in self.mounts:
            if os.path.ismount(path) and subprocess.run(["umount", path], capture_output=True, check=False).returncode:
                subprocess.run(["umount", "-l", path], capture_output=True, check=False)
        for device in self.loops:
            subprocess.run(["losetup", "-d", device], capture_output=True, check=False)
        shutil.rmtree(self.directory, ignore_errors=True)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, check=False, text=True, errors="replace")
    if done.returncode:
        raise DemoError(f"{' '.join(command)} exited {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def unpack(path: str) -> None:
    """The standard library of this Python, as a source tarball."""
    source = sysconfig.get_path("stdlib")

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        skip = ("__pycache__", "site-packages", "dist-packages", "config-", "/test/", "/tests/", "ensurepip", "idlelib")
        return None if any(part in entry.name for part in skip) else entry

    archive = os.path.join(os.path.dirname(path), "source.tar")
    if not os.path.exists(archive):
        with tarfile.open(archive, "w") as tar:
            tar.add(source, "source", filter=wanted)
    run("tar", "-xf", archive, "-C", path)


def build(path: str) -> None:
    run(sys.executable, "-m", "compileall", "-q", "-x", "lib2to3", os.path.join(path, "source"))


def rename(path: str) -> None:
    source = os.path.join(path, "source")
    os.rename(os.path.join(source, "json"), os.path.join(path, "json moved"))
    os.rename(os.path.join(source, "email"), os.path.join(source, "swap"))
    os.rename(os.path.join(source, "html"), os.path.join(source, "email"))
    os.rename(os.path.join(source, "swap"), os.path.join(source, "html"))
    os.link(os.path.join(source, "os.py"), os.path.join(path, "linked.py"))
    os.chmod(os.path.join(source, "abc.py"), 0o600)
    os.symlink("source/ast.py", os.path.join(path, "ast"))
    with open(os.fsencode(path) + b"/a name\x1b[31m\n\xff", "wb") as file:
        file.write(b"hostile")


def large(path: str) -> None:
    block = os.urandom(1 << 20)
    with open(os.path.join(path, "large"), "wb") as file:
        for _ in range(256):
            file.write(block)
            file.flush()


def edit(path: str) -> None:
    with open(os.path.join(path, "large"), "r+b") as file:
        for offset in (1 << 20, 100 << 20, 200 << 20):
            file.seek(offset)
            file.write(os.urandom(4096))


def delete(path: str) -> None:
    shutil.rmtree(os.path.join(path, "source"))


def walk(top: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    yield b"", os.lstat(top)
    stack = [b""]
    while stack:
        below = stack.pop()
        for name in os.listdir(os.path.join(top, below)):
            path = os.path.join(below, name)
            if path == b".snapfeed":
                continue
            found = os.lstat(os.path.join(top, path))
            yield path, found
            if stat.S_ISDIR(found.st_mode):
                stack.append(path)


def disagreements(model: TreeModel, top: bytes) -> list[str]:
    """Where a model differs from a walk of the tree: names, types, sizes, modes, owners, links, times, targets."""
    wrong, left = [], dict(model.paths)
    for path, found in walk(top):
        shown = printable(path) or "."
        ident = left.pop(path, None)
        if ident is None:
            wrong.append(f"{shown} is missing in what arrived")
            continue
        attr = model.attrs[ident]
        told = (
            ident.ino,
            attr.type,
            attr.size,
            attr.mode,
            attr.uid,
            attr.gid,
            attr.nlink,
            attr.mtime_ns,
            attr.ctime_ns,
        )
        real = (
            found.st_ino, TYPES[stat.S_IFMT(found.st_mode)], found.st_size, stat.S_IMODE(found.st_mode), found.st_uid,
            found.st_gid, found.st_nlink, found.st_mtime_ns, found.st_ctime_ns,
        )  # fmt: skip
        if told != real:
            wrong.append(f"{shown}: told {told}, is {real}")
        elif attr.target is not None and os.readlink(os.path.join(top, path)) != attr.target:
            wrong.append(f"{shown}: target differs")
    return wrong + [f"{printable(path)} arrived but is not there" for path in left]


async def show(demo: Demo) -> None:
    loop = asyncio.get_running_loop()
    demo.plan()
    url = await loop.run_in_executor(None, demo.start_daemon)
    subscriber = Subscriber(BrokerConfig(url=url))
    consuming = asyncio.create_task(demo.subscribe(subscriber))
    async with asyncio.timeout(20):
        await subscriber.subscribed.wait()
    await loop.run_in_executor(None, demo.make_partitions)
    working = asyncio.create_task(demo.work())
    done, _ = await asyncio.wait((consuming, working), return_when=asyncio.FIRST_COMPLETED)
    try:
        for task in done:
            task.result()
        demo.verdict()
    finally:
        consuming.cancel()
        working.cancel()
        await asyncio.gather(consuming, working, return_exceptions=True)


def main() -> int:
    started = time.monotonic()
    demo = Demo(tempfile.mkdtemp(prefix="snapfeed-demo-"))

    def stop(number: int, _frame: object) -> None:
        raise DemoError("took too long" if number == signal.SIGALRM else f"stopped by {signal.Signals(number).name}")

    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGHUP):
        signal.signal(number, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the shell that started it ignores Ctrl-C
    signal.alarm(LIMIT)
    code = 1
    try:
        asyncio.run(show(demo))
        code = 1 if demo.problems else 0
    except KeyboardInterrupt:
        say("\nstopped")
        code = 130
    except (DemoError, SnapfeedError, TimeoutError) as error:
        demo.problems.append(str(error) or "timed out")
    finally:
        signal.alarm(0)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        demo.clean_up()
    for problem in demo.problems:
        print(f"demo: {problem}", file=sys.stderr)
    if code == 0:
        title(f"All of it arrived, exactly, in {time.monotonic() - started:.0f} s; nothing is left behind.")
    return code


if __name__ == "__main__":
    sys.exit(main())
