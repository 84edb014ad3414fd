"""What the commands have in common: how rows are named, who asks, and what is said when it can't be done."""

import dataclasses
import functools
import getpass
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, get_type_hints
from uuid import UUID

import typer
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.db.session import get_engine
from app.dlq.classify import FailureClass
from app.dlq.store import OPEN, STATES, DeadLetterError, Filter
from app.dlq.text import printable

_AGE = re.compile(r"(\d+)([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
NOT_ALLOWED = ("42501", "25006")  # a privilege is missing, or the role may only read

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Reason = Annotated[str, typer.Option(help="Why; it is kept in the audit.")]
Actor = Annotated[str | None, typer.Option("--as", help="Who you are, if not the user who is logged in.")]
Yes = Annotated[bool, typer.Option("--yes", help="Don't ask.")]
Number = Annotated[int, typer.Argument(min=1, help="Number of the dead letter.")]


class StateName(StrEnum):
    """What `--state` takes."""

    pending = "pending"
    in_progress = "in_progress"
    resolved = "resolved"
    ignored = "ignored"
    open = "open"
    any = "any"


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


def filtered(command: Callable[..., None]) -> Callable[..., None]:
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
    return spoken(run)


def spoken(command: Callable[..., None]) -> Callable[..., None]:
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


@contextmanager
def operator() -> Iterator[Session]:
    """A session that is committed when the block ends well."""
    with Session(get_engine()) as session:
        yield session
        session.commit()


def needs_filter(which: Filter, everything: bool = False) -> None:
    """Refuse what would mean every row."""
    if which.empty and not everything:
        raise DeadLetterError("that would mean every dead letter; name what you mean")


def user() -> str:
    """Who types."""
    return os.environ.get("SUDO_USER") or getpass.getuser()
