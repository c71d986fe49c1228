"""`.snapfeed/clones/<seq>/<inode>.<generation>`: the content of a file as of snapshot `seq`, and of later ones until it changes.

One directory for each snapshot, so that what an unfinished one left behind is found by its number. Files are cloned by handle,
many in one call where the library in C was built (linux/batch.py); what that leaves, and everything without it, one by one.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from comparer.extents import Extent
from comparer.model import Attr, Ident
from snapshotter.beside import Beside
from snapshotter.linux import batch
from snapshotter.linux.fiemap import extent_count, extents, ficlone
from snapshotter.linux.inode_flags import set_immutable
from snapshotter.linux.writeback import start_writeback
from snapshotter.live import LiveTree

from .base import SYSTEM_DIR

CLONES = b"clones"
MAX_EXTENTS = 50_000  # cloning costs with extents, and the file's writers wait meanwhile
PAGE = batch.AT_ONCE  # files
_MAPS = 4096  # files whose extent maps are kept in memory, half a kilobyte each; those of others are read when they are asked for
_GROUP = 64  # files that are open together
_TRIES = 3
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SKIP = (
    errno.ETXTBSY,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.ENXIO,
    errno.EAGAIN,
)  # swap files, DAX, immutable oddities


class Seen(NamedTuple):
    """What tells whether a file has stood still, out of its Attr."""

    nlink: int
    ctime_ns: int
    size: int


class Wanted(NamedTuple):
    """A file to be cloned, as it was looked at. `old`: the snapshot that has its last clone."""

    ident: Ident
    attr: Attr | Seen
    old: int | None = None


@dataclass(slots=True)
class Taken:
    """What became of files: which have a clone and which have none; what those are now that changed since they were looked at;
    which of them never stood still; and the extent maps of those with an `old` clone as (old, new), if they are short.
    """

    made: list[Ident] = field(default_factory=list)
    without: list[Ident] = field(default_factory=list)
    moved: dict[Ident, Attr] = field(default_factory=dict)
    restless: list[Ident] = field(default_factory=list)
    maps: dict[Ident, tuple[list[Extent], list[Extent]]] = field(default_factory=dict)


def nothing(_directory: int) -> None:
    """Nobody watches."""


def _cut(files: Sequence[Wanted], size: int) -> list[Sequence[Wanted]]:
    return [files[at : at + size] for at in range(0, len(files), size)]


def clone_path(seq: int, ident: Ident) -> bytes:
    """Where the clone of an object made for snapshot `seq` lies, from the partition's root."""
    return b"%b/%b/%d/%d.%d" % (SYSTEM_DIR, CLONES, seq, *ident)


