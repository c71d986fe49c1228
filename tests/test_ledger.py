"""The memory of commands: used by several threads at once, as the daemon does, it forgets none and fails for none."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

from feed.commands import Command
from watcher.ledger import NAME, Ledger


class OneAtATime:
    """A connection that notes whether two threads were in it together; each stays long enough for that."""

    def __init__(self, db):
        self.db, self.within, self.together = db, 0, False

    def execute(self, *args):
        self.within += 1
        self.together |= self.within > 1
        try:
            return self.db.execute(*args)
        finally:
            self.together |= self.within > 1
            self.within -= 1

    def close(self):
        self.db.close()


def test_threads_at_once(tmp_path):
    ledger = Ledger()
    ledger.open(str(tmp_path))
    used = ledger._db = OneAtATime(ledger._db)
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
    assert not used.together, "what sqlite3 makes of that depends on its version"
    assert (tmp_path / NAME).exists()
    again = Ledger()
    again.open(str(tmp_path))
    for number, commands in enumerate(per_thread):
        assert all(again.earlier(command) == (True, b"%d" % number) for command in commands)
    again.close()
