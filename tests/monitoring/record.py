"""Record what real workers and the real exporter show in good and in bad times, for the tests of the rules.

    python -m tests.monitoring.record        # writes tests/monitoring/scrapes/*.txt, in about two minutes

Each file begins with what was going on when it was taken.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from app.core.topology import load_topology
from tests.postgres import Cluster, Database, free_port, provisioned_cluster
from tests.workers import Worker, environment, exporter_command, publish, ready_worker, started

SCRAPES = Path(__file__).parent / "scrapes"
LLM = load_topology().queues["llm"]
REFRESHING = "app.tasks.maintenance.refresh_all_materialized_views"
OF_REFRESH = f'queue="llm",task_name="{REFRESHING}"'
REFRESH = "answer = maintenance.refresh_all_materialized_views.apply_async(queue='llm').id"
FAIL = "answer = app.send_task('app.tasks.llm.route', kwargs={'nonsense': 1}).id"


class Recorder:
    """Scrapes ports and keeps what came, with a word on what it was."""

    def get(self, port: int) -> str:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def until(self, port: int, sign: str, seconds: float = 60) -> str:
        """The first scrape that has a line which begins so."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                text = self.get(port)
            except OSError:
                text = ""
            if f"\n{sign}" in text:
                return text
            if time.monotonic() > deadline:
                raise RuntimeError(f"no scrape of {port} had {sign} within {seconds} s:\n{text[-3000:]}")
            time.sleep(0.2)

    def keep(self, name: str, state: str, text: str) -> None:
        (SCRAPES / f"{name}.txt").write_text(f"# {state}\n{text}")
        print(name)


recorder = Recorder()


@contextmanager
def worker(database: Database, folder: Path, *arguments: str, **more: str) -> Iterator[tuple[Worker, int]]:
    """A worker of the queue `llm` and its port."""
    port = free_port()
    with ready_worker(
        database.dsn(), "llm", folder, *arguments, CELERY_METRICS_PORT=str(port), **more
    ) as started_worker:
        recorder.until(port, 'celery_worker_ready{queue="llm"} 1.0')
        yield started_worker, port


@contextmanager
def exporter(database: Database, folder: Path) -> Iterator[int]:
    """An exporter's port."""
    port = free_port()
    env = environment(database.dsn("app_ro"), SKELDIR_CONNECTION_BUDGET="85")
    with started(exporter_command(port), folder / "exporter", env) as process:
        recorder.until(port, "celery_postgres_database_size_bytes ")
        yield port
        process.process.send_signal(signal.SIGKILL)


@contextmanager
def locked(database: Database) -> Iterator[Any]:
    """A task that refreshes views waits here for a lock."""
    session = database.connect("postgres")
    session.autocommit = False
    session.cursor().execute("LOCK TABLE events")
    try:
        yield session
    finally:
        session.close()


def workers(postgres: Cluster, database: Database, folder: Path) -> None:
    """Everything a worker can show."""
    limits = '{"llm": {"soft_time_limit": 1, "time_limit": 2}}'
    with worker(database, folder, SKELDIR_QUEUE_OVERRIDES=limits) as (process, port):
        publish(database.dsn(), "answer = housekeeping.ping.apply_async(queue='llm').get(timeout=20)")
        text = recorder.until(
            port, 'celery_task_success_total{queue="llm",task_name="app.tasks.housekeeping.ping"} 1.0'
        )
        recorder.keep("worker-healthy", "a worker that did one job", text)
        publish(database.dsn(), FAIL)
        failed = (
            'celery_task_failure_total{exception="TypeError",queue="llm",task_name="app.tasks.llm.route"}'
        )
        text = recorder.until(port, f"{failed} 1.0")
        recorder.keep("worker-failure", "one job raised and became a dead letter", text)
        postgres.stop("fast")
        text = recorder.until(port, 'celery_worker_database_connected{queue="llm"} 0.0')
        recorder.keep("worker-database-down", "the database is stopped", text)
        postgres.start()
        recorder.until(port, 'celery_worker_ready{queue="llm"} 1.0')
        session = database.connect("postgres")
        session.cursor().execute("REVOKE EXECUTE ON FUNCTION celery_task_failure_capture FROM app_user")
        publish(database.dsn(), FAIL)
        text = recorder.until(port, 'celery_worker_dlq_capture_errors_total{queue="llm"} 1.0')
        recorder.keep("worker-capture-error", "app_user may not write dead letters", text)
        session.cursor().execute("GRANT EXECUTE ON FUNCTION celery_task_failure_capture TO app_user")
        session.close()
    with worker(database, folder, "--time-limit", "3", "--soft-time-limit", "1") as (process, port):
        sign = 'celery_task_timeout_total{kind="%s",' + OF_REFRESH + "} 1.0"
        with locked(database):
            publish(
                database.dsn(), REFRESH.replace("queue='llm'", "queue='llm', soft_time_limit=1, time_limit=3")
            )
            recorder.until(port, sign % "soft")
            text = recorder.until(port, sign % "hard")
        recorder.keep("worker-timeout", "one job hit its soft and then its hard time limit", text)
    with worker(database, folder) as (process, port), locked(database):
        publish(database.dsn(), REFRESH)
        sign = "celery_task_in_flight{" + OF_REFRESH + "} 1.0"
        recorder.until(port, sign)
        kill_children(process)
        sign = "celery_task_worker_lost_total{" + OF_REFRESH + "} 1.0"
        recorder.keep("worker-lost", "a child was killed while it ran a job", recorder.until(port, sign))
        process.process.send_signal(signal.SIGTERM)
        text = recorder.until(port, 'celery_worker_draining{queue="llm"} 1.0')
        recorder.keep("worker-draining", "told to stop while a job runs", text)


