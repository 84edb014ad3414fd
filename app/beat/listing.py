"""What `skeldir schedule` shows."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import text

from app.beat.schedule import Entry
from app.db.session import get_engine

_READ = text("SELECT name, rhythm, last_due, enqueued_at, task_id FROM celery_schedule")


def listing(schedule: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """A row for each entry: its last run, the job that was, and its next run; times in ISO 8601.

    The last run is none before the first. An entry whose next run lies in the past is overdue.

    Raises:
        sqlalchemy.exc.DBAPIError: the database can't be read.
    """
    with get_engine().connect() as connection:
        seen = {name: found for name, *found in connection.execute(_READ)}
    return [_row(entry, *seen.get(entry.name, ("", None, None, None))) for entry in schedule.values()]


def _row(
    entry: Entry, rhythm: str, last_due: datetime | None, enqueued_at: datetime | None, task_id: str | None
) -> dict[str, Any]:
    if rhythm != entry.rhythm:  # no scheduler has seen it yet
        last_due = enqueued_at = task_id = None
    last_run = last_due if enqueued_at else None
    late = (enqueued_at - last_run).total_seconds() if enqueued_at and last_run else None
    return {
        "entry": entry.name,
        "task": entry.task,
        "when": entry.rhythm,
        "kwargs": entry.kwargs,
        "last_due": _iso(last_run),
        "enqueued_at": _iso(enqueued_at),
        "late_seconds": late,
        "next_due": _iso(entry.next_after(last_due or datetime.now(UTC))),
        "task_id": task_id,
    }


def _iso(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat() if moment else None
