"""A queue with one task is one entry in the sheet and its module; without them it is gone again."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.checkout import copy_tree
from tests.lab import (
    SHEET,
    http,
    invocations,
    python,
    site,
    sql,
    task_state,
    unit,
    wait_until,
)

PORT = max(queue.metrics_port for queue in SHEET.queues.values()) + 1
TASK = "app.tasks.reports.summarise"
ENTRY = f"""
  reports:
    exchange: reports
    routing_key: reports
    tasks: [{TASK}]
    metrics_port: {PORT}
    concurrency: 1
    prefetch: 1
    soft_time_limit: 600
    time_limit: 660
    delivery_limit: 3
    retry: {{max_retries: 3, backoff: 1, backoff_max: 60}}
"""
MODULE = '''"""Summaries."""

from celery import shared_task
from sqlalchemy import text

from app.db.session import get_session


@shared_task
def summarise() -> str:
    """Wait for whoever has the lock."""
    with get_session(None) as session:
        session.execute(text("SET LOCAL lock_timeout = 0"))  # the roles' own would end it on a slow machine
        session.execute(text("SELECT pg_advisory_xact_lock(42)"))
    return "summarised"
'''

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout with one queue more."""
    copy = copy_tree(tmp_path_factory.mktemp("checkout"))
    sheet = copy / "app/topology.yml"
    sheet.write_text(sheet.read_text() + ENTRY)
    (copy / "app/tasks/reports.py").write_text(MODULE)
    return copy


@pytest.fixture(scope="module")
def before(worker: Host) -> dict[str, str]:
    """The units' InvocationIDs as deployed from this checkout."""
    assert http(worker, PORT, "/health")[0] == 0
    return invocations(worker)


@pytest.fixture(scope="module")
def added(worker: Host, tree: Path, before: dict[str, str]) -> dict[str, str]:
    """The same once `site.yml` was run with the queue more."""
    run = site(tree=tree)
    assert run.status == 0, run.output[-3000:]
    return invocations(worker)


def test_a_unit_appears_and_no_other_restarts(
    worker: Host, before: dict[str, str], added: dict[str, str]
) -> None:
    assert set(added) - set(before) == {unit("reports")}
    assert before.items() <= added.items()
    assert worker.service(unit("reports")).is_enabled


def test_its_port_answers_with_its_queue(worker: Host, added: dict[str, str]) -> None:
    status, body = http(worker, PORT, "/health")
    assert (status, json.loads(body)["status"]) == (200, "ok")
    assert "reports" in json.loads(body)["queues"]
    assert f'task_name="{TASK}"' in http(worker, PORT, "/metrics")[1]


def test_every_queue_answers(worker: Host, added: dict[str, str]) -> None:
    answers = json.loads(worker.check_output("skeldir ping --json"))
    assert {answer["queue"]: answer["result"] for answer in answers} == dict.fromkeys(
        [*SHEET.queues, "reports"], "ok"
    )


def test_prometheus_reads_its_port_and_judges_it(worker: Host, added: dict[str, str]) -> None:
    found = f'"instance":"worker1:{PORT}","job":"celery-worker"'
    targets = "curl -s 'http://127.0.0.1:9090/api/v1/targets?state=active'"
    wait_until(lambda: found in worker.check_output(targets), 30)  # it gathers changes for some seconds
    assert "queue: reports" in worker.check_output("cat /etc/prometheus/skeldir-rules.yml")


def test_the_same_tree_again_changes_nothing(worker: Host, tree: Path, added: dict[str, str]) -> None:
    run = site(tree=tree)
    assert (run.status, run.changed) == (0, 0), run.recap
    assert invocations(worker) == added


def test_removed_it_drains_and_leaves_nothing(worker: Host, database: Host, added: dict[str, str]) -> None:
    held = "FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND"
    with ThreadPoolExecutor() as pool:
        lock = (
            "psql --dbname=skeldir --command='SELECT pg_advisory_lock(42)' --command='SELECT pg_sleep(600)'"
        )
        pool.submit(database.run, f"runuser --user=postgres -- {lock}")
        wait_until(lambda: sql(database, f"SELECT count(*) {held} granted") == "1", 10)
        task_id = python(
            worker,
            "import json; from app.celery_app import celery_app;"
            f"print(json.dumps(celery_app.send_task('{TASK}').id))",
        )
        wait_until(lambda: sql(database, f"SELECT count(*) {held} NOT granted") == "1", 15)
        run = pool.submit(site)
        state = f"systemctl show --value --property=ActiveState {unit('reports')}"
        try:
            wait_until(lambda: worker.check_output(state) == "deactivating", 500)
        finally:
            sql(database, f"SELECT pg_terminate_backend(pid) {held} granted")
        removal = run.result()
    assert removal.status == 0, removal.output[-3000:]
    assert task_state(database, task_id) == "SUCCESS"
    assert http(worker, PORT, "/health")[0] == 0
    left = worker.run("find /etc/skeldir/worker /etc/systemd -name '*reports*'")
    assert left.stdout == ""
    assert worker.check_output("systemctl list-units --all --plain --no-legend '*reports*'") == ""
    assert f":{PORT}" not in worker.check_output("cat /etc/prometheus/prometheus.yml")
    assert invocations(worker) == {key: value for key, value in added.items() if key != unit("reports")}
