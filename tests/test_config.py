"""The configuration file: every key is checked, and an error says where it is and what is allowed."""

import contextlib
import json
import re

import pytest
from daemon_process import ROOT
from hypothesis import given
from hypothesis import strategies as st

from comparer.errors import OperatorError
from watcher.config import KEEP, SOCKET, Config, PartitionConfig, doubts, load, parse, partition_name

FULL = """
[broker]
url = "mqtts://broker.example:8884"
username = "edge7"
password_file = "{directory}/password"
ca_file = "{directory}/ca.pem"
cert_file = "{directory}/client.pem"
key_file = "{directory}/client.key"
base = "site/feed"
host = "edge7"
max_packet = 262144
[control]
socket = "/run/x.sock"
[defaults]
io_threshold = "128MiB"
time_threshold = "5min"
keep = 3
reconcile = "1h"
[watch]
exclude = ["/mnt/*"]
[[partition]]
mount = "/data/"
name = "data"
io_threshold = 4096
time_threshold = 1.5
keep = 2
[[partition]]
mount = "/srv"
"""


def test_every_key(tmp_path):
    for name in ("ca.pem", "client.pem", "client.key"):
        (tmp_path / name).write_text("x")
    (tmp_path / "password").write_text("secret\n")
    config = parse(FULL.format(directory=tmp_path))
    broker = config.broker
    assert (broker.url, broker.username, broker.password) == ("mqtts://broker.example:8884", "edge7", "secret")
    assert (broker.base, broker.host, broker.max_packet) == ("site/feed", "edge7", 262144)
    assert (broker.ca_file, broker.cert_file, broker.key_file) == tuple(
        f"{tmp_path}/{name}" for name in ("ca.pem", "client.pem", "client.key")
    )
    assert "secret" not in repr(config)
    assert (config.socket, config.io_threshold, config.time_threshold) == ("/run/x.sock", 128 << 20, 300.0)
    assert (config.keep, config.reconcile, config.exclude) == (3, 3600.0, ("/mnt/*",))
    assert config.of("/data") == PartitionConfig("/data", "data", 4096, 1.5, 2)
    assert config.of("/srv") == PartitionConfig("/srv")
    assert config.of("/elsewhere") == PartitionConfig("/elsewhere")


def test_nothing_is_needed():
    assert parse("") == Config()
    assert (Config().broker, Config().socket, Config().keep) == (None, SOCKET, KEEP)


def test_host_and_base_count_without_a_broker(tmp_path):
    config = parse('[broker]\nhost = "edge7"\nbase = "site"\n')
    assert (config.broker, config.host, config.base) == (None, "edge7", "site")


def test_the_shipped_file_says_the_defaults():
    assert load(str(ROOT / "etc" / "snapfeed.toml")) == Config(base="snapfeed")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[nonsense]", ["nonsense", "unknown", "broker", "partition"]),
        ("nonsense = 1", ["nonsense", "unknown"]),
        ("[defaults]\nio_treshold = 1", ["defaults.io_treshold", "unknown", "io_threshold"]),
        ("[[partition]]\nmount = '/x'\nfs = 'xfs'", ["partition[1].fs", "unknown", "mount"]),
        ("[[partition]]\nname = 'x'", ["partition[1]", "mount", "missing"]),
        ("[[partition]]\nmount = 'data'", ["partition[1].mount", "'data'", "absolute"]),
        ("[[partition]]\nmount = '/a'\n[[partition]]\nmount = '/b'\nname = 'x y'", ["partition[2].name", "'x y'", "A-Z"]),
        ("[[partition]]\nmount = '/a'\n[[partition]]\nmount = '/a/'", ["partition.mount", "'/a'", "twice"]),
        ("[[partition]]\nmount='/a'\nname='x'\n[[partition]]\nmount='/b'\nname='x'", ["partition.name", "'x'", "twice"]),
        ("[partition]\nmount = '/x'", ["partition", "[[partition]]"]),
        ("broker = 'mqtt://x'", ["broker", "table", "[broker]"]),
        ("[defaults]\nio_threshold = '12 parsecs'", ["defaults.io_threshold", "'12 parsecs'", "64MiB"]),
        ("[defaults]\ntime_threshold = '12 parsecs'", ["defaults.time_threshold", "'12 parsecs'", "60s"]),
        ("[defaults]\ntime_threshold = 0", ["defaults.time_threshold", "0", "60s"]),
        ("[defaults]\nkeep = 1", ["defaults.keep", "1", "from 2 to"]),
        ("[defaults]\nkeep = true", ["defaults.keep", "True", "from 2 to"]),
        ("[defaults]\nkeep = '16'", ["defaults.keep", "'16'", "from 2 to"]),
        ("[watch]\nexclude = '/mnt'", ["watch.exclude", "'/mnt'", "list"]),
        ("[control]\nsocket = 'x.sock'", ["control.socket", "'x.sock'", "absolute"]),
        ("[broker]\nurl = 'http://x'", ["url", "http://x", "mqtt://"]),
        ("[broker]\nurl = 'mqtt://me:secret@x'", ["url", "username", "password_file"]),
        ("[broker]\nurl = 1", ["broker.url", "1", "text"]),
        ("[broker]\nmax_packet = 100", ["broker.max_packet", "100", "8192"]),
        ("[broker]\nhost = 'a/b'", ["broker.host", "'a/b'", "A-Z"]),
        ("[broker]\nurl = 'mqtts://x'\nca_file = '/nonexistent/ca'", ["broker.ca_file", "/nonexistent/ca", "readable"]),
        ("[broker]\nurl = 'mqtt://x'\nusername = 'a'\npassword_file = '/nonexistent/p'", ["password_file", "/nonexistent/p"]),
        ("[broker]\nurl = 'mqtts://x'\ncert_file = '/etc/passwd'", ["key_file", "together"]),
        ("[defaults]\nio_threshold = '64'", ["defaults.io_threshold", "'64'", "unit", "64MiB"]),
        ("[[partition]]\nmount = '/x'\nio_threshold = 64", ["partition[1].io_threshold", "64 bytes", "unit"]),
        ("[broker", ["TOML", "quotes", "etc/snapfeed.toml"]),
        ("[a]\n[a]", ["TOML"]),
    ],
)  # fmt: skip
def test_an_error_says_where_and_what(text, words):
    with pytest.raises(OperatorError) as error:
        parse(text, "/etc/x.toml")
    said = str(error.value)
    assert said.startswith("/etc/x.toml: ")
    assert all(word in said for word in words), said
    assert said.count("/nonexistent/p") <= 1
    assert "secret" not in said


