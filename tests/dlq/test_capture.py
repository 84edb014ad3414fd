"""Failures made for real, with every pool: each message ends as one row of the right class."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import psycopg2
import pytest
from psycopg2.extras import execute_values

from app.broker import DeadMessage
from app.dlq import replay
from app.dlq.capture import DeadLetters
from app.dlq.message import read
from app.dlq.store import Filter
from tests.dlq import fuzz
from tests.dlq.conftest import Worker, until
from tests.dlq.plane import TENANT_A, Plane, payload

EXPIRED = {"expires": "2020-01-01T00:00:00+00:00"}
CASES: dict[str, tuple[str, str]] = {
    payload(task="t.raise", task_id="raise"): ("permanent", "ValueError"),
    payload(task="t.unpicklable", task_id="unpicklable"): ("permanent", "Odd"),
    payload(task="t.transient", task_id="transient"): ("transient", "ConnectionError"),
    payload(task="t.by_hand", task_id="by_hand"): ("transient", "KeyError"),
    payload(task="t.memory", task_id="memory"): ("permanent", "MemoryError"),
    payload(task="t.reject", task_id="reject"): ("permanent", "Reject"),
    payload(task="t.raise", task_id="wrong_args", args=[1, 2]): ("permanent", "TypeError"),
    payload(task="t.tenant", task_id="no_tenant"): ("invalid", "TenantRequired"),
    payload(task="t.tenant", task_id="bad_tenant", tenant_id="x"): ("invalid", "TenantRequired"),
    payload(task="t.gone", task_id="gone"): ("unknown_task", "NotRegistered"),
    payload(task="t.ok", task_id="expired", headers=EXPIRED): ("expired", "Expired"),
    payload(task="t.ok", task_id="bad_expires", headers={"expires": "2020-99-99T"}): ("invalid", ""),
    payload(task="t.ok", task_id="bad_retries", headers={"retries": "x"}): ("invalid", ""),
    payload(task="t.ok", task_id="args").replace('"application/json"', '"application/x-python-serialize"'): (
        "invalid",
        "",
    ),
    payload(task="t.ok", task_id="body").replace('"body": "', '"body": "x'): ("invalid", ""),
    payload(task_id="list", headers={"task": ["t.ok"]}): ("invalid", ""),
    payload(task_id="dict", headers={"task": {"a": 1}}): ("invalid", ""),
    payload(headers={"id": None}): ("invalid", ""),
    '{"headers": {"task": "t.ok", "id": "x"}}': ("invalid", ""),
    "\x01 not json": ("invalid", ""),
    "null": ("invalid", ""),
    "[]": ("invalid", ""),
}
NOT_SOLO = {
    payload(task="t.killed", task_id="killed"): ("poison", "WorkerLost"),
    payload(task="t.hard", task_id="hard"): ("timeout", "TimeLimitExceeded"),
    payload(task="t.soft", task_id="soft"): ("timeout", "SoftTimeLimitExceeded"),
}
POOLS = {
    "prefork": (("-P", "prefork", "-c", "2"), CASES | NOT_SOLO),
    "solo": (("-P", "solo"), CASES),
    "threads": (("-P", "threads", "-c", "4"), CASES),
}


def done(plane: Plane, rows: int) -> Callable[[], bool]:
    return lambda: (
        plane.scalar("SELECT count(*) FROM celery_task_failures") >= rows
        and plane.scalar("SELECT count(*) FROM kombu_message") == 0
    )


@pytest.mark.parametrize("pool", POOLS)
def test_every_class_in_every_pool(plane: Plane, worker: Callable[..., Worker], pool: str) -> None:
    arguments, cases = POOLS[pool]
    for message in cases:
        plane.publish(message)
    for _ in range(5):
        plane.publish(payload(task="t.ok"))
    plane.publish(payload(task="t.ignore"))
    one = worker(*arguments)
    until(done(plane, len(cases)), 60, one.log)
    found = plane.database.rows(
        "SELECT p.payload, f.class, f.error_type, f.state FROM celery_task_failures f"
        " JOIN celery_task_failure_payloads p ON p.failure_id = f.id"
    )
    # A retry is a message of its own, so rows are told by their task id there.
    by_payload = {content: (failure_class, error, state) for content, failure_class, error, state in found}
    for message, (failure_class, error) in cases.items():
        if failure_class == "transient":
            got = plane.database.rows(
                "SELECT class, error_type, state FROM celery_task_failures WHERE task_id ="
                f" '{'transient' if 't.transient' in message else 'by_hand'}'"
            )
            assert got == [(failure_class, error, "pending")]
            continue
        assert message in by_payload, message
        assert by_payload[message][0] == failure_class, (message, by_payload[message])
        assert error in by_payload[message][1]
        assert by_payload[message][2] == "pending"
    assert len(found) == len(cases)
    assert one.process.poll() is None


def test_what_a_person_needs_is_there(plane: Plane, worker: Callable[..., Worker]) -> None:
    plane.publish(payload(task="t.raise", task_id="r", tenant_id=TENANT_A, headers={"retries": 2}))
    worker("-P", "prefork", "-c", "1")
    until(done(plane, 1))
    [(error, traceback, who, attempts, deliveries)] = plane.database.rows(
        "SELECT f.error_message, e.traceback, f.worker, f.attempts, f.deliveries FROM celery_task_failures f"
        " JOIN celery_task_failure_errors e ON e.failure_id = f.id"
    )
    assert "TypeError" in str(traceback) or "hunter2" not in f"{error}{traceback}"
    assert who == "w1@test"
    assert (attempts, deliveries) == (3, 1)


def test_a_replay_through_a_worker_ends_as_it_ends(plane: Plane, worker: Callable[..., Worker]) -> None:
    for name in ("t.once", "t.raise", "t.transient"):
        plane.publish(payload(task=name))
    worker("-P", "prefork", "-c", "2")
    until(done(plane, 3))
    sheet = plane.sheet.model_copy(
        update={
            "queues": {
                **plane.sheet.queues,
                "housekeeping": plane.sheet.queues["housekeeping"].model_copy(
                    update={"tasks": ("t.once", "t.raise", "t.transient")}
                ),
            }
        }
    )
    with plane.session() as session:
        number = replay.start(session, Filter(), sheet, actor="m", reason="r", everything=True)
    end = replay.run(plane.engine(), number, sheet, wait=True)
    assert (end.sent, end.succeeded, end.failed_again, end.in_flight) == (3, 1, 2, 0)
    assert plane.database.rows("SELECT task, state, failures FROM celery_task_failures ORDER BY task") == [
        ("t.once", "resolved", 1),
        ("t.raise", "pending", 2),
        ("t.transient", "pending", 2),
    ]


def test_health_says_when_dead_letters_cannot_be_written(plane: Plane) -> None:
    dead_letters = DeadLetters(lambda task: False)
    dead = DeadMessage(1, "housekeeping", payload(), 0, None, 1, 0, "rejected")
    connection = plane.database.connect("app_ro")  # may not write
    with pytest.raises(psycopg2.Error):
        dead_letters(connection.cursor(), dead)
    assert (dead_letters.errors, dead_letters.health()) == (1, "can't be written")
    connection.close()
    connection = plane.database.connect("app_user")
    dead_letters(connection.cursor(), dead)
    assert dead_letters.health() == "ok"
    connection.close()


def test_without_the_table_a_message_is_kept_until_it_is_back(
    plane: Plane, worker: Callable[..., Worker]
) -> None:
    plane.database.rows("ALTER TABLE celery_task_failures RENAME TO away; SELECT 1")
    plane.publish(payload(task="t.raise"))
    one = worker("-P", "solo")
    until(lambda: "can't be disposed of" in one.log.read_text(), 30, one.log)
    assert plane.scalar("SELECT count(*) FROM kombu_message") == 1
    plane.database.rows("ALTER TABLE away RENAME TO celery_task_failures; SELECT 1")
    until(done(plane, 1), 20, one.log)


def test_killing_the_worker_around_captures_loses_and_doubles_nothing(
    plane: Plane, worker: Callable[..., Worker]
) -> None:
    """Each message of each class is one row, whenever its worker was killed.

    `DLQ_KILLS=100 DLQ_SEED=1 pytest tests/dlq/test_capture.py -k killing` is the long form. Retries are left
    out: they are messages of their own, and a worker killed between sending one and acknowledging the other
    leaves two.
    """
    kills = int(os.environ.get("DLQ_KILLS", "4"))
    rng = random.Random(int(os.environ.get("DLQ_SEED", "5")))  # noqa: S311 - a failure can be had again
    cases = [case for case in CASES.items() if case[1][0] != "transient"]
    expected = {}
    for _ in range(40 * kills):
        message, (kind, _) = rng.choice(cases)
        expected[plane.publish(message)] = kind
    killed = []
    for _ in range(kills):
        before = plane.scalar("SELECT count(*) FROM celery_task_failures")
        one = worker("-P", "prefork", "-c", "2", DELIVERY_LIMIT="1000")
        until(
            lambda before=before: (
                plane.scalar("SELECT count(*) FROM celery_task_failures") > before
                or done(plane, len(expected))()
            ),
            45,
            one.log,
        )
        time.sleep(rng.uniform(0, 0.1))
        one.kill(everything=rng.random() < 0.5)
        killed.append(plane.scalar("SELECT count(*) FROM celery_task_failures"))
    last = worker("-P", "prefork", "-c", "2", DELIVERY_LIMIT="1000")
    until(done(plane, len(expected)), 60, last.log)
    rows = plane.database.rows("SELECT message_id, class FROM celery_task_failures WHERE state = 'pending'")
    print(f"{kills} kills among {len(expected):,} messages, after which there were {killed} rows")
    assert len(rows) == len(expected)
    assert dict(rows) == expected


def test_malformed_messages_end_as_rows_and_the_worker_goes_on(
    plane: Plane, worker: Callable[..., Worker], tmp_path: Path
) -> None:
    """Each message is a row, or it was valid by chance and ran; nothing else becomes of any.

    `DLQ_FUZZ=100000 DLQ_SEED=1 pytest tests/dlq/test_capture.py -k malformed` is the long form.
    """
    rng = random.Random(int(os.environ.get("DLQ_SEED", "7")))  # noqa: S311 - a failure can be had again
    count = int(os.environ.get("DLQ_FUZZ", "300"))
    messages = [fuzz.message(rng).replace("\0", "") for _ in range(count)]
    connection = plane.database.connect("app_user")
    queue = plane.scalar("SELECT id FROM kombu_queue WHERE name = 'housekeeping'")
    published = execute_values(
        connection.cursor(),
        "INSERT INTO kombu_message (queue_id, payload) VALUES %s RETURNING id, payload",
        [(queue, text) for text in messages],
        fetch=True,
    )
    connection.close()
    runs = tmp_path / "runs"
    one = worker("-P", "solo", "--prefetch-multiplier", "50", RUNS=str(runs))
    until(lambda: plane.scalar("SELECT count(*) FROM kombu_message") == 0, 60 + count / 100, one.log)
    last = plane.publish(payload(task="t.raise"))
    until(lambda: plane.scalar("SELECT count(*) FROM kombu_message") == 0, 20, one.log)
    assert one.process.poll() is None
    rows = plane.database.rows("SELECT message_id, class FROM celery_task_failures")
    ended = dict(rows)
    assert len(ended) == len(rows)
    assert ended.pop(last) == "permanent"
    ran = {int(line.split()[0]) for line in runs.read_text().splitlines()} - {last}
    traced = {id_ for id_, kind in ended.items() if kind in ("invalid", "unknown_task")}
    untraced = [(id_, text, ended.get(id_)) for id_, text in published if id_ not in traced | ran]
    assert not untraced, untraced[:5]
    valid = [text for id_, text in published if id_ in ran]
    print(f"{len(traced):,} rows, {len(ran):,} valid jobs that ran", *valid[:10], sep="\n")
    assert all(read(text).problem is None and read(text).task.startswith("t.") for text in valid)
