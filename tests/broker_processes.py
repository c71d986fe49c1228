"""Real brokers and foreign subscribers as processes, for tests: started, waited for, and always ended again.

with mosquitto(tmp_path) as broker, collector(broker, "snapfeed/#") as seen:
    ...
    wait_until(lambda: seen.messages("snapfeed/edge7/data/changes"), "a page")
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from partitions import DEADLINE, require, run, wait_until

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


async def eventually(condition, what: str, deadline: float = DEADLINE):
    """`wait_until` for the event loop."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        await asyncio.sleep(0.01)
    return value


@dataclass
class Broker:
    """A broker process. `options` are the arguments a mosquitto client needs to reach it."""

    command: list[str]
    port: int
    log: Path
    options: list[str] = field(default_factory=list)
    tls: bool = False
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"mqtts://localhost:{self.port}" if self.tls else f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=ROOT)
        process = self.process

        def up():
            assert process.poll() is None, f"{self.command} exited: {self.log.read_text()}"
            return accepts(self.port)

        wait_until(up, f"{self.command[0]} accepts connections on port {self.port}")

    def signal(self, number: int) -> None:
        """SIGSTOP, SIGCONT, SIGHUP (mosquitto: read the password and ACL files again), ..."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead. `start` starts it again on the same port."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def set_user(self, name: str, password: str) -> None:
        """Add a user to the password file of a mosquitto started with `users`; it is known after SIGHUP."""
        run("mosquitto_passwd", "-b", self.log.parent / "passwords", name, password)

    def publish(self, topic: str, payload: bytes | str, *options: str) -> None:
        """Publish with QoS 1 as a foreign client, and wait for the acknowledgement."""
        message = payload.encode() if isinstance(payload, str) else payload
        run("mosquitto_pub", *self.options, "-q", "1", "-t", topic, "-s", *options, input=message)


@contextlib.contextmanager
def _running(broker: Broker) -> Iterator[Broker]:
    try:
        broker.start()
        yield broker
    finally:
        if broker.process is not None:
            with contextlib.suppress(ProcessLookupError):
                broker.process.send_signal(signal.SIGCONT)
        broker.kill()


@contextlib.contextmanager
def mosquitto(
    directory: Path,
    *,
    users: dict[str, str] | None = None,
    acl: str | None = None,
    tls: bool = False,
    config: tuple[str, ...] = (),
    port: int | None = None,
    started: bool = True,
) -> Iterator[Broker]:
    """A mosquitto. `users` (name to password, may be empty) end anonymous access; `acl` is an ACL file's text.

    With `tls`, `directory` gets `ca.pem`, `client.pem` and `client.key`, and clients need a certificate. `config` are more
    lines of its configuration. With `started` False it is to be started by the test.
    """
    program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    require(os.access(program, os.X_OK) and shutil.which("mosquitto_sub") is not None, "mosquitto and its clients")
    place = directory / f"mosquitto-{uuid.uuid4().hex[:8]}"
    place.mkdir()
    place.chmod(0o755)
    port = port or free_port()
    lines = ["user root", "persistence false", "log_type all", f"listener {port} 127.0.0.1", *config]
    options = ["-h", "127.0.0.1", "-p", str(port)]
    if users is None:
        lines.append("allow_anonymous true")
    else:
        (place / "passwords").touch(mode=0o600)
        lines += ["allow_anonymous false", f"password_file {place}/passwords"]
    if acl is not None:
        (place / "acl").write_text(acl)
        (place / "acl").chmod(0o600)
        lines.append(f"acl_file {place}/acl")
    if tls:
        _certificates(directory)
        lines += [f"cafile {directory}/ca.pem", f"certfile {directory}/server.pem", f"keyfile {directory}/server.key"]
        lines.append("require_certificate true")
        options = ["-h", "localhost", "-p", str(port), "--cafile", f"{directory}/ca.pem"]
        options += ["--cert", f"{directory}/client.pem", "--key", f"{directory}/client.key"]
    (place / "mosquitto.conf").write_text("\n".join(lines) + "\n")
    broker = Broker([program, "-c", f"{place}/mosquitto.conf"], port, place / "log", options, tls)
    for name, password in (users or {}).items():
        broker.set_user(name, password)
    if started:
        with _running(broker):
            yield broker
    else:
        try:
            yield broker
        finally:
            broker.kill()


@contextlib.contextmanager
def embedded(directory: Path) -> Iterator[Broker]:
    """snapfeed's embedded broker, in a process of its own."""
    port = free_port()
    script = (
        "import asyncio, logging\n"
        "logging.basicConfig(level=logging.DEBUG)\n"  # a client that was dropped shows in the log
        "from feed.embedded import EmbeddedBroker\n"
        "async def main():\n"
        f"    await EmbeddedBroker(port={port}).start()\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    options = ["-h", "127.0.0.1", "-p", str(port)]
    with _running(Broker([sys.executable, "-c", script], port, directory / "embedded.log", options)) as broker:
        yield broker


def _certificates(directory: Path) -> None:
    """A certificate authority, and a server's and a client's certificate from it, valid for a day."""
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    run(
        *new,
        "-x509",
        "-days",
        "1",
        "-subj",
        "/CN=test authority",
        "-keyout",
        directory / "ca.key",
        "-out",
        directory / "ca.pem",
    )
    (directory / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name, subject in (("server", "/CN=localhost"), ("client", "/CN=edge7")):
        run(*new, "-subj", subject, "-keyout", directory / f"{name}.key", "-out", directory / f"{name}.csr")
        sign = ["openssl", "x509", "-req", "-days", "1", "-CAcreateserial", "-extfile", directory / "san"]
        files = ["-in", directory / f"{name}.csr", "-out", directory / f"{name}.pem"]
        run(*sign, "-CA", directory / "ca.pem", "-CAkey", directory / "ca.key", *files)


@dataclass(frozen=True)
class Message:
    topic: str
    retained: bool
    payload: bytes


@dataclass
class Collector:
    """What a `mosquitto_sub` has received so far, in the order of arrival."""

    broker: Broker
    file: Path
    token: str
    process: subprocess.Popen
    read: int = 0

    def messages(self, topic: str | None = None) -> list[Message]:
        """All messages, or those of one topic."""
        return self._parsed(self.file.read_bytes(), topic)

    @staticmethod
    def _parsed(text: bytes, topic: str | None) -> list[Message]:
        found = []
        for line in text.split(b"\n")[:-1]:  # the last is empty, or half written
            name, retained, payload = line.rsplit(b" ", 2)
            if not name.startswith(b"ready/") and topic in {None, name.decode()}:
                found.append(Message(name.decode(), retained == b"1", bytes.fromhex(payload.decode())))
        return found

    def new(self) -> list[Message]:
        """Those that have come since the last call of this."""
        with self.file.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        whole = text.rfind(b"\n") + 1
        self.read += whole
        return self._parsed(text[:whole], None)

    def subscribed(self) -> bool:
        """Whether what is published now would arrive: publishes a probe, so poll it."""
        if not accepts(self.broker.port):
            return False
        mark = uuid.uuid4().hex
        self.broker.publish(f"ready/{self.token}/{mark}", "x")
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            if mark.encode() in self.file.read_bytes():
                return True
            time.sleep(0.005)
        return False


@contextlib.contextmanager
def collector(broker: Broker, *filters: str, options: tuple[str, ...] = ()) -> Iterator[Collector]:
    """A `mosquitto_sub` with QoS 1, subscribed when this returns. It reconnects by itself after a second."""
    token = uuid.uuid4().hex[:8]
    file = broker.log.parent / f"collected-{token}"
    topics = [word for one in (*filters, f"ready/{token}/+") for word in ("-t", one)]
    with file.open("wb") as output:
        command = ["mosquitto_sub", *broker.options, "-q", "1", *topics, "-F", "%t %r %x", *options]
        process = subprocess.Popen(["stdbuf", "-oL", *command], stdout=output)
    try:
        made = Collector(broker, file, token, process)
        wait_until(made.subscribed, "mosquitto_sub is subscribed")
        yield made
    finally:
        process.kill()
        process.wait()
