"""Real workers on a real Postgres."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import yaml

from app.core.topology import load_topology
from tests.postgres import PASSWORDS, ROOT, Cluster, Database, free_port
from tests.workers import Worker, environment, publish, ready_worker, started, started_worker

SKELDIR = Path(sys.prefix) / "bin" / "skeldir"
QUEUES = list(load_topology().queues)
TENANT = "6f1f3c2e-58a5-4a36-9a5a-0a4b6e7c0001"
OTHER = "6f1f3c2e-58a5-4a36-9a5a-0a4b6e7c0002"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def workers(database: Database, logs: Path) -> Iterator[dict[str, Worker]]:
    """A worker for each queue of the sheet."""
    with ExitStack() as stack:
        yield {queue: stack.enter_context(ready_worker(database.dsn(), queue, logs)) for queue in QUEUES}


def _ping(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SKELDIR, "ping", "--json", *arguments],
        env=environment(dsn),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _add_tenants(database: Database) -> None:
    connection = database.connect("postgres")
    cursor = connection.cursor()
    cursor.execute("INSERT INTO tenants (id, name) VALUES (%s, 'one'), (%s, 'other')", [TENANT, OTHER])
    for tenant, payload, age in [
        (TENANT, {"note": "nothing personal, at 2026-11-22 20:00"}, 1),
        (TENANT, {"mail": "someone@example.org"}, 2),
        (TENANT, {"call": "+49 30 1234567", "mail": "a.b+c@example.co.uk"}, 3),
        (TENANT, {"paid": "4111 1111 1111 1111"}, 100),
        (OTHER, {"mail": "other@example.org"}, 100),
        (OTHER, {"mail": "other@example.org"}, 1),
    ]:
        cursor.execute(
            "INSERT INTO events (tenant_id, kind, payload, occurred_at)"
            " VALUES (%s, 'test', %s, now() - make_interval(days => %s))",
            [tenant, json.dumps(payload), age],
        )
    connection.close()


def test_every_queue_answers_and_logs_only_json(
    database: Database, workers: dict[str, Worker], logs: Path
) -> None:
    done = _ping(database.dsn())
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(row["queue"], row["worker"], row["result"]) for row in json.loads(done.stdout)] == [
        (queue, f"{queue}@test", "ok") for queue in QUEUES
    ]

    with_secrets = publish(
        database.dsn(),
        f"""
results = [
    llm.route.delay({{"prompt": "geheim"}}, tenant_id="{TENANT}"),
    llm.route.delay({{"prompt": "geheim", "more": "geheim"}}, "{TENANT}"),
    app.send_task("app.tasks.nobody.knows", args=["geheim"], queue="llm"),
]
for result in results:
    result.get(timeout=20, propagate=False)
