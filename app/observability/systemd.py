"""sd_notify(3): tell systemd that a worker is ready, stopping and alive. Without systemd nothing happens."""

import logging
import os
import socket

logger = logging.getLogger(__name__)


def notify(*assignments: str) -> None:
    """Send one datagram of assignments such as `READY=1`; a failure is logged, never raised."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(1)
            channel.connect(address)
            channel.send("\n".join(assignments).encode())
    except OSError as error:
        logger.warning("systemd can't be notified of %s: %s", " ".join(assignments), error)


def watchdog_seconds() -> float | None:
    """How often systemd wants to hear `WATCHDOG=1` from this process (sd_watchdog_enabled(3)), if it does."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(usec) / 1e6 if usec.isdecimal() and int(usec) > 0 and pid == str(os.getpid()) else None
