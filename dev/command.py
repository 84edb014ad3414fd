"""`skeldir dev` and `skeldir new`, which only a checkout has."""

import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dev import ROOT


def dev(
    folder: Annotated[
        Path, typer.Option(help="Where the data, passwords and logs are kept; removing it begins anew.")
    ] = ROOT / ".skeldir",
) -> None:
    """Run the whole plane on this machine, and restart it when the code changes."""
    # Only here, because every worker of a checkout imports this module.
    from app.core.topology import TopologyError
    from dev.loop import run
    from dev.plane import DevError, Plane

    # A shell makes what runs in its background deaf to Ctrl-C; whoever sends it means it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        run(Plane(folder.resolve(), _say))
    except KeyboardInterrupt:
        _say("All of it has ended.")
    except (DevError, TopologyError, RuntimeError) as error:
        sys.exit(str(error))


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, flush=True)


new_cli = typer.Typer(help="Add a queue or a task to this checkout.", no_args_is_help=True)


@new_cli.command()
def queue(name: Annotated[str, typer.Argument(help="Such as `reports`.")]) -> None:
    """Add a queue: its entry in the sheet, a module with a task, a test, and compose.yaml's part."""
    from dev.scaffold import FIRST_TASK, REGENERATE, Refused, new_queue, regenerate

    try:
        written = new_queue(name)
    except Refused as refused:
        sys.exit(str(refused))
    _say("".join(f"wrote {path}\n" for path in written) + "making compose.yaml's part of it …")
    if not regenerate():
        sys.exit(f"That failed; see why with: {REGENERATE}")
    _say(
        f"Next: write its work in app/tasks, beside {FIRST_TASK}; a running `skeldir dev` has it already.\n"
        "On your hosts site.yml brings its unit, port, metrics, alerts and panels; no other queue is touched."
    )


@new_cli.command()
def task(
    queue: Annotated[str, typer.Argument(help="The queue that is to carry it.")],
    name: Annotated[str, typer.Argument(help="The function's name, such as `weekly`.")],
    tenant: Annotated[bool, typer.Option("--tenant", help="It works for one tenant.")] = False,
) -> None:
    """Add a task: its line in the sheet, a function and a test."""
    from dev.scaffold import Refused, new_task

    try:
        written = new_task(queue, name, tenant=tenant)
    except Refused as refused:
        sys.exit(str(refused))
    _say(
        "".join(f"wrote {path}\n" for path in written)
        + "Next: write its work and what it must do in the test."
    )
