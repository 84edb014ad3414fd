"""A runbook on a deployed worker host, by copy and paste."""

import pytest
from testinfra.host import Host

from tests import runbooks
from tests.lab import python, scheduler_paused, sql, wait_until

REFRESH = "app.tasks.maintenance.refresh_all_materialized_views"
FUNCTION = "EXECUTE ON FUNCTION refresh_all_materialized_views"
JOBS = 3


@pytest.mark.timeout(180)
def test_replaying_after_a_fix(worker: Host, database: Host) -> None:
    def paste(script: str) -> tuple[int, str]:
        done = worker.run("bash -c %s", f"exec 2>&1\n{script}")
        return done.rc, done.stdout

    def dead_letters(column: str) -> list[str]:
        where = f"task_id IN ({', '.join(map(repr, published))})"
        return sql(database, f"SELECT {column} FROM celery_task_failures WHERE {where}").split()  # noqa: S608

    # The schedule has this task, too: its run would fail in company with these.
    with scheduler_paused(worker, database):
        sql(database, f"REVOKE {FUNCTION} FROM app_user")  # as a deployment that forgot a grant
        try:
            publish = f"[celery_app.send_task('{REFRESH}').id for _ in range({JOBS})]"
            published = python(
                worker, f"import json; from app.celery_app import celery_app; print(json.dumps({publish}))"
            )
            wait_until(lambda: dead_letters("state") == ["pending"] * JOBS, 60)
        finally:
            sql(database, f"GRANT {FUNCTION} TO app_user")
        [group] = set(dead_letters("fingerprint"))
        page = runbooks.Reader(runbooks.read_page(runbooks.RUNBOOKS / "dlq-replay-after-a-fix.md"), paste)
        page.paste("Diagnosis", GROUP=group)
        [said] = page.paste("Mitigation")
        assert f"{JOBS} succeeded" in said
        page.paste("Verify recovered")
        page.assert_nothing_is_left()
        assert dead_letters("state") == ["resolved"] * JOBS
