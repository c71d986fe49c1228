"""An exact copy of a partition's tree, made of the feed's diffs: one change after the other on a real directory.

    with Replica(b"/backup/data", kernel=..., boot_id=..., source=b"/data") as replica:
        replica.apply(diff)

A diff is checked whole (paths, and that each change fits the tree before it) before anything is done; then it is kept in the
replica's own file, and applied change by change, each recorded. A process that is killed resumes at the change it was at, and
every change may be done twice. A baseline is compared with what is there, and what differs becomes an ordinary diff.

The directory is the replica's alone: what others put there in the way of the feed is removed.
"""

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeVar

from comparer.errors import DamageError, OperatorError, TransientError
from comparer.model import Attr, ByteRanges, FileType, Ident, Op, Quality
from feed.escape import printable
from feed.pages import Envelope
from feed.replica_content import Copier, Kernel, ShortError, Source, Tally, check_kept, closing
from feed.replica_plan import Described, Told, comparable, converged, emptied, read
from feed.replica_state import Known, Pending, open_state
from feed.replica_tree import AstrayError, Tree, refusable
from feed.replica_verify import ContentCheck, Disagreement, content, disagreements, shortcomings

_REMEDIES = 2  # how often in one diff the directory is put right when something else lies in it
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR})
_NAMES = "not all its names can be made here"  # how the flaw of an object begins that is here
_UNLIKE = "it cannot be here as it is there"
_NO_DIRECTORY = "the directory that it is in cannot be made here"
T = TypeVar("T")


class WholeDiff(Protocol):
    """What of `feed.subscriber.Diff` is needed."""

    @property
    def envelope(self) -> Envelope: ...
    @property
    def documents(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True, slots=True)
class Applied:
    """What one diff did.

    `copied`: bytes read from the source; `cloned`: bytes shared with it; `stale`: files whose content is not that of this
    state, in all; `flaws`: objects of which something could not be had here, in all.
    """

    partition: str
    epoch: str
    seq: int
    baseline: bool
    changes: int
    copied: int
    cloned: int
    stale: int
    flaws: int