def kill_children(process: Worker) -> None:
    """End the children that run tasks as the kernel's OOM killer does."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == process.process.pid:
            os.kill(int(stat.parent.name), signal.SIGKILL)


def frozen(database: Database, folder: Path) -> None:
    """A loop that stands still; the port still answers."""
    env = environment(database.dsn(), WATCHED_FOLDER=str(folder))
    port = free_port()
    env["CELERY_METRICS_PORT"] = str(port)
    command = [sys.executable, "-m", "celery", "-A", "tests.integration.watched_app", "worker"]
    with started([*command, "--pool", "prefork", "--concurrency", "1"], folder / "frozen", env) as _:
        recorder.until(port, 'celery_worker_ready{queue="watched"} 1.0')
        subprocess.run(
            [sys.executable, "-c", "from tests.integration.watched_app import freeze\nfreeze.delay()"],
            env=env,
            check=True,
            cwd=SCRAPES.parents[2],
        )
        text = recorder.until(port, 'celery_worker_ready{queue="watched"} 0.0')
        recorder.keep(
            "worker-frozen", "the consumer's loop has stood still for some seconds (queue `watched`)", text
        )
        recorder.until(port, 'celery_worker_ready{queue="watched"} 1.0')


def exporters(postgres: Cluster, database: Database, folder: Path) -> None:
    """Everything the exporter can show."""

    def sql(statement: str) -> None:
        session = database.connect("postgres")
        session.cursor().execute(statement)
        session.close()

    with exporter(database, folder) as port:
        recorder.keep("exporter-healthy", "an exporter on an empty plane without workers", recorder.get(port))
        with worker(database, folder):
            text = recorder.until(port, 'celery_queue_consumers{queue="llm"} 1.0')
            recorder.keep("exporter-worker", "a worker of the queue llm sleeps until a message comes", text)
            for _ in range(3):
                publish(database.dsn(), FAIL)
            sign = (
                'celery_dlq_open{failure_class="permanent",queue="llm",task_name="app.tasks.llm.route"} 3.0'
            )
            recorder.until(port, sign)
            sign = 'celery_dlq_arrivals_total{failure_class="permanent",queue="llm"} 3.0'
            recorder.keep(
                "exporter-dead-letters", "three jobs became dead letters", recorder.until(port, sign)
            )
        sql(
            "ALTER TABLE celery_task_failures DISABLE TRIGGER USER;"
            " UPDATE celery_task_failures SET last_failed_at = now() - interval '30 hours',"
            " changed_at = now() - interval '30 hours'; ALTER TABLE celery_task_failures ENABLE TRIGGER USER"
        )
        publish(
            database.dsn(), "for _ in range(500): housekeeping.ping.apply_async(queue='llm')\nanswer = None"
        )
        sql('UPDATE kombu_message SET "timestamp" = "timestamp" - interval \'1 hour\'')
        sql("INSERT INTO kombu_holder (id, name) VALUES (7, 'gone:7')")
        sql(
            "UPDATE kombu_message SET visible = false, holder = 7"
            " WHERE id IN (SELECT id FROM kombu_message ORDER BY id LIMIT 4)"
        )
        holding = database.connect("app_user")
        holding.autocommit = False
        holding.cursor().execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holding.cursor().execute("SELECT 1")
        more = [database.connect("app_user") for _ in range(60)]
        for _ in range(3):
            sql("UPDATE kombu_message SET version = version")
        recorder.until(port, 'celery_queue_messages{queue="llm",state="ready"} 496.0')
        time.sleep(12)
        text = recorder.until(port, "celery_broker_held_by_dead 4.0")
        recorder.keep(
            "exporter-trouble",
            "a backlog an hour old, four messages of a dead holder, letters 30 hours old, a snapshot held,"
            " 60 more connections, no worker",
            text,
        )
        for session in (holding, *more):
            session.close()
        sql("REVOKE pg_read_all_stats FROM app_owner")
        text = recorder.until(port, 'skeldir_exporter_collector_success{collector="sessions"} 0.0')
        recorder.keep("exporter-collector-failing", "the owner may not see other sessions", text)
        sql("GRANT pg_read_all_stats TO app_owner")
        recorder.until(port, 'skeldir_exporter_collector_success{collector="sessions"} 1.0')
        postgres.stop("fast")
        recorder.until(port, "skeldir_exporter_database_up 0.0")
        text = recorder.until(port, 'skeldir_exporter_collector_success{collector="tables"} 0.0')
        recorder.keep("exporter-database-down", "the database is stopped", text)
        time.sleep(75)
        recorder.keep(
            "exporter-database-down-long", "the database is stopped for over a minute", recorder.get(port)
        )
        postgres.start()


def main() -> None:
    """Record all of them."""
    steps: list[Callable[[Cluster, Database, Path], None]] = [
        workers,
        lambda _, database, folder: frozen(database, folder),
        exporters,
    ]
    for postgres in provisioned_cluster(Cluster(settings={"max_connections": "100"})):
        for number, step in enumerate(steps):
            with tempfile.TemporaryDirectory(prefix="skeldir-record-") as folder:
                step(postgres, postgres.copy_database("skeldir", f"record_{number}"), Path(folder))


if __name__ == "__main__":
    main()
