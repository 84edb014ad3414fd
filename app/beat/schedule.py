"""The schedule (`app/schedule.yml`), typed and checked: which job is due when."""

import inspect
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from celery import Celery
from celery.schedules import ParseException
from celery.schedules import crontab as Crontab  # noqa: N812 - a class, though Celery writes it small
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from app.core.topology import Topology, TopologyError, read_sheet, sentences

MADE_UP = timedelta(minutes=1)
"""Of a gap up to this long every run is made up; of a longer one the latest alone."""

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,59}")
_EPOCH = datetime.fromtimestamp(0, UTC)
_LOOK_BACK = (timedelta(hours=1), timedelta(days=1), timedelta(days=32))

# A crontab asks its application what time zone it has, and must not find one whose settings need a database.
_CALENDAR = Celery("calendar", set_as_current=False, config_source={"enable_utc": True, "timezone": "UTC"})


class Entry(BaseModel):
    """A job that is enqueued by itself: `every` so many seconds, or at the times of a `crontab`, in UTC."""

    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(cached_property,))

    name: str
    task: str
    crontab: str | None = None
    every: Annotated[int, Field(ge=1, strict=True)] | None = None
    kwargs: dict[str, Any] = {}

    @field_validator("crontab")
    @classmethod
    def _legal_crontab(cls, text: str | None) -> str | None:
        if text is not None:
            if len(text.split()) != 5:
                raise ValueError(f"{text!r} does not have the five fields of a crontab, such as 10 3 * * *")
            try:
                _parsed(text)
            except (ParseException, ValueError, KeyError) as error:
                raise ValueError(f"{text!r} is not a crontab: {error}") from None
        return text

    @model_validator(mode="after")
    def _one_rhythm(self) -> Self:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                "is not a legal name: use at most 60 lower-case letters, digits, '-' and '_', a letter first"
            )
        if (self.crontab is None) == (self.every is None):
            raise ValueError("must have either crontab or every")
        return self

    @property
    def rhythm(self) -> str:
        """Its times, as they are remembered beside its last run and shown to people."""
        return f"every {self.every} s" if self.every else " ".join((self.crontab or "").split())

    @cached_property
    def _crontab(self) -> Any:
        return _parsed(self.crontab or "")

    def next_after(self, moment: datetime) -> datetime:
        """The first time after a moment at which it is due; both are aware."""
        if self.every:
            period = timedelta(seconds=self.every)
            return _EPOCH + ((moment - _EPOCH) // period + 1) * period
        last, delta, _ = self._crontab.remaining_delta(moment, tz=UTC)
        following: datetime = last + delta
        return following

    def missed(self, after: datetime, until: datetime) -> tuple[list[datetime], bool]:
        """Which runs are to be enqueued of those due after one moment and up to another.

        Returns:
            Their times, in order, and whether one stands for all: because the first is `MADE_UP` ago.
        """
        if self.next_after(after) > until:
            return [], False
        if until - self.next_after(after) <= MADE_UP:
            return list(self._due(after, until)), False
        # Nearest first: a calendar only goes forward, and every minute is half a million times a year.
        for back in _LOOK_BACK:
            if found := list(self._due(max(after, until - back), until)):
                return found[-1:], True
        return list(self._due(after, until))[-1:], True

    def _due(self, after: datetime, until: datetime) -> Iterator[datetime]:
        moment = self.next_after(after)
        while moment <= until:
            yield moment
            moment = self.next_after(moment)


def _parsed(text: str) -> Any:
    minute, hour, day_of_month, month_of_year, day_of_week = text.split()
    return Crontab(minute, hour, day_of_week, day_of_month, month_of_year, app=_CALENDAR)


def load_schedule(sheet: Topology, path: Path | None = None) -> dict[str, Entry]:
    """Read the schedule, in its order, and check it against the sheet.

    Args:
        sheet: what knows the tasks.
        path: the schedule; without it the one that belongs to this release of the package.

    Raises:
        TopologyError: with a sentence for each thing that must be changed.
    """
    source, content = read_sheet("schedule.yml", path)
    if not isinstance(content or {}, dict):
        raise TopologyError(source, ["must hold entries by name, such as `tidy-up: {task: …, every: 60}`"])
    entries: dict[str, Entry] = {}
    problems = []
    for name, given in (content or {}).items():
        try:
            entry = Entry.model_validate(given | {"name": name} if isinstance(given, dict) else given)
        except ValidationError as error:
            problems += [f"{name}: {sentence}" for sentence in sentences(error)]
            continue
        if entry.task not in sheet.queue_by_task:
            problems.append(f"{name}: no queue of app/topology.yml carries the task {entry.task}; correct it")
        entries[entry.name] = entry
    if problems:
        raise TopologyError(source, problems)
    return entries


def misfits(tasks: Mapping[str, Any], schedule: Mapping[str, Entry]) -> list[str]:
    """Entries whose arguments their task doesn't take, a sentence each; `tasks` are Celery's, by name."""
    found = []
    for entry in schedule.values():
        try:
            inspect.signature(tasks[entry.task].run).bind(**entry.kwargs)
        except TypeError as error:
            found.append(f"app/schedule.yml: {entry.name}: {entry.task} can't be called so: {error}.")
        except KeyError:
            found.append(f"app/schedule.yml: {entry.name}: the task {entry.task} has no code.")
    return found