class Replica:
    """A directory that follows a partition.

    Raises OperatorError for a directory that cannot be used, or that another process works in; DamageError for its own file.
    """

    def __init__(self, top: bytes, *, kernel: Kernel, boot_id: str, source: bytes | None = None) -> None:
        self.kernel = kernel
        self._copier = Copier(kernel)
        self._lacking: list[str] = []  # of the change at work: extended attributes that are not to be had
        with contextlib.ExitStack() as undo:
            self.source = None if source is None else Source(source)
            if self.source is not None:
                undo.callback(self.source.close)
            self.tree = Tree(top, _refusal(self.source, source))
            undo.callback(self.tree.close)
            self.state = open_state(self.tree.own_fd)
            undo.callback(self.state.close)
            # a machine that stopped under us may have lost what was written last; a killed process loses nothing
            self._holes = self._has_holes()  # directories that could not be made here
            lost = self.state["open"] is not None and self.state["boot"] != boot_id
            with self.state.transaction(durable=True):
                self.state["boot"], self.state["open"] = boot_id, 1
                if lost:
                    self._suspect()
            self.tree.sweep()
            self.repaired = self.repair() if lost else None
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """All is on the disk when this returns."""
        with self._undo:
            self.kernel.sync(self.tree.root_fd)
            with self.state.transaction(durable=True):
                self.state["open"] = None

    @property
    def position(self) -> tuple[str, int] | None:
        """(epoch, seq) of the last diff that was applied whole."""
        return self.state.position

    @property
    def stale(self) -> int:
        """How many files hold content that is not that of this state."""
        return self.state.count("stale")

    @property
    def flaws(self) -> int:
        """Of how many objects something could not be had here: an extended attribute, a device."""
        return self.state.count("flaw IS NOT NULL")

    # ---- applying

    def resume(self) -> Applied | None:
        """Finish the diff that was under way when the process before this one ended; else try again what was not to be had.

        None if nothing was under way. Raises as `apply`.
        """
        pending = self.state.pending()
        if pending is not None:
            return self._mended(self._go_on)
        if self.source is not None and self.stale:
            self._mended(lambda: self._settle(None))
        return None

    def apply(self, diff: WholeDiff) -> Applied | None:
        """Apply a diff; None if it was already.

        Raises DamageError, nothing done, if it is none or does not follow. What the replica's file system refuses comes as
        TransientError or OperatorError; `resume`, or the next call, goes on from there.
        """
        envelope = diff.envelope
        self._check_envelope(envelope)
        resumed = self.resume() if self.state.pending() is not None else None
        told = (envelope.epoch, envelope.seq, envelope.baseline)
        if resumed is not None and (resumed.epoch, resumed.seq, resumed.baseline) == told:
            return resumed  # tried again after an error
        if self._had(envelope):
            return None
        given = [read(document) for document in diff.documents]
        documents: Iterable[dict[str, Any]] = diff.documents
        with self.state.transaction(durable=True):
            if envelope.baseline:
                documents = self._converged(envelope, given)
            else:
                self._rehearse(given)
            self.state.begin(envelope.epoch, envelope.seq, envelope.snapshot, documents, baseline=envelope.baseline)
        del given
        return self._mended(self._go_on)

    def _check_envelope(self, envelope: Envelope) -> None:
        told = (envelope.host, envelope.partition)
        held = (self.state["host"], self.state["partition"])
        if held[0] is not None and held != told:
            raise OperatorError(
                f"{printable(self.tree.top)} is a replica of {'/'.join(held)}, not of {'/'.join(told)}; give another directory"
            )
        if envelope.snapshot is not None:
            check_kept(envelope.snapshot.encode(), "snapshot")

    def _had(self, envelope: Envelope) -> bool:
        position = self.position
        ours = position[1] if position is not None and position[0] == envelope.epoch else -1
        # a baseline of what was applied may be asked for again, to put right what is in doubt
        if envelope.seq < ours or (envelope.seq == ours and not envelope.baseline):
            return True
        if not envelope.baseline and (envelope.epoch, envelope.parent) != position:
            raise DamageError(
                f"a diff from {envelope.epoch}/{envelope.parent} to {envelope.seq} does not follow what this replica has"
                f" ({'nothing' if position is None else '/'.join(map(str, position))}): it needs a baseline"
            )
        return False

    def _mended(self, action: Callable[[], T]) -> T:
        """Do it; put the directory right, and again, where something else lies in it."""
        self._copier.tally = Tally()
        self.tree.forget()
        try:
            for _ in range(_REMEDIES):
                try:
                    return action()
                except (AstrayError, FileNotFoundError, NotADirectoryError):
                    self.repair()
            return action()
        except AstrayError as error:
            raise OperatorError(f"{printable(self.tree.top)}: {error}; does somebody else change it?") from error
        except OSError as error:
            raise _explained(error, self.tree.top) from error
        except sqlite3.OperationalError as error:
            raise TransientError(f"{printable(self.tree.top)}/.snapfeed-replica/state.db: {error}") from error

    def _go_on(self) -> Applied:
        pending = self.state.pending()
        assert pending is not None  # noqa: S101 - callers have begun one
        for index, document in self.state.pending_documents(pending.done):
            self._step(index, document)
        if pending.baseline:
            self._remove_strangers()
        self._settle(pending.snapshot)
        with self.state.transaction():
            self.state.finish(pending)
        return self._applied(pending)

    def _applied(self, pending: Pending) -> Applied:
        tally, name = self._copier.tally, self.state["partition"]
        done = (pending.epoch, pending.seq, pending.baseline, pending.count)
        return Applied(name, *done, tally.copied, tally.cloned, self.stale, self.flaws)

    def _settle(self, snapshot: str | None) -> None:
        """The end of a diff: what was not to be had or made before, directories' times, and all of it on the disk."""
        self._retry_flawed()
        self._retry_stale(snapshot)
        self._dress_directories()
        self.kernel.sync(self.tree.root_fd)

    def _rehearse(self, given: Iterable[Told]) -> None:
        """Raises DamageError if a change does not fit the tree before it. Nothing stays of it."""
        self.state.db.execute("SAVEPOINT rehearsal")
        try:
            for told in given:
                self.state.transition(told.change)
        finally:
            self.state.db.execute("ROLLBACK TO rehearsal")
            self.state.db.execute("RELEASE rehearsal")

    # ---- a baseline

    def _converged(self, envelope: Envelope, given: list[Told]) -> Iterable[dict[str, Any]]:
        """The changes from what is here to what a baseline says."""
        wanted = Described(given)
        old_uuid, state = self.state["uuid"], self.state
        state["host"], state["partition"], state["uuid"] = envelope.host, envelope.partition, envelope.uuid
        if state["root"] is None:
            return [dict(told.document) for told in given]
        known = state.idents()
        if old_uuid != envelope.uuid or not comparable(state, known, wanted):
            state["another_root"] = 1
            return [*emptied(state, known), *(dict(told.document) for told in given)]
        for told in given:  # what stays as it is has been kept for another snapshot now
            state.set_content(told.change.ident, told.content)
        return list(converged(state, known, given, wanted))

    def _remove_strangers(self) -> None:
        """What lies in the directory and was never the feed's: a baseline makes an exact copy of whatever was there."""
        for found in disagreements(self.tree, self.state):
            if found.what == "extra":
                self._mend(found)

    # ---- one change

    def _step(self, index: int, document: dict[str, Any]) -> None:
        """Do one change and record it. A crash in between leaves the record on this side and the directory on either."""
        told = read(document)
        change = told.change
        with self.state.transaction():
            if change.path == b"" and change.before is None and self.state["another_root"]:
                self.state.forget_root()
            known = self.state.known(change.ident)
            self.state.transition(change)
            if change.type is FileType.FILE and change.after is not None and (told.content is not None or told.writes):
                self.state.set_content(change.ident, told.content)
            self._lacking = self._complete(told, known) if told.omitted and change.after is not None else []
            self._do(told, known)
            self.state["done"] = index + 1

    def _do(self, told: Told, known: Known | None) -> None:
        change, path = told.change, told.change.path
        if change.op is Op.CREATE:
            self._make(change.ident, path, told.content)
        elif change.op in {Op.UNLINK, Op.DELETE}:
            self._clear(path)
        if change.op is Op.CREATE or change.op is Op.DELETE or (known is not None and known.absent):
            return  # what could not be made is tried again at the end of the diff
        try:
            self._name(told)
            if change.after is None or not (change.op is Op.MODIFY or change.changed):
                return
            if change.type is FileType.DIR:
                self.state.mark(change.ident, undressed=1)
            elif told.writes:
                self._rewrite(told, stale=known is not None and known.stale)
            else:
                self._dress(change.ident, self._paths(change.ident)[0])
        except OSError as error:
            if not refusable(error):
                raise
            self._give_up(told, f"{error.strerror}")

    def _name(self, told: Told) -> None:
        """Give an object that is here the name that a change gives it. Raises OSError."""
        change, path, old = told.change, told.change.path, told.change.from_path or b""
        if change.op not in {Op.LINK, Op.RENAME}:
            return
        if self._is_nowhere(path):
            raise OSError(errno.EOPNOTSUPP, _NO_DIRECTORY)
        other = None if self._is_here(old) else self._other_name(change.ident, path)
        if other is not None or change.op is Op.LINK:
            self.tree.link(old if other is None else other, path)
        else:
            self.tree.rename(old, path)

    # ---- what cannot be held here

    def _make(self, ident: Ident, path: bytes, kept: bytes | None) -> bool:
        """Make an object that the state knows already; False if it cannot be made here, which is a flaw of all that is in it."""
        if self._is_nowhere(path):
            self._lose(ident, _NO_DIRECTORY)
            return False
        attr = self._attr(ident)
        try:
            self._create(ident, attr, path, kept)
        except OSError as error:
            special = attr.type not in {FileType.FILE, FileType.DIR}
            if not refusable(error) and not (special and error.errno == errno.EACCES):
                raise
            self._clear(path)
            self._lose(ident, f"this {attr.type.value} cannot be made here: {error.strerror}")
            return False
        return True

    def _give_up(self, told: Told, why: str) -> None:
        """A change that cannot be made here: of a file that is still here, it is said what differs; else all of it is lost."""
        ident, old, paths = told.change.ident, told.change.from_path, self.state.paths(told.change.ident)
        if told.change.op is Op.RENAME and old is not None and old not in paths:
            self._clear(old)
        here = [path for path in paths if self._is_here(path)]
        if told.change.type is FileType.DIR or not here:
            self._lose(ident, f"this {told.change.type.value} cannot be held here: {why}")
            return
        if told.writes:
            self.state.mark(ident, stale=1)
        self.state.mark(ident, flaw=f"{_NAMES if len(here) < len(paths) else _UNLIKE}: {why}")

    def _lose(self, ident: Ident, why: str) -> None:
        """Record that an object is not here, nor all that is in it; the directory is so already."""
        inside: list[tuple[Ident, str]] = []
        waiting = [(ident, why)]
        while waiting:
            one, flaw = waiting.pop()
            inside.append((one, flaw))
            if self._attr(one).type is FileType.DIR:
                self._holes = True
                self.state.mark(one, absent=1, flaw=flaw)
                waiting += [(below, _NO_DIRECTORY) for _, below in self.state.children(one)]
        for one, flaw in inside:  # now that it is known of every directory
            if self._attr(one).type is FileType.DIR:
                continue
            if any(map(self._is_here, self.state.paths(one))):
                self.state.mark(one, flaw=f"{_NAMES}: {flaw}")
            else:
                self.state.mark(one, absent=1, stale=0, flaw=flaw)

    def _clear(self, path: bytes) -> None:
        """Remove what has a name, if such a name can be here."""
        if not self._is_nowhere(path):
            self.tree.remove_at(path)

    def _is_nowhere(self, path: bytes) -> bool:
        """Whether the directory of a path could not be made here."""
        if not path or not self._holes:
            return False
        ident = self.state.find(path.rpartition(b"/")[0])
        parent = None if ident is None else self.state.known(ident)
        return parent is not None and parent.absent

    def _is_here(self, path: bytes) -> bool:
        return not self._is_nowhere(path) and self.tree.look(path) is not None

    def _paths(self, ident: Ident) -> list[bytes]:
        """The paths of an object that is here, those first that it has here."""
        paths = self.state.paths(ident)
        return sorted(paths, key=lambda path: not self._is_here(path)) if self._lacks_names(ident) else paths

    def _other_name(self, ident: Ident, path: bytes) -> bytes | None:
        """Another name that an object has here which lacks some."""
        others = [one for one in self._paths(ident) if one != path] if self._lacks_names(ident) else []
        return others[0] if others and self._is_here(others[0]) else None

    def _lacks_names(self, ident: Ident) -> bool:
        return (self.state.flaw(ident) or "").startswith(_NAMES)

    def _retry_flawed(self) -> None:
        """What could not be made or named here before: perhaps it can be now. Directories before what is in them."""
        lost = [(path, i) for i in self.state.idents("flaw IS NOT NULL AND absent") for path in self.state.paths(i)]
        for path, ident in sorted(lost):
            known = self.state.known(ident)
            if known is not None and known.absent and not self._is_nowhere(path):
                self._lacking = []
                with self.state.transaction():
                    if self._make(ident, path, known.content):
                        self.state.mark(ident, absent=0)
                        self._link_all(ident)
        for ident, flaw in self.state.flaws():
            if flaw.startswith((_NAMES, _UNLIKE)):
                self._lacking = []
                with self.state.transaction():
                    self._link_all(ident)
                    self._mend_attributes(ident, self._paths(ident)[0])
        self._holes = self._has_holes()

    def _has_holes(self) -> bool:
        return self.state.count("flaw IS NOT NULL AND absent AND type = 'dir'") > 0

    def _link_all(self, ident: Ident) -> None:
        """Give an object that is here the names that it lacks here."""
        first, *further = sorted(self.state.paths(ident), key=lambda path: not self._is_here(path))
        why = self._linked(first, [path for path in further if not self._is_here(path)])
        if why is not None or self._lacks_names(ident):
            self.state.mark(ident, flaw=None if why is None else f"{_NAMES}: {why}")
            self._dress(ident, first)

    def _linked(self, first: bytes, further: Iterable[bytes]) -> str | None:
        """Give an object further names; why not all, if some cannot be."""
        why = None
        for path in further:
            if self._is_nowhere(path):
                why = why or _NO_DIRECTORY
                continue
            try:
                self.tree.link(first, path)
            except OSError as error:
                if not refusable(error):
                    raise
                why = f"{error.strerror}"
        return why

    # ---- objects

    def _create(self, ident: Ident, attr: Attr, path: bytes, kept: bytes | None) -> None:
        """Raises OSError: see `_make`."""
        if attr.type is FileType.DIR:
            self.tree.make_directory(path)
            self.state.mark(ident, undressed=1)
            return
        if attr.type is FileType.FILE:
            had = self._fill(ident, attr, kept, [path])
            self.state.mark(ident, stale=int(not had))
        else:
            self.tree.new_other(attr)
        self._bring(ident, attr, [path])

    def _attr(self, ident: Ident) -> Attr:
        attr = self.state.attr(ident)
        assert attr is not None  # noqa: S101 - asked of objects that live only
        return attr

    def _dress(self, ident: Ident, path: bytes) -> None:
        self._flawed(ident, self.tree.dress(path, self._attr(ident)))

    def _flawed(self, ident: Ident, flaws: list[str]) -> None:
        if (flaw := self.state.flaw(ident)) is not None and self._remains(ident, flaw):
            return  # that is what must be known of it
        self.state.mark(ident, flaw="; ".join([*flaws, *self._lacking]) or None)

    def _remains(self, ident: Ident, flaw: str) -> bool:
        """Whether a flaw holds still that attributes have no part in."""
        paths = self.state.paths(ident)
        if flaw.startswith(_NAMES):
            return not all(map(self._is_here, paths))
        facts = self.tree.look(paths[0]) if flaw.startswith(_UNLIKE) and paths else None
        return facts is not None and facts.st_size != self._attr(ident).size

    def _bring(self, ident: Ident, attr: Attr, paths: list[bytes]) -> None:
        """Give what was made in tmp its attributes, and then all its names."""
        flaws = self.tree.dress_new(attr)
        first, *further = paths
        self.tree.move_in(b"new", first)
        why = self._linked(first, further)
        if why is not None:
            self.state.mark(ident, flaw=f"{_NAMES}: {why}")
        self._flawed(ident, flaws)
        for name in self.state.names(ident):
            self.state.mark(name.parent, undressed=1)

    def _complete(self, told: Told, known: Known | None) -> list[str]:
        """Extended attributes that were too large for the feed: from the live object, else those that are here; what lacks."""
        ident, attr = told.change.ident, self._attr(told.change.ident)
        live = None if self.source is None else self.source.xattrs(told.change.path, ident, attr)
        if live is not None:
            self.state.put(ident, replace(attr, xattrs=tuple(sorted(live.items()))))
            return []
        if known is not None:
            left = {
                k: v for k, v in known.attr.xattrs if "*" in told.omitted or k.decode(errors="replace") in told.omitted
            }
            self.state.put(ident, replace(attr, xattrs=tuple(sorted({**left, **dict(attr.xattrs)}.items()))))
        return ["extended attributes that the feed left out, being too large, are not known"]

    # ---- content

    def _fill(self, ident: Ident, attr: Attr, kept: bytes | None, places: Iterable[bytes]) -> bool:
        """Make a file in tmp, with its content if that is to be had: what is kept for it, else where it may be unchanged."""
        with self.tree.new_file() as new:
            if self.source is not None and attr.size:
                with closing(self.source.kept(kept, attr)) as found:
                    if found is not None and self._copied(found, new, attr):
                        return True
                for place in places:
                    with closing(self.source.live(place, ident, attr)) as found:
                        if found is not None and self._copied(found, new, attr):
                            if self.source.still(found, ident, attr):
                                return True
                            os.ftruncate(new, 0)
            os.ftruncate(new, attr.size)
        return not attr.size

    def _copied(self, found: int, new: int, attr: Attr) -> bool:
        try:
            self._copier.whole(found, new, attr.size)
        except ShortError as error:
            self._say(f"a file of the source: {error}")
            os.ftruncate(new, 0)
            return False
        return True

    def _say(self, trouble: str) -> None:
        if self.source is not None:
            self.source.trouble = trouble

    def _rewrite(self, told: Told, *, stale: bool) -> None:
        """Bring a file's content to that of the change: only what changed, if what is here is what it changed from."""
        ident, ranges = told.change.ident, told.change.ranges
        attr, paths = self._attr(told.change.ident), self._paths(told.change.ident)
        if not stale and ranges is not None and ranges.quality is not Quality.UNKNOWN and self.source is not None:
            with closing(self.source.kept(told.content, attr)) as found:
                if found is not None and self._rewritten(found, told, paths, ranges):
                    return
        had = self._fill(ident, attr, told.content, [told.change.path])
        if not had and self._resized(paths[0], attr):
            self._dress(ident, paths[0])  # the old content stays until the new one is to be had
        else:
            self._bring(ident, attr, paths)
        self.state.mark(ident, stale=int(not had))

    def _resized(self, path: bytes, attr: Attr) -> bool:
        with closing(self.tree.open_file(path, os.O_RDWR)) as here:
            if here is None:
                return False
            os.ftruncate(here, attr.size)
            return True

    def _rewritten(self, found: int, told: Told, paths: list[bytes], ranges: ByteRanges) -> bool:
        """False where what is here is not the file that the ranges are meant for, or the source failed."""
        ident, before = told.change.ident, told.change.before
        attr = self._attr(ident)
        with closing(self.tree.open_file(paths[0], os.O_RDWR)) as here:
            if here is None:
                return False
            facts = os.fstat(here)
            # of either size: this change may have been interrupted; a file with a name elsewhere is never written to
            if facts.st_size not in {attr.size, attr.size if before is None else before.size}:
                return False
            if facts.st_nlink != len(paths):
                return False
            try:
                with self.tree.new_file() as new:
                    whole = self._copier.take(found, new, attr.size)
                    if not whole and self._copier.share(here, new):
                        self._copier.changes(found, new, attr.size, ranges)
                        whole = True
                if not whole:
                    # in place; if the process ends here, the same ranges are copied again
                    self._copier.changes(found, here, attr.size, ranges)
            except ShortError as error:
                self._say(f"{printable(told.content or b'')} of the source: {error}")
                return False
        if whole:
            self._bring(ident, attr, paths)
        else:
            self._dress(ident, paths[0])
        return True

    def _retry_stale(self, snapshot: str | None) -> None:
        """Content that was not to be had before: perhaps of this snapshot, or of the live file, which may have come to rest.

        A snapshot's tree may be one that moves on with the next snapshot, so that its files count as the live ones do.
        """
        if self.source is None:
            return
        for ident in self.state.idents("stale AND NOT absent"):
            known, paths = self.state.known(ident), self._paths(ident)
            if known is None or not paths:
                continue
            places = [] if snapshot is None else [snapshot.encode() + b"/" + paths[0]]
            with self.state.transaction():
                self._lacking = []
                try:
                    had = self._fill(ident, known.attr, known.content, [*places, paths[0]])
                except OSError as error:
                    if not refusable(error):
                        raise
                    continue  # its flaw says so
                if had:
                    self._bring(ident, known.attr, paths)
                    self.state.mark(ident, stale=0)

    def _dress_directories(self) -> None:
        """Attributes of directories, whose times change with what is in them."""
        self._lacking = []
        with self.state.transaction():
            for ident in self.state.idents("undressed AND NOT absent"):
                for path in self.state.paths(ident):
                    self._dress(ident, path)
                self.state.mark(ident, undressed=0)

    # ---- verifying

    def verify(self, check: ContentCheck | None = None) -> Iterator[Disagreement]:
        """What differs from what the replica knows, and what it knows to lack; with `check`, content against the source too."""
        yield from disagreements(self.tree, self.state)
        yield from shortcomings(self.state)
        if check is not None and self.source is not None:
            yield from content(self.tree, self.state, self.source, check)

    def repair(self) -> int:
        """Put names, types and attributes right, and copy again what has another size; how many disagreements there were."""
        count = 0
        self.tree.forget()
        for found in disagreements(self.tree, self.state):
            count += 1
            self._mend(found)
        self._settle(None)
        return count

    def _mend(self, found: Disagreement) -> None:
        ident, path = found.ident, found.path
        self._lacking = []
        with self.state.transaction():
            if ident is None:
                self.tree.remove_at(path)
            elif found.what == "attributes":
                self._mend_attributes(ident, path)
            elif (other := found.other or self._other_name(ident, path)) is not None:
                why = self._linked(other, [path])
                if why is not None:
                    self._clear(path)
                    self.state.mark(ident, flaw=f"{_NAMES}: {why}")
            else:
                known = self.state.known(ident)
                self._make(ident, path, None if known is None else known.content)
            directory = self.state.find(path.rpartition(b"/")[0])
            if path and directory is not None:
                self.state.mark(directory, undressed=1)

    def _mend_attributes(self, ident: Ident, path: bytes) -> None:
        attr, facts = self._attr(ident), self.tree.look(path)
        if attr.type is FileType.DIR:
            self.state.mark(ident, undressed=1)
        elif attr.type is FileType.SYMLINK:
            self._make(ident, path, None)
        elif attr.type is FileType.FILE and facts is not None and facts.st_size != attr.size:
            self.state.mark(ident, stale=int(attr.size > 0))
            try:
                self._resized(path, attr)
            except OSError as error:
                if not refusable(error):
                    raise
                if not self._lacks_names(ident):
                    self.state.mark(ident, flaw=f"{_UNLIKE}: {error.strerror}")
            else:
                self._dress(ident, path)
        else:
            self._dress(ident, path)

    def _suspect(self) -> None:
        """The machine stopped in the middle of a diff: whatever it writes to may not be what was written."""
        for _, document in self.state.pending_documents():
            told = read(document)
            if told.change.after is not None and told.change.after.size and told.change.type is FileType.FILE:
                self.state.mark(told.change.ident, stale=1)


