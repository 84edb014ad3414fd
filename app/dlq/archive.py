"""Take dead letters out as JSON lines, bring them back, and delete what is over.

These functions commit as they go, a chunk a transaction: a row is marked as exported, or deleted, only
after its
line is safely on the disk.
"""

import io
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TextIO

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.dlq import store
from app.dlq.store import OPEN, DeadLetterError, Filter

FORMAT = 1
"""The version of a line; `restore` refuses others."""

_CHUNK = 500

_LINES = """
    SELECT f.id, jsonb_build_object(
        'format', CAST(:format AS integer),
        'failure', to_jsonb(f),
        'payloads', (SELECT jsonb_agg(to_jsonb(p) ORDER BY p.version)
                     FROM celery_task_failure_payloads p WHERE p.failure_id = f.id),
        'errors', (SELECT jsonb_agg(to_jsonb(e) ORDER BY e.number)
                   FROM celery_task_failure_errors e WHERE e.failure_id = f.id))::text AS line
    FROM celery_task_failures f
    WHERE f.id = ANY (:chunk) ORDER BY f.id FOR UPDATE OF f
"""


@dataclass(frozen=True)
class Imported:
    """What became of the lines of an export."""

    added: int
    here_already: int


def export(session: Session, which: Filter, out: TextIO, *, actor: str, reason: str) -> int:
    """Write rows with all that belongs to them, one a line. Returns how many.

    Raises:
        DeadLetterError: without a reason.
    """
    _needs(reason)
    return sum(_written(session, chunk, out, actor, reason) for chunk in _chunks(session, which))


def restore(session: Session, lines: Iterable[str], *, actor: str, reason: str) -> Imported:
    """Bring exported rows back; one that is here already is left as it is.

    What was open is pending again. Nothing is sent.

    Raises:
        DeadLetterError: a line isn't of an export; the lines before it are in.
    """
    _needs(reason)
    added = here_already = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DeadLetterError(
                f"line {number} is not JSON; the {number - 1} before it were read"
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT or not content.get("payloads"):
            raise DeadLetterError(
                f"line {number} is not a dead letter of format {FORMAT}; the {number - 1} before it were read"
            )
        store.act_as(session, actor, reason)
        try:
            new = session.execute(
                text("SELECT celery_task_failure_import(CAST(:line AS jsonb))"), {"line": line}
            ).scalar_one()
        except DBAPIError as error:
            session.rollback()
            raise DeadLetterError(
                f"line {number} is refused: {str(error.orig).splitlines()[0]};"
                f" the {number - 1} before it were read"
            ) from error
        session.commit()
        if new is None:
            here_already += 1
        else:
            added += 1
    return Imported(added, here_already)


def purge(
    session: Session,
    which: Filter,
    out: TextIO | None,
    *,
    actor: str,
    reason: str,
    open_too: bool = False,
) -> int:
    """Delete rows, each after it was written to `out`. Returns how many.

    Args:
        session: an operator's.
        which: the rows meant.
        out: where they are exported to first; None deletes for good.
        actor: who.
        reason: why.
        open_too: without it open rows are refused, not skipped in silence.

    Raises:
        DeadLetterError: the filter means open rows, or there is no reason.
    """
    _needs(reason)
    if not open_too and any(state in OPEN for state in which.states):
        raise DeadLetterError("open dead letters are purged only when that is asked for; name a closed state")
    purged = 0
    for chunk in _chunks(session, which):
        if out:
            _written(session, chunk, out, actor, reason, commit=False)
        store.act_as(session, actor, reason)
        session.execute(
            text("SELECT set_config('app.purge_open', :open, true)"), {"open": "on" if open_too else "off"}
        )
        purged += session.execute(
            text("DELETE FROM celery_task_failures WHERE id = ANY (:chunk) AND state = ANY (:states)"),
            {"chunk": chunk, "states": list(which.states)},
        ).rowcount  # type: ignore[attr-defined] # a DELETE's result is a cursor's
        session.commit()
    return purged


def tend(
    session: Session, *, resolved_after: timedelta, ignored_after: timedelta, stuck_after: timedelta
) -> dict[str, int]:
    """Housekeeping, for workers: delete what is over and was exported, and settle what is stuck under way.

    A replay is stuck when its message is gone and nobody said how it ended: a result says so, or the row goes
    back to pending. Open rows are never deleted here.

    Args:
        session: a worker's, bound to no tenant.
        resolved_after: how long resolved rows are kept, at least a day.
        ignored_after: how long ignored rows are kept, at least a day.
        stuck_after: how long a replay may be under way without a message.

    Returns:
        Counts: `purged`, `not_exported` (due, but not exported yet), `resolved` and `returned`.
    """
    total = {"purged": 0, "not_exported": 0, "resolved": 0, "returned": 0}
    while True:
        row = session.execute(
            text("SELECT * FROM celery_task_failure_tend(:resolved, :ignored, :stuck, :batch)"),
            {"resolved": resolved_after, "ignored": ignored_after, "stuck": stuck_after, "batch": _CHUNK},
        ).one()
        session.commit()
        for name in ("purged", "resolved", "returned"):
            total[name] += row._mapping[name]
        total["not_exported"] = row.not_exported
        if row.purged < _CHUNK:
            return total


def _chunks(session: Session, which: Filter) -> Iterator[list[int]]:
    """The ids meant, as they are when this is called."""
    ids = list(store.ids_of(session, which))
    session.commit()
    for start in range(0, len(ids), _CHUNK):
        yield ids[start : start + _CHUNK]


def _written(
    session: Session, chunk: list[int], out: TextIO, actor: str, reason: str, *, commit: bool = True
) -> int:
    store.act_as(session, actor, reason)
    rows: list[Any] = list(session.execute(text(_LINES), {"format": FORMAT, "chunk": chunk}))
    for row in rows:
        out.write(row.line + "\n")
    _onto_the_disk(out)
    session.execute(
        text("UPDATE celery_task_failures SET exported_at = now() WHERE id = ANY (:chunk)"),
        {"chunk": [row.id for row in rows]},
    )
    if commit:
        session.commit()
    return len(rows)


def _onto_the_disk(out: TextIO) -> None:
    out.flush()
    try:
        descriptor = out.fileno()
    except io.UnsupportedOperation:  # a file in memory
        return
    if stat.S_ISREG(os.fstat(descriptor).st_mode):  # a pipe has no disk to wait for
        os.fsync(descriptor)


def _needs(reason: str) -> None:
    if not reason.strip():
        raise DeadLetterError("say why: a reason is needed")
