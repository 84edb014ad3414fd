"""The scheduler's unit: one active, a second one takes over, and none of a kill is felt by the schedule."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from testinfra.host import Host

from tests.lab import SHEET, http, site, sql, task_state, wait_until

assert SHEET.beat
PORT, STANDBY = SHEET.beat.port, SHEET.beat.port - 1
UNIT = "skeldir-beat.service"
# The unit's own process as a second one, by the same user, with the same credential, on another port.
SECOND = (
    "systemd-run --quiet --unit=second-scheduler --uid=skeldir --property=Type=notify"
    " --property=LoadCredential=database_url:/etc/skeldir/credentials/database_url"
    " /opt/skeldir/current/venv/bin/python -c"
    " 'from app.core.topology import Beat, load_topology; from app.beat.process import run;"
    " from app.beat.schedule import load_schedule; sheet = load_topology();"
    f" run(sheet.model_copy(update=dict(beat=Beat(port={STANDBY}))), load_schedule(sheet))'"
)


def role(worker: Host, port: int = PORT) -> str | None:
    status, body = http(worker, port, "/health")
    return json.loads(body)["role"] if status else None


@pytest.fixture
def second(worker: Host) -> Iterator[None]:
    worker.check_output(SECOND)
    yield
    worker.run("systemctl stop second-scheduler.service")


def test_the_unit_is_active_and_hardened(worker: Host, secrets: list[str]) -> None:
    assert worker.service(UNIT).is_running
    assert worker.service(UNIT).is_enabled
    assert role(worker) == "active"
    score = re.search(
        r"exposure level for \S+: ([0-9.]+)",
        worker.check_output(f"systemd-analyze security --no-pager {UNIT}"),
    )
    assert score
    assert float(score[1]) <= 2.0
    assert worker.run(f"systemd-analyze verify {UNIT}").stderr == ""
    for command in (f"systemctl show {UNIT}", f"journalctl --no-pager --all --unit={UNIT}"):
        assert not [secret for secret in secrets if secret in worker.run(command).stdout]


def test_operators_see_what_ran_and_what_is_next(worker: Host) -> None:
    rows: list[dict[str, Any]] = json.loads(worker.check_output("skeldir schedule --json"))
    assert {row["task"] for row in rows} <= SHEET.queue_by_task.keys()
    assert all(row["next_due"] for row in rows)


def test_an_entry_that_missed_its_runs_is_enqueued_once_and_run(worker: Host, database: Host) -> None:
    last_job = "SELECT task_id FROM celery_schedule WHERE name = 'tend-dead-letters'"
    before = sql(database, last_job)
    sql(
        database,
        "UPDATE celery_schedule SET last_due = last_due - interval '1 day' WHERE name = 'tend-dead-letters'",
    )
    wait_until(lambda: sql(database, last_job) != before, 15)
    after = sql(database, last_job)
    wait_until(lambda: task_state(database, after) == "SUCCESS", 15)
    assert sql(database, last_job) == after


@pytest.mark.usefixtures("second")
def test_the_standby_takes_over_when_the_active_one_is_killed(worker: Host) -> None:
    wait_until(lambda: role(worker, STANDBY) == "standby", 15)
    worker.check_output(f"systemctl kill --kill-whom=main --signal=KILL {UNIT}")
    assert wait_until(lambda: role(worker, STANDBY) == "active", 15) < 15
    wait_until(lambda: role(worker) == "standby", 60)  # systemd started it again
    worker.check_output("systemctl stop second-scheduler.service")
    assert wait_until(lambda: role(worker) == "active", 15) < 5


@pytest.mark.usefixtures("second")
def test_a_frozen_one_loses_the_lock_and_is_ended_by_its_watchdog(worker: Host) -> None:
    wait_until(lambda: role(worker, STANDBY) == "standby", 15)
    before = worker.check_output(f"systemctl show --value --property=InvocationID {UNIT}")
    worker.check_output(f"systemctl kill --kill-whom=main --signal=STOP {UNIT}")
    assert wait_until(lambda: role(worker, STANDBY) == "active", 20) < 15
    wait_until(lambda: role(worker) == "standby", 90)
    assert worker.check_output(f"systemctl show --value --property=InvocationID {UNIT}") != before


def test_a_process_that_is_older_than_its_files_is_started_anew(worker: Host) -> None:
    """As a run leaves it that was interrupted between the file and the restart."""
    invocation = f"systemctl show --value --property=InvocationID {UNIT}"
    before = worker.check_output(invocation)
    assert site("--tags=beat").changed == 0
    assert worker.check_output(invocation) == before
    worker.check_output("touch /etc/skeldir/beat.env")
    run = site("--tags=beat")
    assert (run.status, run.changed) == (0, 1), run.output[-2000:]
    assert worker.check_output(invocation) != before
