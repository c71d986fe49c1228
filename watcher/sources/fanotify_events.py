"""What read(2) on a fanotify group returns, as values. Pure: no I/O. Source: fanotify(7), include/uapi/linux/fanotify.h.

A read returns records, each a `struct fanotify_event_metadata` (24 bytes) followed by info records:

    u32 event_len, u8 vers, u8 reserved, u16 metadata_len, u64 mask, s32 fd, s32 pid
    u8 info_type, u8 pad, u16 len, s32 fsid[2], u32 handle_bytes, s32 handle_type, u8 f_handle[], char name[]  (NUL, padded)

Two steps, because most records repeat: `collect` keeps each different tail (the info records) once, with the masks of
all its events or-ed together; `decode` makes identities and names of what was collected, when somebody asks.
"""

import struct

from comparer.dirty import Dirty
from comparer.errors import DamageError
from comparer.model import Ident, Name
from snapshotter.linux import handles

FAN_MODIFY = 0x2
FAN_ATTRIB = 0x4
FAN_CLOSE_WRITE = 0x8
FAN_MOVED_FROM = 0x40
FAN_MOVED_TO = 0x80
FAN_CREATE = 0x100
FAN_DELETE = 0x200
FAN_Q_OVERFLOW = 0x4000
FAN_RENAME = 0x10000000
FAN_EVENT_ON_CHILD = 0x08000000
FAN_ONDIR = 0x40000000

FAN_EVENT_INFO_TYPE_FID = 1
FAN_EVENT_INFO_TYPE_DFID_NAME = 2
FAN_EVENT_INFO_TYPE_DFID = 3
FAN_EVENT_INFO_TYPE_OLD_DFID_NAME = 10
FAN_EVENT_INFO_TYPE_NEW_DFID_NAME = 12

FANOTIFY_METADATA_VERSION = 3
FAN_NOFD = -1

NAMES = FAN_CREATE | FAN_DELETE | FAN_MOVED_FROM | FAN_MOVED_TO | FAN_RENAME
CONTENT = FAN_MODIFY | FAN_CLOSE_WRITE
OVERFLOW = "event queue overflow"

_METADATA = struct.Struct("=IBxHQii")
_INFO = struct.Struct("=BxH8xIi")  # header, fsid, head of struct file_handle
_FILE_HANDLE = struct.Struct("=Ii")
_INFO_HEADER = struct.Struct("=BxH")
_NAMED = frozenset(
    (FAN_EVENT_INFO_TYPE_DFID_NAME, FAN_EVENT_INFO_TYPE_OLD_DFID_NAME, FAN_EVENT_INFO_TYPE_NEW_DFID_NAME)
)
_KNOWN = _NAMED | {FAN_EVENT_INFO_TYPE_FID, FAN_EVENT_INFO_TYPE_DFID}

# btrfs: struct btrfs_fid = u64 objectid, u64 root objectid, u32 generation
_BTRFS_FID = struct.pack("=Ii", 20, 0x4D)
_HEAD_OFFSET = _METADATA.size + 12
_ROOT_OFFSET = _METADATA.size + _INFO.size + 8


def collect(buffer: bytes, found: dict[bytes, int], ignored: frozenset[int], root: bytes = b"") -> tuple[int, int]:
    """Add the records of one read to `found` (info records -> or-ed masks); how many there were, and how many of `ignored`.

    Records of processes in `ignored` are left out. `root`: on btrfs the 8 bytes of the subvolume's root objectid; records
    about objects of other subvolumes are left out. An overflow record has no info: it is found under b"".
    Raises DamageError if the buffer is not a sequence of whole records.
    """
    offset, size = 0, len(buffer)
    count = own = 0
    unpack, head = _METADATA.unpack_from, _METADATA.size
    get = found.get
    while offset < size:
        if size - offset < head:
            raise DamageError(f"fanotify: {size - offset} bytes after the last record")
        length, version, metadata_len, mask, fd, pid = unpack(buffer, offset)
        end = offset + length
        if version != FANOTIFY_METADATA_VERSION or metadata_len != head or fd != FAN_NOFD:
            raise DamageError(f"fanotify: record of version {version}, metadata_len {metadata_len}, fd {fd}")
        if length < head or end > size:
            raise DamageError(f"fanotify: a record of {length} bytes with {size - offset} left")
        count += 1
        if pid in ignored:
            own += 1
        elif (
            not root or buffer[offset + _ROOT_OFFSET : offset + _ROOT_OFFSET + 8] == root or _unrelated(buffer, offset)
        ):
            info = buffer[offset + head : end]
            found[info] = get(info, 0) | mask
        offset = end
    return count, own


