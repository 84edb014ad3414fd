"""The loop of `skeldir dev`: what was written, who ended, what changed."""

import os
import time
from contextlib import ExitStack

from rich.console import Console
from rich.live import Live
from watchfiles import DefaultFilter, watch

from app.core.topology import load_topology
from dev import ROOT
from dev.plane import Plane
from dev.view import Screen, short

_LOOK = 1.0  # seconds between two looks at the processes' numbers


def run(plane: Plane) -> None:
    """Run the plane until KeyboardInterrupt.

    Raises:
        DevError: it can't run.
    """
    began = time.monotonic()
    terminal = Console()
    with plane.running(), ExitStack() as stack:
        screen = Screen(plane, load_topology())
        live = None
        if terminal.is_terminal:
            live = stack.enter_context(Live(console=terminal, screen=True, auto_refresh=False))

        def tell(name: str, line: str) -> None:
            if live:
                screen.add(name, line)
            else:
                plane.say("\n".join(f"{name:<14} | {each}" for each in line.splitlines() if each.strip()))

        ready, looked = False, 0.0
        # Its own settings and caches aside, everything that a worker runs with.
        for changes in watch(
            ROOT / "app",
            ROOT / "alembic",
            watch_filter=_Code(),
            debounce=400,
            rust_timeout=200,
            yield_on_timeout=True,
        ):
            if changes:
                names = sorted({os.path.relpath(path, ROOT) for _, path in changes})
                tell("dev", f"{', '.join(names)} changed")
                if problem := plane.reload():
                    tell("dev", f"{problem}\nUntil this is mended, what ran before goes on.")
                else:
                    screen.sheet, ready, began = load_topology(), False, time.monotonic()
            for name, process in plane.processes.items():
                for line in process.new_lines():
                    tell(name, short(line))
            for said in plane.revive():
                tell("dev", said)
            if not ready and all(process.state == "ready" for process in plane.processes.values()):
                ready = True
                tell(
                    "dev",
                    f"Ready after {time.monotonic() - began:.1f} s: {', '.join(plane.processes)}."
                    f" In another terminal: set -a; . {plane.folder}/env; skeldir ping",
                )
            if live and time.monotonic() - looked > _LOOK:
                screen.look()
                looked = time.monotonic()
            if live:
                live.update(screen.rendered(terminal.height), refresh=True)


class _Code(DefaultFilter):
    """Python and the sheets."""

    def __call__(self, change: object, path: str) -> bool:
        return path.endswith((".py", ".yml")) and super().__call__(change, path)  # type: ignore[arg-type]