class ReplicaPositions:
    """A replica's position for `feed.subscriber.Subscriber`: it is stored with the tree already when a diff is committed."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def load(self, host: str, partition: str) -> tuple[str, int] | None:
        state = self._replica.state
        return self._replica.position if (state["host"], state["partition"]) == (host, partition) else None

    def store(self, host: str, partition: str, epoch: str, seq: int) -> None:
        """Raises DamageError if the replica is not there."""
        if self.load(host, partition) != (epoch, seq):
            raise DamageError(f"{host}/{partition}: {epoch}/{seq} was not applied, and must not be acknowledged")


def _refusal(source: Source | None, name: bytes | None) -> Callable[[int, bytes], None]:
    def refuse(directory_fd: int, top: bytes) -> None:
        if source is not None and source.holds(directory_fd):
            raise OperatorError(
                f"{printable(top)} lies in the source {printable(name or b'')}: the feed would tell of its own replica;"
                " give a directory elsewhere"
            )

    return refuse


def _explained(error: OSError, top: bytes) -> TransientError | OperatorError:
    name = error.filename if isinstance(error.filename, bytes) else os.fsencode(str(error.filename or ""))
    text = f"{printable(top)}: {printable(name)}: {error.strerror}" if name else f"{printable(top)}: {error.strerror}"
    if error.errno in _PASSING:
        return TransientError(text)
    return OperatorError(f"{text}; make it possible, and start again: it goes on from there")
