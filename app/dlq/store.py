"""The rows: find, count, group and show them, and what a person does to them short of a replay.

Every function takes the caller's session and leaves the commit to it. What a role may see and change, which
transitions exist and what is recorded of them is the database's business (`alembic/versions/dead_letters_*`).
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from app.dlq.classify import FAILURE_CLASSES, Failure, FailureClass, fingerprint
from app.dlq.message import InvalidMessageError, Message, difference, edited, read

State = Literal["pending", "in_progress", "resolved", "ignored"]
STATES: tuple[State, ...] = get_args(State)
OPEN: tuple[State, ...] = ("pending", "in_progress")


class DeadLetterError(Exception):
    """What was asked for can't be done; one sentence for a person."""


@dataclass(frozen=True)
class Filter:
    """Which rows are meant; what isn't given doesn't restrict. Times are aware."""

    ids: tuple[int, ...] = ()
    queue: str | None = None
    task: str | None = None
    failure_class: FailureClass | None = None
    error_type: str | None = None
    fingerprint: str | None = None
    tenant: UUID | None = None
    without_tenant: bool = False
    since: datetime | None = None
    until: datetime | None = None
    text: str | None = None
    assignee: str | None = None
    states: tuple[State, ...] = OPEN

    def __post_init__(self) -> None:
        unknown = [state for state in self.states if state not in STATES]
        if unknown or not self.states:
            raise DeadLetterError(f"{unknown or 'nothing'} is no state; there are {', '.join(STATES)}")
        if self.failure_class not in (None, *FAILURE_CLASSES):
            raise DeadLetterError(
                f"{self.failure_class!r} is no class; there are {', '.join(FAILURE_CLASSES)}"
            )
        if any(not 0 < row < 2**63 for row in self.ids):
            raise DeadLetterError("an id is a number above 0")
        for name in ("since", "until"):
            moment = getattr(self, name)
            if moment and not moment.tzinfo:
                raise DeadLetterError(f"{name} needs a time zone")

    @property
    def empty(self) -> bool:
        """Whether it means every row, whatever its state."""
        return dataclasses.replace(self, states=OPEN) == Filter()

    def where(self, *leave_out: str) -> tuple[str, dict[str, Any]]:
        """The condition on `f`, celery_task_failures, and its parameters; no value is part of the SQL."""
        values: dict[str, Any] = {
            "ids": list(self.ids) or None,
            "queue": self.queue,
            "task": self.task,
            "failure_class": self.failure_class,
            "error_type": self.error_type,
            "fingerprint": self.fingerprint,
            "tenant": str(self.tenant) if self.tenant else None,
            "since": self.since,
            "until": self.until,
            "text": _pattern(self.text) if self.text else None,
            "assignee": self.assignee,
            "without_tenant": True if self.without_tenant else None,
        }
        values = {
            name: _storable(value)
            for name, value in values.items()
            if value is not None and name not in leave_out
        }
        conditions = [_CONDITIONS[name] for name in values]
        conditions.append("f.state = ANY (:states)")
        return " AND ".join(conditions), values | {"states": list(self.states)}

    def as_json(self) -> dict[str, Any]:
        """What is kept of it with a replay."""
        given = {key: value for key, value in dataclasses.asdict(self).items() if value}
        return {
            key: str(value) if isinstance(value, UUID | datetime) else value for key, value in given.items()
        }


_OF_A_KIND = ("task", "failure_class", "error_type")
_MANY_KINDS = 3000
_FEW = 20_000  # rows that are looked at one by one
_CONDITIONS = {
    "ids": "f.id = ANY (:ids)",
    "queue": "f.queue = :queue",
    "task": "f.task = :task",
    "failure_class": "f.class = :failure_class",
    "error_type": "f.error_type = :error_type",
    "fingerprint": "f.fingerprint = :fingerprint",
    "tenant": "f.tenant_id = CAST(:tenant AS uuid)",
    "since": "f.last_failed_at >= :since",
    "until": "f.last_failed_at < :until",
    "text": "f.error_message ~* :text",
    "assignee": "f.assignee = :assignee",
    "without_tenant": "f.tenant_id IS NULL AND :without_tenant",
}


