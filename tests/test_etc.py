"""etc/: the annotated configuration is complete and valid, the unit lets the daemon work and no more, the broker's ACL holds."""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass

import orjson
import pytest
from broker_processes import ROOT, Broker, _certificates, eventually, free_port
from partitions import require, run, wait_until

from feed.broker import BrokerConfig
from feed.commands import answer
from feed.publisher import Publisher
from watcher.config import Config, parse

ETC = ROOT / "etc"
KEYS = {
    "broker": "url username password_file ca_file cert_file key_file base host max_packet",
    "control": "socket state_dir",
    "commands": "secret_file",
    "journal": "age bytes",
    "consumers": "hold_snapshots hold_age",
    "defaults": "io_threshold time_threshold keep reconcile max_extents",
    "watch": "exclude unlimited_queue",
    "partition": "mount name io_threshold time_threshold keep",
}


# ---- snapfeed.toml


def shipped():
    return (ETC / "snapfeed.toml").read_text(encoding="utf-8")


def everything_on(directory):
    """The configuration with every setting that is off turned on, its files in `directory`."""
    text = re.sub(r"^#(?=[a-z_]+ = |\[\[)", "", shipped(), flags=re.MULTILINE)
    for name in ("password", "ca.pem", "client.pem", "client.key"):
        (directory / name).write_text("x\n")
    (directory / "command.key").write_text("0123456789abcdef\n")
    return text.replace("/etc/snapfeed/", f"{directory}/")


def test_the_configuration_as_shipped_is_the_default():
    found = parse(shipped())
    assert found.base == "snapfeed"
    assert found == Config(base="snapfeed")


def test_the_configuration_names_every_key(tmp_path):
    text = everything_on(tmp_path)
    document = tomllib.loads(text)
    (document["partition"],) = document["partition"]
    assert {table: " ".join(keys) for table, keys in document.items()} == KEYS
    found = parse(text)
    assert found.broker is not None
    assert found.broker.password == "x"
    assert found.partitions[0].keep == 48


def test_each_setting_is_explained():
    """Right above it, or above the settings it stands with, is prose."""
    lines = shipped().splitlines()
    settings = [n for n, line in enumerate(lines) if re.match(r"#?[a-z_]+ = ", line)]
    assert len(settings) == sum(len(keys.split()) for keys in KEYS.values())
    for number in settings:
        above = number - 1
        while above in settings:
            above -= 1
        assert lines[above].startswith("# "), lines[number]


# ---- snapfeed.service


@pytest.fixture
def unit(tmp_path):
    """The unit's file with a program that exists, for systemd-analyze."""
    require(shutil.which("systemd-analyze") is not None, "systemd-analyze")
    text = (ETC / "snapfeed.service").read_text(encoding="utf-8")
    (tmp_path / "snapfeed.service").write_text(text.replace("/opt/snapfeed/bin/snapfeed", "/bin/true"))
    return tmp_path / "snapfeed.service"


def setting(name):
    """The values of a setting of the unit, in order."""
    text = (ETC / "snapfeed.service").read_text(encoding="utf-8")
    return re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)


def test_the_unit_is_valid(unit):
    done = run("systemd-analyze", "verify", "--man=no", unit)
    assert done.stdout + done.stderr == b""


def test_the_units_exposure_is_low(unit):
    run("systemd-analyze", "security", "--offline=true", "--threshold=27", unit)


def granted():
    (names,) = setting("CapabilityBoundingSet")
    return [name.removeprefix("CAP_").lower() for name in names.split()]


def probed(path, capabilities, *wrapper):
    """The steps of unit_probe.py that fail with these capabilities, in a mount namespace as the unit has one."""
    require(shutil.which("setpriv") is not None, "setpriv")
    bounding = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    rights = ["setpriv", f"--bounding-set={bounding}", "--no-new-privs"]
    place = ["unshare", "--mount", "--propagation", "slave"]
    script = [sys.executable, str(ROOT / "tests/unit_probe.py"), "work", str(path)]
    done = run(*place, *rights, *wrapper, *script)
    return {line.partition(":")[0] for line in done.stdout.decode().splitlines()}


