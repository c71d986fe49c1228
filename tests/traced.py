"""What a process opened and wrote, by strace: the paths of its successful calls.

`-y` shows the paths behind descriptors as the kernel knows them; in a mount that is nowhere (a detached clone) from its root on.
"""

import re
from dataclasses import dataclass
from pathlib import Path

OPENS = ("open", "openat", "openat2", "creat", "open_by_handle_at")
WRITES = tuple(
    "mkdir mkdirat unlink unlinkat rmdir rename renameat renameat2 link linkat symlink symlinkat mknod mknodat chmod fchmodat "
    "fchmodat2 chown lchown fchownat truncate utimensat utime utimes setxattr lsetxattr removexattr lremovexattr".split()
)
COMMAND = [
    "strace", "-D", "-f", "--seccomp-bpf", "-q", "-y", "-s", "4096", "--signal=none",
    "-e", "trace=" + ",".join(f"?{name}" for name in (*OPENS, *WRITES)),
]  # fmt: skip
_LINE = re.compile(r"^(\d+) +(.*)$")
_CALL = re.compile(r"^(\w+)\((.*)\) += (-?\d+)(?:<(.*)>)?(?: (E\w+).*)?$", re.DOTALL)
_PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Call:
    """`paths`: of an open what was opened, else what was named, from the root. `error`: its name, "" for none."""

    name: str
    paths: tuple[str, ...]
    writes: bool
    error: str
    line: str


def calls(log: Path) -> list[Call]:
    """Of a log of COMMAND; a call that was interrupted by others in the log is put together."""
    begun: dict[str, str] = {}
    found = []
    for line in log.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        match = _LINE.match(line)
        if match is None:
            raise ValueError(f"not a line of strace: {line!r}")
        pid, text = match.groups()
        if text.endswith("<unfinished ...>"):
            begun[pid] = text.removesuffix("<unfinished ...>").rstrip()
            continue
        if text.startswith("<... "):
            text = begun.pop(pid) + text.split("resumed>", 1)[1]
        parsed = _CALL.match(text)
        if parsed is not None:
            found.append(_call(*parsed.groups(), line))
        elif not text.startswith(("+++", "---")) and "= ?" not in text:
            raise ValueError(f"not a call: {line!r}")
    return found


def _call(name: str, arguments: str, _result: str, opened: str | None, error: str | None, line: str) -> Call:
    named = [
        path if path.startswith("/") else f"{at}/{path}".replace("//", "/") for at, path in _PATH.findall(arguments)
    ]
    if name.endswith("xattr"):
        named = named[:1]  # the next is the attribute's
    if name.startswith("symlink"):
        named = named[1:]
    if name in OPENS and not error:
        named = [opened or ""]
    writes = name in WRITES or any(flag in arguments for flag in ("O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC"))
    return Call(name, tuple(named), writes, error or "", line)
