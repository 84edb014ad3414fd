"""The exporter as a process, on a real Postgres: its numbers, its rights; and with Postgres away."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psycopg2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from psycopg2.errors import InsufficientPrivilege

from app.core.topology import load_topology
from app.exporter.collectors import Arrivals, Collected, collectors
from bench import scrape
from tests.postgres import ROOT, Cluster, Database, free_port
from tests.workers import environment, exporter_command, publish, ready_worker, started

SHEET = load_topology()
PING = "app.tasks.housekeeping.ping"
ROUTE = "app.tasks.llm.route"
CAPTURE = (
    "SELECT celery_task_failure_capture(%s, %s, 'secret', %s, %s, 'id', NULL, 'c', %s, 'e', 'r', 'E', 'm',"
    " NULL, repeat('0', 16), 'w', 'h', 1, 1, true)"
)

Sample = tuple[str, tuple[str, ...]]


def wait(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def values(text: str) -> dict[Sample, float]:
    """Values by name and sorted values of the labels."""
    families = text_string_to_metric_families(text)
    return {
        (sample.name, tuple(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }


def collected(database: Database, *parts: Collected, user: str = "app_ro") -> dict[Sample, float]:
    """What collectors find, asked as the exporter's role."""
    session = database.connect(user)
    try:
        families = [family for part in parts for family in part.collect(session.cursor())]
    finally:
        session.close()
    return {
        (sample.name, tuple(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }


def everything(database: Database) -> dict[Sample, float]:
    return collected(database, *collectors(SHEET, 57))


def run(database: Database, statement: str, *arguments: Any, user: str = "postgres") -> Any:
    session = database.connect(user)
    try:
        cursor = session.cursor()
        cursor.execute(statement, arguments)
        return cursor.fetchall() if cursor.description else None
    finally:
        session.close()


def capture(database: Database, queue: str, task: str, kind: str, replay_of: int | None = None) -> int:
    message = run(database, "SELECT coalesce(max(id), 0) + 1 FROM celery_task_failures")[0][0] + 10**6
    return int(run(database, CAPTURE, message, replay_of, kind, task, queue)[0][0])


@dataclass
class Exported:
    """A running exporter."""

    port: int
    process: subprocess.Popen[bytes]

    def get(self, path: str = "/metrics") -> str:
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def values(self) -> dict[Sample, float]:
        return values(self.get())


@pytest.fixture
def exported(database: Database, tmp_path: Path) -> Iterator[Exported]:
    port = free_port()
    env = environment(database.dsn("app_ro"), SKELDIR_CONNECTION_BUDGET="57")
    with started(exporter_command(port), tmp_path / "exporter", env) as worker:
        found = Exported(port, worker.process)

        def answers() -> bool:
            assert worker.process.poll() is None, worker.stderr.read_text()
            try:
                return ("celery_postgres_database_size_bytes", ()) in found.values()
            except OSError:
                return False

        wait(answers)
        yield found
        worker.process.send_signal(signal.SIGKILL)


def test_every_series_is_there_from_the_beginning(database: Database) -> None:
    seen = everything(database)
    for queue in SHEET.queues.values():
        for state in ("delayed", "held", "ready"):
            assert seen["celery_queue_messages", (queue.name, state)] == 0
        for kind in ("permanent", "transient", "timeout", "poison", "unknown_task", "invalid", "expired"):
            assert seen["celery_dlq_arrivals_total", (kind, queue.name)] == 0
            assert seen["celery_dlq_newest_failure_timestamp_seconds", (kind, queue.name)] == 0
            for task in queue.tasks:
                assert seen["celery_dlq_open", (kind, queue.name, task)] == 0
    assert (
        seen["celery_dlq_replays_total", ("succeeded",)] == seen["celery_dlq_replays_total", ("failed",)] == 0
    )
    assert seen["celery_postgres_connection_budget", ()] == 57
    assert seen["celery_table_size_bytes", ("kombu_message",)] > 0


def test_messages_by_state_and_since_when(database: Database) -> None:
    publish(
        database.dsn(),
        "for _ in range(3): housekeeping.ping.apply_async(queue='llm', countdown=3600)\n"
        "for _ in range(2): housekeeping.ping.apply_async(queue='llm')\n"
        "housekeeping.ping.apply_async(queue='llm', priority=9)\nanswer = None",
    )
    seen = everything(database)
    assert [seen["celery_queue_messages", ("llm", state)] for state in ("ready", "delayed", "held")] == [
        3,
        3,
        0,
    ]
    assert seen["celery_queue_messages", ("other", "ready")] == 0
    assert 0 < seen["celery_queue_oldest_ready_age_seconds", ("llm",)] < 20
    # An hour later: what was published an hour ago but with an ETA waits since that.
    run(database, 'UPDATE kombu_message SET "timestamp" = "timestamp" - interval \'1 hour\'')
    due = (
        "UPDATE kombu_message SET due_at = NULL, payload = replace(payload, %s, %s) WHERE due_at IS NOT NULL"
    )
    run(database, "DELETE FROM kombu_message WHERE due_at IS NULL")
    year = run(database, 'SELECT substring(payload FROM \'"eta": "([0-9]{4})\') FROM kombu_message')[0][0]
    run(database, due, f'"eta": "{year}', '"eta": "1999')
    assert 3600 < everything(database)["celery_queue_oldest_ready_age_seconds", ("llm",)] < 3620
    run(database, "UPDATE kombu_message SET payload = replace(payload, '1999', '2999')")
    assert everything(database)["celery_queue_oldest_ready_age_seconds", ("llm",)] < 1
    run(database, 'UPDATE kombu_message SET payload = \'{"eta": "2026-99-99T00:00:00"}\'')
    assert everything(database)["celery_queue_oldest_ready_age_seconds", ("llm",)] > 3600


def test_a_queue_or_task_nobody_knows_mints_no_series(database: Database) -> None:
    before = set(everything(database))
    run(database, "SELECT kombu_declare('mine', NULL, NULL)")
    run(database, "SELECT kombu_put('mine', 0, NULL, NULL, '{}')")
    for number in range(3):
        capture(database, f"mine{number}", f"no.task{number}", "unknown_task")
    seen = everything(database)
    assert set(seen) - before == {("celery_dlq_open", ("unknown_task", "other", "other"))}
    assert seen["celery_queue_messages", ("other", "ready")] == 1
    assert seen["celery_dlq_open", ("unknown_task", "other", "other")] == 3


def test_who_consumes_and_who_is_gone(database: Database, tmp_path: Path) -> None:
    with ready_worker(database.dsn(), "llm", tmp_path) as worker:

        def seen() -> tuple[float, float, float]:
            found = everything(database)
            return (
                found["celery_queue_consumers", ("llm",)],
                found["celery_queue_consumers", ("maintenance",)],
                found["celery_broker_holders_alive", ()],
            )

        wait(lambda: seen() == (1, 0, 1))
        publish(database.dsn(), "housekeeping.ping.apply_async(queue='llm').get(timeout=10)\nanswer = None")
        wait(lambda: seen() == (1, 0, 1))
        assert worker.stop() == 0
    wait(lambda: seen() == (0, 0, 0))
    run(database, "INSERT INTO kombu_holder (id, name) VALUES (7, 'gone')")
    run(database, "SELECT kombu_put('llm', 0, NULL, NULL, '{}')")
    run(database, "UPDATE kombu_message SET visible = false, holder = 7")
    found = everything(database)
    assert found["celery_broker_held_by_dead", ()] == found["celery_queue_messages", ("llm", "held")] == 1
    assert seen() == (0, 0, 0)


def test_dead_letters_open_arriving_and_replayed(database: Database) -> None:
    arrivals = Arrivals(SHEET)
    capture(database, "llm", ROUTE, "permanent")  # before the exporter looks for the first time

    def counters() -> dict[Sample, float]:
        found = collected(database, arrivals)
        return {key: value for key, value in found.items() if value}

    assert counters() == counters() == {}
    first, second = (capture(database, "llm", ROUTE, "timeout") for _ in range(2))
    assert counters() == counters() == {("celery_dlq_arrivals_total", ("timeout", "llm")): 2}
    seen = everything(database)
    assert seen["celery_dlq_open", ("timeout", "llm", ROUTE)] == 2
    assert 0 < seen["celery_dlq_oldest_open_age_seconds", ("llm",)] < 20
    assert abs(time.time() - seen["celery_dlq_newest_failure_timestamp_seconds", ("timeout", "llm")]) < 20
    assert seen["celery_dlq_newest_failure_timestamp_seconds", ("poison", "llm")] == 0
    assert seen["celery_dlq_in_progress_oldest_age_seconds", ()] == 0
    for row in (first, second):
        run(database, "INSERT INTO kombu_queue (name) VALUES ('llm') ON CONFLICT DO NOTHING")
        run(database, "SELECT kombu_put('llm', 0, NULL, NULL, '{}')")
        run(
            database,
            "UPDATE celery_task_failures SET state = 'in_progress', replays = 1, replay_id = 1,"
            " message_id = (SELECT max(id) FROM kombu_message) WHERE id = %s",
            row,
        )
    time.sleep(0.01)
    assert everything(database)["celery_dlq_in_progress_oldest_age_seconds", ()] > 0
    run(database, "SELECT celery_task_failure_resolve(%s, 'id')", first)
    capture(database, "llm", ROUTE, "permanent", replay_of=second)
    expected = {
        ("celery_dlq_arrivals_total", ("timeout", "llm")): 2,
        ("celery_dlq_arrivals_total", ("permanent", "llm")): 1,
        ("celery_dlq_replays_total", ("succeeded",)): 1,
        ("celery_dlq_replays_total", ("failed",)): 1,
    }
    assert counters() == counters() == expected
    # Rows that are removed take nothing back.
    run(
        database,
        "SET app.purge_open = 'on'; DELETE FROM celery_task_failures",
    )
    assert counters() == expected
    seen = everything(database)
    assert seen["celery_dlq_open", ("timeout", "llm", ROUTE)] == 0
    assert seen["celery_dlq_oldest_open_age_seconds", ("llm",)] == 0


def test_an_old_transaction_shows(database: Database) -> None:
    before = everything(database)["celery_postgres_connections", ("app_user",)]
    holding = database.connect("app_user")
    try:
        holding.autocommit = False
        # It has changed something and reads nothing now: it has no snapshot, and yet vacuum waits for it.
        holding.cursor().execute("INSERT INTO kombu_queue (name) VALUES ('written')")
        for number in range(5):
            run(database, "SELECT kombu_declare(%s, NULL, NULL)", f"queue{number}")
        time.sleep(1)
        seen = everything(database)
        assert 1 <= seen["celery_postgres_oldest_transaction_age_seconds", ()] < 20
        assert seen["celery_postgres_connections", ("app_user",)] == before + 1
        assert seen["celery_postgres_oldest_xmin_age_transactions", ()] >= 5
        holding.rollback()
        holding.cursor().execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holding.cursor().execute("SELECT 1")
        for number in range(5):
            run(database, "SELECT kombu_declare(%s, NULL, NULL)", f"another{number}")
        assert everything(database)["celery_postgres_oldest_xmin_age_transactions", ()] >= 5
    finally:
        holding.close()


@pytest.mark.parametrize(
    ("role", "statement"),
    [
        ("app_user", "SELECT * FROM skeldir_watch_sessions()"),
        ("app_rw", "SELECT * FROM skeldir_watch_heads()"),
        ("app_ro", "SELECT payload FROM kombu_message"),
        ("app_ro", "SELECT * FROM celery_task_failure_audit"),
        ("app_ro", "SELECT actor FROM celery_task_failure_audit"),
        ("app_ro", "SELECT reason FROM celery_task_failure_audit"),
        ("app_ro", "SELECT error_message FROM celery_task_failures"),
        ("app_ro", "SET ROLE app_owner"),
        ("app_ro", "CREATE OR REPLACE FUNCTION skeldir_watch_heads() RETURNS int LANGUAGE sql AS 'SELECT 1'"),
        ("app_ro", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'"),
    ],
)
def test_is_refused(database: Database, role: str, statement: str) -> None:
    superuser = database.connect("postgres")  # somebody to terminate
    try:
        with pytest.raises((InsufficientPrivilege, psycopg2.errors.ReadOnlySqlTransaction)):
            run(database, statement, user=role)
    finally:
        superuser.close()


def test_no_statement_of_another_session_is_shown(database: Database) -> None:
    secret = "4711 is in a statement"
    other = database.connect("app_user")
    try:
        other.cursor().execute(f"SELECT '{secret}'")
        assert secret in str(run(database, "SELECT query FROM pg_stat_activity"))
        for source in ("pg_stat_activity", "skeldir_watch_sessions()", "skeldir_watch_heads()"):
            assert secret not in str(run(database, f"SELECT * FROM {source}", user="app_ro"))
    finally:
        other.close()


def test_without_the_right_it_says_so_instead_of_half_the_truth(
    database: Database, exported: Exported
) -> None:
    run(database, "REVOKE pg_read_all_stats FROM app_owner")
    try:
        wait(lambda: exported.values()["skeldir_exporter_collector_success", ("sessions",)] == 0)
        assert exported.values()["skeldir_exporter_collector_success", ("queues",)] == 1
    finally:
        run(database, "GRANT pg_read_all_stats TO app_owner")
    wait(lambda: exported.values()["skeldir_exporter_collector_success", ("sessions",)] == 1)


def test_stays_up_and_truthful_while_the_database_is_away(postgres: Cluster, exported: Exported) -> None:
    def up() -> float:
        return exported.values()["skeldir_exporter_database_up", ()]

    assert up() == 1
    postgres.pause()
    try:
        wait(lambda: up() == 0, 8)
    finally:
        postgres.resume()
    wait(lambda: up() == 1, 8)
    postgres.stop("immediate")
    try:
        wait(lambda: up() == 0, 8)
        wait(lambda: exported.values()["skeldir_exporter_collector_success", ("queues",)] == 0, 15)
        then = exported.values()["skeldir_exporter_collector_last_success_timestamp_seconds", ("queues",)]
        assert time.time() - then < 60
    finally:
        postgres.start()
    wait(lambda: up() == 1, 8)
    wait(lambda: exported.values()["skeldir_exporter_collector_success", ("queues",)] == 1, 15)


def test_a_scrape_is_well_formed(exported: Exported) -> None:
    text = exported.get()
    assert "postgresql" not in text
    # The rules are tested with recorded scrapes: `python -m tests.monitoring.record` when this fails.
    recorded = (ROOT / "tests/monitoring/scrapes/exporter-healthy.txt").read_text()
    assert {name for name, _ in values(text)} == {name for name, _ in values(recorded)}
    if promtool := shutil.which("promtool"):
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_a_scrape_of_a_full_plane_is_cheap(database: Database) -> None:
    scrape.measure(database, rows=5000)  # python -m bench.scrape has a million


def test_a_taken_port_is_said(database: Database, exported: Exported) -> None:
    done = subprocess.run(
        exporter_command(exported.port),
        env=environment(database.dsn("app_ro")),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 78
    assert str(exported.port) in done.stderr
