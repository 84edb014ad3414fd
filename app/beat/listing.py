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
    return [_row(entry, seen.get(entry.name)) for entry in schedule.values()]


def _row(entry: Entry, seen: list[Any] | None) -> dict[str, Any]:
    row = {"entry": entry.name, "task": entry.task, "when": entry.rhythm, "kwargs": entry.kwargs}
    if seen is None or seen[0] != entry.rhythm:  # no scheduler has seen it yet
        return row | _times(None, None, entry.next_after(datetime.now(UTC))) | {"task_id": None}
    _, last_due, enqueued_at, task_id = seen
    last = last_due if enqueued_at else None
    return row | _times(last, enqueued_at, entry.next_after(last_due)) | {"task_id": task_id}


def _times(
    last_due: datetime | None, enqueued_at: datetime | None, next_due: datetime
) -> dict[str, str | None]:
    times = {"last_due": last_due, "enqueued_at": enqueued_at, "next_due": next_due}
    return {name: moment.astimezone(UTC).isoformat() if moment else None for name, moment in times.items()}