answer = [result.id for result in results]
""",
    )
    for worker in workers.values():
        assert worker.stop() == 0
        assert worker.stderr.read_text() == ""
        text = worker.stdout.read_text()
        assert "geheim" not in text
        assert PASSWORDS["app_user"] not in text
        for line in worker.lines():
            assert {"time", "level", "message", "logger"} <= line.keys()
    about = [line for line in workers["llm"].lines() if line.get("task_id") in with_secrets[:2]]
    assert {line["task_name"] for line in about} == {"app.tasks.llm.route"}
    assert all(line["correlation_id"] == line["task_id"] for line in about)
    inside = [line for line in about if line["logger"] == "celery.app.trace"]
    assert [line["tenant_id"] for line in inside] == [TENANT, TENANT]
    assert [line["queue"] for line in inside] == ["llm", "llm"]
    assert any("InvalidPayload" in line.get("exception", "") for line in inside)


def test_a_queue_without_a_worker_is_told_apart(database: Database, logs: Path) -> None:
    with ready_worker(database.dsn(), "housekeeping", logs):
        done = _ping(database.dsn(), "--queue", "housekeeping", "--queue", "llm", "--timeout", "4")
    assert done.returncode == 1
    assert [row["result"] for row in json.loads(done.stdout)] == ["ok", "no answer"]


def test_a_ping_of_one_worker_counts_its_answer_alone(database: Database, logs: Path) -> None:
    (logs / "other").mkdir()
    queue = ("--queue", "housekeeping")
    with (
        ready_worker(database.dsn(), "housekeeping", logs),
        ready_worker(database.dsn(), "housekeeping", logs / "other", "--hostname", "housekeeping@other"),
    ):
        for worker in ("housekeeping@test", "housekeeping@other"):
            done = _ping(database.dsn(), *queue, "--on", worker)
            assert done.returncode == 0, done.stdout + done.stderr
            assert json.loads(done.stdout)[0]["worker"] == worker
        done = _ping(database.dsn(), *queue, "--on", "housekeeping@nowhere", "--timeout", "2")
    assert done.returncode == 1
    assert json.loads(done.stdout)[0]["result"] == "no answer of housekeeping@nowhere"


def test_a_ping_of_one_worker_has_patience_while_it_is_busy(database: Database, logs: Path) -> None:
    with ready_worker(database.dsn(), "maintenance", logs), database.connect("postgres") as session:
        session.autocommit = False
        cursor = session.cursor()
        cursor.execute("LOCK TABLE events")  # the refresh waits for it
        publish(database.dsn(), "answer = maintenance.refresh_all_materialized_views.delay().id")
        arguments = ("--queue", "maintenance", "--on", "maintenance@test", "--timeout", "1")
        with ThreadPoolExecutor() as pool:
            ping = pool.submit(_ping, database.dsn(), *arguments)
            time.sleep(6)
            assert not ping.done()
            session.rollback()
            assert ping.result().returncode == 0, ping.result().stdout


def test_a_drained_worker_answers_and_takes_nothing(database: Database, logs: Path) -> None:
    port = free_port()
    code = (
        "from app.celery_app import topology\n"
        "from app.observability.worker_monitoring import stand_by\n"
        "stand_by(topology(), 'llm', 'new kernel')"
    )
    env = environment(database.dsn(), CELERY_METRICS_PORT=str(port))

    def get(path: str) -> tuple[int, str]:
        try:
            with urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    publish(database.dsn(), "answer = housekeeping.ping.apply_async(queue='llm').id")
    with started([sys.executable, "-c", code], logs / "drained", env):
        deadline = time.monotonic() + 20
        while 'celery_worker_database_connected{queue="llm"} 1.0' not in _body(get, "/metrics"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert get("/health/ready") == (503, "not ready: drained: new kernel\n")
        assert get("/health/live")[0] == 200
        assert json.loads(get("/health")[1])["drained"] == "new kernel"
        metrics = get("/metrics")[1]
        assert 'celery_worker_draining{queue="llm"} 1.0' in metrics
        assert 'celery_worker_drained{queue="llm"} 1.0' in metrics
        assert 'celery_worker_ready{queue="llm"} 0.0' in metrics
        assert 'queue="llm"' in metrics.partition("celery_task_started_total")[2]
    assert database.rows("SELECT count(*) FROM kombu_message WHERE holder IS NULL") == [(1,)]


def _body(get: Callable[[str], tuple[int, str]], path: str) -> str:
    try:
        return get(path)[1]
    except OSError:  # it doesn't listen as yet
        return ""


def test_maintenance_works_for_one_tenant_alone(database: Database, logs: Path) -> None:
    _add_tenants(database)
    with ready_worker(database.dsn(), "maintenance", logs) as worker:
        scanned, deleted, again, refreshed, nobody = publish(
            database.dsn(),
            f"""
def run(task, *args, **kwargs):
    return task.delay(*args, **kwargs).get(timeout=20)
answer = [
    run(maintenance.scan_for_pii_contamination, tenant_id="{TENANT}"),
    run(maintenance.enforce_data_retention, "{TENANT}"),
    run(maintenance.scan_for_pii_contamination, "{TENANT}"),
    run(maintenance.refresh_all_materialized_views),
    run(maintenance.scan_for_pii_contamination, "00000000-0000-4000-8000-000000000000"),
]
""",
        )
        assert scanned == {"scanned": 4, "suspects": {"email": 2, "phone": 1, "card": 1}}
        assert deleted == {"deleted": 1}
        assert again == {"scanned": 3, "suspects": {"email": 2, "phone": 1, "card": 0}}
        assert refreshed["refreshed"]
        assert nobody["scanned"] == 0
        assert "example" not in worker.stdout.read_text()
    assert database.rows(f"SELECT count(*) FROM events WHERE tenant_id = '{OTHER}'") == [(2,)]


def test_old_events_go_in_batches(database: Database, logs: Path) -> None:
    _add_tenants(database)
    database.rows(
        "INSERT INTO events (tenant_id, kind, occurred_at)"
        f" SELECT '{TENANT}', 'old', now() - interval '1 year' FROM generate_series(1, 2500) RETURNING 1"
    )
    with ready_worker(database.dsn(), "maintenance", logs):
        deleted = publish(
            database.dsn(),
            f'answer = maintenance.enforce_data_retention.delay("{TENANT}", days=30).get(timeout=20)',
        )
    assert deleted == {"deleted": 2501}


def test_the_correlation_id_travels_to_the_subtask(database: Database, logs: Path) -> None:
    with ready_worker(database.dsn(), "housekeeping", logs) as worker:
        task_id = publish(
            database.dsn(),
            """
with correlation("from-the-request"):
    result = housekeeping.ping.apply_async(link=housekeeping.ping.si())