@pytest.fixture
def strangers(part):
    """A partition whose root belongs to another user; on btrfs a subvolume."""
    if part.fs == "btrfs":
        run("btrfs", "subvolume", "create", part.path / "sub")
        part.umount()
        part.mount("subvol=sub")
    run(sys.executable, ROOT / "tests/unit_probe.py", "prepare", part.path)
    return part


NO_REFLINK = {"ext4": {"FICLONE"}}
NEEDED_FOR = {
    "sys_admin": {"a private mount", "fanotify"},
    "dac_read_search": {"strangers' directories"},
    "fowner": {"O_NOATIME"},
    "linux_immutable": {"immutable"},
}


@pytest.mark.kernel
def test_the_units_capabilities_suffice(strangers):
    assert probed(strangers.path, granted()) == NO_REFLINK.get(strangers.fs, set())


@pytest.mark.kernel
@pytest.mark.parametrize("dropped", NEEDED_FOR)
def test_each_capability_is_needed(xfs, dropped):
    run(sys.executable, ROOT / "tests/unit_probe.py", "prepare", xfs.path)
    assert set(granted()) == set(NEEDED_FOR)
    assert NEEDED_FOR[dropped] <= probed(xfs.path, [name for name in granted() if name != dropped])


def members(name):
    """The system calls of a name in a filter: itself, or those of a set."""
    if not name.startswith("@"):
        return {name}
    lines = run("systemd-analyze", "syscall-filter", name).stdout.decode().splitlines()[1:]
    words = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return {call for word in words for call in members(word)}


def allowed():
    """The system calls that the unit's filter lets through; systemd's @default is always among them."""
    calls = members("@default")
    for line in setting("SystemCallFilter"):
        found = {call for word in line.removeprefix("~").split() for call in members(word)}
        calls = calls - found if line.startswith("~") else calls | found
    return calls


