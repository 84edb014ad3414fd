"""Ends what a `skeldir dev` has started, however that one ends: also by `kill -9`.

It reads lines from its standard input, whose other end only `skeldir dev` holds: `group PID` (a process that
leads a group of its own), `server PID` (PostgreSQL) and `gone PID`. At the end of the input it ends what is
left, workers before their database. Nothing of the project is imported here, so that it starts at once.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

PATIENCE = 5.0
"""Seconds that a worker gets to finish what it runs; what takes longer runs again at the next start."""


def main() -> None:
    """Watch, then end everything."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    known: dict[int, str] = {}
    for line in sys.stdin:
        kind, _, pid = line.strip().partition(" ")
        if kind == "gone":
            known.pop(int(pid), None)
        else:
            known[int(pid)] = kind
    groups = [pid for pid, kind in known.items() if kind == "group"]
    servers = [pid for pid, kind in known.items() if kind == "server"]
    _end(groups, os.killpg, [signal.SIGTERM, signal.SIGKILL])
    _end(servers, os.kill, [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL])


def _end(pids: Iterable[int], send: Callable[[int, int], None], ways: Iterable[signal.Signals]) -> None:
    left = list(pids)
    for way in ways:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                send(pid, way)
        deadline = time.monotonic() + PATIENCE
        while (left := [pid for pid in left if _runs(pid)]) and time.monotonic() < deadline:
            time.sleep(0.02)
    # Whoever led a group may have left members of it behind.
    for pid in pids if send is os.killpg else ():
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Ended, and nobody asked how: a container's first process often doesn't.
    stat = Path(f"/proc/{pid}/stat")
    with suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return not Path("/proc/self").exists()


if __name__ == "__main__":
    main()
