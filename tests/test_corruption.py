"""The system file corrupted in every way we could think of, thousands of times in the life of one partition.

After each corruption the partition is opened as the daemon opens it, and judged: either the damage is detected (the bad file kept
aside, a new epoch, a baseline that makes a consumer exact), or it is harmless: the same epoch, and a consumer that held what was
published before is exact again with the next diffs. SNAPFEED_CORRUPTIONS and SNAPFEED_SEED say how many and which;
SNAPFEED_REPORT names a file for the figures.
"""

import collections
import os
import shutil
import socket
import stat
import struct
import time

import pytest
from daemon_process import HOST
from life import Life
from partitions import partition, wait_until
from reporting import report
from test_invariants import feeding

from comparer.errors import OperatorError
from snapshotter.adopt import adopt, quarantine
from snapshotter.partition import partition_at
from snapshotter.systemfile import SystemFile

pytestmark = pytest.mark.kernel
PAGE = 4096


# ---- corruptions: each takes a Life whose daemon is not running


def flips(life, suffix=b"", most=8, end=None):
    data = bytearray(life.read()[suffix])
    used = [at for at in range(0, len(data), 16) if any(data[at : at + 16])] if life.random.random() < 0.7 else []
    for _ in range(life.random.randrange(1, most + 1)):
        at = (
            life.random.choice(used) + life.random.randrange(16)
            if used and not end
            else life.random.randrange(end or len(data))
        )
        data[min(at, len(data) - 1)] ^= 1 << life.random.randrange(8)
    put(life, suffix, data)


def put(life, suffix, data):
    with open(life.file + suffix, "wb") as file:
        file.write(data)


def one_bit(life):
    flips(life, most=1)


def some_bits(life):
    flips(life)


def header(life):
    flips(life, most=2, end=100)


def noise(life):
    data = bytearray(life.read()[b""])
    at = life.random.randrange(len(data))
    length = min(life.random.randrange(1, 3 * PAGE), len(data) - at)
    data[at : at + length] = life.random.randbytes(length)
    put(life, b"", data)


