"""The daemon: a pipeline for each partition, one publisher, the control socket, signals."""

import asyncio
import contextlib
import fnmatch
import logging
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from comparer.errors import OperatorError
from feed.broker import BrokerConfig
from feed.documents import StateDocument
from feed.embedded import EmbeddedBroker
from feed.pages import Envelope, chunk_limit
from feed.publisher import Publisher
from snapshotter.linux import batch
from snapshotter.partition import Partition, adopted, is_adopted, label_of, partition_at, still_mounted

from . import __version__
from .config import Config, partition_name
from .control import ControlServer
from .ledger import Ledger
from .mountwatch import MountWatch
from .notify import sd_notify, watchdog_interval
from .outbox import JournalOutbox
from .pipeline import Pipeline, Rules
from .replays import Replays
from .said import printable_path
from .service import Service

log = logging.getLogger(__name__)
STATE_INTERVAL = 0.2  # seconds between two publications of one partition's state


class Daemon:
    """`mounts`: the mount points of the command line; empty: those of the config, else all that are adopted."""

    def __init__(self, config: Config, mounts: list[str], reload: "Reload") -> None:
        self.config = config
        self._fixed = mounts
        self._reload = reload
        self._pipelines: dict[str, Pipeline] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()
        self._embedded: EmbeddedBroker | None = None
        self._publisher: Publisher | None = None
        self._replays = Replays(self._lanes)
        self._control: ControlServer | None = None
        self._service: Service | None = None
        self._ledger = Ledger()
        self._ending: set[asyncio.Task[None]] = set()
        self._stale: set[str] = set()
        self._news = asyncio.Event()
        self._told: set[str] = set()  # mount points that were said to be served by another name
        self._started = time.time()
        self._failed: BaseException | None = None

    def pipelines(self) -> Mapping[str, Pipeline]:
        return self._pipelines

    # ---- life

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises OperatorError for what keeps it from starting."""
        loop = asyncio.get_running_loop()
        host = (self.config.broker or self.config.draft).host
        self._service = Service(self, self._replays, self._ledger, self.config.host or host, self.config.secret)
        self._control = ControlServer(self.config.socket, self._service)
        await self._control.start()
        tasks: list[asyncio.Task[None]] = []
        watch: MountWatch | None = None
        try:
            found = self._wanted(start=True)
            self._ledger.open(self.config.where_state_is())
            broker = await self._broker()
            self._publisher = Publisher(
                broker, version=__version__, handler=self._service.handle, on_status=self._feed_status
            )
            watch = MountWatch(self.rescan)
            for wanted in found:
                self._found(wanted)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
            loop.add_signal_handler(signal.SIGHUP, self._reload_config)
            tasks = [
                asyncio.create_task(self._publisher.run()),
                asyncio.create_task(self._publish_states()),
                asyncio.create_task(self._watchdog()),
            ]
            for task in tasks:
                task.add_done_callback(self._ended)
            sd_notify("READY=1")
            log.info("snapfeed %s: broker %s, control socket %s", __version__, broker.url, self.config.socket)
            if not batch.available():
                log.info("without its compiled library, which makes snapshots of XFS cheaper (docs/install.md)")
            await self._stop.wait()
            sd_notify("STOPPING=1")
        finally:
            await self._shut_down(tasks, watch)
        if self._failed is not None:
            raise self._failed

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """A task that should live as long as we do ended: a bug, which must not go unseen."""
        if not task.cancelled() and not self._stop.is_set():
            self._failed = task.exception() or RuntimeError(f"{task.get_coro()} ended")
            log.critical("stopping: %s", self._failed, exc_info=task.exception())
            self._stop.set()

    async def _shut_down(self, tasks: list["asyncio.Task[None]"], watch: MountWatch | None) -> None:
        log.info("stopping")
        if self._control is not None:
            await self._control.stop()
        await self._replays.end_all()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._publisher is not None and tasks:  # one that never ran has nothing to end
            await self._publisher.stop()
        for pipeline in self._pipelines.values():
            with contextlib.suppress(Exception):
                await pipeline.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if watch is not None:
            watch.close()
        if self._embedded is not None:
            await self._embedded.stop()
        self._ledger.close()

    async def _broker(self) -> BrokerConfig:
        if self.config.broker is not None:
            broker = self.config.broker
        else:
            self._embedded = EmbeddedBroker()
            await self._embedded.start()
            broker = BrokerConfig(url=self._embedded.url, max_packet=self.config.draft.max_packet)
            log.info("no broker configured: the embedded one listens at %s (loopback, this host only)", broker.url)
        return replace(broker, host=self.config.host or broker.host, base=self.config.base or broker.base)

    async def _watchdog(self) -> None:
        interval = watchdog_interval()
        while True:
            await asyncio.sleep(interval or 3600)
            sd_notify("WATCHDOG=1")

    # ---- partitions

    def _wanted(self, *, start: bool = False) -> list[Partition]:
        """The partitions to visit now. At the start, one named that is none is an OperatorError; later it is left alone."""
        named = self._fixed or [p.mount for p in self.config.partitions]
        if not named:
            excluded = self.config.exclude
            found = [
                p for p in adopted() if not any(fnmatch.fnmatch(os.fsdecode(p.path), pattern) for pattern in excluded)
            ]
            if start and not found:
                log.warning("no adopted partition is mounted; waiting for one (adopt with `snapfeed init MOUNTPOINT`)")
            return found
        found = []
        for mount in named:
            try:
                partition = partition_at(mount, directory=True)
                if not is_adopted(partition.path):
                    if partition.kind == "directory":
                        partition_at(mount)  # says why it is no partition
                    raise OperatorError(f"{mount!r} is not adopted; run `snapfeed init {mount}`")
                if partition.kind == "directory" and partition_at(mount, directory=True) != partition:
                    continue  # mounted as we looked: the mount point and not what is mounted there; there is news of that
            except OperatorError as error:
                if start and self._fixed:
                    raise
                if start:
                    log.warning("%s; waiting for it", error)
                continue
            found.append(partition)
        return found

    def _add(self, partition: Partition) -> None:
        assert self._publisher is not None  # noqa: S101 - made before partitions are
        mount = os.fsdecode(partition.path)
        configured = self.config.of(mount)
        name = partition_name(configured.name, label_of(partition), mount)
        plain, number = name, 2
        while name in self._pipelines:
            name, number = f"{plain[:60]}-{number}", number + 1
        broker = self._publisher.config

        def envelope(partition_name: str, uuid: str, epoch: str) -> Envelope:
            return Envelope(broker.host, partition_name, uuid, epoch, 0, None, 0, "", 0, "", None)

        pipeline = Pipeline(
            partition,
            name,
            self._rules(mount),
            envelope,
            self._publisher.topics.changes(name),
            changed=self._state_changed,
            opened=self._opened,
            closed=self._closed,
        )
        pipeline.sending = lambda: self._replays.running(name)
        self._pipelines[name] = pipeline
        task = asyncio.create_task(pipeline.run(), name=f"pipeline {name}")
        task.add_done_callback(self._ended)
        self._tasks[name] = task

    def _rules(self, mount: str) -> Rules:
        config, own = self.config, self.config.of(mount)
        assert self._publisher is not None  # noqa: S101 - made before partitions are
        return Rules(
            own.io_threshold or config.io_threshold,
            own.time_threshold or config.time_threshold,
            own.keep or config.keep,
            config.reconcile,
            chunk_limit(self._publisher.config.max_packet),
            config.max_extents,
            config.unlimited_queue,
            config.limits,
        )

    def rescan(self) -> None:
        """Mounts came or went, or a partition was adopted: look what there is to visit."""
        for pipeline in self._pipelines.values():
            pipeline.mounts_changed()
        known = {(p.partition.path, p.partition.uuid) for p in self._pipelines.values()}
        for partition in self._wanted():
            if (partition.path, partition.uuid) not in known:
                self._found(partition)

    def _found(self, partition: Partition) -> None:
        """Serve what was not served, or not there; a file system that is served needs no second mount point."""
        path = printable_path(partition.path)
        same = next(
            (p for p in self._pipelines.values() if partition.uuid and p.partition.uuid == partition.uuid), None
        )
        if same is None:
            log.info("found %s", path)
            self._add(partition)
        elif not still_mounted(same.partition):
            log.info("%s: mounted at %s now", same.name, path)
            same.moved(partition)
        elif path not in self._told:
            self._told.add(path)
            log.warning("%s is served already, as %s at %s", path, same.name, same.state.mount)

    def _opened(self, outbox: JournalOutbox) -> None:
        if self._publisher is not None:
            self._publisher.add(outbox)

    def _closed(self, outbox: JournalOutbox) -> None:
        self._ending.add(task := asyncio.create_task(self._replays.end_all(outbox.partition)))
        task.add_done_callback(self._ending.discard)
        if self._publisher is not None:
            self._publisher.remove(outbox)

    def _lanes(self) -> Publisher:
        assert self._publisher is not None  # noqa: S101 - commands are carried out only while it is there
        return self._publisher

    def _reload_config(self) -> None:
        """SIGHUP: thresholds, retention and partitions change at once; broker and socket at the next start."""
        try:
            config = self._reload()
        except OperatorError as error:
            log.error("configuration not changed: %s", error)  # noqa: TRY400 - no trace for an operator's error
            return
        fixed = ("broker", "socket", "state_dir", "secret", "host", "base")
        if any(getattr(config, name) != getattr(self.config, name) for name in fixed):
            log.warning("[broker], [control] and [commands] change only with a restart")
        self.config = replace(config, **{name: getattr(self.config, name) for name in fixed})
        self._say_what_stays()
        for pipeline in self._pipelines.values():
            pipeline.configure(self._rules(os.fsdecode(pipeline.partition.path)))
        self.rescan()
        log.info("configuration read again")

    def _say_what_stays(self) -> None:
        """A partition keeps its name as long as the daemon lives: topics do not change under consumers."""
        for pipeline in self._pipelines.values():
            wanted = self.config.of(os.fsdecode(pipeline.partition.path))
            if wanted.name is not None and wanted.name != pipeline.name:
                log.warning("%s is called %s only after a restart", pipeline.name, wanted.name)
        named = [os.path.realpath(p.mount) for p in self.config.partitions]
        for pipeline in self._pipelines.values():
            if named and not self._fixed and os.path.realpath(os.fsdecode(pipeline.partition.path)) not in named:
                log.warning("%s is not configured any more; it is left alone only after a restart", pipeline.name)

    # ---- what is said

    def _state_changed(self, pipeline: Pipeline) -> None:
        self._stale.add(pipeline.name)
        self._news.set()

    def _feed_status(self) -> None:
        self._stale.update(self._pipelines)
        self._news.set()

    async def _publish_states(self) -> None:
        """Publish what changed, but no partition's state more often than every 200 ms."""
        assert self._publisher is not None  # noqa: S101 - made before this task is
        while True:
            await self._news.wait()
            self._news.clear()
            names, self._stale = self._stale, set()
            for name in names:
                self._publisher.set_state(name, orjson.dumps(self._document(self._pipelines[name])))
            await asyncio.sleep(STATE_INTERVAL)

    def _document(self, pipeline: Pipeline) -> StateDocument:
        assert self._publisher is not None  # noqa: S101 - made before this is asked
        lane = self._publisher.stats.lanes.get(pipeline.name)
        state = pipeline.state
        state.feed_error = (lane.last_error if lane else None) or self._publisher.last_error
        position = pipeline.outbox.acknowledged if pipeline.outbox is not None else None
        document = state.document(time.time_ns())
        document["published"] = (
            {"seq": position.seq, "page": position.page} if position is not None and position.page else None
        )
        return document

    def overview(self) -> dict[str, Any]:
        """What `snapfeed status` shows."""
        publisher = self._publisher
        service = self._service
        assert publisher is not None and service is not None  # noqa: S101, PT018 - the socket answers only while they are there
        requests = publisher.stats.requests
        with open("/proc/self/statm", encoding="ascii") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {
            "version": __version__,
            "pid": os.getpid(),
            "host": publisher.config.host,
            "since": self._started,
            "resident": resident,
            "broker": {
                "url": publisher.config.url,
                "base": publisher.config.base,
                "embedded": self._embedded is not None,
                "connected": publisher.connected,
                "error": publisher.last_error,
                "protocol": publisher.stats.protocol,
                "connections": publisher.stats.connections,
            },
            "commands": {
                "executed": service.executed,
                "refused": service.refused + requests.refused,
                "trouble": self._ledger.trouble,
            },
            "partitions": [self._document(p) for p in self._pipelines.values()],
        }


class Reload:
    """Reads the configuration again, as the command line says."""

    def __init__(self, path: str | None, adjust: Any) -> None:
        self._path = path
        self._adjust = adjust

    def __call__(self) -> Config:
        from .config import load  # noqa: PLC0415

        config = load(self._path) if self._path else Config()
        return self._adjust(config)  # type: ignore[no-any-return]
