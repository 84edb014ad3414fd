"""Whole units killed with -9 amid running and prefetched jobs: systemd restarts them, and nothing is lost."""

from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import pytest
from testinfra.host import Host

from tests.lab import SHEET, invocations, processes, python, sql, unit, wait_until

PING, REFRESH = "app.tasks.housekeeping.ping", "app.tasks.maintenance.refresh_all_materialized_views"
JOBS = 300

_PUBLISH = f"""
import json
from app.broker import batch
from app.celery_app import celery_app as app
with batch():
    ids = [app.send_task("{PING}").id for _ in range({JOBS})]
print(json.dumps([app.send_task("{REFRESH}").id, *ids]))
"""
_STORED = "SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS' AND task_id IN ({})"


@pytest.mark.timeout(180)
def test_killed_units_come_back_and_every_job_is_done(
    worker: Host, database: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    quick, slow = SHEET.queue_by_task[PING], SHEET.queue_by_task[REFRESH]

    def held(name: str) -> int:
        return int(
            sql(
                database,
                "SELECT count(*) FROM kombu_message m JOIN kombu_queue q ON q.id = m.queue_id"  # noqa: S608
                f" WHERE q.name = '{name}' AND m.holder IS NOT NULL",
            )
        )

    before = invocations(worker)
    # Frozen children: the unit holds a job for each of them and all that it may prefetch.
    children = " ".join(processes(worker, quick.name)[1:])
    worker.check_output(f"kill -STOP {children}")
    with ThreadPoolExecutor() as pool:
        # The refresh waits for this lock, so it is in the middle of running.
        lock = pool.submit(sql, database, "BEGIN; LOCK TABLE events; SELECT pg_sleep(8); ROLLBACK")
        ids = python(worker, _PUBLISH)
        wait_until(lambda: held(quick.name) == quick.concurrency * quick.prefetch and held(slow.name) > 0, 7)
        taken = held(quick.name) + held(slow.name)
        worker.check_output(
            f"systemctl kill --signal=KILL --kill-whom=all {unit(quick.name)} {unit(slow.name)}"
        )
        killed = monotonic()
        stored = _STORED.format(", ".join(f"'{id_}'" for id_ in ids))
        free = wait_until(lambda: held(quick.name) + held(slow.name) == 0, 15)
        wait_until(lambda: int(sql(database, stored)) > 0, 60)
        again = monotonic() - killed
        lock.result()
        wait_until(lambda: int(sql(database, stored)) == len(ids), 60)
        done = monotonic() - killed
    after = invocations(worker)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {unit(quick.name), unit(slow.name)}
    wait_until(lambda: sql(database, "SELECT count(*) FROM kombu_message") == "0", 10)
    failures = "SELECT count(*) FROM celery_task_failures WHERE task_id IN ({})"
    assert sql(database, failures.format(", ".join(f"'{id_}'" for id_ in ids))) == "0"
    # These restarts were meant: other tests look for those that were not.
    worker.check_output(f"systemctl reset-failed {unit(quick.name)} {unit(slow.name)}")
    with capsys.disabled():
        print(
            f"\n2 units killed while they held {taken} of {len(ids)} jobs: free again after {free:.1f} s,"
            f" running again after {again:.1f} s, all done after {done:.1f} s"
        )
