"""Files of dead letters: export, import, purge."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from app.dlq import archive, store
from app.dlq.command.options import Actor, AsJson, Reason, Yes, filtered, operator, spoken, user
from app.dlq.command.printing import print_json
from app.dlq.store import DeadLetterError, Filter


@filtered
def export_(
    which: Filter,
    out: Annotated[Path, typer.Option(help="A new file; - for the output.")],
    reason: Reason,
    actor: Actor = None,
) -> None:
    """Write dead letters, messages included, as JSON lines that can be imported and replayed again."""
    with operator() as session, _new_file(out) as file:
        count = archive.export(session, which, file, actor=actor or user(), reason=reason)
    print(f"{count:,} exported", file=sys.stderr)


@spoken
def import_(
    source: Annotated[typer.FileText, typer.Argument(help="An export; - for the input.")],
    reason: Reason,
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Bring exported dead letters back; what is here already is left as it is, and nothing is sent."""
    with operator() as session:
        done = archive.restore(session, source, actor=actor or user(), reason=reason)
    if as_json:
        print_json(dataclasses.asdict(done))
    else:
        print(f"{done.added:,} imported, {done.here_already:,} were here already")


@filtered
def purge(
    which: Filter,
    reason: Reason,
    export_to: Annotated[
        Path | None, typer.Option("--export", help="A new file that they are written to first.")
    ] = None,
    without_export: Annotated[bool, typer.Option("--without-export", help="Delete for good.")] = False,
    open_too: Annotated[
        bool, typer.Option("--open-too", help="Allow open ones, if the filter means them.")
    ] = False,
    actor: Actor = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete dead letters that are over, after exporting them."""
    if (export_to is None) != without_export:
        raise DeadLetterError("say where they are written to first with --export, or --without-export")
    with operator() as session:
        count = store.count(session, which)
        if count and not yes:
            if not sys.stdin.isatty():
                raise DeadLetterError(f"{count:,} dead letters would be deleted; add --yes")
            typer.confirm(f"Delete {count:,} dead letters?", abort=True)
        arguments: dict[str, Any] = {"actor": actor or user(), "reason": reason, "open_too": open_too}
        if export_to:
            with _new_file(export_to) as file:
                purged = archive.purge(session, which, file, **arguments)
        else:
            purged = archive.purge(session, which, None, **arguments)
    if as_json:
        print_json({"purged": purged})
    else:
        print(f"{purged:,} purged")


@contextmanager
def _new_file(path: Path) -> Iterator[Any]:
    if str(path) == "-":
        yield sys.stdout
        return
    try:
        # It holds what the database shows to operators only.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise DeadLetterError(f"{path} can't be written: {error.strerror}") from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        yield file