@dataclass(frozen=True)
class Row:
    """A dead letter without its message; times are aware."""

    id: int
    uid: UUID
    state: State
    failure_class: FailureClass
    task: str | None
    task_id: str | None
    tenant_id: UUID | None
    correlation_id: str | None
    queue: str
    exchange: str | None
    routing_key: str | None
    error_type: str
    error_message: str
    fingerprint: str
    worker: str | None
    host: str | None
    attempts: int
    deliveries: int
    failures: int
    first_failed_at: datetime
    last_failed_at: datetime
    changed_at: datetime
    message_id: int | None
    decodable: bool
    payload_version: int
    replays: int
    replay_id: int | None
    assignee: str | None
    note: str | None
    exported_at: datetime | None
    imported_at: datetime | None


_COLUMNS = ", ".join(
    "f.class AS failure_class" if column.name == "failure_class" else f"f.{column.name}"
    for column in dataclasses.fields(Row)
)


@dataclass(frozen=True)
class Group:
    """Equal failures: how many, whose, since when, and one of them as an example."""

    fingerprint: str
    count: int
    tenants: int
    first_failed_at: datetime
    last_failed_at: datetime
    failure_class: FailureClass
    task: str | None
    queue: str
    error_type: str
    error_message: str
    example_id: int


@dataclass(frozen=True)
class Details:
    """All that is known of one row; `errors` and `history` are oldest first."""

    row: Row
    payload: str
    message: Message
    versions: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


def find(
    session: Session, which: Filter, *, limit: int = 50, before: tuple[datetime, int] | None = None
) -> list[Row]:
    """Rows that failed last, first.

    Args:
        session: an operator's or a tenant's.
        which: the rows meant.
        limit: at most so many.
        before: `last_failed_at` and `id` of the last row of the page before.
    """
    where, values = which.where()
    if (few := _few(session, which)) is not None:
        where, values = f"{where} AND f.id = ANY (:few)", values | {"few": few}
    elif (kinds := _kinds(session, which)) is not None:
        where, values = f"{where} AND f.fingerprint = ANY (:kinds)", values | {"kinds": kinds}
    elif which.text:  # what is in many rows is soon found in the newest, which Postgres can't know
        session.execute(
            text("SELECT set_config('enable_seqscan', 'off', true), set_config('enable_sort', 'off', true)")
        )
    if before:
        where += " AND (f.last_failed_at, f.id) < (:before_time, :before_id)"
        values |= {"before_time": before[0], "before_id": before[1]}
    rows = session.execute(
        text(
            f"SELECT {_COLUMNS} FROM celery_task_failures f WHERE {where}"
            " ORDER BY f.last_failed_at DESC, f.id DESC LIMIT :limit"
        ),
        values | {"limit": limit},
    )
    return [_row(row._mapping) for row in rows]


def count(session: Session, which: Filter) -> int:
    """How many rows are meant."""
    where, values = which.where()
    number: int = session.execute(
        text(f"SELECT count(*) FROM celery_task_failures f WHERE {where}"),
        values,
    ).scalar_one()
    return number


def groups(session: Session, which: Filter, *, limit: int = 50) -> list[Group]:
    """Equal failures together, the largest group first."""
    # Over a million rows Postgres would compile the query first, for longer than the query takes; and sort on
    # the disk what it takes for less than it is.
    session.execute(text("SELECT set_config('jit', 'off', true), set_config('enable_sort', 'off', true)"))
    where, values = which.where()
    if (few := _few(session, which)) is not None:
        query, values = _GROUPS_OF_FEW.format(where=where), values | {"few": few}
    else:
        counted, kinds = where, _kinds(session, which)
        if kinds is not None:  # then the count needs nothing but the index
            counted = f"{which.where(*_OF_A_KIND)[0]} AND f.fingerprint = ANY (:kinds)"
        query, values = _GROUPS.format(where=where, counted=counted), values | {"kinds": kinds}
    rows = session.execute(text(query), values | {"limit": limit})
    return [Group(**row._mapping) for row in rows]


