"""What is mounted where: /proc/self/mountinfo, proc_pid_mountinfo(5); its text is parsed apart from being read."""

import re
from dataclasses import dataclass

MOUNTINFO = "/proc/self/mountinfo"
_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line. `root`: the directory within the file system that is mounted; `source`: usually a device."""

    mount_id: int
    dev: str  # "major:minor"
    root: bytes
    path: bytes
    fs_type: str
    source: bytes
    options: tuple[bytes, ...]
    super_options: tuple[bytes, ...]

    @property
    def read_only(self) -> bool:
        return b"ro" in self.options or b"ro" in self.super_options


def parse(text: bytes) -> list[Mount]:
    """Every line that is one; a line of another form is passed over (future kernels may add some)."""
    found = []
    for line in text.splitlines():
        before, separator, after = line.partition(b" - ")
        fields, tail = before.split(b" "), after.split(b" ")
        if not separator or len(fields) < 6 or len(tail) < 3 or not fields[0].isdigit():
            continue
        found.append(
            Mount(
                int(fields[0]),
                fields[2].decode("ascii", "replace"),
                _unescape(fields[3]),
                _unescape(fields[4]),
                tail[0].decode("ascii", "replace"),
                _unescape(tail[1]),
                tuple(fields[5].split(b",")),
                tuple(tail[2].split(b",")),
            )
        )
    return found


def _unescape(field: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)


def mounts() -> list[Mount]:
    """All mounts of this process's namespace, in the kernel's order (later ones hide earlier ones at the same path)."""
    with open(MOUNTINFO, "rb") as file:
        return parse(file.read())
