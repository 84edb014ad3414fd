"""A runbook on a deployed worker host, by copy and paste."""

import json

import pytest
from testinfra.host import Host

from tests import runbooks
from tests.lab import python, sql, wait_until

REFRESH = "app.tasks.maintenance.refresh_all_materialized_views"
FUNCTION = "EXECUTE ON FUNCTION refresh_all_materialized_views"
JOBS = 3


@pytest.mark.timeout(180)
def test_replaying_after_a_fix(worker: Host, database: Host) -> None:
    def paste(script: str) -> tuple[int, str]:
        done = worker.run("bash -c %s", f"exec 2>&1\n{script}")
        return done.rc, done.stdout

    def rows(state: str) -> int:
        where = f"task = '{REFRESH}' AND state = '{state}'"
        return int(sql(database, f"SELECT count(*) FROM celery_task_failures WHERE {where}"))  # noqa: S608

    before = rows("resolved")
    sql(database, f"REVOKE {FUNCTION} FROM app_user")  # as a deployment that forgot a grant
    try:
        publish = f"[celery_app.send_task('{REFRESH}').id for _ in range({JOBS})]"
        python(worker, f"import json; from app.celery_app import celery_app; print(json.dumps({publish}))")
        wait_until(lambda: rows("pending") == JOBS, 30)
    finally:
        sql(database, f"GRANT {FUNCTION} TO app_user")
    page = runbooks.Reader(runbooks.read_page(runbooks.RUNBOOKS / "dlq-replay-after-a-fix.md"), paste)
    [group] = [
        group["fingerprint"]
        for group in json.loads(worker.check_output("skeldir dlq groups --json"))
        if group["task"] == REFRESH
    ]
    page.paste("Diagnosis", GROUP=group)
    [said] = page.paste("Mitigation")
    assert f"{JOBS} succeeded" in said
    page.paste("Verify recovered")
    page.assert_nothing_is_left()
    assert (rows("pending"), rows("resolved")) == (0, before + JOBS)
