"""Bring dead letters back: row, message and audit change in one transaction, so no job is lost or sent twice.

A replay is a list of rows chosen once (`start`) and sent in steps (`step`), each a transaction: all at once
without
a rate, else as many as the rate allows. Whoever drives it (`run`) can die at any point; `run` goes on from
there.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from app.core.topology import Topology
from app.dlq import store
from app.dlq.message import priority_of, read, replay_form
from app.dlq.store import DeadLetterError, Filter

MAX_REPLAYS = 5
"""How often a row is replayed unless more is asked for."""
STOP_RATIO = 0.2
"""Share of the finished jobs that may fail again before a replay stops by itself."""
STOP_AFTER = 5
"""Jobs that must have finished before that share says anything."""

_CHUNK = 20_000  # rows a transaction without a rate; bounds its memory
_STEP = 0.5  # seconds between two steps
_DRIVER_LOCK = 1_802_331_491  # two-key advisory lock: somebody drives the replay of that number

ReplayState = Literal["running", "paused", "stopped", "cancelled", "done"]


@dataclass(frozen=True)
class PlannedGroup:
    """What a replay would do with one group of equal failures."""

    fingerprint: str
    task: str | None
    failure_class: str
    error_type: str
    eligible: int
    refused: dict[str, int]  # why -> how many


@dataclass(frozen=True)
class Progress:
    """How far a replay is; counts are rows."""

    id: int
    state: ReplayState
    state_reason: str | None
    actor: str
    reason: str
    target_queue: str | None
    rate: float | None
    canary: int
    stop_ratio: float
    max_replays: int
    total: int
    position: int
    skipped: int
    in_flight: int
    succeeded: int
    failed_again: int
    created_at: datetime

    @property
    def sent(self) -> int:
        """Rows whose message was put into its queue."""
        return self.position - self.skipped

    @property
    def over(self) -> bool:
        """Whether nothing is left to send or to wait for."""
        return self.state in ("done", "cancelled", "stopped") and self.in_flight == 0


# Why a row can't be replayed now; the first reason that holds.
_VERDICT = """
    CASE
        WHEN f.state = 'in_progress' THEN 'its replay is under way'
        WHEN f.state <> 'pending' THEN 'it is ' || f.state
        WHEN NOT f.decodable THEN 'its message can''t be decoded; edit it first'
        WHEN f.task IS NULL OR f.task <> ALL (:known) THEN 'no worker knows its task'
        WHEN CAST(:target AS text) IS NULL AND f.queue <> ALL (:queues) THEN 'its queue is gone; name another'
        WHEN f.replays >= :max_replays THEN 'it was replayed ' || f.replays || ' times'
    END
