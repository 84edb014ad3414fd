"""Bringing dead letters back: exactly those meant, each once, whatever happens to whoever does it."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from sqlalchemy import text

from app.dlq import replay, store
from app.dlq.classify import Failure
from app.dlq.message import REPLAY_HEADER
from app.dlq.replay import Progress
from app.dlq.store import DeadLetterError, Filter
from tests.dlq.plane import TASK, TENANT_A, Plane, payload


def start(plane: Plane, which: Filter, **options: object) -> int:
    with plane.session() as session:
        given: Any = options
        return replay.start(session, which, plane.sheet, actor="maria", reason="fixed", **given)


def run(plane: Plane, number: int, **options: object) -> Progress:
    return replay.run(plane.engine(), number, plane.sheet, **options)  # type: ignore[arg-type]


def test_a_replay_is_the_same_job_with_a_fresh_life(plane: Plane) -> None:
    headers = {
        "expires": "2020-01-01T00:00:00+00:00",
        "eta": "2020-01-01T00:00:00+00:00",
        "retries": 3,
        "mine": "kept",
    }
    original = payload(task_id="t-1", args=[1], headers=headers)
    row = plane.fail(original)
    end = run(plane, start(plane, Filter(ids=(row,))))
    [(message_id, message)] = plane.messages()
    assert (end.state, end.sent, end.in_flight) == ("done", 1, 1)
    assert message["headers"]["id"] == "t-1"
    assert message["headers"]["mine"] == "kept"
    assert message["headers"]["retries"] == 0
    assert not message["headers"].keys() & {"expires", "eta"}
    assert message["body"] in original
    assert plane.scalar("SELECT message_id FROM celery_task_failures") == message_id


def test_a_replay_that_succeeds_resolves_its_row(plane: Plane) -> None:
    row = plane.fail()
    number = start(plane, Filter(ids=(row,)))
    run(plane, number)
    assert plane.state(row) == "in_progress"
    plane.succeed()
    assert plane.state(row) == "resolved"
    with plane.session() as session:
        history = store.show(session, row).history
        assert replay.progress(session, number).succeeded == 1
    assert [(event["action"], event["actor"], event["db_user"]) for event in history] == [
        ("replayed", "maria", "app_rw"),
        ("resolved", "app_user", "app_user"),
    ]


def test_a_replay_that_fails_again_is_the_same_row(plane: Plane) -> None:
    row = plane.fail()
    for times in (1, 2):
        run(plane, start(plane, Filter(ids=(row,))))
        [(message_id, _)] = plane.messages()
        assert plane.capture(message_id, Failure.of("timeout", "TimeLimitExceeded", f"again {times}")) == row
    with plane.session() as session:
        details = store.show(session, row)
    assert plane.scalar("SELECT count(*) FROM celery_task_failures") == 1
    assert (details.row.state, details.row.failures, details.row.replays) == ("pending", 3, 2)
    assert details.row.failure_class == "timeout"
    assert [error["error_message"] for error in details.errors] == ["no", "again 1", "again 2"]


def test_a_retry_of_a_replay_settles_the_row_too(plane: Plane) -> None:
    row = plane.fail(payload(task_id="t"))
    run(plane, start(plane, Filter(ids=(row,))))
    [(message_id, message)] = plane.messages()
    # What Celery does for a retry: another message with the same id and headers, then the acknowledgement.
    plane.publish(
        payload(task_id="t", headers={REPLAY_HEADER: message["headers"][REPLAY_HEADER], "retries": 1})
    )
    plane.database.rows(f"DELETE FROM kombu_message WHERE id = {message_id} RETURNING 1")
    assert plane.state(row) == "in_progress"
    plane.succeed()
    assert plane.state(row) == "resolved"


def test_a_forged_header_touches_nobody_elses_row(plane: Plane) -> None:
    victim = plane.fail(payload(task_id="victim"))
    run(plane, start(plane, Filter(ids=(victim,))))
    forged = plane.fail(payload(task_id="other", headers={REPLAY_HEADER: victim}))
    assert forged != victim
    assert plane.state(victim) == "in_progress"
    for nonsense in ("1", True, -1, 2**70, [1], 1.5):
        plane.fail(payload(headers={REPLAY_HEADER: nonsense}))
    assert plane.state(victim) == "in_progress"


def test_a_dry_run_says_what_would_go_and_why_the_rest_would_not(plane: Plane) -> None:
    good = [plane.fail() for _ in range(3)]
    ignored, sent, undecodable = (
        plane.fail(),
        plane.fail(),
        plane.fail("garbage", Failure.of("invalid", "I", "m")),
    )
    unknown = plane.fail(
        payload(task="app.tasks.gone.away"), Failure.of("unknown_task", "NotRegistered", "m")
    )
    often = plane.fail()
    orphan = plane.fail()
    plane.database.rows(
        f"ALTER TABLE celery_task_failures DISABLE TRIGGER guard;"
        f"UPDATE celery_task_failures SET replays = 5 WHERE id = {often};"
        f"UPDATE celery_task_failures SET queue = 'gone' WHERE id = {orphan};"
        f"ALTER TABLE celery_task_failures ENABLE TRIGGER guard; SELECT 1"
    )
    with plane.session() as session:
        store.ignore(session, Filter(ids=(ignored,)), actor="m", reason="r")
    run(plane, start(plane, Filter(ids=(sent,))))
    before = plane.messages()
    everything = Filter(states=("pending", "in_progress", "resolved", "ignored"))
    with plane.session() as session:
        plan = replay.plan(session, everything, plane.sheet, everything=True, limit=2)
    why = {}
    for group in plan:
        for reason, count in group.refused.items():
            why[reason] = why.get(reason, 0) + count
    assert sum(group.eligible for group in plan) == 2
    assert why == {
        "beyond the limit": 1,
        "it is ignored": 1,
        "its replay is under way": 1,
        "its message can't be decoded; edit it first": 1,
        "no worker knows its task": 1,
        "it was replayed 5 times": 1,
        "its queue is gone; name another": 1,
    }
    assert plane.messages() == before
    assert start(plane, everything, everything=True, limit=2)
    assert (
        plane.scalar("SELECT failure_ids FROM celery_task_failure_replays ORDER BY id DESC LIMIT 1")
        == good[:2]
    )
    for row in (undecodable, unknown, often, ignored):
        with pytest.raises(DeadLetterError, match="none of these"):
            start(plane, Filter(ids=(row,)))


def test_an_empty_filter_is_refused_unless_all_is_meant(plane: Plane) -> None:
    plane.fail()
    with pytest.raises(DeadLetterError, match="--all"):
        start(plane, Filter())
    assert start(plane, Filter(), everything=True)


@pytest.mark.parametrize(
    "options",
    [{"rate": 0}, {"rate": -1}, {"rate": float("inf")}, {"canary": -1}, {"stop_ratio": 2}, {"max_replays": 0},
     {"target_queue": "nowhere"}],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(plane: Plane, options: dict[str, object]) -> None:
    row = plane.fail()
    with pytest.raises(DeadLetterError):
        start(plane, Filter(ids=(row,)), **options)


def test_another_queue_can_be_the_target(plane: Plane) -> None:
    row = plane.fail()
    run(plane, start(plane, Filter(ids=(row,)), target_queue="llm"))
    [(_, message)] = plane.messages()
    assert message["properties"]["delivery_info"] == {"exchange": "llm", "routing_key": "llm"}
    assert plane.scalar("SELECT q.name FROM kombu_message m JOIN kombu_queue q ON q.id = m.queue_id") == "llm"


def test_an_edited_message_is_what_is_replayed(plane: Plane) -> None:
    row = plane.fail(payload(args=[1]))
    plane.database.rows("GRANT EXECUTE ON FUNCTION celery_task_failure_edit TO app_rw; SELECT 1")
    with plane.session() as session:
        store.edit(session, row, {"args": [2]}, actor="m", reason="r")
        edited = store.show(session, row).payload
    run(plane, start(plane, Filter(ids=(row,))))
    [(_, message)] = plane.messages()
    assert message["body"] in edited


def test_a_step_that_is_rolled_back_sends_nothing(plane: Plane) -> None:
    row = plane.fail()
    number = start(plane, Filter(ids=(row,)))
    with plane.session() as session:
        assert replay.step(session, number, plane.sheet, at_most=10) == 1
        session.rollback()
    assert plane.messages() == []
    assert plane.state(row) == "pending"


def test_two_terminals_replay_each_job_once(plane: Plane) -> None:
    for _ in range(200):
        plane.fail()
    numbers = [start(plane, Filter(), everything=True, rate=2000) for _ in range(2)]
    threads = [threading.Thread(target=run, args=(plane, number)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    messages = plane.messages()
    assert len(messages) == 200
    assert len({message["headers"]["id"] for _, message in messages}) == 200
    with plane.session() as session:
        ends = [replay.progress(session, number) for number in numbers]
    assert sum(end.sent for end in ends) == 200
    assert sum(end.skipped for end in ends) == 200


def test_one_replay_has_one_driver(plane: Plane) -> None:
    for _ in range(20):
        plane.fail()
    number = start(plane, Filter(), everything=True, rate=20)
    first = threading.Thread(target=run, args=(plane, number))
    first.start()
    time.sleep(0.3)
    with pytest.raises(DeadLetterError, match="another session"):
        run(plane, number)
    first.join()
    assert len(plane.messages()) == 20


def test_the_rate_is_kept(plane: Plane) -> None:
    for _ in range(30):
        plane.fail()
    number = start(plane, Filter(), everything=True, rate=20)
    began = time.monotonic()
    run(plane, number)
    assert 1.0 <= time.monotonic() - began <= 3.0  # 29 gaps of 50 ms
    assert len(plane.messages()) == 30


def test_the_canary_goes_first_and_the_rest_only_if_it_succeeds(plane: Plane) -> None:
    for _ in range(10):
        plane.fail()
    number = start(plane, Filter(), everything=True, canary=2)
    seen: list[int] = []

    def report(now: Progress) -> None:
        seen.append(now.sent)
        if now.sent == 2 and now.in_flight == 2:
            assert plane.succeed() == 2

    end = run(plane, number, report=report)
    assert sorted(set(seen)) == [0, 2, 10]
    assert end.sent == 10


def test_a_canary_that_fails_again_stops_the_replay(plane: Plane) -> None:
    for _ in range(10):
        plane.fail()
    number = start(plane, Filter(), everything=True, canary=2)

    def report(now: Progress) -> None:
        if now.in_flight == 2:
            plane.capture(plane.messages()[0][0])

    end = run(plane, number, report=report)
    assert (end.state, end.sent) == ("stopped", 2)
    assert "canary" in (end.state_reason or "")


def test_too_many_that_fail_again_stop_the_replay(plane: Plane) -> None:
    for _ in range(60):
        plane.fail()
    number = start(plane, Filter(), everything=True, rate=40, stop_ratio=0.3)

    def report(_: Progress) -> None:
        for message_id, _message in plane.messages():
            plane.capture(message_id)

    end = run(plane, number, report=report)
    assert end.state == "stopped"
    assert 5 <= end.sent < 60
    with plane.session() as session:
        assert replay.set_state(session, number, "running", "goes on").state == "running"


def test_pause_resume_and_cancel(plane: Plane) -> None:
    for _ in range(40):
        plane.fail()
    number = start(plane, Filter(), everything=True, rate=20)
    driver = threading.Thread(target=run, args=(plane, number))
    driver.start()
    time.sleep(0.5)
    with plane.session() as session:
        replay.set_state(session, number, "paused", "lunch")
    driver.join(timeout=3)
    assert not driver.is_alive()
    paused_at = len(plane.messages())
    assert 0 < paused_at < 40
    assert run(plane, number).state == "paused"
    assert len(plane.messages()) == paused_at
    with plane.session() as session:
        replay.set_state(session, number, "running", "back")
        replay.set_state(session, number, "cancelled", "enough")
    run(plane, number)
    assert len(plane.messages()) == paused_at
    with plane.session() as session, pytest.raises(DeadLetterError, match="can't become"):
        replay.set_state(session, number, "running", "no")


def test_what_was_taken_meanwhile_is_skipped_and_counted(plane: Plane) -> None:
    rows = [plane.fail() for _ in range(3)]
    number = start(plane, Filter(ids=tuple(rows)))
    with plane.session() as session:
        store.ignore(session, Filter(ids=(rows[1],)), actor="m", reason="r")
    end = run(plane, number)
    assert (end.sent, end.skipped) == (2, 1)


def test_a_queue_that_was_never_declared_is_said_to_be_and_nothing_is_sent(plane: Plane) -> None:
    row = plane.fail()
    plane.database.rows("DELETE FROM kombu_queue WHERE name = 'llm' RETURNING 1")
    number = start(plane, Filter(ids=(row,)), target_queue="llm")
    with pytest.raises(DeadLetterError, match="never declared"):
        run(plane, number)
    assert plane.state(row) == "pending"


_DRIVE = """
import sys
from sqlalchemy import create_engine
from app.core.dsn import sqlalchemy_url
from app.core.topology import load_topology
from app.dlq import replay
replay._CHUNK = 7
print("ready", flush=True)
replay.run(create_engine(sqlalchemy_url(sys.argv[1])), int(sys.argv[2]), load_topology())
"""


def test_killing_the_replaying_process_loses_and_doubles_nothing(plane: Plane) -> None:
    kills = int(os.environ.get("DLQ_KILLS", "6"))
    rng = random.Random(4)  # noqa: S311 - a seed, so that a failure can be had again
    size = 60 * kills
    for _ in range(size):
        plane.fail()
    number = start(plane, Filter(), everything=True)
    for _ in range(kills):
        driver = subprocess.Popen(
            [sys.executable, "-c", _DRIVE, plane.database.dsn("app_rw"), str(number)], stdout=subprocess.PIPE
        )
        assert driver.stdout
        assert driver.stdout.readline()
        time.sleep(rng.uniform(0.02, 0.12))
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        states = dict(plane.database.rows("SELECT state, count(*) FROM celery_task_failures GROUP BY 1"))
        assert states.get("in_progress", 0) == len(plane.messages())
        with plane.session() as session:
            now = replay.progress(session, number)
        assert now.sent == len(plane.messages())
    deadline = time.monotonic() + 10
    while True:  # the last victim's session may still hold the driver's lock
        try:
            end = run(plane, number)
            break
        except DeadLetterError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    ids = [message["headers"]["id"] for _, message in plane.messages()]
    assert (end.sent, len(ids), len(set(ids))) == (size, size, size)


def test_what_is_stuck_goes_back_or_is_resolved_by_its_result(plane: Plane) -> None:
    lost, done, waiting, retried = (
        plane.fail(payload(task_id=name)) for name in ("lost", "done", "waiting", "retried")
    )
    run(plane, start(plane, Filter(), everything=True))
    plane.database.rows(
        "ALTER TABLE celery_task_failures DISABLE TRIGGER USER;"
        "UPDATE celery_task_failures SET changed_at = now() - interval '2 hours';"
        "ALTER TABLE celery_task_failures ENABLE TRIGGER USER;"
        "DELETE FROM kombu_message m USING celery_task_failures f"
        f" WHERE f.message_id = m.id AND f.id <> {waiting};"
        "INSERT INTO celery_taskmeta (task_id, status) VALUES ('done', 'SUCCESS'), ('lost', 'FAILURE');"
        "SELECT 1"
    )
    plane.publish(payload(task_id="retried", headers={REPLAY_HEADER: retried, "retries": 1}))
    with plane.session("app_user") as session:
        done_so_far = session.execute(
            text("SELECT * FROM celery_task_failure_tend('30 days', '90 days', '1 hour', 1000)")
        ).one()
    assert (done_so_far.resolved, done_so_far.returned) == (1, 1)
    assert [plane.state(row) for row in (lost, done, waiting, retried)] == [
        "pending", "resolved", "in_progress", "in_progress",
    ]  # fmt: skip


def test_a_tenants_session_of_an_operator_replays_no_other_tenants_rows(plane: Plane) -> None:
    mine, other = plane.fail(payload(tenant_id=TENANT_A)), plane.fail()
    with plane.session(tenant=TENANT_A) as session:
        plan = replay.plan(session, Filter(ids=(mine, other)), plane.sheet)
    assert sum(group.eligible for group in plan) == 1
    assert TASK
