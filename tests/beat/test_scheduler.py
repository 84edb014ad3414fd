"""One scheduler: what it enqueues, what it says of itself, and with the database away or refusing."""

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.beat.schedule import load_schedule
from app.core.topology import load_topology
from tests.beat.conftest import Plan, Scheduler, now, until
from tests.beat.test_take_over import goes_on
from tests.postgres import Cluster, Database
from tests.workers import environment, publish, ready_worker

Start = Callable[..., Scheduler]
SKELDIR = Path(sys.executable).with_name("skeldir")


def listing(database: Database, *arguments: str) -> Any:
    done = subprocess.run(
        [SKELDIR, "schedule", "--json", *arguments],
        env=environment(database.dsn("app_rw")),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return {row["entry"]: row for row in json.loads(done.stdout)}


def test_a_run_is_a_job_like_any_other(
    database: Database, plan: Plan, scheduler: Start, tmp_path: Path
) -> None:
    begun = plan.last_due()
    one = scheduler()
    goes_on(plan)
    one.stop()
    runs = sum(sum(times.values()) for times in plan.runs().values())
    assert runs == plan.settle(begun)[0]
    states = "SELECT status, count(*) FROM celery_taskmeta GROUP BY status ORDER BY status"
    with ready_worker(database.dsn(), "housekeeping,maintenance", tmp_path):
        until(lambda: database.rows("SELECT count(*) FROM kombu_message") == [(0,)])
        until(lambda: sum(int(str(count)) for _, count in database.rows(states)) == runs)
    assert [state for state, _ in database.rows(states)] == ["FAILURE", "SUCCESS"]
    # The job that `skeldir schedule` names for the last run.
    last = database.rows(
        "SELECT s.name, status FROM celery_schedule s JOIN celery_taskmeta USING (task_id) ORDER BY 1"
    )
    assert last == [("first", "SUCCESS"), ("second", "FAILURE"), ("third", "SUCCESS")]


def test_it_tells_how_it_is(plan: Plan, scheduler: Start) -> None:
    one = scheduler()
    until(lambda: one.role == "active")
    # Everything is there from the beginning.
    for name in plan.entries:
        for counter in ("enqueued", "errors", "gaps"):
            assert one.metric(f'skeldir_beat_{counter}_total{{entry="{name}"}}') >= 0
    goes_on(plan)
    assert one.health["status"] == "ok"
    assert one.metric("skeldir_beat_active") == 1
    assert one.metric('skeldir_beat_enqueued_total{entry="first"}') > 0
    assert one.metric('skeldir_beat_gaps_total{entry="first"}') == 0
    assert one.metric('skeldir_beat_lateness_seconds_bucket{le="2.5"}') > 0
    assert abs(one.metric('skeldir_beat_next_due_timestamp_seconds{entry="first"}') - now().timestamp()) < 5
    assert now().timestamp() - one.metric("skeldir_beat_last_tick_timestamp_seconds") < 5
    two = scheduler()
    until(lambda: two.role == "standby")
    assert two.get("/health/ready") == "ready\n"
    assert two.metric("skeldir_beat_active") == 0
    assert two.metric('skeldir_beat_next_due_timestamp_seconds{entry="first"}') == 0


def test_after_a_long_gap_one_run_stands_for_all(plan: Plan, scheduler: Start) -> None:
    began = now()
    plan.begin(plan.entries["third"], began - timedelta(days=3))
    one = scheduler()
    goes_on(plan)
    # The latest that was missed, and none before it.
    assert min(plan.runs()["third"]) >= began - timedelta(seconds=2)
    assert one.metric('skeldir_beat_gaps_total{entry="third"}') == 1
    assert one.metric('skeldir_beat_gaps_total{entry="first"}') == 0


def test_a_clock_that_was_ahead_and_is_corrected_stops_nothing(plan: Plan, scheduler: Start) -> None:
    began = now()
    # What the clock of a resumed machine leaves behind. A few seconds are no reason: those pass.
    plan.begin(plan.entries["first"], began + timedelta(days=1))
    plan.begin(plan.entries["second"], began + timedelta(seconds=8))
    one = scheduler()
    until(lambda: all(plan.runs().values()))
    one.stop()
    runs = plan.runs()
    assert began - timedelta(seconds=1) < min(runs["first"]) <= max(runs["first"]) < now()
    assert min(runs["second"]) > began + timedelta(seconds=8)
    (told,) = (line for line in one.log.read_text().splitlines() if "clock" in line)
    assert "WARNING" in told
    assert "first" in told


def test_a_new_entry_and_a_changed_one_begin_with_what_comes(plan: Plan, scheduler: Start) -> None:
    session = plan.database.connect("app_owner")
    session.cursor().execute("DELETE FROM celery_schedule WHERE name = 'first'")
    session.cursor().execute(
        "UPDATE celery_schedule SET rhythm = '0 0 * * *', last_due = now() - interval '9 days'"
    )
    session.close()
    began = now()
    one = scheduler()
    until(lambda: one.role == "active")
    until(lambda: len(plan.last_due()) == 3)
    goes_on(plan)
    for times in plan.runs().values():
        assert times
        assert min(times) > began - timedelta(seconds=1)


def test_an_entry_that_fails_is_told_and_keeps_no_other_from_running(plan: Plan, scheduler: Start) -> None:
    begun = plan.last_due()
    # The trigger refuses one entry alone.
    session = plan.database.connect("app_owner")
    session.cursor().execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'not this one'; END $$;"
        "CREATE TRIGGER refuse BEFORE UPDATE ON celery_schedule FOR EACH ROW"
        " WHEN (NEW.name = 'second') EXECUTE FUNCTION refuse()"
    )
    one = scheduler()
    until(lambda: one.health.get("failing") == ["second"])
    assert one.health["status"] == "unhealthy"
    assert one.metric('skeldir_beat_errors_total{entry="second"}') > 0
    before = plan.last_due()
    until(lambda: plan.last_due()["first"] > before["first"] and plan.last_due()["third"] > before["third"])
    assert plan.last_due()["second"] == begun["second"]
    assert not plan.runs()["second"]
    session.cursor().execute("DROP TRIGGER refuse ON celery_schedule")
    session.close()
    goes_on(plan)
    assert one.health["status"] == "ok"
    one.stop()
    assert plan.settle(begun)[1:] == (0, 0)


