"""A program that runs another one and kills it right before its Nth durable step: a system call that a later start can see.

python tests/tracer.py CONTROL COMMAND...

CONTROL is a file with a number N, read at the start and with each SIGUSR1: from then on steps are counted from one, and before
step N everything that was started gets SIGKILL; 0: only count. What happened is in CONTROL.out, as JSON, once the command has
ended. SIGTERM goes to the command; SIGUSR2 kills it. If the tracer dies, so does what it runs.

strace's `inject=...:signal=KILL:when=N` counts each system call and each thread by itself, so a run for every N of every call
would be needed, and still some steps of one thread hide behind those of another. Here all steps of all threads and child
processes are one sequence, and calls that only read, of which ioctl has many, are none. A seccomp filter picks the calls, so
that everything else runs at full speed: seccomp(2), ptrace(2).
"""

import contextlib
import ctypes
import json
import os
import platform
import signal
import struct
import sys

CALLS = {  # <asm/unistd.h>, <asm-generic/unistd.h>
    "x86_64": {
        "write": 1, "pwrite64": 18, "writev": 20, "pwritev": 296, "pwritev2": 328, "sendfile": 40, "sendto": 44,
        "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "fallocate": 285, "copy_file_range": 326,
        "rename": 82, "renameat": 264, "renameat2": 316, "mkdir": 83, "mkdirat": 258, "rmdir": 84, "creat": 85,
        "open": 2, "openat": 257, "openat2": 437, "link": 86, "linkat": 265, "symlink": 88, "symlinkat": 266,
        "unlink": 87, "unlinkat": 263, "chmod": 90, "fchmod": 91, "fchmodat": 268, "chown": 92, "fchown": 93,
        "fchownat": 260, "setxattr": 188, "fsetxattr": 190, "removexattr": 197, "mount": 165, "umount2": 166,
        "ioctl": 16, "sync_file_range": 277, "syncfs": 306,
    },
    "aarch64": {
        "write": 64, "pwrite64": 68, "writev": 66, "pwritev": 70, "pwritev2": 287, "sendfile": 71, "sendto": 206,
        "fsync": 82, "fdatasync": 83, "truncate": 45, "ftruncate": 46, "fallocate": 47, "copy_file_range": 285,
        "renameat": 38, "renameat2": 276, "mkdirat": 34, "openat": 56, "openat2": 437, "linkat": 37, "symlinkat": 36,
        "unlinkat": 35, "fchmod": 52, "fchmodat": 53, "fchown": 55, "fchownat": 54, "setxattr": 5, "fsetxattr": 7,
        "removexattr": 14, "mount": 40, "umount2": 39, "ioctl": 29, "sync_file_range": 84, "syncfs": 267,
    },
}.get(platform.machine(), {})  # fmt: skip
IOCTLS = {  # those that change something
    0x40049409: "FICLONE",
    0x40086602: "FS_IOC_SETFLAGS",
    0x50009417: "BTRFS_IOC_SNAP_CREATE_V2",
    0x50009418: "BTRFS_IOC_SUBVOL_CREATE_V2",
    0x5000940F: "BTRFS_IOC_SNAP_DESTROY",
    0x4008941A: "BTRFS_IOC_SUBVOL_SETFLAGS",
    0x9408: "BTRFS_IOC_SYNC",
}
OPEN_FLAGS = {"open": 1, "openat": 2}  # which argument has them
TOUCHED_BY_FD = {"write", "writev"}  # pipes, terminals, logs and sockets are no disks

PTRACE_CONT, PTRACE_SEIZE, PTRACE_LISTEN, PTRACE_GET_SYSCALL_INFO = 7, 0x4206, 0x4208, 0x420E
PTRACE_O = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 7 | 1 << 20  # FORK, VFORK, CLONE, EXEC, SECCOMP, EXITKILL
EVENT_SECCOMP, EVENT_STOP = 7, 128
WALL = 0x40000000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RET_TRACE, RET_ALLOW = 0x7FF00000, 0x7FFF0000
BPF_LD_W_ABS, BPF_JEQ_K, BPF_RET_K = 0x20, 0x15, 0x06

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def ptrace(request: int, pid: int, address: int = 0, data=0) -> int:
    result = libc.ptrace(request, pid, address, data)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), f"ptrace {request:#x}")
    return result


