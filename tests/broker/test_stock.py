"""Users of kombu's own transport move to ours in place, and back: nothing that waited is lost."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.broker.conftest import Ledger, Worker, until
from tests.postgres import ROOT, Database, run_alembic


def stock(dsn: str, step: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.broker.stock", dsn, step],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def migrate(database: Database, *words: str) -> str:
    done = run_alembic(database.dsn("app_owner"), *words)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_what_waited_under_the_stock_transport_is_run_by_ours(
    empty_database: Database, tmp_path: Path, ledger: Ledger
) -> None:
    database = empty_database
    stock(database.dsn("app_owner"), "leave")
    assert database.rows("SELECT count(*), count(*) FILTER (WHERE visible) FROM kombu_message") == [(10, 7)]
    migrate(database, "upgrade", "heads")
    assert database.rows(
        "SELECT q.name, m.due_at IS NOT NULL, count(*) FROM kombu_message m JOIN kombu_queue q"
        " ON q.id = m.queue_id WHERE m.visible GROUP BY 1, 2 ORDER BY 1, 2"
    ) == [("jobs", False, 5), ("jobs", True, 1), ("others", False, 1)]
    assert database.rows("SELECT task_id, status FROM celery_taskmeta") == [("stored", "SUCCESS")]
    one = Worker(database.dsn(), tmp_path, 1, "-P", "solo", "-Q", "jobs,others", QUEUES="jobs,others")
    try:
        until(lambda: all(ledger.count(f"ended {name}") for name in ("j4", "other")), 30)
        until(lambda: ledger.count("ended later"), 20)
        until(lambda: database.rows("SELECT count(*) FROM kombu_message") == [(0,)])
    finally:
        one.stop()
    wanted = {*(f"j{i}" for i in range(5)), "other", "later"}
    assert sorted(ledger.lines()) == sorted(
        f"{what} {name}" for name in wanted for what in ("began", "ended")
    )


def test_on_the_way_back_the_stock_transport_gets_what_still_waits(
    database: Database, publish: Callable[[str], None]
) -> None:
    publish(
        "tasks.job.delay('now'); tasks.job.apply_async(['later'], countdown=60)\n"
        "from kombu import Connection, Consumer\n"
        "tasks.job.delay('held')\n"
        "import os; connection = Connection(tasks.celery.conf.broker_url); channel = connection.channel()\n"
        "channel.basic_qos(0, 9, False)\n"
        "Consumer(channel, tasks.celery.amqp.queues['jobs'], on_message=lambda _: None).consume()\n"
        "for _ in range(2): connection.drain_events(timeout=5)\n"
        "os._exit(0)"  # a worker that is killed with what it holds
    )
    assert database.rows("SELECT count(*) FROM kombu_message WHERE NOT visible") == [(2,)]
    migrate(database, "downgrade", "monitoring@base")
    migrate(database, "downgrade", "dead_letters@base")
    migrate(database, "downgrade", "celery_0001")
    assert sorted(stock(database.dsn("app_user"), "consume")) == ["jobs held", "jobs later", "jobs now"]


def test_tables_of_another_role_are_named_with_what_to_do(empty_database: Database) -> None:
    for table in ("kombu_queue", "kombu_message"):
        empty_database.rows(f"CREATE TABLE {table} (id integer); SELECT 1")
    done = run_alembic(empty_database.dsn("app_owner"), "upgrade", "celery_foundation@head")
    assert done.returncode != 0
    assert "ALTER TABLE kombu_message OWNER TO app_owner" in done.stderr
    assert "Traceback" not in done.stderr