def test_a_server_that_crashes_costs_no_run(postgres: Cluster, plan: Plan, scheduler: Start) -> None:
    begun = plan.last_due()
    both = [scheduler(dawdle=0.05), scheduler(dawdle=0.05)]
    until(lambda: {one.role for one in both} == {"active", "standby"})
    for _ in range(2):
        goes_on(plan)
        postgres.stop("immediate")
        postgres.start()
        until(lambda: sorted(str(one.role) for one in both) == ["active", "standby"])
    goes_on(plan)
    for one in both:
        one.stop()
    assert plan.settle(begun)[1:] == (0, 0)


def test_a_frozen_server_is_no_reason_to_be_restarted(
    postgres: Cluster, plan: Plan, scheduler: Start
) -> None:
    one = scheduler()
    until(lambda: one.role == "active")
    postgres.pause()
    try:
        until(lambda: one.role == "unknown", 30)
        assert one.get("/health/live") == "live\n"
        assert one.metric("skeldir_beat_active") == 0
    finally:
        postgres.resume()
    until(lambda: one.role == "active", 30)


def test_operators_see_last_and_next_runs(database: Database) -> None:
    schedule = load_schedule(load_topology())
    before = listing(database)
    assert list(before) == list(schedule)
    assert all(row["last_due"] is None and row["next_due"] for row in before.values())
    first, second, *_ = schedule.values()
    session = database.connect("app_user")
    session.cursor().execute(
        "INSERT INTO celery_schedule (name, rhythm, last_due, enqueued_at, task_id) VALUES"
        " (%s, %s, '2026-01-01T00:00Z', '2026-01-01T00:00:03Z', 'j'),"
        " (%s, 'at other times', '2026-01-01T00:00Z', '2026-01-01T00:00:03Z', 'j')",
        (first.name, first.rhythm, second.name),
    )
    session.close()
    after = listing(database)
    shown = {name: after[first.name][name] for name in ("last_due", "late_seconds", "task_id")}
    assert shown == {"last_due": "2026-01-01T00:00:00+00:00", "late_seconds": 3.0, "task_id": "j"}
    assert after[first.name]["next_due"] < now().isoformat()  # overdue
    assert after[second.name] | {"next_due": None} == before[second.name] | {"next_due": None}
    table = subprocess.run(
        [SKELDIR, "schedule"],
        env=environment(database.dsn("app_rw")),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert all(entry.name in table and entry.task in table for entry in schedule.values())


def test_every_tenant_gets_its_job(database: Database, tmp_path: Path) -> None:
    session = database.connect("postgres")
    session.cursor().execute("INSERT INTO tenants (name) VALUES ('one'), ('two'), ('three')")
    session.close()
    code = (
        "for task in ('enforce_data_retention', 'scan_for_pii_contamination'):\n"
        "    maintenance.enqueue_for_every_tenant.delay(f'app.tasks.maintenance.{task}')\n"
        "answer = None"
    )
    publish(database.dsn(), code)
    count = "SELECT status, count(*) FROM celery_taskmeta GROUP BY status"
    with ready_worker(database.dsn(), "maintenance", tmp_path):
        until(lambda: database.rows(count) == [("SUCCESS", 8)])
    # Nothing is left open: the owner sees no tenant outside of the function.
    assert database.rows("SELECT count(*) FROM tenants", user="app_owner") == [(0,)]


@pytest.mark.parametrize(
    ("variables", "named", "status"),
    [
        ({"DATABASE_URL": "mysql://localhost/x"}, "DATABASE_URL", 78),
        ({"CELERY_BROKER_URL": "amqp://localhost//"}, "CELERY_BROKER_URL", 78),
        ({"CELERY_METRICS_ADDR": "192.0.2.1"}, "CELERY_METRICS_ADDR", 1),  # it may be late: tried again
    ],
    ids=["database", "broker", "address"],
)
def test_what_keeps_it_from_starting_is_one_sentence(
    variables: dict[str, str], named: str, status: int
) -> None:
    done = subprocess.run(
        [SKELDIR, "beat"],
        env=environment("postgresql://app_user@127.0.0.1:1/nowhere") | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status
    assert named in done.stderr
    assert "Traceback" not in done.stderr
