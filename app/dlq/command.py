"""`skeldir dlq`: the operator's way to the dead letters, in tables for people and in JSON for machines."""

import dataclasses
import functools
import getpass
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints
from uuid import UUID

import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.core.config import get_settings
from app.core.topology import Topology
from app.db.session import get_engine
from app.dlq import archive, replay, store
from app.dlq.classify import FailureClass
from app.dlq.message import editable
from app.dlq.store import OPEN, STATES, DeadLetterError, Filter
from app.dlq.text import cut, printable

dlq_cli = typer.Typer(
    help="Dead letters: what failed for good, and how it is brought back.", no_args_is_help=True
)


class StateName(StrEnum):
    """What `--state` takes."""

    pending = "pending"
    in_progress = "in_progress"
    resolved = "resolved"
    ignored = "ignored"
    open = "open"
    any = "any"


_AGE = re.compile(r"(\d+)([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
NOT_ALLOWED = ("42501", "25006")  # a privilege is missing, or the role may only read

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Reason = Annotated[str, typer.Option(help="Why; it is kept in the audit.")]
Actor = Annotated[str | None, typer.Option("--as", help="Who you are, if not the user who is logged in.")]
Yes = Annotated[bool, typer.Option("--yes", help="Don't ask.")]
Number = Annotated[int, typer.Argument(min=1, help="Number of the dead letter.")]


def _moment(value: str) -> datetime:
    """`2h` or `3d` ago, or an ISO time; UTC unless it says otherwise."""
    if match := _AGE.fullmatch(value):
        try:
            return datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})
        except OverflowError:
            raise typer.BadParameter(f"{value} is longer ago than there is time") from None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither an age such as 2h or 3d nor a time") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@dataclasses.dataclass
class _FilterOptions:
    """The options that every command over many rows has."""

    ids: Annotated[
        list[int] | None, typer.Argument(min=1, metavar="[ID]...", help="Numbers of dead letters.")
    ] = None
    queue: Annotated[str | None, typer.Option(help="The queue they came from.")] = None
    task: Annotated[str | None, typer.Option(help="Full name of the task.")] = None
    failure_class: Annotated[FailureClass | None, typer.Option("--class", help="How they failed.")] = None
    error_type: Annotated[str | None, typer.Option(help="Type of the error, as listed.")] = None
    group: Annotated[str | None, typer.Option(help="Equal failures: a group's fingerprint.")] = None
    tenant: Annotated[UUID | None, typer.Option(help="The tenant whose they are.")] = None
    no_tenant: Annotated[bool, typer.Option("--no-tenant", help="Only those of no tenant.")] = False
    since: Annotated[
        datetime | None, typer.Option(parser=_moment, metavar="TIME", help="Failed since; 2h, 3d or a time.")
    ] = None
    until: Annotated[datetime | None, typer.Option(parser=_moment, metavar="TIME", help="Failed before.")] = (
        None
    )
    text: Annotated[
        str | None,
        typer.Option(help="Words of the error message, as they stand there; the last may be cut short."),
    ] = None
    assignee: Annotated[str | None, typer.Option(help="Who cares for them.")] = None
    state: Annotated[list[StateName] | None, typer.Option(help="Their state; open ones without.")] = None

    def filter(self) -> Filter:
        states: list[Any] = []
        for state in self.state or [StateName("open")]:
            states += {"open": OPEN, "any": STATES}.get(state.value, (state.value,))
        return Filter(
            ids=tuple(self.ids or ()),
            queue=self.queue,
            task=self.task,
            failure_class=self.failure_class,
            error_type=self.error_type,
            fingerprint=self.group,
            tenant=self.tenant,
            without_tenant=self.no_tenant,
            since=self.since,
            until=self.until,
            text=self.text,
            assignee=self.assignee,
            states=tuple(dict.fromkeys(states)),
        )