def test_a_mistake_is_found_though_no_broker_is_configured():
    """Keys of [broker] are checked even if its `url`, and with it the broker, is off."""
    with pytest.raises(OperatorError, match="'a b'"):
        parse("[broker]\nbase = 'a b'\n")


def test_a_login_is_kept_for_a_url_from_the_command_line():
    config = parse("[broker]\nusername = 'edge7'\nmax_packet = 8192\n")
    assert config.broker is None
    assert (config.draft.username, config.draft.max_packet) == ("edge7", 8192)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(OperatorError):
        parse(text)


scalars = st.one_of(
    st.text(max_size=10), st.integers(-(2**63), 2**63 - 1), st.booleans(), st.lists(st.integers(0, 9), max_size=2)
)


@given(
    st.sampled_from(["broker", "control", "defaults", "watch", "partition"]),
    st.sampled_from(
        "url username base host max_packet socket io_threshold time_threshold keep reconcile exclude mount name".split()
    ),
    scalars,
)
def test_any_value_is_taken_or_refused_by_name(table, key, value):
    written = json.dumps(value, ensure_ascii=True)  # TOML's escapes are JSON's, but for lone surrogates
    header = "[[partition]]" if table == "partition" else f"[{table}]"
    try:
        config = parse(f"{header}\n{key} = {written}\n")
    except OperatorError as error:
        said = str(error)
        assert table in said or "TOML" in said
        return
    assert config.keep >= 2
    assert config.io_threshold is None or config.io_threshold >= 1
    assert config.time_threshold is None or config.time_threshold > 0
    assert config.socket.startswith("/")


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "latin"):
        with pytest.raises(OperatorError, match="readable") as error:
            load(str(path))
        assert str(path) in str(error.value)


def test_what_is_valid_and_odd(tmp_path):
    for name in ("password", "key", "secret"):
        (tmp_path / name).write_text("x" * 16)
        (tmp_path / name).chmod(0o644)
    file = tmp_path / "x.toml"
    file.write_text(
        f"[broker]\nusername='u'\npassword_file='{tmp_path}/password'\ncert_file='{tmp_path}/key'\nkey_file='{tmp_path}/key'\n"
        f"[commands]\nsecret_file='{tmp_path}/secret'\n[[partition]]\nmount='{tmp_path}'\n[[partition]]\nmount='/nonexistent'\n"
    )
    odd = doubts(str(file))
    assert [text.split(":")[0] for text in odd] == [
        "broker.password_file", "broker.key_file", "commands.secret_file", "partition[2].mount",
    ]  # fmt: skip
    assert all("chmod 600" in text for text in odd[:3])
    assert "/nonexistent" in odd[3]
    for name in ("password", "key", "secret"):
        (tmp_path / name).chmod(0o640)
    assert len(doubts(str(file))) == 1
    assert doubts(str(ROOT / "etc" / "snapfeed.toml")) == []


@given(st.text(max_size=100), st.text(max_size=300))
def test_a_partition_has_a_name_that_stands_in_a_topic(label, mount):
    for given_label in (label, None):
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", partition_name(None, given_label, mount))
    assert partition_name("mine", label, mount) == "mine"
    assert partition_name(None, "backup", "/data") == "backup"
    assert partition_name(None, None, "/srv/data") == "srv-data"
    assert partition_name(None, None, "/") == "root"