result.get(timeout=20)
answer = result.id
""",
        )
        child = worker.wait_for(lambda line: "succeeded" in line["message"] and line["task_id"] != task_id)
        about = [line for line in worker.lines() if line.get("task_id") in {task_id, child["task_id"]}]
    assert len(about) == 4  # each received and each succeeded
    assert {line["correlation_id"] for line in about} == {"from-the-request"}


def test_a_failing_ping_fails(database: Database, logs: Path) -> None:
    with ready_worker(database.dsn(), "housekeeping", logs):
        state = publish(
            database.dsn(),
            "result = housekeeping.ping.delay(fail=True)\n"
            "result.get(timeout=20, propagate=False)\nanswer = result.state",
        )
    assert state == "FAILURE"


def test_a_worker_survives_the_database(postgres: Cluster, database: Database, logs: Path) -> None:
    with ready_worker(database.dsn(), "housekeeping", logs) as worker:
        assert _ping(database.dsn(), "--queue", "housekeeping").returncode == 0
        with postgres.away():
            worker.wait_for(lambda line: "connection to Postgres is gone" in line["message"])
            away = _ping(database.dsn(), "--queue", "housekeeping")
        assert away.returncode == 1
        assert "Traceback" not in away.stderr
        back = _ping(database.dsn(), "--queue", "housekeeping", "--timeout", "5")
        assert back.returncode == 0, back.stdout
        assert worker.process.poll() is None


def test_a_worker_that_starts_before_the_database_waits_for_it(
    postgres: Cluster, database: Database, logs: Path
) -> None:
    with postgres.away(), started_worker(database.dsn(), "housekeeping", logs) as worker:
        worker.wait_for(lambda line: "onnect" in line["message"] and line["level"] != "INFO")
        postgres.start()
        assert _ping(database.dsn(), "--queue", "housekeeping", "--timeout", "10").returncode == 0


def test_a_worker_makes_no_table(empty_database: Database, logs: Path) -> None:
    with started_worker(empty_database.dsn("postgres"), "housekeeping", logs) as worker:
        assert worker.process.wait(timeout=30) not in {0, 78}, "after the migration it shall be started again"
    assert "alembic upgrade" in worker.stdout.read_text()
    assert empty_database.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == []


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package that a test may change, to be run from its parent directory."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "app", copy / "app", ignore=shutil.ignore_patterns("__pycache__"))
    sheet = yaml.safe_load((copy / "app" / "topology.yml").read_text())
    for queue in sheet["queues"].values():
        queue["metrics_port"] = free_port()
    (copy / "app" / "topology.yml").write_text(yaml.safe_dump(sheet, sort_keys=False))
    return copy


def _refusal(database: Database, package: Path, logs: Path, queue: str = "llm") -> str:
    with started_worker(database.dsn(), queue, logs, cwd=package) as worker:
        assert worker.process.wait(timeout=30) == 78
    assert worker.stdout.read_text() == ""
    (sentence,) = worker.stderr.read_text().splitlines()
    return sentence


def test_a_worker_refuses_a_task_without_a_queue(database: Database, package: Path, logs: Path) -> None:
    stray = "from celery import shared_task\n\n@shared_task\ndef work(): ...\n"
    (package / "app" / "tasks" / "stray.py").write_text(stray)
    assert "app.tasks.stray.work" in _refusal(database, package, logs)


@pytest.mark.parametrize("task", ["app.tasks.llm.missing", "app.tasks.missing.work", "nowhere.at.all"])
def test_a_worker_refuses_a_queues_task_without_code(
    database: Database, package: Path, logs: Path, task: str
) -> None:
    sheet = (package / "app" / "topology.yml").read_text()
    (package / "app" / "topology.yml").write_text(
        sheet.replace("- app.tasks.llm.route\n", f"- app.tasks.llm.route\n    - {task}\n")
    )
    assert task in _refusal(database, package, logs)


def test_a_worker_refuses_a_queue_that_is_not_in_the_sheet(
    database: Database, package: Path, logs: Path
) -> None:
    assert "elsewhere" in _refusal(database, package, logs, queue="elsewhere")


def test_a_worker_refuses_a_broken_sheet(database: Database, package: Path, logs: Path) -> None:
    (package / "app" / "topology.yml").write_text("queues: {}\n")
    assert "topology.yml" in _refusal(database, package, logs)


def test_skeldir_worker_takes_its_numbers_from_the_sheet(
    database: Database, package: Path, logs: Path
) -> None:
    variables = {"PYTHONPATH": str(package), "SKELDIR_QUEUE_OVERRIDES": '{"llm": {"concurrency": 3}}'}
    env = environment(database.dsn(), **variables)
    with started([SKELDIR, "worker", "llm"], logs / "skeldir", env, package) as worker:
        worker.wait_for(lambda line: line["message"].endswith(" ready."))
        children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split()
        assert len(children) == 3
        done = _ping(database.dsn(), "--queue", "llm")
        assert json.loads(done.stdout)[0]["worker"].startswith("llm@")
        assert PASSWORDS["app_user"].split()[0] not in Path(f"/proc/{worker.process.pid}/cmdline").read_text()
        assert worker.stop() == 0