class Clones:
    """All clones of one partition, for the length of one piece of work. Everything raises OSError.

    Files with more than `max_extents` extents are not cloned. `leave_out` is told of directories of ours, before they are filled
    or emptied: no events of what is in them are wanted.
    """

    def __init__(self, tree: LiveTree, max_extents: int, leave_out: Callable[[int], None] = nothing) -> None:
        self.tree = tree
        self.max_extents = max_extents
        self._leave_out = leave_out
        codec = tree.codec
        self._sample = codec.sample if codec is not None and batch.can_open(codec.sample) else None

    # ---- taking them

    def take(self, seq: int, files: Sequence[Wanted]) -> Taken:
        """Clone files for a snapshot.

        FICLONE waits until the file's dirty pages are written. That is begun for a group of files before the first is cloned:
        the disk gets them together, and we wait once instead of for each.
        """
        if not files:
            return Taken()
        with self._made_directory(seq) as (clones, directory):
            taken = Taken()
            for part in _cut(files, batch.AT_ONCE):
                request = self._request(part, with_maps=len(taken.maps) < _MAPS)
                self._rest(directory, part, self._at_once(clones, directory, request), taken)
            return taken

    def take_pages(self, seq: int, pages: Iterable[Sequence[Wanted]]) -> Iterator[tuple[Sequence[Wanted], Taken]]:
        """Clone files, a page of at most PAGE at a time, and say what became of them, in their order.

        While a page is cloned the next one is asked for, and the one before is given out.
        """
        with self._made_directory(seq) as (clones, directory), Beside(wanted=self._sample is not None) as worker:
            under_way: tuple[Sequence[Wanted], Future[list[batch.Cloned]]] | None = None

            def finished() -> Iterator[tuple[Sequence[Wanted], Taken]]:
                if under_way is not None:
                    page, future = under_way
                    taken = Taken()
                    self._rest(directory, page, future.result(), taken)
                    yield page, taken

            for page in pages:
                future = worker.submit(self._at_once, clones, directory, self._request(page))
                yield from finished()
                under_way = page, future
            yield from finished()

    @contextlib.contextmanager
    def _made_directory(self, seq: int) -> Iterator[tuple[int, int]]:
        """(descriptor of the directory of all clones, of that of a snapshot's), which are there from now on."""
        with contextlib.ExitStack() as stack:
            opened = []
            for names in ((CLONES,), (CLONES, b"%d" % seq)):
                fd = self._below(*names, make=True)
                assert fd is not None  # noqa: S101 - just made
                stack.callback(os.close, fd)
                opened.append(fd)
            self._leave_out(opened[1])
            yield opened[0], opened[1]

    def _request(self, files: Sequence[Wanted], *, with_maps: bool = False) -> batch.Request | None:
        if self._sample is None:
            return None
        return batch.Request(
            [batch.Wanted(f.ident, f.attr.ctime_ns, f.attr.size, f.old if with_maps else None) for f in files]
        )

    def _at_once(self, clones: int, directory: int, request: batch.Request | None) -> list[batch.Cloned]:
        """What can be done of files in one call; nothing where there is no such call."""
        if request is None or self._sample is None:
            return []
        return request.clone(self.tree.root_fd, self._sample, clones, directory, self.max_extents)

    def _rest(self, directory: int, files: Sequence[Wanted], answers: list[batch.Cloned], taken: Taken) -> None:
        """Add what was done to `taken`, and do the rest one by one."""
        if not answers:
            self._one_by_one(directory, files, taken)
            return
        rest = []
        for file, answer in zip(files, answers, strict=True):
            if not answer.done:
                if answer.errno and answer.errno not in _SKIP:
                    raise OSError(answer.errno, os.strerror(answer.errno), b"%d.%d" % file.ident)
                rest.append(file)
                continue
            taken.made.append(file.ident)
            if answer.old is not None and answer.new is not None:
                taken.maps[file.ident] = answer.old, answer.new
        self._one_by_one(directory, rest, taken)

    def _one_by_one(self, directory: int, files: Sequence[Wanted], taken: Taken) -> None:
        for group in _cut(files, _GROUP):
            with contextlib.ExitStack() as stack:
                sources = [self._open(file, stack) for file in group]
                for (ident, attr, _), source in zip(group, sources, strict=True):
                    now, still = self._clone(directory, ident, attr, source)
                    if now is not attr and isinstance(now, Attr):
                        taken.moved[ident] = now
                    if still is None:
                        self._remove(directory, b"%d.%d" % ident)  # of an earlier try: nobody would remove it ever
                        taken.without.append(ident)
                    else:
                        taken.made.append(ident)
                    if still is False:
                        taken.restless.append(ident)

    def _open(self, file: Wanted, stack: contextlib.ExitStack) -> int | None:
        """A file to be cloned, open until the stack is unwound, its dirty pages on their way; None if it is gone."""
        source = self.tree.open_file(file.ident) if file.attr.nlink else None
        if source is not None:
            stack.callback(os.close, source)
            start_writeback(source)
        return source

    def _clone(
        self, directory: int, ident: Ident, attr: Attr | Seen, source: int | None
    ) -> tuple[Attr | Seen, bool | None]:
        """Clone one file. Returns its attributes at that moment, and whether they stood still (None: no clone was made).

        Content and attributes are of one moment: if the file changes while it is cloned, again. Of one that never stands still
        the size is that of its clone, the rest what was seen right after.
        """
        label = b"%d.%d" % ident
        for _ in range(_TRIES):
            if source is None or not attr.nlink:
                return attr, None  # gone since it was looked at: the next snapshot says so
            try:
                if not self._fits(source):
                    return attr, None
                self._make(directory, label, source)
            except OSError as error:
                if error.errno in _SKIP:
                    return attr, None
                raise
            now = os.fstat(source)
            if (now.st_ctime_ns, now.st_size) == (attr.ctime_ns, attr.size):
                return attr, True
            after = self.tree.look_at(ident)
            if after is None:
                return attr, False
            attr = after
        assert isinstance(attr, Attr)  # noqa: S101 - it was looked at again
        size = os.stat(label, dir_fd=directory, follow_symlinks=False).st_size
        return replace(attr, size=size), False

    def _fits(self, source: int) -> bool:
        return stat.S_ISREG(os.fstat(source).st_mode) and extent_count(source) <= self.max_extents

    def _make(self, directory: int, label: bytes, source: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            clone = os.open(label, flags, 0o400, dir_fd=directory)
        except FileExistsError:
            self._remove(directory, label)
            clone = os.open(label, flags, 0o400, dir_fd=directory)
        try:
            ficlone(source, clone)
            with contextlib.suppress(OSError):  # no such attribute here: the mode and the directory's protect it
                set_immutable(clone, on=True)
        except OSError:
            self._remove(directory, label)
            raise
        finally:
            os.close(clone)

    # ---- reading them

    def maps(self, ident: Ident, old: int, new: int) -> tuple[list[Extent], list[Extent]] | None:
        """The extents of a file's clones made for two snapshots, None if one of them is not there."""
        system = self.tree.system_directory()
        found = []
        for seq in (old, new):
            path = b"%b/%d/%d.%d" % (CLONES, seq, *ident)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=system)
            except FileNotFoundError:
                return None
            try:
                found.append(list(extents(fd)))
            finally:
                os.close(fd)
        return found[0], found[1]

    # ---- their end

    def remove(self, seq: int, idents: Iterable[Ident]) -> None:
        """Remove some of a snapshot's clones, and its directory if none is left."""
        directory = self._below(CLONES, b"%d" % seq)
        if directory is None:
            return
        try:
            self._leave_out(directory)
            for ident in idents:
                self._remove(directory, b"%d.%d" % ident)
        finally:
            os.close(directory)
        with contextlib.suppress(OSError):  # others are still in use
            self.forget(seq)

    def remove_all(self, seq: int) -> int:
        """Remove a snapshot's clones and its directory; the number of clones."""
        directory = self._below(CLONES, b"%d" % seq)
        if directory is None:
            return 0
        try:
            self._leave_out(directory)
            names = os.listdir(directory)
            for name in names:
                self._remove(directory, os.fsencode(name))
        finally:
            os.close(directory)
        self.forget(seq)
        return len(names)

    def forget(self, seq: int) -> None:
        """Remove the directory of a snapshot's clones. ENOTEMPTY if there are some."""
        clones = self._below(CLONES)
        if clones is not None:
            try:
                os.rmdir(b"%d" % seq, dir_fd=clones)
            finally:
                os.close(clones)

    def present(self) -> list[int]:
        """The snapshots that have a directory."""
        fd = self._below(CLONES)
        if fd is None:
            return []
        try:
            return [int(name) for name in os.listdir(fd) if name.isdecimal()]
        finally:
            os.close(fd)

    def sync(self) -> None:
        """What was removed stays so after a power cut: whoever forgets that it had to be removed may do so now."""
        clones = self._below(CLONES)
        if clones is not None:
            try:
                os.fsync(clones)
            finally:
                os.close(clones)

    def _remove(self, directory: int, label: bytes) -> None:
        try:
            os.unlink(label, dir_fd=directory)
        except FileNotFoundError:
            return
        except PermissionError:
            fd = os.open(label, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
            try:
                set_immutable(fd, on=False)
            finally:
                os.close(fd)
            os.unlink(label, dir_fd=directory)

    def _below(self, *names: bytes, make: bool = False) -> int | None:
        """A directory below the system directory; None if it does not exist."""
        system = self.tree.system_directory()
        if make:
            for depth in range(1, len(names) + 1):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(b"/".join(names[:depth]), 0o700, dir_fd=system)
        try:
            return os.open(b"/".join(names), _DIRECTORY, dir_fd=system)
        except FileNotFoundError:
            return None
