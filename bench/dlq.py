"""Dead letters by the million: how long finding, counting, replaying and capturing takes.

    python -m bench.dlq [--rows 1000000] [--explain]

On a Postgres of its own with default settings. The limits are what the project promises: `list` and `groups`
over a million rows within 300 ms, 10,000 replayed within 5 s, a capture at most twice an acknowledgement.
"""

import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from hashlib import md5
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session

from app.core.dsn import sqlalchemy_url
from app.core.topology import load_topology
from app.dlq import replay, store
from app.dlq.classify import Failure
from app.dlq.message import read
from app.dlq.store import Filter
from bench import servers
from tests.dlq.plane import payload
from tests.postgres import Database

ROOT = Path(__file__).resolve().parent.parent
REPLAYED = 10_000
DRAINED = 2_000
TENANT = uuid.UUID(int=7)

# 60 kinds of failure, some of them far more frequent than others; a year of them; 300 tenants.
FILL = """
INSERT INTO celery_task_failures
    (state, class, task, task_id, tenant_id, queue, exchange, routing_key, error_type, error_message,
     fingerprint, worker, host, attempts, deliveries, first_failed_at, last_failed_at, message_id, decodable,
     assignee)
SELECT CASE WHEN n %% 20 < 8 THEN 'pending' WHEN n %% 20 < 15 THEN 'ignored' ELSE 'resolved' END,
    (ARRAY['permanent', 'transient', 'timeout'])[1 + kind %% 3], 'bench.task' || kind %% 12, n,
    CASE WHEN n %% 3 > 0 THEN lpad(to_hex(n %% 300), 32, '0')::uuid END, queue, queue, queue,
    'Error' || kind,
    format('order %%s of customer %%s: connection reset by peer after %%s s', n, n %% 5000, kind),
    left(md5(kind::text), 16), 'worker@host' || n %% 4, 'host' || n %% 4, 1 + n %% 4, 1,
    now() - n * interval '30 s', now() - n * interval '30 s', -n, true,
    CASE WHEN n %% 1000 = 0 THEN 'maria' END
FROM (
    SELECT n, (60 * power(random(), 2))::integer AS kind,
        (%(queues)s)[1 + n %% cardinality(%(queues)s)] AS queue
    FROM generate_series(1, %(rows)s) n
) made
"""
ERRORS = """
INSERT INTO celery_task_failure_errors
    (failure_id, number, failed_at, class, error_type, error_message, worker)
SELECT id, 1, last_failed_at, class, error_type, error_message, worker FROM celery_task_failures
"""


def fill(database: Database, rows: int, queues: list[str]) -> None:
    """Failures as they look after a bad year, and messages for those that are replayed."""
    with closing(database.connect("postgres")) as session, session.cursor() as cursor:
        cursor.execute("SET synchronous_commit = off")
        cursor.execute(FILL, {"rows": rows, "queues": queues})
        cursor.execute(ERRORS)
        task = next(iter(load_topology().queue_by_task))
        cursor.execute(
            "WITH chosen AS (UPDATE celery_task_failures SET task = %s WHERE id IN"
            " (SELECT id FROM celery_task_failures WHERE state = 'pending' LIMIT %s) RETURNING id)"
            " INSERT INTO celery_task_failure_payloads (failure_id, version, payload)"
            " SELECT id, 1, %s FROM chosen",
            (task, REPLAYED, payload(task=task)),
        )
        cursor.execute("VACUUM ANALYZE")


