"""What a running plane bears: deployment again, a killed child, a database that goes and comes back."""

import json
from concurrent.futures import ThreadPoolExecutor
from time import sleep

import pytest
from testinfra.host import Host

from tests.lab import (
    SHEET,
    http,
    invocations,
    processes,
    python,
    samples,
    site,
    sql,
    task_state,
    unit,
    wait_until,
)

REFRESH = "app.tasks.maintenance.refresh_all_materialized_views"


@pytest.mark.timeout(600)
def test_a_second_run_changes_and_restarts_nothing(worker: Host) -> None:
    before = invocations(worker)
    run = site()
    assert (run.status, run.changed) == (0, 0), run.recap
    assert invocations(worker) == before
    assert len(before) == len(SHEET.queues)


@pytest.mark.timeout(600)
def test_check_mode_finds_nothing_to_change_and_shows_no_secret(secrets: list[str]) -> None:
    run = site("--check", "--diff")
    assert (run.status, run.changed) == (0, 0), run.recap
    assert not [secret for secret in secrets if secret in run.output]


@pytest.mark.timeout(600)
def test_a_wrong_password_is_said_before_any_unit_is_touched(worker: Host) -> None:
    files = "sha256sum /etc/skeldir/*/* /etc/systemd/system/skeldir-*.*"
    before, digest = invocations(worker), worker.run(files).stdout
    wrong = {role: f"{role}-is-not-the-right-one" for role in ("app_owner", "app_user", "app_rw", "app_ro")}
    run = site("--limit=workers", "--tags=worker", f"--extra-vars={json.dumps({'skeldir_secrets': wrong})}")
    assert run.status != 0
    assert any("app_user" in sentence and "password" in sentence for sentence in run.sentences), run.sentences
    assert not [password for password in wrong.values() if password in run.output]
    assert invocations(worker) == before
    assert worker.run(files).stdout == digest


def test_a_killed_child_counts_once_as_a_failure_of_its_task(worker: Host, database: Host) -> None:
    queue = SHEET.queue_by_task[REFRESH]

    def counts() -> dict[tuple[str, str], float]:
        return samples(http(worker, queue.metrics_port, "/metrics")[1])

    def children() -> list[str]:
        return processes(worker, queue.name)[1:]

    before, old = counts(), children()
    with ThreadPoolExecutor() as pool:
        # The refresh waits for this lock, so its child is surely in the middle of the task when it is killed.
        lock = pool.submit(sql, database, "BEGIN; LOCK TABLE events; SELECT pg_sleep(8); ROLLBACK")
        task_id = python(
            worker,
            "import json; from app.celery_app import celery_app;"
            f"print(json.dumps(celery_app.send_task('{REFRESH}').id))",
        )
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND usename = 'app_user'"
        )
        wait_until(lambda: sql(database, waiting) == "1", 6)
        worker.check_output(f"kill -KILL {' '.join(old)}")
        lock.result()
    # Its message wasn't acknowledged, so another child runs the task to its end.
    wait_until(lambda: task_state(database, task_id) == "SUCCESS", 30)
    wait_until(lambda: len(children()) == queue.concurrency, 15)
    after = counts()
    changed = {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key)}
    failures = {key: value for key, value in changed.items() if key[0].endswith("failure_total")}
    assert failures == {("celery_task_failure_total", REFRESH): 1}
    assert worker.service(unit(queue.name)).is_running


@pytest.mark.timeout(180)
def test_the_database_goes_and_comes_back(worker: Host, database: Host) -> None:
    def statuses() -> set[int]:
        return {http(worker, queue.metrics_port, "/health")[0] for queue in SHEET.queues.values()}

    before = invocations(worker)
    assert statuses() == {200}
    database.check_output("systemctl stop postgresql")
    try:
        wait_until(lambda: statuses() == {503}, 5)
        sleep(10)  # long enough for a unit to give up, if it would
        assert statuses() == {503}
        assert all(worker.service(unit(queue)).is_running for queue in SHEET.queues)
        for queue in SHEET.queues.values():
            assert http(worker, queue.metrics_port, "/health/live")[0] == 200
            assert "postgresql" not in http(worker, queue.metrics_port, "/health")[1]
    finally:
        database.check_output("systemctl start postgresql")
    wait_until(lambda: statuses() == {200}, 10)
    assert invocations(worker) == before
    answers = json.loads(worker.check_output("skeldir ping --json"))
    assert {answer["result"] for answer in answers} == {"ok"}