_GROUPS = """
    WITH by_tenant AS (
        SELECT f.fingerprint, f.tenant_id, count(*) AS n FROM celery_task_failures f
        WHERE {counted} GROUP BY f.fingerprint, f.tenant_id
    ), by_fingerprint AS (
        SELECT fingerprint, sum(n)::bigint AS count, count(tenant_id) AS tenants
        FROM by_tenant GROUP BY fingerprint ORDER BY 2 DESC, 1 LIMIT :limit
    )
    SELECT g.*, oldest.first_failed_at, newest.last_failed_at, newest.class AS failure_class,
        newest.task, newest.queue, newest.error_type, newest.error_message, newest.id AS example_id
    FROM by_fingerprint g,
        LATERAL (SELECT f.* FROM celery_task_failures f WHERE f.fingerprint = g.fingerprint AND {where}
            ORDER BY f.last_failed_at DESC, f.id DESC LIMIT 1) newest,
        LATERAL (SELECT f.first_failed_at FROM celery_task_failures f
            WHERE f.fingerprint = g.fingerprint AND {where}
            ORDER BY f.last_failed_at, f.id LIMIT 1) oldest
    ORDER BY g.count DESC, g.fingerprint
"""
_GROUPS_OF_FEW = """
    WITH meant AS MATERIALIZED (
        SELECT f.* FROM celery_task_failures f WHERE f.id = ANY (:few) AND {where}
    ), by_fingerprint AS (
        SELECT fingerprint, count(*) AS count, count(DISTINCT tenant_id) AS tenants,
            min(first_failed_at) AS first_failed_at,
            (array_agg(id ORDER BY last_failed_at DESC, id DESC))[1] AS example_id
        FROM meant GROUP BY fingerprint ORDER BY 2 DESC, 1 LIMIT :limit
    )
    SELECT g.*, m.last_failed_at, m.class AS failure_class, m.task, m.queue, m.error_type, m.error_message
    FROM by_fingerprint g JOIN meant m ON m.id = g.example_id ORDER BY g.count DESC, g.fingerprint
"""


def show(session: Session, failure_id: int) -> Details:
    """One row with its message, all its errors, its edits and its history.

    Raises:
        DeadLetterError: there is no such row for this session.
    """
    found = find(session, Filter(ids=(failure_id,), states=STATES), limit=1)
    if not found:
        raise DeadLetterError(f"there is no dead letter {failure_id}")
    versions = _dicts(
        session, "SELECT * FROM celery_task_failure_payloads WHERE failure_id = :id", failure_id, "version"
    )
    errors = _dicts(
        session, "SELECT * FROM celery_task_failure_errors WHERE failure_id = :id", failure_id, "number"
    )
    history = _dicts(
        session, "SELECT * FROM celery_task_failure_audit WHERE failure_id = :id", failure_id, "id"
    )
    payload = versions[-1].pop("payload") if versions else ""
    for version in versions:
        version.pop("payload", None)
    return Details(found[0], payload, read(payload), versions, errors, history)


def stats(session: Session) -> list[dict[str, Any]]:
    """Counts by state, class and queue; for `app_ro` too."""
    session.execute(text("SELECT set_config('jit', 'off', true)"))
    rows = session.execute(
        text(
            """
            WITH counted AS (
                SELECT fingerprint, queue, state, count(*) AS n FROM celery_task_failures GROUP BY 1, 2, 3
            )
            SELECT c.state, f.class AS failure_class, c.queue, sum(c.n)::bigint AS count
            FROM counted c, LATERAL (
                SELECT class FROM celery_task_failures WHERE fingerprint = c.fingerprint
                ORDER BY last_failed_at DESC LIMIT 1
            ) f GROUP BY 1, 2, 3 ORDER BY 1, 4 DESC
            """
        )
    )
    return [dict(row._mapping) for row in rows]


def ignore(session: Session, which: Filter, *, actor: str, reason: str) -> list[int]:
    """Give rows up; only pending ones are touched. Returns their ids.

    Raises:
        DeadLetterError: without a reason.
    """
    return _change(session, which, "state = 'ignored'", "pending", actor=actor, reason=reason)


