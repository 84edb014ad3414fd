"""A backup put back on the lab's hosts, by copy and paste; the way back from it, too."""

import json
from collections.abc import Iterator

import pytest
from testinfra.host import Host

from tests import runbooks
from tests.lab import ROOT, SHEET, http, python, site, sql, task_state, unit, wait_until

PAGE = runbooks.RUNBOOKS / "postgres-restore.md"
QUEUE = "housekeeping"
PING = "app.tasks.housekeeping.ping"
REFRESH = "app.tasks.maintenance.refresh_all_materialized_views"
JOBS = 5
SWAP, UNDO = "PUT=skeldir_restored KEEP=skeldir_before", "PUT=skeldir_before KEEP=skeldir_restored"
WHO_MAY = "SELECT acl FROM pg_database, unnest(datacl) AS acl WHERE datname = 'skeldir' ORDER BY acl::text"
INVOCATION = "systemctl show --value --property=InvocationID skeldir-beat.service"
assert SHEET.beat
BEAT = SHEET.beat.port


def paste(host: Host, script: str) -> tuple[int, str]:
    done = host.run("bash -c %s", f"exec 2>&1\n{script}")
    return done.rc, done.stdout


def publish(worker: Host, task: str, count: int = 1) -> list[str]:
    code = f"[celery_app.send_task('{task}').id for _ in range({count})]"
    published: list[str] = python(
        worker, f"import json; from app.celery_app import celery_app; print(json.dumps({code}))"
    )
    return published


@pytest.fixture
def put_right(worker: Host, database: Host) -> Iterator[None]:
    """One database, open, with its workers, whatever became of the test."""
    yield
    for name in ("skeldir_restored", "skeldir_before"):
        database.run(f"runuser -u postgres -- dropdb --if-exists --force {name}")
    database.run("runuser -u postgres -- psql -Xc 'ALTER DATABASE skeldir ALLOW_CONNECTIONS true'")
    database.run("rm -rf /var/backups/skeldir")
    worker.check_output("systemctl start skeldir-workers.target")


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("put_right")
def test_a_backup_is_put_back(worker: Host, database: Host) -> None:
    def done(jobs: list[str]) -> bool:
        return {task_state(database, job) for job in jobs} == {"SUCCESS"}

    def pasted(script: str) -> tuple[int, str]:
        if "worker host:" in script:
            return paste(worker, script)
        answer = paste(database, script)
        if SWAP in script and answer[0] == 0:
            assert task_state(database, younger) == ""
            status, said = paste(database, script.replace(SWAP, UNDO))
            assert status == 0, said
            assert task_state(database, younger) == "SUCCESS"
            answer = paste(database, script)
        return answer

    # Jobs that waited when the dump was made and were done since, and one that was published since.
    worker.check_output(f"systemctl stop {unit(QUEUE)}")
    waiting = publish(worker, PING, JOBS)
    [block] = [
        block
        for block in runbooks.read_docs(ROOT / "docs/operating.md")
        if block.run_by == "molecule/default/tests/test_restore.py"
    ]
    status, said = paste(database, block.text)
    assert (status, said) == (0, "")
    worker.check_output(f"systemctl start {unit(QUEUE)}")
    [younger] = publish(worker, PING)
    wait_until(lambda: done([*waiting, younger]), 30)

    who_may, scheduler = sql(database, WHO_MAY), worker.check_output(INVOCATION)
    dump = database.check_output("ls /var/backups/skeldir/*.dump")
    page = runbooks.Reader(runbooks.read_page(PAGE), pasted)
    assert page.page.sections == runbooks.SECTIONS
    assert PAGE.name == "postgres-restore.md"
    page.paste("Diagnosis", DUMP=dump)
    page.paste("Mitigation")
    wait_until(lambda: done(waiting), 60)
    assert task_state(database, younger) == ""
    # The scheduler came back by itself.
    wait_until(lambda: http(worker, BEAT, "/health/ready")[0] == 200, 20)
    assert json.loads(http(worker, BEAT, "/health")[1])["role"] == "active"
    assert worker.check_output(INVOCATION) == scheduler
    # A view that the restore had left empty couldn't be refreshed.
    refreshed = publish(worker, REFRESH)
    wait_until(lambda: done(refreshed), 30)

    assert sql(database, WHO_MAY) != who_may
    run = site()
    assert (run.status, run.changed) == (0, 1), run.output[-3000:]
    assert sql(database, WHO_MAY) == who_may
    page.paste("Verify recovered", SURE="yes")
    page.assert_nothing_is_left()
    again = site()
    assert (again.status, again.changed) == (0, 0), again.output[-3000:]
    assert sql(
        database, "SELECT string_agg(datname, ' ') FROM pg_database WHERE datname LIKE 'skeldir%'"
    ) == ("skeldir")
