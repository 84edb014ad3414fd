"""The health check of a container: healthy while `/health` says so, ended when `/health/live` says no.

Docker only notes that a container is unhealthy, and restarts it when it ends. So what systemd's watchdog does
on a host is done here: a worker whose loop stands still, or that answers nobody, is killed. Its jobs run
elsewhere then.
"""

import os
import signal
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

SILENCE = 45
"""Seconds without any answer after which the process counts as frozen."""

SILENT_SINCE = Path("/tmp/silent-since")  # noqa: S108 - the container's own


def ask(port: int, path: str) -> int:
    """The status of an answer.

    Raises:
        OSError: nobody answers within 2 s.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def main(port: int) -> int:
    """0 while the container does its work."""
    try:
        live = ask(port, "/health/live") == 200
        healthy = ask(port, "/health") == 200
    except OSError:
        since = float(SILENT_SINCE.read_text()) if SILENT_SINCE.exists() else time.monotonic()
        SILENT_SINCE.write_text(str(since))
        live, healthy = time.monotonic() - since < SILENCE, False
    else:
        SILENT_SINCE.unlink(missing_ok=True)
    if not live:
        SILENT_SINCE.unlink(missing_ok=True)
        os.kill(-1, signal.SIGKILL)  # all but this process and the init, which then ends the container
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
