"""Bring dead letters back: replay, and what belongs to it."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from app.core.config import get_settings
from app.core.topology import Topology
from app.db.session import get_engine
from app.dlq import replay, store
from app.dlq.command.options import Actor, AsJson, Yes, filtered, operator, user
from app.dlq.command.printing import cell, print_json, print_table
from app.dlq.message import editable
from app.dlq.store import DeadLetterError, Filter
from app.dlq.text import printable


@filtered
def replay_(
    which: Filter,
    reason: Annotated[str | None, typer.Option(help="Why; it is kept in the audit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent, and what not and why.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Every open dead letter; needed without a filter.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many, what failed first at the front.")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=0.01, max=100_000, help="Jobs a second.")] = None,
    canary: Annotated[
        int, typer.Option(min=0, help="So many first, the others only if all of these succeed.")
    ] = 0,
    stop_ratio: Annotated[
        float,
        typer.Option(min=0, max=1, help="Stop when more than this share of the finished jobs failed again."),
    ] = replay.STOP_RATIO,
    max_replays: Annotated[
        int, typer.Option(min=1, help="Leave out what was replayed so often.")
    ] = replay.MAX_REPLAYS,
    to: Annotated[str | None, typer.Option(help="Another queue than the one each came from.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the outcome of all.")] = False,
    message: Annotated[
        typer.FileText | None,
        typer.Option(help="One dead letter only: JSON with the task, args or kwargs it is to have."),
    ] = None,
    edit: Annotated[bool, typer.Option("--edit", help="The same, in your $EDITOR.")] = False,
    progress: Annotated[int | None, typer.Option(metavar="REPLAY", help="Show how far a replay is.")] = None,
    pause: Annotated[int | None, typer.Option(metavar="REPLAY", help="Pause a running replay.")] = None,
    resume: Annotated[
        int | None, typer.Option(metavar="REPLAY", help="Go on with one that was paused, stopped or left.")
    ] = None,
    cancel: Annotated[int | None, typer.Option(metavar="REPLAY", help="Send no more of a replay.")] = None,
    history: Annotated[bool, typer.Option("--history", help="List the last replays.")] = False,
    actor: Actor = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Run dead letters again: exactly those meant, each once."""
    sheet, who = get_settings().topology, actor or user()
    if history:
        with operator() as session:
            _print_progress(replay.replays(session), as_json=as_json)
        return
    for number, state in ((pause, "paused"), (cancel, "cancelled")):
        if number:
            with operator() as session:
                now = replay.set_state(session, number, state, f"{state} by {who}")  # type: ignore[arg-type]
            _print_progress([now], as_json=as_json)
            return
    if progress:
        with operator() as session:
            _print_progress([replay.progress(session, progress)], as_json=as_json)
        return
    if resume:
        with operator() as session:
            if replay.progress(session, resume).state != "done":
                replay.set_state(session, resume, "running", f"resumed by {who}")
        _drive(resume, sheet, wait=wait, as_json=as_json)
        return
    chosen: dict[str, Any] = {
        "target_queue": to,
        "max_replays": max_replays,
        "limit": limit,
        "everything": everything,
    }
    with operator() as session:
        plan = replay.plan(session, which, sheet, **chosen)
    eligible = sum(group.eligible for group in plan)
    if dry_run:
        _print_plan(plan, as_json=as_json)
        return
    if not reason:
        raise DeadLetterError("say why with --reason")
    if (message or edit) and (len(which.ids) != 1 or which.as_json().keys() - {"ids", "states"}):
        raise DeadLetterError(
            "an edited message belongs to one dead letter: name its number and nothing else"
        )
    if message or edit:
        _edit(which.ids[0], message.read() if message else None, who, reason)
    elif eligible > 1 and sys.stdin.isatty() and not yes:
        _print_plan(plan, as_json=False)
        typer.confirm(f"Replay these {eligible:,}?", abort=True)
    with operator() as session:
        number = replay.start(
            session,
            which,
            sheet,
            actor=who,
            reason=reason,
            rate=rate,
            canary=canary,
            stop_ratio=stop_ratio,
            **chosen,
        )
    _drive(number, sheet, wait=wait, as_json=as_json)


def _edit(number: int, given: str | None, actor: str, reason: str) -> None:
    with operator() as session:
        form = editable(store.show(session, number).message, reveal=True)
        if given is None:
            given = _in_editor(json.dumps(form, indent=2))
        try:
            changed = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise DeadLetterError(f"the edited message is not JSON: {error}") from error
        if not isinstance(changed, dict):
            raise DeadLetterError("the edited message is not an object")
        diff = store.edit(session, number, changed, actor=actor, reason=reason)
    print(printable(diff), file=sys.stderr)


def _in_editor(text: str) -> str:
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.NamedTemporaryFile("w+", suffix=".json") as file:  # readable by its owner alone
        file.write(text)
        file.flush()
        words = [*shlex.split(editor), file.name]
        if subprocess.run(words, check=False).returncode:  # noqa: S603 - the user's own editor
            raise DeadLetterError(f"the editor ({editor}) failed, nothing was done")
        return Path(file.name).read_text()


def _drive(number: int, sheet: Topology, *, wait: bool, as_json: bool) -> None:
    last = ""

    def report(now: replay.Progress) -> None:
        nonlocal last
        line = f"replay {now.id}: {_counts(now)}"
        if sys.stderr.isatty() and line != last:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
            last = line

    try:
        end = replay.run(get_engine(), number, sheet, wait=wait, report=report)
    except KeyboardInterrupt:
        sys.exit(f"\nLeft where it is; go on with: skeldir dlq replay --resume {number}")
    if last:
        print(file=sys.stderr)
    _print_progress([end], as_json=as_json)
    if end.state in ("stopped", "paused"):
        sys.exit(
            f"Replay {number} {end.state}: {printable(end.state_reason or '')}. Go on with --resume {number}"
        )
    if wait and end.failed_again:
        sys.exit(f"{end.failed_again:,} failed again; see: skeldir dlq groups")


def _counts(now: replay.Progress) -> str:
    return (
        f"{now.state}, {now.sent:,} of {now.total:,} sent, {now.in_flight:,} under way,"
        f" {now.succeeded:,} succeeded, {now.failed_again:,} failed again, {now.skipped:,} skipped"
    )


def _print_plan(plan: Sequence[replay.PlannedGroup], *, as_json: bool) -> None:
    if as_json:
        print_json([dataclasses.asdict(group) for group in plan])
        return
    table = Table("group", "class", "task", "error", "would be sent", "left out, because")
    for group in plan:
        why = "\n".join(f"{count:,}: {reason}" for reason, count in group.refused.items())
        table.add_row(
            group.fingerprint,
            group.failure_class,
            cell(group.task),
            cell(group.error_type),
            f"{group.eligible:,}",
            printable(why),
        )
    print_table(table, "Nothing matches." if not plan else None)


def _print_progress(replays: Sequence[replay.Progress], *, as_json: bool) -> None:
    if as_json:
        print_json([dataclasses.asdict(now) for now in replays])
        return
    for now in replays:
        print(f"replay {now.id} by {printable(now.actor)} ({printable(now.reason)}): {_counts(now)}")