"""


def plan(
    session: Session,
    which: Filter,
    topology: Topology,
    *,
    target_queue: str | None = None,
    max_replays: int = MAX_REPLAYS,
    limit: int | None = None,
    everything: bool = False,
) -> list[PlannedGroup]:
    """What `start` with the same arguments would send, by group, and why it would leave the others.

    Raises:
        DeadLetterError: the filter is empty, or the target unknown.
    """
    which = _checked(which, topology, target_queue, everything)
    where, values = which.where()
    session.execute(text("SELECT set_config('jit', 'off', true)"))
    rows = session.execute(
        text(
            f"""
            WITH judged AS (
                SELECT f.*, {_VERDICT} AS refusal FROM celery_task_failures f WHERE {where}
            ), chosen AS (
                SELECT *, CASE WHEN refusal IS NULL AND row_number() OVER (
                    PARTITION BY refusal IS NULL ORDER BY first_failed_at, id) > CAST(:limit AS bigint)
                    THEN 'beyond the limit' ELSE refusal END AS why
                FROM judged
            )
            SELECT fingerprint, min(task) AS task, min(class) AS failure_class, min(error_type) AS error_type,
                why, count(*) AS n
            FROM chosen GROUP BY fingerprint, why ORDER BY fingerprint, n DESC
            """
        ),
        values | _judged_by(topology, target_queue, max_replays) | {"limit": limit},
    )
    groups: dict[str, PlannedGroup] = {}
    for row in rows:
        group = groups.setdefault(
            row.fingerprint, PlannedGroup(row.fingerprint, row.task, row.failure_class, row.error_type, 0, {})
        )
        if row.why is None:
            groups[row.fingerprint] = replace(group, eligible=row.n)
        else:
            group.refused[row.why] = row.n
    return sorted(groups.values(), key=lambda group: -group.eligible)


def start(
    session: Session,
    which: Filter,
    topology: Topology,
    *,
    actor: str,
    reason: str,
    target_queue: str | None = None,
    rate: float | None = None,
    canary: int = 0,
    stop_ratio: float = STOP_RATIO,
    max_replays: int = MAX_REPLAYS,
    limit: int | None = None,
    everything: bool = False,
) -> int:
    """Choose the rows of a replay. Nothing is sent before `run` or `step`.

    Args:
        session: an operator's.
        which: the rows meant; those that can't be replayed are left out, `plan` says why.
        topology: the queues and tasks that exist.
        actor: who.
        reason: why.
        target_queue: instead of the queue each came from.
        rate: jobs a second; all at once without.
        canary: so many first, and the others only if all of these succeed.
        stop_ratio: share of failed jobs among the finished ones beyond which it stops by itself.
        max_replays: rows that were replayed so often already are left out.
        limit: at most so many rows, what failed first at the front.
        everything: allows an empty filter.

    Returns:
        The number of the replay.

    Raises:
        DeadLetterError: the filter is empty, the target unknown, a number out of range, or no row is
        eligible.
    """
    which = _checked(which, topology, target_queue, everything)
    if not reason.strip():
        raise DeadLetterError("say why: a reason is needed")
    if (rate is not None and not 0 < rate < 1e6) or canary < 0 or max_replays < 1 or not 0 <= stop_ratio <= 1:
        raise DeadLetterError("rate and max_replays are above 0, canary at least 0, stop_ratio from 0 to 1")
    where, values = which.where()
    ids = list(
        session.execute(
            text(
                f"SELECT f.id FROM celery_task_failures f WHERE {where} AND {_VERDICT} IS NULL"
                " ORDER BY f.first_failed_at, f.id LIMIT CAST(:limit AS bigint)"
            ),
            values | _judged_by(topology, target_queue, max_replays) | {"limit": limit},
        ).scalars()
    )
    if not ids:
        raise DeadLetterError("none of these can be replayed; a dry run says why")
    number: int = session.execute(
        text(
            "INSERT INTO celery_task_failure_replays"
            " (actor, reason, filter, target_queue, rate, canary, stop_ratio, max_replays, failure_ids)"
            " VALUES (:actor, :reason, CAST(:filter AS jsonb), :target, :rate, :canary, :stop_ratio,"
            " :max_replays, :ids) RETURNING id"
        ),
        {
            "actor": actor,
            "reason": reason,
            "filter": json.dumps(which.as_json()),
            "target": target_queue,
            "rate": rate,
            "canary": canary,
            "stop_ratio": stop_ratio,
            "max_replays": max_replays,
            "ids": ids,
        },
    ).scalar_one()
    return number


def progress(session: Session, replay_id: int) -> Progress:
    """How far a replay is.

    Raises:
        DeadLetterError: there is no such replay.
    """
    row = session.execute(
        text(
            """
            SELECT r.id, r.state, r.state_reason, r.actor, r.reason, r.target_queue, r.rate, r.canary,
                r.stop_ratio,
                r.max_replays, cardinality(r.failure_ids) AS total, r.position, r.skipped, r.created_at,
                o.in_flight, o.succeeded, o.failed_again
            FROM celery_task_failure_replays r, LATERAL (
                SELECT count(*) FILTER (WHERE f.state = 'in_progress') AS in_flight,
                    count(*) FILTER (WHERE f.state = 'resolved') AS succeeded,
                    count(*) FILTER (WHERE f.state IN ('pending', 'ignored')) AS failed_again
                FROM celery_task_failures f WHERE f.replay_id = r.id
            ) o WHERE r.id = :id
            """
        ),
        {"id": replay_id},
    ).one_or_none()
    if row is None:
        raise DeadLetterError(f"there is no replay {replay_id}")
    return Progress(**row._mapping)


def replays(session: Session, *, limit: int = 20) -> list[Progress]:
    """The last replays, newest first."""
    ids = session.execute(
        text("SELECT id FROM celery_task_failure_replays ORDER BY id DESC LIMIT :limit"), {"limit": limit}
    ).scalars()
    return [progress(session, replay_id) for replay_id in ids]


def set_state(session: Session, replay_id: int, state: ReplayState, why: str) -> Progress:
    """Pause, resume or cancel a replay; what was sent stays sent.

    Raises:
        DeadLetterError: the replay is over, or there is none.
    """
    before = _locked(session, replay_id)
    allowed: dict[str, tuple[str, ...]] = {
        "running": ("paused", "stopped", "running"),
        "paused": ("running", "paused"),
        "cancelled": ("running", "paused", "stopped"),
    }
    if before["state"] not in allowed.get(state, ("running",)):
        raise DeadLetterError(f"replay {replay_id} is {before['state']} and can't become {state}")
    _set_state(session, replay_id, state, why)
    return progress(session, replay_id)


def step(session: Session, replay_id: int, topology: Topology, *, at_most: int) -> int:
    """Send the next rows of a running replay, in the caller's transaction. Returns how many were sent.

    A row that somebody else has taken, ignored or purged meanwhile is skipped and counted.
    """
    batch = _locked(session, replay_id)
    ids = batch["failure_ids"][batch["position"] : batch["position"] + at_most]
    if batch["state"] != "running" or not ids:
        return 0
    store.act_as(session, batch["actor"], f"replay {replay_id}: {batch['reason']}")
    rows = session.execute(
        text(
            f"""
            SELECT f.id, f.queue, p.payload FROM celery_task_failures f
            JOIN celery_task_failure_payloads p ON p.failure_id = f.id AND p.version = f.payload_version
            WHERE f.id = ANY (:ids) AND {_VERDICT} IS NULL
            ORDER BY array_position(:ids, f.id) FOR UPDATE OF f
            """
        ),
        {"ids": ids} | _judged_by(topology, batch["target_queue"], batch["max_replays"]),
    ).all()
    sent = _send(session, replay_id, topology, batch["target_queue"], rows)
    position = batch["position"] + len(ids)
    session.execute(
        text(
            "UPDATE celery_task_failure_replays SET position = :position, skipped = skipped + :skipped,"
            " changed_at = now() WHERE id = :id"
        ),
        {"id": replay_id, "position": position, "skipped": len(ids) - sent},
    )
    if position >= len(batch["failure_ids"]):
        _set_state(session, replay_id, "done", "everything was sent")
    return sent


def run(
    engine: Engine,
    replay_id: int,
    topology: Topology,
    *,
    wait: bool = False,
    report: Callable[[Progress], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Progress:
    """Drive a replay to its end, or to where somebody pauses, cancels or stops it.

    Args:
        engine: the operator's.
        replay_id: from `start`, or of a replay whose driver died.
        topology: the queues and tasks that exist.
        wait: also for the outcome of what was sent.
        report: called with the progress after each step.
        clock: seconds.
        sleep: waits so many seconds.

    Raises:
        DeadLetterError: somebody else drives it, or there is no such replay.
    """
    with _driver(engine, replay_id):
        allowance, last = 1.0, clock()
        while True:
            with Session(engine) as session:
                now = progress(session, replay_id)
                report(now)
                if now.over or (now.state != "running" and not wait) or (now.state == "done" and not wait):
                    return now
                if now.state == "paused":
                    return now
                _stop_if_too_many_fail(session, now)
                at_most = _allowed(now)
                if now.rate:
                    allowance = min(allowance + (clock() - last) * now.rate, max(now.rate, 1.0))
                    at_most = min(at_most, int(allowance))
                last = clock()
                sent = step(session, replay_id, topology, at_most=at_most) if at_most else 0
                queues = _queue_ids(session, topology) if sent else []
                session.commit()
                if queues:
                    session.execute(text("SELECT kombu_wake(:queues)"), {"queues": queues})
                    session.commit()
            allowance -= sent
            if not (sent and not now.rate):
                sleep(min(_STEP, 1 / now.rate) if now.rate else _STEP)


def _send(session: Session, replay_id: int, topology: Topology, target_queue: str | None, rows: Any) -> int:
    target = topology.queues[target_queue] if target_queue else None
    ids, queues, priorities, payloads = [], [], [], []
    for row in rows:
        message = read(row.payload)
        if message.problem:  # pragma: no cover - `decodable` says so before
            continue
        ids.append(row.id)
        queues.append(target_queue or row.queue)
        priorities.append(priority_of(message))
        payloads.append(replay_form(message, row.id, target))
    if not ids:
        return 0
    messages = list(
        session.execute(
            text("SELECT nextval('message_id_sequence') FROM generate_series(1, :n)"), {"n": len(ids)}
        ).scalars()
    )
    inserted = session.execute(
        text(
            """
            INSERT INTO kombu_message (id, queue_id, priority, payload)
            SELECT m.id, q.id, m.priority, m.payload
            FROM unnest(CAST(:ids AS bigint[]), CAST(:queues AS text[]), CAST(:priorities AS smallint[]),
                CAST(:payloads AS text[])) AS m (id, queue, priority, payload)
            JOIN kombu_queue q ON q.name = m.queue
            """
        ),
        {"ids": messages, "queues": queues, "priorities": priorities, "payloads": payloads},
    ).rowcount  # type: ignore[attr-defined] # an INSERT's result is a cursor's
    if inserted != len(ids):
        raise DeadLetterError(
            f"a queue of {', '.join(sorted(set(queues)))} was never declared; start its worker once"
        )
    session.execute(
        text(
            """
            UPDATE celery_task_failures f SET state = 'in_progress', replays = f.replays + 1,
                replay_id = :replay, message_id = m.message_id
            FROM unnest(CAST(:ids AS bigint[]), CAST(:messages AS bigint[])) AS m (id, message_id) WHERE
                f.id = m.id
            """
        ),
        {"replay": replay_id, "ids": ids, "messages": messages},
    )
    return len(ids)


def _allowed(now: Progress) -> int:
    """How many may be sent now, the rate apart: the canary's, nothing while it runs, then everything."""
    if now.state != "running":
        return 0
    if now.canary and now.sent < now.canary:
        return now.canary - now.sent
    if now.canary and now.succeeded < min(now.canary, now.sent):
        return 0
    return _CHUNK


