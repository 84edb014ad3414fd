"""What a backlog and a long past cost: the time a job takes, against an empty table, and the table's size.

    python -m bench.backlog [--waiting 1000000] [--passed 10000000]

A Postgres of its own with default settings; one `solo` worker drains real jobs each time.
"""

import argparse
import json
import sys
import time
from contextlib import closing
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import measures, servers
from bench.measures import Contender
from tests.postgres import Database

JOBS = 5000
ROUNDS = 3
CHUNK = 50_000
BATCH = 1000
TAKE = (
    "SELECT id, delivery FROM kombu_take(1, %s::bigint[], %s::integer[],"
    " ARRAY[%s], '{0}', '{9}', '{0}', '{NULL}', %s, false, false)"
)


def fill(cursor: Any, message: tuple[int, str], count: int) -> None:
    """Put copies of one message (queue and payload) into its queue."""
    cursor.execute(
        "INSERT INTO kombu_message (queue_id, payload) SELECT %s, %s FROM generate_series(1, %s)",
        (*message, count),
    )


def pass_through(cursor: Any, message: tuple[int, str], count: int) -> None:
    """Take and acknowledge so many messages, with never more than a chunk of them in the table."""
    cursor.execute("INSERT INTO kombu_holder (id, name) VALUES (1, 'bench')")
    for _ in track(range(count // CHUNK), "messages pass", console=Console(stderr=True)):
        fill(cursor, message, CHUNK)
        ids: list[int] = []
        deliveries: list[int] = []
        while True:
            cursor.execute(TAKE, (ids, deliveries, message[0], BATCH))
            rows = cursor.fetchall()
            if not rows:
                break
            ids, deliveries = [row[0] for row in rows], [row[1] for row in rows]
    cursor.execute("DELETE FROM kombu_holder WHERE id = 1")


def rate(contender: Contender, *, publish: bool) -> float:
    """Jobs a second of one worker."""
    with measures.run(contender) as r:
        if publish:
            r.client("publish_many", JOBS)
        with r.worker("--pool", "solo") as worker:
            found = r.started(JOBS, seconds=300)
            measures.kill(worker)
        return measures.rate(found)


def main() -> int:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--waiting", type=int, default=1_000_000)
    parser.add_argument("--passed", type=int, default=10_000_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    with servers.postgres() as cluster, closing(cluster.connect(database="skeldir")) as session:
        session.autocommit = True
        cursor = session.cursor()
        database = Database(cluster, "skeldir")
        url = database.dsn("app_user")
        ours = Contender("ours", f"sqla+{url}", f"db+{url}", database)

        def size(what: str) -> float:
            cursor.execute(f"SELECT pg_{what}_size('kombu_message') / 1048576.0")
            return float(cursor.fetchone()[0])

        def empty() -> None:
            cursor.execute("DELETE FROM kombu_message; DELETE FROM kombu_holder")

        found: list[dict[str, float | str]] = []

        def note(when: str, *, publish: bool = True) -> None:
            jobs = median(rate(ours, publish=publish) for _ in range(ROUNDS))
            sizes = {"MiB of the table": size("table"), "MiB of its indexes": size("indexes")}
            found.append({"when": when, "jobs a second": jobs, **sizes})
            console.print(found[-1])

        rate(ours, publish=True)  # warms up
        with measures.run(ours) as r:
            r.client("publish_many", 1)
        cursor.execute("SELECT queue_id, payload FROM kombu_message ORDER BY id DESC LIMIT 1")
        message = cursor.fetchone()
        empty()
        note("empty")
        empty()
        fill(cursor, message, arguments.waiting)
        note(f"{arguments.waiting:,} waiting", publish=False)
        empty()
        cursor.execute("VACUUM kombu_message")
        pass_through(cursor, message, arguments.passed)
        note(f"{arguments.passed:,} passed")
        empty()
        deadline = time.monotonic() + 300
        while size("table") > 5 and time.monotonic() < deadline:
            time.sleep(5)  # autovacuum looks once a minute
        note("and after autovacuum")
    if arguments.json:
        print(json.dumps(found))
        return 0
    table = Table("when", "jobs a second", "time of a job", "MiB of the table", "MiB of its indexes")
    for row in found:
        slower = float(found[0]["jobs a second"]) / float(row["jobs a second"])
        table.add_row(
            str(row["when"]),
            f"{row['jobs a second']:,.0f}",
            f"{slower:.2f}x",
            f"{row['MiB of the table']:.1f}",
            f"{row['MiB of its indexes']:.1f}",
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
