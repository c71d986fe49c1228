"""The memory of commands: used by several threads at once, as the daemon does, it forgets none and fails for none."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

from feed.commands import Command
from watcher.ledger import NAME, Ledger


def test_threads_at_once(tmp_path):
    ledger = Ledger()
    ledger.open(str(tmp_path))
    begin = threading.Barrier(8)

    def carries_out(number):
        begin.wait()
        done = []
        for _ in range(30):
            command = Command("snapshot", uuid.uuid4().hex, None, {})
            assert ledger.earlier(command) == (False, None)
            ledger.begin(command)
            assert ledger.earlier(command) == (True, None)
            ledger.finish(command, b"%d" % number)
            done.append(command)
        return done

    with ThreadPoolExecutor(8) as pool:
        per_thread = list(pool.map(carries_out, range(8)))
    ledger.close()
    assert ledger.trouble is None
    assert (tmp_path / NAME).exists()
    again = Ledger()
    again.open(str(tmp_path))
    for number, commands in enumerate(per_thread):
        assert all(again.earlier(command) == (True, b"%d" % number) for command in commands)
    again.close()
