r"""Parser of the btrfs send stream: bytes in pieces -> commands. No I/O. Source: fs/btrfs/send.h, fs/btrfs/send.c.

    stream   "btrfs-stream\0", u32 version; then commands, the last of which is END
    command  u32 length of what follows the header, u16 command, u32 crc32c; then attributes
    attribute  u16 type, u16 length, bytes; from version 2 on DATA has no length and takes the rest of the command

All integers are little-endian. Damage of any kind raises DamageError and nothing else.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from .crc32c import crc32c
from .errors import DamageError

BTRFS_SEND_STREAM_MAGIC = b"btrfs-stream\0"
MAX_VERSION = 2
# v1 commands are at most 64 KiB, v2 at most 16 KiB + 128 KiB (put_file_data, ENCODED_WRITE); more is garbage, not waited for
MAX_COMMAND = 1 << 20

_STREAM_HEADER = struct.Struct("<13sI")
_CMD_HEADER = struct.Struct("<IHI")
_TLV_HEADER = struct.Struct("<HH")
_U64 = struct.Struct("<Q")


class Cmd(IntEnum):
    """enum btrfs_send_cmd, without the prefix BTRFS_SEND_C_."""

    UNSPEC = 0
    SUBVOL = 1
    SNAPSHOT = 2
    MKFILE = 3
    MKDIR = 4
    MKNOD = 5
    MKFIFO = 6
    MKSOCK = 7
    SYMLINK = 8
    RENAME = 9
    LINK = 10
    UNLINK = 11
    RMDIR = 12
    SET_XATTR = 13
    REMOVE_XATTR = 14
    WRITE = 15
    CLONE = 16
    TRUNCATE = 17
    CHMOD = 18
    CHOWN = 19
    UTIMES = 20
    END = 21
    UPDATE_EXTENT = 22
    FALLOCATE = 23
    FILEATTR = 24
    ENCODED_WRITE = 25
    ENABLE_VERITY = 26


class Attribute(IntEnum):
    """The attributes of use here, of the enum that starts with BTRFS_SEND_A_UNSPEC, without the prefix BTRFS_SEND_A_."""

    UUID = 1
    CTRANSID = 2
    INO = 3
    SIZE = 4
    MODE = 5
    UID = 6
    GID = 7
    RDEV = 8
    CTIME = 9
    MTIME = 10
    ATIME = 11
    OTIME = 12
    XATTR_NAME = 13
    XATTR_DATA = 14
    PATH = 15
    PATH_TO = 16
    PATH_LINK = 17
    FILE_OFFSET = 18
    DATA = 19
    CLONE_UUID = 20
    CLONE_CTRANSID = 21
    CLONE_PATH = 22
    CLONE_OFFSET = 23
    CLONE_LEN = 24
    UNENCODED_FILE_LEN = 28


_CMDS = {int(cmd): cmd for cmd in Cmd if cmd is not Cmd.UNSPEC}
_DATA = int(Attribute.DATA)


class Command(NamedTuple):
    """One command: its kind and its attributes' bytes by attribute number."""

    kind: Cmd
    attributes: dict[int, bytes]

    def data(self, attribute: Attribute) -> bytes:
        """The bytes of an attribute. Raises DamageError if the command does not have it."""
        try:
            return self.attributes[attribute]
        except KeyError:
            raise DamageError(f"send stream: {self.kind.name} without {attribute.name}") from None

    def u64(self, attribute: Attribute) -> int:
        """The number in an attribute. Raises DamageError if it is missing or not 8 bytes long."""
        data = self.data(attribute)
        if len(data) != _U64.size:
            raise DamageError(f"send stream: {self.kind.name} with {attribute.name} of {len(data)} bytes, not 8")
        (value,) = _U64.unpack(data)
        return int(value)


class Parser:
    """Takes the stream in pieces of any size; what is complete comes out.

    `check_crc` verifies each command's checksum. It is off by default: the stream comes from the running kernel through a pipe,
    where nothing can damage it that would not damage the metadata as well, and the check in Python costs more than all the
    rest of the parser.
    """

    def __init__(self, *, check_crc: bool = False) -> None:
        self.version: int | None = None
        self.ended = False
        self._check_crc = check_crc
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Command]:
        """The commands that `data` completes; consume them before feeding more. Raises DamageError."""
        self._buffer += data
        at = 0
        try:
            if self.version is None:
                if len(self._buffer) < _STREAM_HEADER.size:
                    return
                self.version = self._header()
                at = _STREAM_HEADER.size
            while len(self._buffer) - at >= _CMD_HEADER.size:
                if self.ended:
                    raise DamageError("send stream: more bytes after END")
                size, number, crc = _CMD_HEADER.unpack_from(self._buffer, at)
                if size > MAX_COMMAND:
                    raise DamageError(f"send stream: command of {size} bytes")
                end = at + _CMD_HEADER.size + size
                if end > len(self._buffer):
                    return
                if self._check_crc:
                    self._verify(at, end, crc)
                command = self._command(number, bytes(self._buffer[at + _CMD_HEADER.size : end]))
                at = end
                self.ended = command.kind is Cmd.END
                yield command
            if self.ended and at < len(self._buffer):
                raise DamageError("send stream: more bytes after END")
        finally:
            del self._buffer[:at]

    def close(self) -> None:
        """Say that no more bytes will come. Raises DamageError if the stream is not complete."""
        if self._buffer or not self.ended:
            raise DamageError(f"send stream: cut off, {len(self._buffer)} bytes into a command")

    def _header(self) -> int:
        magic, version = _STREAM_HEADER.unpack_from(self._buffer)
        if magic != BTRFS_SEND_STREAM_MAGIC:
            raise DamageError(f"send stream: starts with {magic!r}")
        if not 1 <= version <= MAX_VERSION:
            raise DamageError(f"send stream: version {version}, known are 1 to {MAX_VERSION}")
        return int(version)

    def _verify(self, start: int, end: int, crc: int) -> None:
        head = bytes(self._buffer[start : start + 6]) + b"\0\0\0\0"
        found = crc32c(crc32c(0, head), bytes(self._buffer[start + _CMD_HEADER.size : end]))
        if found != crc:
            raise DamageError(f"send stream: checksum of a command is {found:#010x}, not {crc:#010x}")

    def _command(self, number: int, payload: bytes) -> Command:
        kind = _CMDS.get(number)
        if kind is None:
            raise DamageError(f"send stream: unknown command {number}")
        attributes: dict[int, bytes] = {}
        at, end = 0, len(payload)
        while at < end:
            if self.version != 1 and payload[at : at + 2] == b"%c\0" % _DATA:
                attributes[_DATA] = payload[at + 2 :]
                break
            if end - at < _TLV_HEADER.size:
                raise DamageError(f"send stream: {kind.name} ends inside an attribute")
            attribute, size = _TLV_HEADER.unpack_from(payload, at)
            at += _TLV_HEADER.size
            if size > end - at:
                raise DamageError(
                    f"send stream: {kind.name} has attribute {attribute} of {size} bytes, {end - at} are left"
                )
            attributes[attribute] = payload[at : at + size]
            at += size
        return Command(kind, attributes)