def filter_calls() -> None:
    """From now on each of CALLS stops this process and all that come of it for the tracer."""
    numbers = sorted(set(CALLS.values()))
    program = [struct.pack("HBBI", BPF_LD_W_ABS, 0, 0, 0)]  # seccomp_data.nr
    program += [
        struct.pack("HBBI", BPF_JEQ_K, len(numbers) - at, 0, number) for at, number in enumerate(numbers)
    ]  # to the last line
    program += [struct.pack("HBBI", BPF_RET_K, 0, 0, RET_ALLOW), struct.pack("HBBI", BPF_RET_K, 0, 0, RET_TRACE)]
    code = ctypes.create_string_buffer(b"".join(program))
    fprog = struct.pack("H6xP", len(program), ctypes.addressof(code))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(fprog), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


class Tracer:
    def __init__(self, control: str) -> None:
        self.control = control
        self.names = {number: name for name, number in CALLS.items()}
        self.info = ctypes.create_string_buffer(88)
        self.steps: dict[str, int] = {}
        self.count = self.at = 0
        self.killed: str | None = None
        self.child = 0
        self.arm()

    def arm(self, *_) -> None:
        with open(self.control) as file:
            self.at = int(file.read())
        os.unlink(self.control)  # seen
        self.count = 0
        self.steps = {}

    def kill(self, *_) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)

    # ---- what is a step

    def step(self, pid: int) -> str | None:
        """The name of the step that a stopped thread is about to take, or None if it is none."""
        ptrace(PTRACE_GET_SYSCALL_INFO, pid, len(self.info), ctypes.addressof(self.info))
        number, *arguments = struct.unpack_from("7Q", self.info, 24)
        name = self.names[number]
        if name == "ioctl":
            return IOCTLS.get(arguments[1] & 0xFFFFFFFF)
        if name in OPEN_FLAGS:
            return name if arguments[OPEN_FLAGS[name]] & (os.O_CREAT | os.O_TRUNC) else None
        if name == "openat2":
            return None
        if name in TOUCHED_BY_FD:
            return name if self.on_disk(pid, arguments[0]) else None
        if name == "sendto":
            # to the broker; neither a loop's own wake-up of one byte nor an answer of the control socket
            return name if arguments[2] > 1 and self.peek(pid, arguments[1]) != b"{" else None
        return name

    def on_disk(self, pid: int, fd: int) -> bool:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            return False
        elsewhere = target.endswith(".log") or target.startswith(("/dev/null", "/dev/pts"))
        return target.startswith("/") and not elsewhere

    def peek(self, pid: int, address: int) -> bytes:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(1)

    # ---- running

    def run(self, command: list[str]) -> int:
        ours, theirs = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            os.close(theirs)
            os.read(ours, 1)
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM})
            filter_calls()
            os.execvp(command[0], command)
        os.close(ours)
        ptrace(PTRACE_SEIZE, self.child, 0, PTRACE_O)
        signal.signal(signal.SIGUSR1, self.arm)
        signal.signal(signal.SIGUSR2, self.kill)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(self.child, signal.SIGTERM))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM})
        os.close(theirs)
        code = 0
        while True:
            try:
                pid, status = os.waitpid(-1, WALL)
            except ChildProcessError:
                break
            if os.WIFSTOPPED(status):
                with contextlib.suppress(ProcessLookupError):  # killed meanwhile
                    self.stopped(pid, status)
            elif pid == self.child:
                code = os.waitstatus_to_exitcode(status)
                if code < 0:  # its children, if it had any, go with it
                    break
        with open(self.control + ".out", "w") as file:
            json.dump({"code": code, "killed": self.killed, "count": self.count, "steps": self.steps}, file)
        return code

    def stopped(self, pid: int, status: int) -> None:
        event, number = status >> 16, os.WSTOPSIG(status)
        if event == EVENT_SECCOMP:
            name = self.step(pid) if self.killed is None else None
            if name is not None:
                self.count += 1
                self.steps[name] = self.steps.get(name, 0) + 1
                if self.count == self.at:
                    self.killed = name
                    for one in {pid, self.child}:
                        os.kill(one, signal.SIGKILL)
                    return
            ptrace(PTRACE_CONT, pid)
        elif event == EVENT_STOP and number in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            ptrace(PTRACE_LISTEN, pid)
        else:
            ptrace(PTRACE_CONT, pid, 0, 0 if event else number)


def main() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM})
    code = Tracer(sys.argv[1]).run(sys.argv[2:])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
