"""A steady load and its ledger, run on a worker host in an installed release, as the operator.

load.py publish RATE LEDGER     jobs a second, round all queues, until it is told to stop
load.py judge LEDGER            what became of them, as JSON
"""

import json
import signal
import sys
import time
from itertools import cycle, islice, pairwise
from pathlib import Path

from sqlalchemy import text

from app.broker import batch
from app.celery_app import celery_app, topology
from app.db.session import get_engine

PING = "app.tasks.housekeeping.ping"
REFRESH = "app.tasks.maintenance.refresh_all_materialized_views"  # one a second: it may take its time
TICK = 0.1


def publish(rate: int, ledger: Path) -> None:
    """A job stands in the ledger once it was accepted."""
    running = True

    def stop(*_: object) -> None:
        nonlocal running
        running = False

    signal.signal(signal.SIGTERM, stop)
    queues = cycle(topology().queues)
    due = time.monotonic()
    with ledger.open("a", buffering=1) as lines:
        while running:
            with batch():
                sent = [
                    (celery_app.send_task(PING, queue=queue).id, queue)
                    for queue in islice(queues, int(rate * TICK))
                ]
                if int(due) != int(due - TICK):
                    sent.append((celery_app.send_task(REFRESH).id, topology().queue_by_task[REFRESH].name))
            lines.write("".join(f"{id_} {queue}\n" for id_, queue in sent))
            due += TICK
            time.sleep(max(0.0, due - time.monotonic()))


def judge(ledger: Path) -> dict[str, object]:
    """Jobs published, done, and failed, and by queue the longest time in which none was done."""
    queue_of = dict(line.split() for line in ledger.read_text().splitlines())
    done: dict[str, list[float]] = {queue: [] for queue in topology().queues}
    ids = list(queue_of)
    with get_engine().connect() as connection:
        for start in range(0, len(ids), 5000):
            rows = connection.execute(
                text(
                    "SELECT task_id, extract(epoch FROM date_done)::float8 FROM celery_taskmeta"
                    " WHERE status = 'SUCCESS' AND task_id = ANY(:ids)"
                ),
                {"ids": ids[start : start + 5000]},
            )
            for id_, when in rows:
                done[queue_of[id_]].append(when)
        failed = connection.scalar(
            text("SELECT count(*) FROM celery_task_failures WHERE task_id = ANY(:ids)"), {"ids": ids}
        )
    gaps = {}
    for queue, times in done.items():
        times.sort()
        gaps[queue] = max((after - before for before, after in pairwise(times)), default=0)
    return {
        "published": len(ids),
        "done": sum(map(len, done.values())),
        "failed": failed,
        "longest_gap": {queue: round(gap, 2) for queue, gap in gaps.items()},
        "seconds": round(
            max(max(times) for times in done.values()) - min(min(times) for times in done.values())
        ),
    }


if sys.argv[1] == "publish":
    publish(int(sys.argv[2]), Path(sys.argv[3]))
else:
    print(json.dumps(judge(Path(sys.argv[2]))))
