"""Rolls: jobs outlast lowered limits, what runs keeps its fingerprints, the way back works, and refusals."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.checkout import copy_tree
from tests.lab import (
    SHEET,
    Run,
    http,
    invocations,
    playbook,
    python,
    site,
    sql,
    task_state,
    unit,
    wait_until,
)

pytestmark = pytest.mark.timeout(900)

QUEUE = SHEET.queues["maintenance"]
RETENTION = "app.tasks.maintenance.enforce_data_retention"
TENANT = "6f1f3c2e-58a5-4a36-9a5a-0a4b6e7c0001"
LOWERED = {
    "skeldir_queue_overrides": {QUEUE.name: {"soft_time_limit": 4, "time_limit": 5}},
    "worker_stop_margin": 1,
}
PORT = max(queue.metrics_port for queue in SHEET.queues.values()) + 1
LATER_QUEUE = f"""
  reports:
    exchange: reports
    routing_key: reports
    tasks: [app.tasks.reports.summarise]
    metrics_port: {PORT}
    concurrency: 1
    prefetch: 1
    soft_time_limit: 60
    time_limit: 90
    delivery_limit: 3
    retry: {{max_retries: 3, backoff: 1, backoff_max: 60}}
"""
LATER_OVERRIDES = '--extra-vars={"skeldir_queue_overrides": {"reports": {"time_limit": 100}}}'
LATER_PORT = PORT + 10


def current(worker: Host) -> str:
    return Path(worker.check_output("readlink /opt/skeldir/current")).name


def started(worker: Host, name: str) -> int:
    """When a unit's start was begun, in microseconds since the host's."""
    return int(
        worker.check_output(f"systemctl show --value --property=InactiveExitTimestampMonotonic {name}")
    )


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A later checkout: one queue more, and one on another port."""
    tree = copy_tree(tmp_path_factory.mktemp("later"))
    sheet = tree / "app/topology.yml"
    text = sheet.read_text().replace(f"metrics_port: {QUEUE.metrics_port}", f"metrics_port: {LATER_PORT}")
    sheet.write_text(text + LATER_QUEUE)
    (tree / "app/tasks/reports.py").write_text(
        '"""Summaries."""\n\nfrom celery import shared_task\n\n\n'
        '@shared_task\ndef summarise() -> str:\n    """Do nothing."""\n    return "summarised"\n'
    )
    return tree


@pytest.fixture
def endless(database: Host) -> Iterator[None]:
    """Jobs that enforce retention go on until the table `going_on` is dropped."""
    # Not by to_regclass(), which goes on to answer from its cache while a transaction takes no locks.
    going_on = "EXISTS (SELECT FROM pg_class WHERE relname = 'going_on')"
    wait = f"WHILE {going_on} LOOP PERFORM pg_sleep(0.2); END LOOP"
    sql(
        database,
        "CREATE TABLE public.going_on (); CREATE FUNCTION public.go_on() RETURNS trigger LANGUAGE plpgsql"
        f" AS $go$BEGIN {wait}; RETURN NULL; END$go$;"
        " CREATE TRIGGER goes_on BEFORE DELETE ON events EXECUTE FUNCTION public.go_on()",
    )
    yield
    sql(database, "DROP TABLE IF EXISTS public.going_on")
    sql(database, "DROP FUNCTION public.go_on CASCADE")


