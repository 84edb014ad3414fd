"""A primary that dies and its standby that takes over, under one DSN that names both."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import ROOT, Cluster, Database, Standby
from tests.workers import environment, ready_worker

JOBS = 120
TENANT = "6f1c1f6e-0d0e-4c8a-9a53-0a4f3bb0a001"
# Every job opens a transaction of its tenant: broker, results and the application's engine are all used.
PUBLISHER = f"""
import sys, time
from app.celery_app import celery_app as app
policy = dict(max_retries=200, interval_start=0, interval_step=0.2, interval_max=0.5)
results = []
for i in range({JOBS}):
    results.append(app.send_task("app.tasks.housekeeping.ping", kwargs=dict(tenant_id="{TENANT}"),
                                 retry=True, retry_policy=policy))
    print(i, flush=True)
    time.sleep(0.05)
answers = [result.get(timeout=60) for result in results]
print(sum(answer["tenant_id"] == "{TENANT}" for answer in answers), "answers")
"""


@pytest.fixture
def pair(postgres: Cluster) -> Iterator[tuple[Standby, Standby]]:
    """A primary that confirms only what its standby has, and that standby."""
    primary = Standby(primary=postgres, settings={"synchronous_standby_names": "*"})
    standby = None
    try:
        primary.start()
        primary.promote()
        standby = Standby(primary=primary).start()
        yield primary, standby
    finally:
        primary.destroy()
        if standby:
            standby.destroy()


@pytest.mark.timeout(180)
def test_work_goes_on_at_the_standby_and_nothing_is_lost(
    pair: tuple[Standby, Standby], tmp_path: Path
) -> None:
    primary, standby = pair
    # As a person writes it; the standby first, so that a session that doesn't ask for writes would end there.
    dsn = primary.dsn("app_user", "skeldir").replace(
        f"{primary.host}:{primary.port}", f"{standby.host}:{standby.port},{primary.host}:{primary.port}"
    )
    log = tmp_path / "publisher"
    with ready_worker(dsn, "housekeeping", tmp_path) as worker, log.open("w+") as out:
        publisher = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER],
            cwd=ROOT,
            env=environment(dsn),
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while "\n30\n" not in log.read_text():
                assert publisher.poll() is None, publisher.communicate()[1]
                time.sleep(0.05)
            primary.stop("immediate")
            killed = time.monotonic()
            standby.promote()
            said = publisher.communicate(timeout=120)[1]
        finally:
            publisher.kill()
        assert log.read_text().endswith(f"{JOBS} answers\n"), said
        assert worker.process.poll() is None
        after = Database(standby, "skeldir")
        assert after.rows("SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS'")[0][0] >= JOBS
        print(f"primary lost; all {JOBS} jobs done {time.monotonic() - killed:.1f} s later")
        deadline = time.monotonic() + 10
        while after.rows("SELECT count(*) FROM kombu_message") != [(0,)]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