def _unrelated(buffer: bytes, offset: int) -> bool:
    """Whether a record does not begin with a btrfs handle at all, so that it cannot be told whose it is."""
    return buffer[offset + _HEAD_OFFSET : offset + _HEAD_OFFSET + len(_BTRFS_FID)] != _BTRFS_FID


def decode(found: dict[bytes, int], root: bytes = b"") -> Dirty:
    """The dirty set that collected records speak of; `root` as in `collect`.

    Directories are dirty with every name that comes or goes in them (their times change). An unknown handle layout or a
    damaged record makes the set incomplete (`lost`), and never fails. `events` is left 0.
    """
    dirty = Dirty()
    directories: dict[bytes, Ident | None] = {}
    for record, mask in found.items():
        if mask & FAN_Q_OVERFLOW:
            dirty.lost = OVERFLOW
        try:
            _decode(record, mask, root, dirty, directories)
        except (handles.UnknownHandleError, DamageError) as error:
            dirty.lost = dirty.lost or str(error)
    return dirty


def _decode(record: bytes, mask: int, root: bytes, dirty: Dirty, directories: dict[bytes, Ident | None]) -> None:
    """One collected record; `directories` remembers the handles of directories, which repeat. Raises DamageError."""
    offset, size = 0, len(record)
    names = []
    has_fid = False
    while offset < size:
        if size - offset < _INFO_HEADER.size:
            raise DamageError(f"fanotify: {size - offset} bytes after the last info record")
        info_type, length = _INFO_HEADER.unpack_from(record, offset)
        end = offset + length
        if length < _INFO_HEADER.size or end > size:
            raise DamageError(f"fanotify: an info record of {length} bytes with {size - offset} left")
        if info_type in _KNOWN:
            start = offset + _INFO.size
            if start > end:
                raise DamageError("fanotify: an info record without a whole file handle")
            handle_bytes, handle_type = _FILE_HANDLE.unpack_from(record, start - _FILE_HANDLE.size)
            after = start + handle_bytes
            if after > end:
                raise DamageError(f"fanotify: a file handle of {handle_bytes} bytes in an info record of {length}")
            if info_type == FAN_EVENT_INFO_TYPE_FID:
                has_fid = True
                child = _ident(handle_type, record[start:after], root)
                if child is not None:
                    dirty.objects.add(child)
                    if mask & CONTENT:
                        dirty.written.add(child)
            else:
                key = record[start - _FILE_HANDLE.size : after]
                if key in directories:
                    directory = directories[key]
                else:
                    directory = directories[key] = _ident(handle_type, record[start:after], root)
                name = _name(record, after, end) if info_type != FAN_EVENT_INFO_TYPE_DFID else b"."
                if directory is not None:
                    if mask & NAMES or name == b".":  # "." is an event on the directory itself
                        dirty.objects.add(directory)
                    if name != b".":
                        names.append(Name(directory, name))
        offset = end
    if mask & NAMES or not has_fid:
        dirty.names.update(names)


def _name(record: bytes, start: int, end: int) -> bytes:
    nul = record.find(0, start, end)
    if nul <= start:
        raise DamageError("fanotify: a name that is empty or does not end")
    return record[start:nul]


def _ident(handle_type: int, data: bytes, root: bytes) -> Ident | None:
    """The identity in a handle, None if it is in another subvolume (a nested one seen from its parent directory)."""
    ident = handles.decode(handle_type, data)
    if root and data[8:16] != root:
        return None
    return ident
