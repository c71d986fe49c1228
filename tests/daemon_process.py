"""The real daemon as a process, and its command line, for tests: started, asked, and always ended again.

with daemon(tmp_path, part.path, broker=broker.url) as snapfeed:
    snapfeed.snapshot()

`daemon` adopts the mount points first. What the daemon logged is printed when the test fails.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from partitions import wait_until

ROOT = Path(__file__).parent.parent
HOST = "testhost"
CLI = [sys.executable, "-m", "watcher.cli"]


def environment(**more: str) -> dict[str, str]:
    """As ours, but nothing of a daemon that may run on this machine."""
    kept = {k: v for k, v in os.environ.items() if k not in ("SNAPFEED_SOCKET", "NOTIFY_SOCKET", "JOURNAL_STREAM")}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def snapfeed(*arguments: str | bytes | Path, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run the command line to its end, as text."""
    options.setdefault("env", environment())
    done = subprocess.run(
        [*CLI, *arguments], capture_output=True, check=False, timeout=60, cwd=ROOT, stdin=subprocess.DEVNULL, **options
    )
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    if check and done.returncode:
        raise AssertionError(f"snapfeed {arguments} exited {done.returncode}: {done.stdout}{done.stderr}")
    return done


def facts(*arguments: str | bytes | Path, **options) -> list:
    """What a command with --json prints, one document a line; nothing that a terminal would obey."""
    shown = snapfeed(*arguments, "--json", **options).stdout
    assert all(" " <= c <= "~" or c == "\n" for c in shown), ascii(shown)
    return [json.loads(line) for line in shown.splitlines()]


class Daemon:
    patience = 60.0  # seconds for an answer

    def __init__(self, directory: Path, arguments: list[str | Path], env: dict[str, str]) -> None:
        self.socket = directory / "control.sock"
        self.log = directory / "daemon.log"
        self.env = environment(SNAPFEED_SOCKET=str(self.socket), **env)
        self.arguments = arguments
        self.process: subprocess.Popen | None = None
        self.ready = 0.0  # seconds that the last start took

    # ---- life

    def start(self, *, ready: bool = True) -> None:
        started = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command_line(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, env=self.env
            )
        if ready:
            self.wait_ready()
            self.ready = time.monotonic() - started

    def command_line(self) -> list[str | Path]:
        return [*CLI, "run", *self.arguments]

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_ready(self) -> None:
        """Every partition is watched, scanned or said to be in trouble."""
        wait_until(self._ready, "the daemon answers and has looked at its partitions")

    def _ready(self) -> bool:
        assert self.alive(), f"the daemon exited: {self.log.read_text()}"
        with contextlib.suppress(OSError):
            return all(p["state"] != "starting" for p in self.status()["partitions"])
        return False

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it, and return its exit code."""
        self.send(number)
        return self.process.wait(20)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def output(self) -> str:
        return self.log.read_text()

    def io(self) -> dict[str, int]:
        """/proc/PID/io."""
        lines = Path(f"/proc/{self.pid}/io").read_text().splitlines()
        return {key: int(value) for key, value in (line.split(": ") for line in lines)}

    # ---- asking it

    def ask(self, verb: str, **fields) -> list:
        """The control socket without the command line: the `data` of each answer. Raises AssertionError for an error."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(self.patience)
            connection.connect(str(self.socket))
            connection.sendall(json.dumps({"verb": verb, "id": uuid.uuid4().hex, **fields}).encode() + b"\n")
            found = []
            with connection.makefile("rb") as lines:
                for line in lines:
                    answer = json.loads(line)
                    assert not answer.get("error"), answer
                    if answer.get("data") is not None:
                        found.append(answer["data"])
                    if not answer.get("more"):
                        return found
            raise AssertionError("the daemon hung up before it had answered")

    def command(self, *arguments: str | Path, check: bool = True, **options) -> subprocess.CompletedProcess:
        return snapfeed(*arguments, check=check, env=self.env, **options)

    def facts(self, *arguments: str | Path) -> list:
        return facts(*arguments, env=self.env)

    def snapshot(self, partition: str | Path | None = None) -> dict:
        """Take a snapshot of one partition (of the only one): the answer."""
        named = {} if partition is None else {"partition": str(partition)}
        (found,) = self.ask("snapshot", **named)
        (answer,) = found if isinstance(found, list) else [found]
        return answer

    def status(self) -> dict:
        (found,) = self.ask("status")
        return found

    def partition(self, mount: Path | None = None) -> dict:
        """A partition's part of the status: of a mount point, or of the only partition."""
        found = [p for p in self.status()["partitions"] if mount is None or p["mount"] == str(mount)]
        assert len(found) == 1, found
        return found[0]

    def published(self, seq: int) -> bool:
        found = self.partition()["published"]
        return found is not None and found["seq"] >= seq


def adopt(mount: Path, io: str = "1GiB", time: str = "1h") -> None:
    """`snapfeed init` with thresholds that do not fire in a test unless asked for."""
    snapfeed("init", mount, "--io-threshold", io, "--time-threshold", time)


@contextlib.contextmanager
def daemon(
    directory: Path,
    *mounts: Path,
    broker: str | None = None,
    config: str | None = None,
    started: bool = True,
    io: str = "1GiB",
    time: str = "1h",
    env: dict[str, str] | None = None,
    kind: type[Daemon] = Daemon,
) -> Iterator[Daemon]:
    """The daemon for some mount points, its state in a directory below `directory`.

    `config` is the text of its configuration. `broker` goes on the command line. `io` and `time` are the thresholds. `kind` is
    the class that starts it.
    """
    place = directory / "daemon"
    place.mkdir()
    for mount in mounts:
        if not (mount / ".snapfeed").exists():
            adopt(mount, io, time)
    arguments: list[str | Path] = []
    text = config if config is not None else f'[broker]\nhost = "{HOST}"\n'
    (place / "snapfeed.toml").write_text(text)
    arguments += ["--config", place / "snapfeed.toml"]
    if broker is not None:
        arguments += ["--broker", broker]
    made = kind(place, [*arguments, *mounts], env or {})
    try:
        if started:
            made.start()
        yield made
    except BaseException:
        if made.log.exists():
            print(f"---- the daemon's log\n{made.output()}----")
        raise
    finally:
        if made.process is not None:
            with contextlib.suppress(ProcessLookupError):
                made.process.send_signal(signal.SIGCONT)
        made.kill()