def looks() -> dict[str, tuple[Callable[..., Any], Filter, dict[str, Any]]]:
    """What an operator asks, as a name and what answers it."""
    year, everything = datetime.now(UTC) - timedelta(days=365), store.STATES
    filters = {
        "": Filter(),
        "--state any": Filter(states=everything),
        "--state ignored": Filter(states=("ignored",)),
        "--state resolved": Filter(states=("resolved",)),
        "--task": Filter(task="bench.task3"),
        "--class": Filter(failure_class="timeout"),
        "--error-type": Filter(error_type="Error59"),
        "--group": Filter(fingerprint=_fingerprint(0)),
        "--queue": Filter(queue=next(iter(load_topology().queues))),
        "--tenant": Filter(tenant=TENANT),
        "--no-tenant": Filter(without_tenant=True),
        "--since": Filter(since=year),
        "--assignee": Filter(assignee="maria"),
        "--text, one row": Filter(text="order 4711 of", states=everything),
        "--text, 200 rows": Filter(text="customer 4711:", states=everything),
        "--text, no row": Filter(text="nobody ever said this", states=everything),
        "--text, every row": Filter(text="connection reset", states=everything),
    }
    found: dict[str, tuple[Callable[..., Any], Filter, dict[str, Any]]] = {}
    for options, which in filters.items():
        found[f"list {options}"] = (store.find, which, {})
        found[f"groups {options}"] = (store.groups, which, {"limit": 30})
    return found


def _fingerprint(kind: int) -> str:
    return md5(str(kind).encode(), usedforsecurity=False).hexdigest()[:16]


def capture_in_postgres(database: Database, count: int = 500) -> tuple[float, float]:
    """Seconds of one acknowledgement and of one capture, each a transaction, median of many."""
    text, acks, captures = payload(), [], []
    failure = Failure.of("permanent", "ValueError", "order 4711: connection reset by peer", "Traceback…" * 50)
    with closing(database.connect("app_user")) as session, session.cursor() as cursor:
        cursor.execute("SELECT kombu_declare('bench', NULL, NULL)")
        [queue] = cursor.fetchone()  # type: ignore[misc]
        cursor.execute("SET synchronous_commit = off")
        cursor.execute("INSERT INTO kombu_holder (id, name) VALUES (1, 'bench')")
        for number in range(2 * count):
            cursor.execute(
                "INSERT INTO kombu_message (queue_id, payload, visible, holder, delivery)"
                " VALUES (%s, %s, false, 1, 1) RETURNING id",
                (queue, text),
            )
            [message_id] = cursor.fetchone()  # type: ignore[misc]
            began = time.perf_counter()
            if number % 2:
                cursor.execute("SELECT kombu_ack(1, %s::bigint[], '{1}')", ([message_id],))
                acks.append(time.perf_counter() - began)
            else:
                cursor.execute("BEGIN")
                cursor.execute("DELETE FROM kombu_message WHERE id = %s AND holder = 1", (message_id,))
                store.insert(
                    cursor,
                    message_id=message_id + 10**9,
                    queue="bench",
                    payload=text,
                    message=read(text),
                    failure=failure,
                    deliveries=1,
                    tenant=None,
                    host="bench",
                )
                cursor.execute("COMMIT")
                captures.append(time.perf_counter() - began)
    return median(acks), median(captures)


def drain(database: Database, task: str, count: int, **environment: str) -> float:
    """Jobs a second of one worker, from the first that is gone to the last."""
    with closing(database.connect("postgres")) as session, session.cursor() as cursor:
        cursor.execute(
            "INSERT INTO kombu_message (queue_id, payload) SELECT kombu_declare(%s, NULL, NULL), %s"
            " FROM generate_series(1, %s)",
            (queue := next(iter(load_topology().queues)), payload(task=task), count),
        )
        words = ["-Q", queue, "-P", "solo", "--prefetch-multiplier", "50", "-l", "ERROR"]
        with tempfile.TemporaryFile() as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "tests.dlq.app_for_tests", "worker", *words],
                cwd=ROOT,
                env={**os.environ, "DATABASE_URL": database.dsn("app_user"), "PYTHONPATH": str(ROOT)}
                | environment,
                stdout=log,
                stderr=log,
            )
            try:
                moments: list[tuple[float, int]] = []
                while not moments or moments[-1][1]:
                    cursor.execute("SELECT count(*) FROM kombu_message")
                    moments.append((time.monotonic(), cursor.fetchone()[0]))  # type: ignore[index]
                    time.sleep(0.02)
            finally:
                worker.terminate()
                worker.wait(30)
    began = next(moment for moment in moments if moment[1] < 0.95 * count)
    return began[1] / (moments[-1][0] - began[0])