def _filtered(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the filter's options; it gets them as its first argument, a `Filter`."""
    fields = [field.name for field in dataclasses.fields(_FilterOptions)]
    hints = get_type_hints(_FilterOptions, include_extras=True)
    own = get_type_hints(command, include_extras=True)
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(_FilterOptions, name),
            annotation=hints[name],
        )
        for name in fields
    ]
    parameters += [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own[name])
        for name, parameter in list(inspect.signature(command).parameters.items())[1:]
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = _FilterOptions(**{name: given.pop(name) for name in fields})
        command(options.filter(), **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {
        "return": None
    }
    return _spoken(run)


def _spoken(command: Callable[..., None]) -> Callable[..., None]:
    """What keeps a command from doing what it was asked is a sentence on stderr."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except DeadLetterError as error:
            sys.exit(printable(str(error)))
        except DBAPIError as error:
            if getattr(error.orig, "pgcode", None) not in NOT_ALLOWED:
                raise
            sys.exit(
                f"Your database role may not do this: {printable(str(error.orig).splitlines()[0])}\n"
                "Operators work as app_rw; to edit a message is a right of its own, which its owner grants: "
                "GRANT EXECUTE ON FUNCTION celery_task_failure_edit TO app_rw"
            )

    return run


@dlq_cli.command("list")
@_filtered
def list_(
    which: Filter,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows a page.")] = 50,
    before: Annotated[
        int | None, typer.Option(help="The next page: the last number of the one before.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List dead letters, what failed last first."""
    with _session() as session:
        start = None
        if before:
            last = store.find(session, Filter(ids=(before,), states=STATES))
            if not last:
                raise DeadLetterError(f"there is no dead letter {before}")
            start = (last[0].last_failed_at, last[0].id)
        rows = store.find(session, which, limit=limit, before=start)
    if as_json:
        _print_json([dataclasses.asdict(row) for row in rows])
        return
    table = Table("id", "state", "class", "task", "queue", "tenant", "failed", "tries", "error")
    for row in rows:
        table.add_row(
            str(row.id),
            row.state,
            row.failure_class,
            _cell(row.task),
            _cell(row.queue),
            _cell(row.tenant_id),
            _ago(row.last_failed_at),
            f"{row.attempts}",
            _cell(f"{row.error_type}: {row.error_message}", 90),
        )
    _print(table, "No dead letters." if not rows else None)
    if len(rows) == limit:
        print(f"There may be more: add --before {rows[-1].id}")


@dlq_cli.command()
@_filtered
def groups(
    which: Filter,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The largest groups.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Show equal failures together: is it one bad job or ten thousand?"""
    with _session() as session:
        found = store.groups(session, which, limit=limit)
    if as_json:
        _print_json([dataclasses.asdict(group) for group in found])
        return
    table = Table("group", "count", "tenants", "class", "task", "queue", "first", "last", "example", "error")
    for group in found:
        table.add_row(
            group.fingerprint,
            f"{group.count:,}",
            str(group.tenants),
            group.failure_class,
            _cell(group.task),
            _cell(group.queue),
            _ago(group.first_failed_at),
            _ago(group.last_failed_at),
            str(group.example_id),
            _cell(f"{group.error_type}: {group.error_message}", 90),
        )
    _print(table, "No dead letters." if not found else None)


@dlq_cli.command()
@_spoken
def show(
    number: Number,
    reveal: Annotated[bool, typer.Option("--reveal", help="Also what is hidden by its name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show all that is known of one dead letter."""
    with _session() as session:
        details = store.show(session, number)
    message = editable(details.message, reveal=reveal)
    if as_json:
        _print_json(
            dataclasses.asdict(details.row)
            | {"message": message, "problem": details.message.problem, "versions": details.versions}
            | {"errors": details.errors, "history": details.history}
        )
        return
    facts = Table(show_header=False, box=None)
    for name, value in dataclasses.asdict(details.row).items():
        if value is not None:
            facts.add_row(name.replace("_", " "), _cell(value, 2000))
    _print(facts)
    if details.message.problem:
        print(f"\nIts message can't be read: {printable(details.message.problem)}")
    else:
        print("\nIts message" + ("" if reveal else " (--reveal shows what is hidden)") + ":")
        print(json.dumps(message, indent=2))
    for version in details.versions[1:]:
        print(f"\nEdit {version['version'] - 1} by {_cell(version['actor'])}: {_cell(version['reason'])}")
        if reveal and version["diff"]:
            print(printable(version["diff"]))
    for error in details.errors:
        print(
            f"\nFailure {error['number']} at {error['failed_at']:%Y-%m-%d %H:%M:%S}:"
            f" {_cell(error['error_type'])}"
        )
        print(printable(error["traceback"] or error["error_message"]))
    if details.history:
        table = Table("at", "what", "who", "as", "why")
        for event in details.history:
            table.add_row(
                f"{event['at']:%Y-%m-%d %H:%M:%S}",
                event["action"],
                _cell(event["actor"]),
                event["db_user"],
                _cell(event["reason"]),
            )
        print()
        _print(table)


@dlq_cli.command("replay")
@_filtered
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
    sheet, who = get_settings().topology, actor or _user()
    if history:
        with _session() as session:
            _print_progress(replay.replays(session), as_json=as_json)
        return
    for number, state in ((pause, "paused"), (cancel, "cancelled")):
        if number:
            with _session() as session:
                now = replay.set_state(session, number, state, f"{state} by {who}")  # type: ignore[arg-type]
            _print_progress([now], as_json=as_json)
            return
    if progress:
        with _session() as session:
            _print_progress([replay.progress(session, progress)], as_json=as_json)
        return
    if resume:
        with _session() as session:
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
    with _session() as session:
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
    with _session() as session:
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


@dlq_cli.command()
@_filtered
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
    _needs_filter(which, everything)
    change = store.reopen if undo else store.ignore
    with _session() as session:
        ids = change(session, which, actor=actor or _user(), reason=reason)
    _print_changed(ids, "taken back" if undo else "ignored", as_json=as_json)


@dlq_cli.command()
@_filtered
def note(
    which: Filter,
    words: Annotated[str, typer.Option("--note", help="The note, in place of the one before.")],
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Write a note on dead letters."""
    _needs_filter(which, False)
    with _session() as session:
        ids = store.note(session, which, words, actor=actor or _user())
    _print_changed(ids, "noted", as_json=as_json)


@dlq_cli.command()
@_filtered
def assign(
    which: Filter,
    to: Annotated[str, typer.Option(help="Who cares for them from now on; empty for nobody.")],
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Say who cares for dead letters."""
    _needs_filter(which, False)
    with _session() as session:
        ids = store.assign(session, which, to or None, actor=actor or _user())
    _print_changed(ids, f"assigned to {to or 'nobody'}", as_json=as_json)


@dlq_cli.command("export")
@_filtered
def export_(
    which: Filter,
    out: Annotated[Path, typer.Option(help="A new file; - for the output.")],
    reason: Reason,
    actor: Actor = None,
) -> None:
    """Write dead letters, messages included, as JSON lines that can be imported and replayed again."""
    with _session() as session, _opened(out) as file:
        count = archive.export(session, which, file, actor=actor or _user(), reason=reason)
    print(f"{count:,} exported", file=sys.stderr)


@dlq_cli.command("import")
@_spoken
def import_(
    source: Annotated[typer.FileText, typer.Argument(help="An export; - for the input.")],
    reason: Reason,
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Bring exported dead letters back; what is here already is left as it is, and nothing is sent."""
    with _session() as session:
        done = archive.restore(session, source, actor=actor or _user(), reason=reason)
    if as_json:
        _print_json(dataclasses.asdict(done))
    else:
        print(f"{done.added:,} imported, {done.here_already:,} were here already")


@dlq_cli.command()
@_filtered
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
    with _session() as session:
        count = store.count(session, which)
        if count and not yes:
            if not sys.stdin.isatty():
                raise DeadLetterError(f"{count:,} dead letters would be deleted; add --yes")
            typer.confirm(f"Delete {count:,} dead letters?", abort=True)
        arguments: dict[str, Any] = {"actor": actor or _user(), "reason": reason, "open_too": open_too}
        if export_to:
            with _opened(export_to) as file:
                purged = archive.purge(session, which, file, **arguments)
        else:
            purged = archive.purge(session, which, None, **arguments)
    if as_json:
        _print_json({"purged": purged})
    else:
        print(f"{purged:,} purged")


@dlq_cli.command()
@_spoken
def stats(as_json: AsJson = False) -> None:
    """Count dead letters by state, class and queue; works as app_ro too."""
    with _session() as session:
        rows = store.stats(session)
    if as_json:
        _print_json(rows)
        return
    table = Table("state", "class", "queue", "count")
    for row in rows:
        table.add_row(row["state"], row["failure_class"], _cell(row["queue"]), f"{row['count']:,}")
    _print(table, "No dead letters." if not rows else None)


@contextmanager
def _session() -> Iterator[Session]:
    with Session(get_engine()) as session:
        yield session
        session.commit()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
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


def _edit(number: int, given: str | None, actor: str, reason: str) -> None:
    with _session() as session:
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


def _needs_filter(which: Filter, everything: bool) -> None:
    if which.empty and not everything:
        raise DeadLetterError("that would mean every dead letter; name what you mean")


def _print_changed(ids: list[int], what: str, *, as_json: bool) -> None:
    if as_json:
        _print_json({"ids": ids})
    else:
        print(f"{len(ids):,} {printable(what)}")


def _print_plan(plan: Sequence[replay.PlannedGroup], *, as_json: bool) -> None:
    if as_json:
        _print_json([dataclasses.asdict(group) for group in plan])
        return
    table = Table("group", "class", "task", "error", "would be sent", "left out, because")
    for group in plan:
        why = "\n".join(f"{count:,}: {reason}" for reason, count in group.refused.items())
        table.add_row(
            group.fingerprint,
            group.failure_class,
            _cell(group.task),
            _cell(group.error_type),
            f"{group.eligible:,}",
            printable(why),
        )
    _print(table, "Nothing matches." if not plan else None)


def _print_progress(replays: Sequence[replay.Progress], *, as_json: bool) -> None:
    if as_json:
        _print_json([dataclasses.asdict(now) for now in replays])
        return
    for now in replays:
        print(f"replay {now.id} by {printable(now.actor)} ({printable(now.reason)}): {_counts(now)}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))  # ASCII: no escape sequence gets through


def _print(table: Table, otherwise: str | None = None) -> None:
    if otherwise:
        print(otherwise)
        return
    # A pipe or a journal has no width of its own: don't cut names there. What a job said is never markup.
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False, emoji=False)
    if sys.stdout.isatty() and table.row_count > console.height - 4:
        with console.pager(styles=True):
            console.print(table)
    else:
        console.print(table)


def _cell(value: Any, limit: int = 200) -> str:
    return "-" if value is None else printable(cut(str(value), limit) if limit > 200 else str(value)[:limit])


def _ago(moment: datetime) -> str:
    seconds = int((datetime.now(UTC) - moment).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{max(seconds, 0)} s ago"


def _user() -> str:
    return os.environ.get("SUDO_USER") or getpass.getuser()
