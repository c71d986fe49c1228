"""Real brokers and foreign subscribers as processes, for tests: started, waited for, and always ended again.

with mosquitto(tmp_path) as broker, collector(broker, "snapfeed/#") as seen:
    ...
    wait_until(lambda: seen.messages("snapfeed/edge7/data/changes"), "a page")
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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
    """A broker process. `options` are the arguments a mosquitto client needs to reach it.

    `reading` are those of `collector`, if not the same; `probe` is a topic that the one may write and the other may read.
    The process leads a process group of its own, since some brokers are several processes. `env` is all of its environment.
    """

    command: list[str]
    port: int
    log: Path
    options: list[str] = field(default_factory=list)
    tls: bool = False
    process: subprocess.Popen | None = None
    env: dict[str, str] | None = None
    reading: list[str] | None = None
    probe: str = "ready/{token}"

    @property
    def url(self) -> str:
        return f"mqtts://localhost:{self.port}" if self.tls else f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=ROOT, env=self.env, start_new_session=True
            )
        process = self.process

        def up():
            assert process.poll() is None, f"{self.command} exited: {self.log.read_text()}"
            return accepts(self.port)

        wait_until(up, f"{self.command[0]} accepts connections on port {self.port}", 60)

    def signal(self, number: int) -> None:
        """SIGSTOP, SIGCONT, SIGHUP (mosquitto: read the password and ACL files again), ..."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead. `start` starts it again on the same port."""
        self.end(signal.SIGKILL)

    def end(self, number: int) -> None:
        """Send it a signal that it dies of, and wait until the port is free."""
        if self.process is None:
            return
        if number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        self.process.wait(DEADLINE)
        self.process = None
        wait_until(lambda: not accepts(self.port), f"nobody listens on port {self.port}")

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


@contextlib.contextmanager
def nats(directory: Path, *, config: str = "") -> Iterator[Broker]:
    """A NATS server with JetStream, which its MQTT needs, everything it keeps below `directory`."""
    program = shutil.which("nats-server") or "/usr/sbin/nats-server"
    require(
        os.access(program, os.X_OK) and shutil.which("mosquitto_sub") is not None, "nats-server and mosquitto's clients"
    )
    place = directory / f"nats-{uuid.uuid4().hex[:8]}"
    place.mkdir()
    port = free_port()
    lines = [
        "server_name: snapfeed-test",
        f'listen: "127.0.0.1:{free_port()}"',
        f'jetstream {{ store_dir: "{place}/store" }}',
        f'mqtt {{ listen: "127.0.0.1:{port}" }}',
        config,
    ]
    (place / "nats.conf").write_text("\n".join(lines) + "\n")
    options = ["-h", "127.0.0.1", "-p", str(port), "-V", "mqttv311"]
    with _running(Broker([program, "-c", f"{place}/nats.conf"], port, place / "log", options)) as broker:
        yield broker