def replayed(engine: Any, task: str) -> float:
    """Seconds of replaying many rows at once."""
    began = time.perf_counter()
    with Session(engine) as session:
        number = replay.start(
            session, Filter(task=task), load_topology(), actor="bench", reason="bench", limit=REPLAYED
        )
        session.commit()
    done = replay.run(engine, number, load_topology())
    if done.sent != REPLAYED:
        raise RuntimeError(f"{done.sent} were sent: {done}")
    return time.perf_counter() - began


def main(
    *,
    rows: Annotated[int, typer.Option(help="How many dead letters there are.")] = 1_000_000,
    repeat: Annotated[int, typer.Option(help="How often each question is asked.")] = 5,
    only: Annotated[
        str | None, typer.Option(help="Only questions with these words in their name; '' for none of them.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the plans, too.")] = False,
) -> None:
    """Measure the dead letters on this machine."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    table = Table("measure", "median", "slowest", "limit")
    with servers.postgres() as cluster:
        database = Database(cluster, "skeldir")
        queues = list(load_topology().queues)
        began = time.monotonic()
        with closing(database.connect("app_user")) as session:
            for queue in queues:
                session.cursor().execute("SELECT kombu_declare(%s, NULL, NULL)", (queue,))
        fill(database, rows, queues)
        console.print(f"{rows:,} dead letters were made in {time.monotonic() - began:.0f} s")
        engine = create_engine(sqlalchemy_url(database.dsn("app_rw")))
        asked: list[tuple[str, Any]] = []
        event.listen(
            engine, "before_cursor_execute", lambda _c, _cu, sql, values, *_: asked.append((sql, values))
        )
        for name, (ask, which, options) in looks().items():
            if only is not None and (not only or only not in name):
                continue
            seconds, asked[:] = [], []
            for _ in range(repeat):
                with Session(engine) as session:
                    began = time.perf_counter()
                    ask(session, which, **options)
                    seconds.append(time.perf_counter() - began)
            table.add_row(name, *(f"{1000 * s:.0f} ms" for s in (median(seconds), max(seconds))), "300 ms")
            console.print(f"{name}: {', '.join(f'{1000 * s:.0f}' for s in seconds)} ms", style="dim")
            if explain:
                _explain(console, database, asked[len(asked) * (repeat - 1) // repeat :])
        if not only:
            taken = replayed(engine, next(iter(load_topology().queue_by_task)))
            table.add_row(f"replay {REPLAYED:,}", f"{taken:.1f} s", "", "5 s")
            ack, capture = capture_in_postgres(database)
            table.add_row("an acknowledgement, in Postgres alone", f"{1e6 * ack:.0f} us")
            table.add_row("a capture, in Postgres alone", f"{1e6 * capture:.0f} us", f"{capture / ack:.1f}x")
            with closing(database.connect("postgres")) as session:
                session.cursor().execute("DELETE FROM kombu_message")
            acked = drain(database, "t.raise", DRAINED, DEAD_LETTERS="off")
            captured = drain(database, "t.raise", DRAINED)
            table.add_row("a job that fails and is acknowledged", f"{1e6 / acked:.0f} us")
            ratio = f"{acked / captured:.1f}x"
            table.add_row("a job that fails and is captured", f"{1e6 / captured:.0f} us", ratio, "2x")
        engine.dispose()
    console.print(table)


def _explain(console: Console, database: Database, asked: list[tuple[str, Any]]) -> None:
    with closing(database.connect("app_rw")) as session, session.cursor() as cursor:
        cursor.execute("SET jit = off")
        for statement, values in asked:
            if statement.lstrip().startswith(("SELECT _", "WITH", "SELECT")):
                cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS) {statement}", values)
                console.print("\n".join(row[0] for row in cursor.fetchall()), style="dim", markup=False)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
