"""Workers whose DATABASE_URL leads to PgBouncer (Debian's), in session and in transaction mode."""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest
from psycopg2.extensions import cursor

from tests.broker.conftest import Database, Ledger, Worker, until
from tests.broker.test_workers import held, left
from tests.postgres import PASSWORDS, free_port, unprivileged
from tests.workers import environment

WARNING = "a pooler in transaction mode stands between this worker and Postgres"
SESSION = pytest.mark.parametrize("mode", ["session"])
TRANSACTION = pytest.mark.parametrize("mode", ["transaction"])
IDLE = "\n".join(
    f"import time; time.sleep(1.3); tasks.note('sent idle{i}'); tasks.job.delay('idle{i}')" for i in range(5)
)


def picked_up(ledger: Ledger) -> float:
    """The median of how many seconds idle workers took to begin a job."""
    until(lambda: all(ledger.count(f"ended idle{i}") for i in range(5)))
    return statistics.median(ledger.when(f"began idle{i}") - ledger.when(f"sent idle{i}") for i in range(5))


def answers(dsn: str) -> bool:
    try:
        psycopg2.connect(dsn).close()
    except psycopg2.OperationalError:
        return False
    return True


@pytest.fixture
def dsn(database: Database, mode: str) -> Iterator[str]:
    """The test's database through a PgBouncer of its own."""
    port, cluster = free_port(), database.cluster
    directory = Path(tempfile.mkdtemp(prefix="skeldir-pgbouncer-"))
    password = PASSWORDS["app_user"].replace("'", "''")
    (directory / "pgbouncer.ini").write_text(
        "[databases]\n"
        f"{database.name} = host={cluster.host} port={cluster.port} user=app_user password='{password}'\n"
        "[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"pool_mode = {mode}\n"
    )
    who = unprivileged()
    if who:
        for path in (directory, *directory.iterdir()):
            os.chown(path, who["user"], who["group"])  # type: ignore[arg-type]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [shutil.which("pgbouncer") or "/usr/sbin/pgbouncer", directory / "pgbouncer.ini"],
            stdout=log,
            stderr=log,
            start_new_session=True,
            **who,  # type: ignore[call-overload]
        )
    dsn = f"postgresql://app_user@127.0.0.1:{port}/{database.name}"
    try:
        until(lambda: answers(dsn))
        yield dsn
    finally:
        process.kill()
        process.wait(10)
        shutil.rmtree(directory)


@SESSION
def test_in_session_mode_nothing_is_missing(
    worker: Callable[..., Worker], publish: Callable[[str], None], ledger: Ledger, sql: cursor
) -> None:
    first, second = worker("-c", "2", PREFETCH="1").ready(), worker("-c", "2", PREFETCH="1").ready()
    publish("for i in range(4): tasks.job.delay(f'j{i}', 4.0)\ntasks.job.apply_async(['later'], countdown=1)")
    until(lambda: len(ledger.lines()) == 4)
    first.kill()
    assert until(lambda: held(sql) <= 2, 5) < 4  # the pooler says at once that its client is gone
    until(lambda: not left(sql))
    assert [ledger.count(f"ended j{i}") for i in range(4)] == [1] * 4
    assert ledger.count("ended later") == 1
    publish(IDLE)
    assert picked_up(ledger) < 1  # a notification wakes: polls are 5 s apart
    assert WARNING not in first.text + second.text


@TRANSACTION
def test_in_transaction_mode_workers_say_what_is_missing_and_poll(
    worker: Callable[..., Worker], publish: Callable[[str], None], ledger: Ledger, sql: cursor
) -> None:
    first, second = worker("-c", "2", PREFETCH="1").ready(), worker("-c", "2", PREFETCH="1").ready()
    for one in (first, second):
        assert one.text.count(WARNING) == 1
    publish(
        "tasks.job.delay('long', 32.0)\n"
        "for i in range(3): tasks.job.delay(f'j{i}', 10.0)\n"
        "tasks.job.apply_async(['later'], countdown=1)\ntasks.retrying.delay('retried')"
    )
    until(lambda: sum(line.startswith("began") for line in ledger.lines()) == 4, 10)
    # The one without the job that is longer than a lease.
    sql.execute(
        "SELECT h.name FROM kombu_message m JOIN kombu_holder h ON h.id = m.holder"
        " WHERE m.payload::jsonb #>> '{headers,argsrepr}' LIKE '%long%'"
    )
    row = sql.fetchone()
    assert row
    victim = second if row[0].endswith(f":{first.process.pid}") else first
    worker("-P", "solo", PREFETCH="1").ready()  # another one who looks for the dead, and must find only one
    victim.kill()
    began = time.monotonic()
    until(lambda: all(ledger.count(f"ended j{i}") for i in range(3)), 60)
    assert 15 < time.monotonic() - began < 45  # a lease, and ten seconds' work
    until(lambda: not left(sql), 40)
    assert ledger.count("began long") == ledger.count("ended long") == 1
    assert ledger.count("ended later") == ledger.count("ended retried") == 1
    assert sum(ledger.count(f"began j{i}") for i in range(3)) == 5
    publish(IDLE)
    assert picked_up(ledger) < 2.5  # polls are a second apart


@TRANSACTION
def test_in_transaction_mode_who_was_given_up_for_dead_becomes_somebody_new(
    worker: Callable[..., Worker], publish: Callable[[str], None], ledger: Ledger, sql: cursor
) -> None:
    one = worker("-P", "solo", PREFETCH="1").ready()
    # As another worker does after a lease in which this one couldn't say that it lives.
    sql.execute("DELETE FROM kombu_holder")
    until(lambda: "given up for dead" in one.text)
    publish("tasks.job.delay('j', 3.0)")
    until(lambda: ledger.count("began j") == 1)
    sql.execute("SELECT holder FROM kombu_message WHERE holder IS NOT NULL")
    holder = sql.fetchone()
    sql.execute("SELECT id FROM kombu_holder")
    assert sql.fetchall() == [holder]
    until(lambda: not left(sql))


@TRANSACTION
def test_in_transaction_mode_a_scheduler_does_not_start(dsn: str) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("skeldir"), "beat"],
        env=environment(dsn, CELERY_METRICS_ADDR="127.0.0.9"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78
    assert "pooler" in done.stderr