@contextlib.contextmanager
def rabbitmq(directory: Path, *, definitions: dict | None = None) -> Iterator[Broker]:
    """A RabbitMQ with its MQTT plugin: a node of its own name, files and ports, with an epmd (Erlang's name server) of its own.

    `definitions`: users, permissions and so on, loaded at the start. It takes 9 s to start on empty directories, 3 s later; on a
    busy disk several times as long, so its data are in memory where that is possible.
    """
    program = "/usr/lib/rabbitmq/bin/rabbitmq-server"  # the one in the PATH becomes another user
    epmd = shutil.which("epmd")
    require(
        os.access(program, os.X_OK) and epmd is not None and shutil.which("mosquitto_sub") is not None,
        "rabbitmq-server and mosquitto's clients",
    )
    place = directory / f"rabbitmq-{uuid.uuid4().hex[:8]}"
    for name in ("home", "log"):
        (place / name).mkdir(parents=True)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else place
    data = tempfile.TemporaryDirectory(prefix="snapfeed-rabbitmq-", dir=memory, ignore_cleanup_errors=True)
    port, names = free_port(), free_port()
    lines = [
        "listeners.tcp = none",  # no AMQP
        f"mqtt.listeners.tcp.1 = 127.0.0.1:{port}",
        "log.console = true",
        "log.file = false",
    ]
    if definitions is not None:
        (place / "definitions.json").write_text(json.dumps(definitions))
        lines.append(f"load_definitions = {place}/definitions.json")
    (place / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
    (place / "plugins").write_text("[rabbitmq_mqtt].\n")
    own = {
        "HOME": place / "home",  # for .erlang.cookie
        "ERL_EPMD_PORT": names,
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": "snapfeed-test@localhost",
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "RABBITMQ_CONFIG_FILE": place / "rabbitmq.conf",
        "RABBITMQ_ADVANCED_CONFIG_FILE": place / "none.config",
        "RABBITMQ_ENABLED_PLUGINS_FILE": place / "plugins",
        "RABBITMQ_MNESIA_BASE": data.name,
        "RABBITMQ_LOG_BASE": place / "log",
        "RABBITMQ_PID_FILE": place / "pid",
        "RABBITMQ_DIST_PORT": free_port(),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
    }
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RABBITMQ_", "ERL_"))}
    env = {**kept, **{key: str(value) for key, value in own.items()}}
    options = ["-h", "127.0.0.1", "-p", str(port), "-V", "mqttv311"]
    # Ours, in the foreground: without one the node starts a daemon that outlives it.
    with data, (place / "log.txt").open("ab") as log:
        server = subprocess.Popen([epmd, "-port", str(names), "-address", "127.0.0.1"], env=env, stdout=log, stderr=log)
        try:
            wait_until(lambda: accepts(names), "epmd accepts connections")
            with _running(Broker([program], port, place / "log.txt", options, env=env)) as broker:
                yield broker
        finally:
            server.kill()
            server.wait()


def _certificates(directory: Path) -> None:
    """A certificate authority, and from it certificates of a server, a client (edge7) and another one, valid for a day."""
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    run(
        *new,
        "-x509",
        "-days",
        "1",
        "-subj",
        "/CN=test authority",
        "-addext",
        "keyUsage=critical,keyCertSign,cRLSign",  # demanded by Python 3.13
        "-keyout",
        directory / "ca.key",
        "-out",
        directory / "ca.pem",
    )
    extensions = "subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n"
    (directory / "san").write_text(extensions)
    for name, subject in (("server", "/CN=localhost"), ("client", "/CN=edge7"), ("commander", "/CN=commander")):
        run(*new, "-subj", subject, "-keyout", directory / f"{name}.key", "-out", directory / f"{name}.csr")
        sign = ["openssl", "x509", "-req", "-days", "1", "-CAcreateserial", "-extfile", directory / "san"]
        files = ["-in", directory / f"{name}.csr", "-out", directory / f"{name}.pem"]
        run(*sign, "-CA", directory / "ca.pem", "-CAkey", directory / "ca.key", *files)
        run("openssl", "verify", "-x509_strict", "-CAfile", directory / "ca.pem", directory / f"{name}.pem")


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
    probe: str
    command: list[str]
    process: subprocess.Popen | None = None
    read: int = 0

    def start(self) -> None:
        with self.file.open("ab") as output:
            self.process = subprocess.Popen(self.command, stdout=output)

    def messages(self, topic: str | None = None) -> list[Message]:
        """All messages, or those of one topic."""
        return self._parsed(self.file.read_bytes(), topic)

    def _parsed(self, text: bytes, topic: str | None) -> list[Message]:
        found = []
        for line in text.split(b"\n")[:-1]:  # the last is empty, or half written
            name, retained, payload = line.rsplit(b" ", 2)
            if name.decode() != self.probe and topic in {None, name.decode()}:
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
        if self.process is None or self.process.poll() is not None:
            self.start()  # it reconnects by itself, but gives up if the broker dies in the middle of a TLS record
        mark = uuid.uuid4().hex.encode()
        command = ["mosquitto_pub", *self.broker.options, "-q", "1", "-t", self.probe, "-s"]
        if run(
            *command, input=mark, check=False
        ).returncode:  # a port that listens is not yet a broker that takes messages
            return False
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            if mark.hex().encode() in self.file.read_bytes():
                return True
            time.sleep(0.005)
        return False


@contextlib.contextmanager
def collector(broker: Broker, *filters: str, options: tuple[str, ...] = ()) -> Iterator[Collector]:
    """A `mosquitto_sub` with QoS 1, subscribed when this returns. It reconnects by itself after a second."""
    token = uuid.uuid4().hex[:8]
    file = broker.log.parent / f"collected-{token}"
    probe = broker.probe.format(token=token)
    topics = [word for one in (*filters, probe) for word in ("-t", one)]
    command = ["mosquitto_sub", *(broker.reading or broker.options), "-q", "1", *topics, "-F", "%t %r %x", *options]
    file.touch()
    made = Collector(broker, file, probe, ["stdbuf", "-oL", *command])
    try:
        wait_until(made.subscribed, "mosquitto_sub is subscribed")
        yield made
    finally:
        if made.process is not None:
            made.process.kill()
            made.process.wait()