def reopen(session: Session, which: Filter, *, actor: str, reason: str) -> list[int]:
    """Take ignored rows back to pending. Returns their ids.

    Raises:
        DeadLetterError: without a reason.
    """
    which = dataclasses.replace(which, states=("ignored",))
    return _change(session, which, "state = 'pending'", "ignored", actor=actor, reason=reason)


def note(session: Session, which: Filter, note: str, *, actor: str) -> list[int]:
    """Write a note on rows, in place of the one before. Returns their ids."""
    return _change(
        session,
        which,
        "note = :note",
        None,
        values={"note": _storable(note) or None},
        actor=actor,
        reason="note",
    )


def assign(session: Session, which: Filter, assignee: str | None, *, actor: str) -> list[int]:
    """Say who cares for rows; None for nobody. Returns their ids."""
    values = {"new_assignee": _storable(assignee) or None}
    reason = f"assigned to {assignee or 'nobody'}"
    return _change(
        session, which, "assignee = :new_assignee", None, values=values, actor=actor, reason=reason
    )


def edit(session: Session, failure_id: int, form: dict[str, Any], *, actor: str, reason: str) -> str:
    """Keep an edited message as a new version, which the next replay sends. Returns the diff.

    Args:
        session: one whose role was granted the right to edit (`celery_task_failure_edit`).
        failure_id: a pending row.
        form: `task`, `id`, `args` and `kwargs`, what isn't given stays.
        actor: who edits.
        reason: why.

    Raises:
        DeadLetterError: the row isn't pending, or the form doesn't make a message.
    """
    before = show(session, failure_id)
    try:
        payload, message = edited(before.message, form)
    except InvalidMessageError as error:
        raise DeadLetterError(str(error)) from error
    diff = difference(before.message, message)
    if not diff:
        raise DeadLetterError("nothing was changed")
    version = session.execute(
        text("SELECT celery_task_failure_edit(:id, :payload, :task, :task_id, :diff, :actor, :reason)"),
        {
            "id": failure_id,
            "payload": payload,
            "task": message.task,
            "task_id": message.task_id,
            "diff": diff,
            "actor": actor,
            "reason": _storable(reason),
        },
    ).scalar_one()
    if version is None:
        raise DeadLetterError(
            f"dead letter {failure_id} is {before.row.state}; only a pending one can be edited"
        )
    return diff


def insert(
    cursor: Any,
    *,
    message_id: int,
    queue: str,
    payload: str,
    message: Message,
    failure: Failure,
    deliveries: int,
    tenant: str | None,
    host: str | None,
) -> int:
    """Keep a message that ended. The caller deletes it in the same transaction, or there is no row either.

    Args:
        cursor: a psycopg2 cursor in that transaction.
        message_id: of `kombu_message`.
        queue: the queue it was in.
        payload: the message to the byte.
        message: what was read of it.
        failure: how it ended.
        deliveries: how often it was delivered.
        tenant: whose it is, or nobody's.
        host: where it ended.

    Returns:
        The id of the row: a new one, or, for a replay, the one it came from.
    """
    cursor.execute(
        "SELECT celery_task_failure_capture(%s, %s, %s, %s, %s, %s, %s::uuid, %s, %s, %s, %s, %s, %s, %s,"
        " %s, %s, %s,"
        " %s, %s, %s)",
        (
            message_id,
            message.replay_of,
            payload,
            failure.failure_class,
            _storable(message.task),
            _storable(message.task_id),
            tenant,
            _storable(message.correlation_id),
            queue,
            _storable(_text(message.delivery_info.get("exchange"))),
            _storable(_text(message.delivery_info.get("routing_key"))),
            failure.error_type,
            failure.error_message,
            failure.traceback,
            fingerprint(failure, message.task),
            failure.worker,
            host,
            message.retries + 1 if failure.attempts is None else failure.attempts,
            deliveries,
            message.problem is None,
        ),
    )
    return int(cursor.fetchone()[0])


