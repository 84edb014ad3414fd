"""Decide about dead letters without running them: ignore, note, assign."""

from typing import Annotated

import typer

from app.dlq import store
from app.dlq.command.options import Actor, AsJson, Reason, filtered, needs_filter, operator, user
from app.dlq.command.printing import print_changed
from app.dlq.store import Filter


@filtered
def ignore(
    which: Filter,
    reason: Reason,
    undo: Annotated[bool, typer.Option("--undo", help="Take ignored ones back to pending.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Every pending one; needed without a filter.")
    ] = False,
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Give dead letters up: they are closed and kept until their retention is over."""
    needs_filter(which, everything)
    change = store.reopen if undo else store.ignore
    with operator() as session:
        ids = change(session, which, actor=actor or user(), reason=reason)
    print_changed(ids, "taken back" if undo else "ignored", as_json=as_json)


@filtered
def note(
    which: Filter,
    words: Annotated[str, typer.Option("--note", help="The note, in place of the one before.")],
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Write a note on dead letters."""
    needs_filter(which)
    with operator() as session:
        ids = store.note(session, which, words, actor=actor or user())
    print_changed(ids, "noted", as_json=as_json)


@filtered
def assign(
    which: Filter,
    to: Annotated[str, typer.Option(help="Who cares for them from now on; empty for nobody.")],
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Say who cares for dead letters."""
    needs_filter(which)
    with operator() as session:
        ids = store.assign(session, which, to or None, actor=actor or user())
    print_changed(ids, f"assigned to {to or 'nobody'}", as_json=as_json)