@pytest.mark.kernel
def test_the_units_filter_lets_every_system_call_through(strangers, tmp_path):
    require(shutil.which("strace") is not None, "strace")
    require(shutil.which("systemd-analyze") is not None, "systemd-analyze")
    trace = tmp_path / "trace"
    probed(strangers.path, granted(), "strace", "--follow-forks", "--quiet=all", "--signal=none", f"--output={trace}")
    calls = set(re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)[( ]", trace.read_text(), re.MULTILINE))
    assert {"open_by_handle_at", "fanotify_mark", "open_tree"} <= calls
    assert calls - allowed() == set()


# ---- mosquitto/


@dataclass
class Clients:
    """The clients of one broker, by user. The broker is mosquitto with the configuration as shipped, but for paths and ports."""

    directory: str
    passwords: int
    certificates: int

    def options(self, user, *, version="5"):
        """How a mosquitto client logs in with a password."""
        place = ["-h", "localhost", "-p", str(self.passwords), "--cafile", f"{self.directory}/ca.pem"]
        return [*place, "-u", user, "-P", f"secret of {user}", "-V", version]

    def certified(self):
        """How the client with the certificate of edge7 does."""
        place = ["-h", "localhost", "-p", str(self.certificates), "--cafile", f"{self.directory}/ca.pem"]
        return [*place, "--cert", f"{self.directory}/client.pem", "--key", f"{self.directory}/client.key", "-V", "5"]

    def publish(self, options, topic, payload, *more):
        """Publish with QoS 1: whether the broker took it."""
        done = run("mosquitto_pub", *options, "-q", "1", "-t", topic, "-m", payload, *more, check=False)
        assert done.returncode or done.stderr == b"" or b"Not authorized" in done.stderr, done.stderr
        return done.returncode == 0 and done.stderr == b""

    @contextlib.contextmanager
    def receiving(self, options, *filters):
        """A mosquitto_sub: the lines `topic payload` it has printed so far."""
        topics = [word for one in filters for word in ("-t", one)]
        command = ["stdbuf", "-oL", "mosquitto_sub", *options, "-q", "1", *topics, "-F", "%t %p"]
        output = os.path.join(self.directory, f"received-{free_port()}")
        with open(output, "wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file)

        def lines():
            with open(output, encoding="utf-8") as file:
                return file.read().splitlines()

        try:
            yield lines
        finally:
            process.kill()
            process.wait()


def test_the_certificates_of_the_documentation_are_strict_ones(tmp_path):
    """As written there; Python 3.13 takes no others."""
    require(shutil.which("openssl") is not None, "openssl")
    lines = (ROOT / "docs/install.md").read_text(encoding="utf-8").splitlines()
    commands = [line.strip() for line in lines if line.startswith(("    openssl", "        -"))]
    assert sum(line.startswith("openssl") for line in commands) == 5
    (tmp_path / "make.sh").write_text("set -e\n" + "\n".join(commands) + "\n")
    run("bash", tmp_path / "make.sh", cwd=tmp_path)
    for name in ("server.pem", "edge7.pem"):
        run("openssl", "verify", "-x509_strict", "-CAfile", tmp_path / "ca.pem", tmp_path / name)
    shown = run("openssl", "x509", "-in", tmp_path / "ca.pem", "-noout", "-ext", "keyUsage").stdout
    assert b"Certificate Sign" in shown


@pytest.fixture
def clients(tmp_path):
    """The shipped files in a directory of the test, users and certificates made as docs/install.md says."""
    program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    require(os.access(program, os.X_OK) and shutil.which("mosquitto_sub") is not None, "mosquitto and its clients")
    require(shutil.which("openssl") is not None, "openssl")
    home = tmp_path / "mosquitto"
    (home / "certs").mkdir(parents=True)
    (home / "conf.d").mkdir()
    _certificates(tmp_path)
    for name in ("ca.pem", "server.pem", "server.key"):
        shutil.copy(tmp_path / name, home / "certs" / name)
    shutil.copy(ETC / "mosquitto/acl", home / "snapfeed.acl")
    for number, user in enumerate(("edge7", "consumer", "commander")):
        run(
            "mosquitto_passwd",
            *([] if number else ["-c"]),
            "-b",
            home / "snapfeed.passwords",
            user,
            f"secret of {user}",
        )
    ports = (free_port(), free_port())
    text = (ETC / "mosquitto/snapfeed.conf").read_text(encoding="utf-8")
    for shipped_port, port in zip(("8883", "8884"), ports, strict=True):
        assert f"listener {shipped_port}\n" in text
        text = text.replace(f"listener {shipped_port}\n", f"listener {port} 127.0.0.1\n")
    (home / "conf.d/snapfeed.conf").write_text(text.replace("/etc/mosquitto/", f"{home}/"))
    (home / "mosquitto.conf").write_text(f"user root\nlog_type all\ninclude_dir {home}/conf.d\n")
    broker = Broker([program, "-c", f"{home}/mosquitto.conf"], ports[0], tmp_path / "log")
    broker.start()
    try:
        yield Clients(str(tmp_path), *ports)
    finally:
        broker.kill()


CHANGES = "snapfeed/edge7/data/changes"


def test_the_daemon_publishes_and_a_consumer_reads(clients):
    consumer = clients.options("consumer")
    with clients.receiving(consumer, "snapfeed/+/+/changes", "snapfeed/+/status") as lines:

        def arrived():
            assert clients.publish(clients.options("edge7"), CHANGES, "a page")
            assert clients.publish(clients.certified(), "snapfeed/edge7/status", "with a certificate")
            return {f"{CHANGES} a page", "snapfeed/edge7/status with a certificate"} <= set(lines())

        wait_until(arrived, "both messages arrive")


def test_a_consumer_may_not_write(clients):
    consumer = clients.options("consumer")
    with clients.receiving(clients.options("commander"), "snapfeed/#") as lines:
        for topic in (
            CHANGES,
            "snapfeed/edge7/status",
            "snapfeed/edge7/request/snapshot",
            "snapfeed/consumer/x/changes",
        ):
            assert not clients.publish(consumer, topic, "forged", "-r")

        def arrived():
            assert clients.publish(clients.options("edge7"), CHANGES, "true")
            return lines()

        wait_until(arrived, "what the daemon writes arrives")
        assert not clients.publish(consumer, CHANGES, "forged")
        assert not any("forged" in line for line in lines())


def test_a_consumer_does_not_hear_commands_and_answers(clients):
    commander = clients.options("commander")
    with clients.receiving(clients.options("consumer"), "snapfeed/#") as lines:

        def arrived():
            assert clients.publish(commander, "snapfeed/edge7/request/snapshot", "private")
            assert clients.publish(clients.options("edge7"), "snapfeed/edge7/response/snapshot", "private")
            assert clients.publish(clients.options("edge7"), CHANGES, "public")
            return lines()

        wait_until(arrived, "what is public arrives")
        assert {line.rpartition(" ")[2] for line in lines()} == {"public"}


def test_a_daemon_writes_for_its_own_host_only(clients):
    for options in (clients.options("edge7"), clients.certified()):
        assert clients.publish(options, "snapfeed/edge7/data/state", "{}")
        assert not clients.publish(options, "snapfeed/edge8/data/state", "{}")
        assert not clients.publish(options, "snapfeed/edge7/request/snapshot", "{}")


def test_nobody_comes_in_without_tls_login_or_certificate(clients):
    plain = ["-h", "localhost", "-p", str(clients.passwords)]
    trusted = ["--cafile", f"{clients.directory}/ca.pem"]
    for options in (
        plain,
        [*plain, *trusted],
        [*plain, *trusted, "-u", "edge7", "-P", "wrong"],
        ["-h", "localhost", "-p", str(clients.certificates), *trusted, "-u", "edge7", "-P", "secret of edge7"],
    ):
        assert not clients.publish(options, CHANGES, "x")


@pytest.mark.parametrize("login", ["password", "certificate"])
def test_the_daemons_publisher_works_with_it(clients, login):
    """Last will, status, state, commands and answers, also those to a response topic."""
    ca_file, port = f"{clients.directory}/ca.pem", getattr(clients, f"{login}s")
    if login == "password":
        who = {"username": "edge7", "password": "secret of edge7"}
    else:
        who = {"cert_file": f"{clients.directory}/client.pem", "key_file": f"{clients.directory}/client.key"}
    config = BrokerConfig(f"mqtts://localhost:{port}", ca_file=ca_file, host="edge7", **who)

    async def handler(request):
        return answer(orjson.loads(request.payload)["id"], data="done")

    async def main():
        publisher = Publisher(config, version="0", handler=handler)
        publisher.set_state("data", b'{"head": 1}')
        running = asyncio.create_task(publisher.run())
        commander = clients.options("commander")
        with clients.receiving(commander, "snapfeed/+/status", "snapfeed/+/+/state", "snapfeed/+/response/#") as lines:
            await eventually(lambda: 'snapfeed/edge7/data/state {"head": 1}' in lines(), "the state")
            assert any(line.startswith('snapfeed/edge7/status {"state":"online"') for line in lines())
            for number in range(100):
                request = ("snapfeed/edge7/request/snapshot", f'{{"id": "{number}"}}')
                more = ("-D", "publish", "response-topic", "snapfeed/edge7/response/snapshot/mine")
                assert await asyncio.to_thread(clients.publish, commander, *request, *more)
                if {line.partition(" ")[0].rpartition("/")[2] for line in lines()} >= {"snapshot", "mine"}:
                    break
            await publisher.stop()
            await running
            await eventually(lambda: '"offline"' in lines()[-1], "the end")
        assert publisher.stats.state_refusals == 0
        assert any(line.startswith("snapfeed/edge7/response/snapshot {") and '"done"' in line for line in lines())
        assert any(line.startswith("snapfeed/edge7/response/snapshot/mine {") for line in lines())

    asyncio.run(main())
