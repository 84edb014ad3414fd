"""What a scrape of the exporter costs with a plane full of messages and dead letters.

    python -m bench.scrape [--rows 1000000]

On a Postgres of its own. The promise: a scrape takes at most 200 ms, however much waits, because it reads
what was found in the background; how long finding takes is printed beside it.
"""

import re
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Annotated
from urllib.request import urlopen

import typer
from rich.console import Console
from rich.table import Table

from app.core.topology import load_topology
from app.exporter.collectors import collectors
from tests.postgres import Database, free_port, provisioned_cluster
from tests.workers import environment, exporter_command, started

LIMIT = 0.2

MESSAGES = """
INSERT INTO kombu_message (queue_id, payload, due_at)
SELECT (ARRAY(SELECT id FROM kombu_queue ORDER BY id))[1 + n % 3], repeat('x', 400),
    CASE WHEN n % 10 = 0 THEN now() + interval '1 day' END
FROM generate_series(1, %(rows)s) n
"""
LETTERS = """
INSERT INTO celery_task_failures
    (class, task, queue, error_type, error_message, fingerprint, attempts, deliveries, decodable, message_id,
     first_failed_at, last_failed_at)
SELECT 'permanent', (%(tasks)s)[1 + n % cardinality(%(tasks)s)],
    (%(queues)s)[1 + n % cardinality(%(queues)s)],
    'ValueError', repeat('y', 120), left(md5((n % 60)::text), 16), 1, 1, true, -n,
    now() - n * interval '1 s', now() - n * interval '1 s'
FROM generate_series(1, %(rows)s) n
"""


def fill(database: Database, rows: int) -> None:
    """Messages and dead letters, as many of each."""
    sheet = load_topology()
    values = {"rows": rows, "queues": list(sheet.queues), "tasks": list(sheet.queue_by_task)}
    with closing(database.connect("postgres")) as session, session.cursor() as cursor:
        cursor.execute("SET synchronous_commit = off")
        for queue in sheet.queues:
            cursor.execute("SELECT kombu_declare(%s, NULL, NULL)", (queue,))
        cursor.execute(MESSAGES.replace(" % ", " %% "), values)
        cursor.execute(LETTERS.replace(" % ", " %% "), values)
        cursor.execute("VACUUM ANALYZE kombu_message")
        cursor.execute("VACUUM ANALYZE celery_task_failures")


def scrape(port: int) -> str:
    """What the exporter shows."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def main(
    rows: Annotated[int, typer.Option(min=1000, help="Messages, and dead letters.")] = 1_000_000,
) -> None:
    """Measure, print, and fail when a scrape takes too long or a number is wrong."""
    for postgres in provisioned_cluster():
        measure(postgres.copy_database("skeldir", "scraped"), rows)


def measure(database: Database, rows: int) -> None:
    """Fill a database and scrape an exporter of it."""
    fill(database, rows)
    port = free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        started(exporter_command(port), Path(folder) / "exporter", environment(database.dsn("app_ro"))),
    ):
        text = found(port)
        took = []
        for _ in range(200):
            began = time.monotonic()
            text = scrape(port)
            took.append(time.monotonic() - began)
            time.sleep(0.02)
    report(text, sorted(took), rows)


def found(port: int) -> str:
    """The first scrape in which every collector has succeeded."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            text = scrape(port)
        except OSError:
            text = ""
        states = re.findall(r"^skeldir_exporter_collector_success\{.*\} (\S+)$", text, re.MULTILINE)
        if states == ["1.0"] * len(collectors(load_topology(), None)):
            return text
        time.sleep(0.2)
    raise SystemExit("the exporter did not find everything within two minutes")


def report(text: str, took: list[float], rows: int) -> None:
    """Say how long it took, and whether the numbers are right."""
    table = Table("what", "took", title=f"{rows:,} messages, {rows:,} dead letters")
    table.add_row("scrape, median of 200", f"{median(took) * 1000:.1f} ms")
    table.add_row("scrape, slowest", f"{took[-1] * 1000:.1f} ms")
    for name, seconds in re.findall(r'duration_seconds\{collector="(\w+)"\} (\S+)', text):
        table.add_row(f"looking, in the background: {name}", f"{float(seconds) * 1000:.0f} ms")
    Console(width=100).print(table)
    messages = sum(float(n) for n in re.findall(r"^celery_queue_messages\{.*\} (\S+)$", text, re.MULTILINE))
    letters = sum(float(n) for n in re.findall(r"^celery_dlq_open\{.*\} (\S+)$", text, re.MULTILINE))
    if (messages, letters) != (rows, rows) or took[-1] > LIMIT:
        raise SystemExit(
            f"counted {messages:.0f} messages and {letters:.0f} letters; slowest {took[-1]:.3f} s"
        )


if __name__ == "__main__":
    typer.run(main)
