"""A kept state as a view with its content: the newest snapshot's table, a copy of it, or on btrfs the snapshot itself."""

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import quote

from comparer.model import Ident, View

from .backends.base import SYSTEM_DIR, no_content
from .backends.btrfs import SNAPSHOTS
from .backends.btrfs_view import SubvolumeView
from .backends.clones import clone_path
from .database import translated
from .table import Table
from .visit import Visit


class Held(NamedTuple):
    """`content(ident, path)`: where a file's content is kept, from the partition's root; None if it is not."""

    view: View
    content: Callable[[Ident, bytes], bytes | None]


@contextlib.contextmanager
def held(visit: Visit, seq: int, copy: bytes | None = None) -> Iterator[Held]:
    """The state of snapshot `seq`: the newest, or the one `copy` (a path of `copy_table`) was made of; on btrfs any that is kept.

    Raises OSError, DamageError.
    """
    if visit.abilities.backend == "btrfs":
        with _subvolume(visit, seq) as view:
            prefix = b"/".join((SYSTEM_DIR, SNAPSHOTS, b"%d" % seq))
            yield Held(view, lambda _ident, path: prefix + b"/" + path)
        return
    if copy is None:
        yield _table(visit, visit.file.db)
        return
    with translated(copy), contextlib.closing(sqlite3.connect(f"file:{quote(copy)}?immutable=1", uri=True)) as db:
        yield _table(visit, db)


def _table(visit: Visit, db: sqlite3.Connection) -> Held:
    table = Table(db, visit.tree.root)
    if visit.abilities.backend != "ficlone":
        return Held(table, no_content)

    def content(ident: Ident, _path: bytes) -> bytes | None:
        seq = table.clone(ident)
        return None if seq is None else clone_path(seq, ident)

    return Held(table, content)


@contextlib.contextmanager
def _subvolume(visit: Visit, seq: int) -> Iterator[SubvolumeView]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    system = os.open(SYSTEM_DIR, flags, dir_fd=visit.root_fd)
    try:
        directory = os.open(SNAPSHOTS, flags, dir_fd=system)
    finally:
        os.close(system)
    try:
        view = SubvolumeView.open(directory, b"%d" % seq)
    finally:
        os.close(directory)
    try:
        yield view
    finally:
        view.close()


def copy_table(visit: Visit, path: bytes) -> None:
    """Copy the system file as it is now to `path`: where there is reflink, at no cost. Raises OSError, TransientError."""
    visit.file.checkpoint()
    source = os.open(visit.file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    visit.close_last(source)
    with open(path, "wb", opener=_private) as target:
        left = os.fstat(source).st_size
        try:
            while left > 0:
                done = os.copy_file_range(source, target.fileno(), left)
                if not done:
                    break
                left -= done
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            _copy(source, target.fileno())  # not between these, or not here


def _copy(source: int, target: int) -> None:
    at = 0
    while block := os.pread(source, 1 << 20, at):
        os.pwrite(target, block, at)
        at += len(block)


def _private(path: str | bytes, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