def act_as(session: Session, actor: str, reason: str) -> None:
    """Say who does the following, and why, for the audit; until the transaction ends."""
    session.execute(
        text("SELECT set_config('app.actor', :actor, true), set_config('app.reason', :reason, true)"),
        {"actor": _storable(actor), "reason": _storable(reason)},
    )


def _few(session: Session, which: Filter) -> list[int] | None:
    """Ids among which all rows meant are, when an index knows them to be few; None otherwise."""
    if which.ids:
        return list(which.ids)
    if which.assignee is not None:
        query = "SELECT id FROM celery_task_failures WHERE assignee = :assignee LIMIT :limit"
        values = {"assignee": _storable(which.assignee), "limit": _FEW + 1}
        ids = list(session.execute(text(query), values).scalars())
        if len(ids) <= _FEW:
            return ids
    if which.text:
        found: list[int] | None = session.execute(
            text("SELECT celery_task_failure_search(:words, :limit)"),
            {"words": _storable(which.text), "limit": _FEW},
        ).scalar_one()
        return found
    return None


def _kinds(session: Session, which: Filter) -> list[str] | None:
    """The fingerprints a filter's task, class and type of error come down to; None when it has none of these.

    A fingerprint is of one task, class and type of error, so the few of them are looked at, not all rows.
    Also None when there are more than a few.
    """
    values = {name: _storable(value) for name in _OF_A_KIND if (value := getattr(which, name)) is not None}
    if not values:
        return None
    conditions = [_CONDITIONS[name] for name in values]
    kinds = session.execute(
        text(
            f"""
            WITH RECURSIVE k AS (
                (SELECT fingerprint, class, task, error_type, 1 AS n FROM celery_task_failures
                 ORDER BY fingerprint LIMIT 1)
                UNION ALL
                SELECT next.*, k.n + 1 FROM k, LATERAL (
                    SELECT fingerprint, class, task, error_type FROM celery_task_failures
                    WHERE fingerprint > k.fingerprint ORDER BY fingerprint LIMIT 1) next
                WHERE k.n < {_MANY_KINDS}
            )
            SELECT f.fingerprint, max(f.n) OVER () AS n, ({" AND ".join(conditions)}) AS meant FROM k f
            """
        ),
        values,
    ).all()
    if kinds and kinds[0].n >= _MANY_KINDS:
        return None
    return [kind.fingerprint for kind in kinds if kind.meant]


def _change(
    session: Session,
    which: Filter,
    assignment: str,
    state: State | None,
    *,
    values: dict[str, Any] | None = None,
    actor: str,
    reason: str,
) -> list[int]:
    if not reason.strip():
        raise DeadLetterError("say why: a reason is needed")
    where, parameters = which.where()
    if state:
        where += " AND f.state = :from_state"
        parameters["from_state"] = state
    act_as(session, actor, reason)
    rows = session.execute(
        text(f"UPDATE celery_task_failures f SET {assignment} WHERE {where} RETURNING f.id"),
        parameters | (values or {}),
    )
    return sorted(rows.scalars())


def _dicts(session: Session, query: str, failure_id: int, order: str) -> list[dict[str, Any]]:
    return [
        dict(row._mapping) for row in session.execute(text(f"{query} ORDER BY {order}"), {"id": failure_id})
    ]


def _row(mapping: Any) -> Row:
    return Row(**mapping)


def _pattern(words: str) -> str:
    """The regular expression of Postgres that finds a text as it is, from the beginning of a word."""
    literal = re.sub(r"(\W|_)", r"\\\1", words)
    return f"(^|[^[:alnum:]]){literal}" if words[0].isalnum() else literal


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _storable(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return value.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def ids_of(session: Session, which: Filter, *, limit: int | None = None) -> Sequence[int]:
    """The ids meant, what failed first at the front."""
    where, values = which.where()
    return (
        session.execute(
            text(
                f"SELECT f.id FROM celery_task_failures f WHERE {where}"
                " ORDER BY f.first_failed_at, f.id LIMIT :limit"
            ),
            values | {"limit": limit},
        )
        .scalars()
        .all()
    )