def _stop_if_too_many_fail(session: Session, now: Progress) -> None:
    if now.state != "running" or not now.failed_again:
        return
    finished = now.succeeded + now.failed_again
    if now.canary and finished <= now.canary:
        _set_state(session, now.id, "stopped", f"{now.failed_again} of the canary failed again")
    elif finished >= STOP_AFTER and now.failed_again > now.stop_ratio * finished:
        _set_state(session, now.id, "stopped", f"{now.failed_again} of {finished} failed again")


def _checked(which: Filter, topology: Topology, target_queue: str | None, everything: bool) -> Filter:
    if which.empty and not everything:
        raise DeadLetterError(
            "an empty filter means every dead letter; say so with --all, or name what you mean"
        )
    if target_queue is not None and target_queue not in topology.queues:
        raise DeadLetterError(f"there is no queue {target_queue}; the sheet has {', '.join(topology.queues)}")
    return which


def _judged_by(topology: Topology, target_queue: str | None, max_replays: int) -> dict[str, Any]:
    return {
        "known": list(topology.queue_by_task),
        "queues": list(topology.queues),
        "target": target_queue,
        "max_replays": max_replays,
    }


def _locked(session: Session, replay_id: int) -> dict[str, Any]:
    row = session.execute(
        text("SELECT * FROM celery_task_failure_replays WHERE id = :id FOR UPDATE"), {"id": replay_id}
    ).one_or_none()
    if row is None:
        raise DeadLetterError(f"there is no replay {replay_id}")
    return dict(row._mapping)


def _set_state(session: Session, replay_id: int, state: ReplayState, why: str) -> None:
    session.execute(
        text(
            "UPDATE celery_task_failure_replays SET state = :state, state_reason = :why, changed_at = now()"
            " WHERE id = :id"
        ),
        {"id": replay_id, "state": state, "why": why},
    )


def _queue_ids(session: Session, topology: Topology) -> list[int]:
    return list(
        session.execute(
            text("SELECT id FROM kombu_queue WHERE name = ANY (:names)"), {"names": list(topology.queues)}
        ).scalars()
    )


@contextmanager
def _driver(engine: Engine, replay_id: int) -> Iterator[None]:
    """One driver a replay; the lock ends with the driver's session, so a dead one is no obstacle."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        lock = {"key": _DRIVER_LOCK, "id": replay_id}
        if not connection.execute(text("SELECT pg_try_advisory_lock(:key, :id)"), lock).scalar_one():
            raise DeadLetterError(
                f"replay {replay_id} is being driven by another session; watch it with --progress"
            )
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key, :id)"), lock)