def zeros(life):
    data = bytearray(life.read()[b""])
    unit = life.random.choice([512, PAGE])
    at = life.random.randrange(len(data) // unit) * unit
    data[at : at + unit] = bytes(unit)
    put(life, b"", data)


def misplaced_page(life):
    """A page written where another belongs."""
    data = bytearray(life.read()[b""])
    source, target = (life.random.randrange(len(data) // PAGE) * PAGE for _ in range(2))
    data[target : target + PAGE] = data[source : source + PAGE]
    put(life, b"", data)


def lost_write(life):
    """One page as it was a while ago."""
    old = life.read()[b""]
    life.live()
    data = bytearray(life.read()[b""])
    pages = [at for at in range(0, min(len(old), len(data)), PAGE) if old[at : at + PAGE] != data[at : at + PAGE]]
    if pages:
        at = life.random.choice(pages)
        data[at : at + PAGE] = old[at : at + PAGE]
        put(life, b"", data)


def truncated(life):
    size = os.path.getsize(life.file)
    os.truncate(
        life.file, life.random.choice([life.random.randrange(size), life.random.randrange(size // PAGE) * PAGE])
    )


def emptied(life):
    os.truncate(life.file, 0)


def tail(life):
    with open(life.file, "ab") as file:
        file.write(life.random.randbytes(life.random.choice([1, 100, PAGE, 5 * PAGE])))


def shifted(life):
    """Bytes too many, or too few, in the middle."""
    data = life.read()[b""]
    at, length = life.random.randrange(len(data)), life.random.randrange(1, 600)
    put(life, b"", data[:at] + (data[at + length :] if life.random.random() < 0.5 else bytes(length) + data[at:]))


def wal_kept(life):
    """No corruption: killed, and that is all."""
    life.killed()


def wal_deleted(life):
    life.killed()
    os.unlink(life.file + b"-wal")


def wal_flipped(life):
    life.killed()
    flips(life, b"-wal", most=2)


def wal_truncated(life):
    life.killed()
    os.truncate(life.file + b"-wal", life.random.randrange(os.path.getsize(life.file + b"-wal")))


def wal_tail(life):
    life.killed()
    with open(life.file + b"-wal", "ab") as file:
        file.write(life.random.randbytes(life.random.randrange(1, 9000)))


def wal_and_file_flipped(life):
    life.killed()
    flips(life, most=1)


def wal_of_another_time(life):
    found = life.killed()
    others = [o for o in life.olds if b"-wal" in o]
    if others:
        put(life, b"-wal", life.random.choice(others)[b"-wal"])
    life.olds.append(found)


def wal_out_of_nothing(life):
    put(life, life.random.choice([b"-wal", b"-journal"]), life.random.randbytes(life.random.randrange(1, 20_000)))


def frames(wal):
    """(page number, content) of each frame of a write-ahead log, and whether it ends a transaction."""
    for at in range(32, len(wal) - PAGE - 23, PAGE + 24):
        number, commit = struct.unpack_from(">II", wal, at)
        yield number, wal[at + 24 : at + 24 + PAGE], bool(commit)


def in_the_middle_of_a_checkpoint(life):
    """Killed while what is in the log was copied to the file: some pages are there already, and the log perhaps not any more."""
    found = life.killed(checkpointing=True)
    pages, pending = {}, {}
    for number, content, commit in frames(found[b"-wal"]):
        pending[number] = content
        if commit:
            pages.update(pending)
            pending = {}
    data = bytearray(found[b""])
    numbers = sorted(pages)
    for number in numbers[: life.random.randrange(1, len(numbers) + 1)]:
        data[(number - 1) * PAGE : number * PAGE] = pages[number]
    put(life, b"", data)
    what = life.random.choice(["kept", "deleted", "flipped", "file flipped"])
    if what == "deleted":
        os.unlink(life.file + b"-wal")
    elif what == "flipped":
        flips(life, b"-wal", most=1)
    elif what == "file flipped":
        flips(life, most=1)


def old_copy(life):
    if not life.olds or life.random.random() < 0.3:
        life.olds.append(life.read())
        life.live()
    life.write({b"": life.random.choice(life.olds)[b""]})


def old_copy_with_log(life):
    if life.random.random() < 0.5:
        life.olds.append(life.killed())
        life.begin()
    with_log = [o for o in life.olds if b"-wal" in o] or list(life.olds)
    if with_log:
        life.write(life.random.choice(with_log))


def foreign(life):
    """The file of another partition, its UUID another; or of the same one, made anew."""
    life.remove()
    shutil.copy(life.foreign if life.random.random() < 0.5 else life.before, life.file)


def newer(life):
    """Not damaged: written by a snapfeed to come."""
    life.kept = life.read()
    with SystemFile.open(life.file) as file, file.transaction():
        file.db.execute("PRAGMA user_version = 999")


def something_else(life):
    """Not a regular file."""
    life.remove()
    kind = life.random.choice(["directory", "full directory", "symlink", "dangling", "fifo", "socket", "device"])
    if "directory" in kind:
        os.mkdir(life.file)
        if kind != "directory":
            with open(life.file + b"/x", "wb"):
                pass
    elif kind == "symlink":
        with open(life.directory + b"/elsewhere", "wb") as file:
            file.write(life.olds[-1][b""] if life.olds else b"")
        os.symlink(b"elsewhere", life.file)
    elif kind == "dangling":
        os.symlink(b"/nonexistent/outside", life.file)
    elif kind == "fifo":
        os.mkfifo(life.file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(life.file)
    else:
        os.mknod(life.file, stat.S_IFCHR | 0o600, os.makedev(1, 3))


OFTEN = [one_bit, some_bits, noise, zeros, lost_write, misplaced_page, truncated]
CORRUPTIONS = [
    *(3 * OFTEN), header, header, emptied, tail, shifted, wal_kept, wal_deleted, wal_flipped, wal_truncated, wal_tail,
    wal_and_file_flipped, wal_of_another_time, wal_out_of_nothing, in_the_middle_of_a_checkpoint, in_the_middle_of_a_checkpoint,
    old_copy, old_copy_with_log, foreign, newer, something_else,
]  # fmt: skip


def judge(life, corruption):
    """Open the partition after a corruption; returns `detected`, `harmless` or `refused`. Anything else raises."""
    epoch = life.consumer.head[0]
    bad = life.read() if stat.S_ISREG(os.lstat(life.file).st_mode) else None
    if corruption is newer:
        with pytest.raises(OperatorError, match="update snapfeed"):
            life.begin()
        assert life.read()[b""] == bad[b""], "left alone"
        put(life, b"", life.kept[b""])
        life.begin()
        life.exact()
        return "refused"
    errors = life.begin()
    life.exact()
    asides = life.asides()
    assert len(asides) == len(errors)
    if not errors:
        assert life.consumer.head[0] == epoch
        return "harmless"
    assert len(errors) == 1, errors
    assert life.consumer.head[0] != epoch
    kept = os.path.join(asides[0], b"system.db")
    assert os.path.lexists(kept)
    if bad is not None and b"-wal" not in bad:
        with open(kept, "rb") as file:
            assert file.read()[PAGE:] == bad[b""][PAGE:], "the bad content is kept"
    shutil.rmtree(asides[0])
    return "detected"


@pytest.mark.parametrize("fs", ["xfs", "ext4"])
def test_a_corrupted_system_file_is_detected_or_harmless(fs, tmp_path):
    count, seed = int(os.environ.get("SNAPFEED_CORRUPTIONS", "60")) // 2, int(os.environ.get("SNAPFEED_SEED", "1"))
    tally: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    with partition(fs, tmp_path) as part:
        life = Life(part, seed)
        life.before = tmp_path / "before"
        shutil.copy(os.fsdecode(life.file), life.before)
        (tmp_path / "other").mkdir()
        with partition("ext4", tmp_path / "other", "64M") as other:
            adopt(partition_at(os.fsencode(other.path)), time.time_ns())
            life.foreign = tmp_path / "foreign"
            shutil.copy(other.path / ".snapfeed/system.db", life.foreign)
        quarantine(life.partition, time.time_ns(), 1 << 20, 60.0)  # what is before is of another epoch
        life.olds.clear()
        life.begin()
        shutil.rmtree(life.asides()[0])
        kinds = []
        for number in range(count):
            if not kinds:
                kinds = CORRUPTIONS.copy()
                life.random.shuffle(kinds)
            corruption = kinds.pop()
            life.live()
            corruption(life)
            where = f"corruption {number} ({corruption.__name__}), seed {seed}, {fs}"
            try:
                found = judge(life, corruption)
            except BaseException as error:
                error.add_note(where)
                raise
            tally[corruption.__name__][found] += 1
            if found == "detected":
                life.olds.clear()  # of another epoch
    total = sum(tally.values(), collections.Counter())
    report("corruption", count, fs=fs, seed=seed, **total, kinds={k: dict(v) for k, v in sorted(tally.items())})
    assert total["detected"] >= count // 3


def bit_in(path, what):
    """Flip one bit of the first place where some bytes stand in a file that SQLite thinks nobody else writes to."""
    data = path.read_bytes()
    at = data.index(what)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 2]))


def test_the_daemon_meets_damage_at_the_start_and_while_it_runs(xfs, tmp_path):
    """What nothing but a checksum can tell: a name in the metadata table; and things in the file's place, a log that is gone."""
    config = f'[broker]\nhost = "{HOST}"\n[defaults]\nreconcile = "1s"\n'
    store = xfs.path / ".snapfeed/system.db"
    (xfs.path / "directory").mkdir()
    (xfs.path / "directory/a-name").write_text("x")
    with feeding(xfs.path, tmp_path, config=config) as feed:
        epochs = [feed.consumer.head[0]]

        def anew():
            def found():
                return feed.snapfeed.alive() and feed.snapfeed.partition()["epoch"] not in (None, *epochs)

            wait_until(found, "a new epoch")
            feed.exact()
            epochs.append(feed.consumer.head[0])

        feed.quiet()
        bit_in(store, b"a-name")  # while it runs: found by the periodic check
        anew()
        for damage in (lambda: bit_in(store, b"a-name"), lambda: (store.unlink(), os.mkfifo(store))):
            assert feed.snapfeed.stop() == 0
            damage()
            feed.snapfeed.start(ready=False)
            wait_until(feed.snapfeed.socket.exists, "it answers")
            anew()
        asides = [p for p in store.parent.iterdir() if p.name.startswith("damaged-")]
        assert len(asides) == len(epochs) - 1 == 3
        assert all((p / "system.db").exists() for p in asides)
        assert "Traceback" not in feed.snapfeed.output()
