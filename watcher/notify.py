"""Telling systemd: sd_notify(3) is one datagram."""

import os
import socket


def sd_notify(message: str) -> None:
    """Send `message` (such as READY=1) if a service manager listens; trouble with that is none of ours."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.connect(address)
            sender.send(message.encode())
    except OSError:
        return


def watchdog_interval() -> float | None:
    """Seconds between two WATCHDOG=1 (half of what the service manager allows), None if it does not ask."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not usec.isdigit() or pid != str(os.getpid()):
        return None
    return int(usec) / 2_000_000
