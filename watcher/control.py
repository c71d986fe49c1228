"""The control socket: one JSON object a line in, one or more a line out; local, for the socket's owner (root) only."""

import asyncio
import contextlib
import logging
import os
import socket
import struct
import uuid
from collections.abc import Iterator
from typing import Any

import orjson

from comparer.errors import OperatorError, SnapfeedError
from feed.commands import LARGEST, VERBS, answer, check_size, readable_id

from .service import Service

log = logging.getLogger(__name__)
_UCRED = struct.Struct("3i")
_LONGEST_ADDRESS = 107  # bytes of sun_path, unix(7)


class ControlServer:
    def __init__(self, path: str, service: Service) -> None:
        self._path = path
        self._service = service
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Raises OperatorError: another daemon answers there, or the directory cannot be written."""
        directory = os.path.dirname(self._path)
        try:
            os.makedirs(directory, mode=0o755, exist_ok=True)
            if _answers(self._path):
                raise OperatorError(
                    f"{self._path}: another snapfeed daemon is running; stop it, or give another --socket"
                )
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            self._server = await asyncio.start_unix_server(self._serve, sock=_listening(self._path), limit=2 * LARGEST)
        except OSError as error:
            raise OperatorError(f"{self._path}: {error.strerror}; run as root or give another --socket") from error

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if not _may(writer):
                why = OperatorError("not your daemon: only root and its own user may command it")
                writer.write(self._service.refuse("?", None, why) + b"\n")
                return
            while line := await reader.readline():
                await self._answer(line, writer)
                await writer.drain()
        except (ConnectionError, ValueError, asyncio.LimitOverrunError):
            pass  # it hung up, or sent a line that never ends
        finally:
            writer.close()

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        identifier, verb = readable_id(line), "?"
        try:
            check_size(line)
            document = orjson.loads(line)
            if not isinstance(document, dict) or not isinstance(document.get("verb"), str):
                raise OperatorError("a command is an object with a `verb`")
            verb = document.pop("verb")
            if verb in VERBS:
                writer.write(await self._service.handle_local(verb, orjson.dumps(document)) + b"\n")
                return
            async with contextlib.aclosing(self._service.local(verb, document)) as found:
                async for data in found:
                    writer.write(orjson.dumps({"id": identifier, "more": True, "data": data}) + b"\n")
                    await writer.drain()
            writer.write(answer(identifier) + b"\n")
        except orjson.JSONDecodeError as error:
            writer.write(self._service.refuse(verb, identifier, OperatorError(f"not JSON: {error}")) + b"\n")
        except SnapfeedError as error:
            writer.write(self._service.refuse(verb, identifier, error) + b"\n")


def _may(writer: asyncio.StreamWriter) -> bool:
    peer = writer.get_extra_info("socket")
    uid = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
    return uid in (0, os.geteuid())


@contextlib.contextmanager
def _address(path: str) -> Iterator[str]:
    """The path, or where it is longer than a socket's address may be (107 bytes), another way to the same place."""
    if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
        yield path
        return
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def _listening(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        with _address(path) as address:
            listener.bind(address)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(previous)
    return listener


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            with _address(path) as address:
                probe.connect(address)
        except OSError:
            return False
        return True


def _with_remedy(text: str) -> str:
    """What a person can do about it, where the daemon, which also answers programs, does not say so."""
    if text.endswith(": unmounted: not mounted"):
        return f"{text}; mount it, and the daemon goes on with it by itself (`snapfeed status` shows its mount point)"
    return text


class NoDaemonError(OperatorError):
    """Nobody answers at the control socket."""


def ask(path: str, verb: str, timeout: float | None = None, **fields: Any) -> Iterator[Any]:
    """Send one command and yield the `data` of its answers. Raises OperatorError, NoDaemonError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            with _address(path) as address:
                connection.connect(address)
        except PermissionError as error:
            raise OperatorError(f"{path}: no permission; run as the user that runs the daemon (root)") from error
        except OSError as error:
            raise NoDaemonError(
                f"{path}: no snapfeed daemon answers ({error.strerror}); start it with `snapfeed run`, or give its --socket"
            ) from error
        connection.sendall(orjson.dumps({"verb": verb, "id": uuid.uuid4().hex, **fields}) + b"\n")
        with connection.makefile("rb") as lines:
            for line in lines:
                document = orjson.loads(line)
                if document.get("error"):
                    raise OperatorError(_with_remedy(document["error"]))
                if not document.get("more"):
                    if document.get("data") is not None:
                        yield document["data"]
                    return
                yield document["data"]
    raise OperatorError(f"{path}: the daemon hung up before it had answered; look at its log")