@pytest.mark.usefixtures("endless")
def test_a_job_outlasts_the_lower_time_limit_that_its_own_roll_brings(worker: Host, database: Host) -> None:
    """The unit is stopped under the limit its process was started with; afterwards the new one counts."""
    state = f"systemctl show --value --property=ActiveState {unit(QUEUE.name)}"
    limit = f"systemctl show --value --property=TimeoutStopUSec {unit(QUEUE.name)}"
    before = worker.check_output(limit)
    with ThreadPoolExecutor() as pool:
        try:
            task_id = python(
                worker,
                "import json; from app.celery_app import celery_app;"
                f"print(json.dumps(celery_app.send_task('{RETENTION}', ['{TENANT}']).id))",
            )
            sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            wait_until(lambda: sql(database, sleeping) != "0", 15)
            lowered = pool.submit(playbook, "playbooks/deploy.yml", f"--extra-vars={json.dumps(LOWERED)}")
            wait_until(lambda: worker.check_output(state) == "deactivating", 300)
            worker.check_output("sleep 10")  # more than the new limit and its margin
            assert worker.check_output(state) == "deactivating"
        finally:
            sql(database, "DROP TABLE public.going_on")
        run = lowered.result()
    assert run.status == 0, run.output[-3000:]
    assert task_state(database, task_id) == "SUCCESS"
    assert worker.check_output(limit) == "6s"
    assert worker.run("ls /run/systemd/system/skeldir-worker@*").rc != 0
    restored = site()
    assert restored.status == 0, restored.output[-3000:]
    assert worker.check_output(limit) == before


def test_a_later_checkout_without_its_release_restarts_nothing(worker: Host, later: Path) -> None:
    """As new passwords given out from one: units run what is installed, and have the fingerprints of that."""
    before = invocations(worker)
    run = playbook("playbooks/deploy.yml", "--tags=worker", tree=later)
    assert (run.status, run.changed) == (0, 0), run.recap
    assert invocations(worker) == before


def test_a_sheet_that_changed_is_no_hindrance_on_the_way_back(worker: Host, later: Path) -> None:
    """Neither overrides of queues it doesn't know nor ports that were others; its scheduler comes first."""
    before = current(worker)
    forward = playbook("playbooks/deploy.yml", LATER_OVERRIDES, tree=later)
    assert forward.status == 0, forward.output[-3000:]
    assert http(worker, LATER_PORT, "/health/ready")[0] == 200
    assert started(worker, "skeldir-beat.service") > started(worker, unit(QUEUE.name))
    back = playbook("playbooks/rollback.yml", LATER_OVERRIDES, tree=later)
    assert back.status == 0, back.output[-3000:]
    assert current(worker) == before
    assert http(worker, QUEUE.metrics_port, "/health/ready")[0] == 200
    assert invocations(worker).keys() == {unit(queue) for queue in SHEET.queues}
    answers = json.loads(worker.check_output("skeldir ping --json"))
    assert {answer["queue"]: answer["result"] for answer in answers} == dict.fromkeys(SHEET.queues, "ok")
    assert worker.service("skeldir-beat.service").is_running
    assert started(worker, "skeldir-beat.service") < started(worker, unit(QUEUE.name))
    settled = site()
    assert settled.status == 0, settled.output[-3000:]


class TestRefused:
    """In one sentence that names it, before anything is changed."""

    @pytest.fixture(autouse=True)
    def nothing_restarts(self, worker: Host) -> Iterator[None]:
        before = invocations(worker), current(worker)
        yield
        assert (invocations(worker), current(worker)) == before

    @staticmethod
    def refused(run: Run, *words: str) -> None:
        assert run.status != 0
        assert any(all(word in sentence for word in words) for sentence in run.sentences), run.output[-3000:]

    def test_a_release_that_lacks_what_a_contract_migration_took(self, worker: Host, database: Host) -> None:
        sql(database, "INSERT INTO alembic_version VALUES ('contract_9999')")
        try:
            self.refused(playbook("playbooks/deploy.yml"), "contract_9999", current(worker))
        finally:
            sql(database, "DELETE FROM alembic_version WHERE version_num = 'contract_9999'")

    @pytest.mark.parametrize("way", ["drain", "undrain"])
    def test_a_queue_that_nobody_serves(self, worker: Host, way: str) -> None:
        queues = f"--extra-vars=queue='{QUEUE.name}, nosuch'"
        self.refused(playbook(f"playbooks/{way}.yml", queues), "nosuch", *SHEET.queues)
        assert worker.check_output("ls /etc/skeldir/drained") == ""
