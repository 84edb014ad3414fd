"""The runbooks of the dead letters, pasted into a shell, beside a worker whose jobs really failed."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.dlq import store
from app.dlq.classify import Failure
from app.dlq.store import Filter
from tests import runbooks
from tests.dlq.conftest import until
from tests.dlq.plane import TENANT_A, TENANT_B, Plane, payload
from tests.postgres import BIN, ROOT
from tests.workers import Worker, ready_worker

PAGES = sorted(path.name for path in runbooks.pages("dlq-*.md"))
REFRESH = "app.tasks.maintenance.refresh_all_materialized_views"
RETENTION = "app.tasks.maintenance.enforce_data_retention"
PING = "app.tasks.housekeeping.ping"

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def worker(shared_plane: Plane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One worker for all queues."""
    queues, directory = ",".join(shared_plane.sheet.queues), tmp_path_factory.mktemp("worker")
    with ready_worker(shared_plane.database.dsn(), queues, directory) as one:
        yield one


@pytest.fixture
def plane(shared_plane: Plane, worker: Worker) -> Iterator[Plane]:
    """The plane, without anything that an earlier test left."""
    yield shared_plane
    change(
        shared_plane, "SET app.purge_open = on; DELETE FROM celery_task_failures; DELETE FROM kombu_message"
    )


@pytest.fixture
def reader(plane: Plane, tmp_path: Path) -> Iterator[Callable[[str], runbooks.Reader]]:
    """Somebody who opens a page on a worker host, and has run all of it in the end."""
    opened: list[runbooks.Reader] = []

    def open_page(name: str) -> runbooks.Reader:
        page = runbooks.read_page(runbooks.RUNBOOKS / name)
        opened.append(runbooks.Reader(page, runbooks.bash(operators_environment(plane, tmp_path), tmp_path)))
        return opened[-1]

    yield open_page
    for one in opened:
        one.assert_nothing_is_left()


def operators_environment(plane: Plane, home: Path) -> dict[str, str]:
    return {
        "PATH": f"{BIN}:/usr/bin:/bin",
        "HOME": str(home),
        "DATABASE_URL": plane.database.dsn("app_rw"),
    }


def change(plane: Plane, statements: str) -> None:
    """What somebody else does to the database."""
    session = plane.database.connect("postgres")
    session.cursor().execute(statements)
    session.close()


def break_it(plane: Plane) -> None:
    """A grant that a deployment forgot."""
    change(plane, "REVOKE EXECUTE ON FUNCTION refresh_all_materialized_views FROM app_user")


def repair_it(plane: Plane) -> None:
    change(plane, "GRANT EXECUTE ON FUNCTION refresh_all_materialized_views TO app_user")


def fail(plane: Plane, task: str, count: int, queue: str, **kwargs: object) -> None:
    """Publish jobs, and wait until all of them have failed."""
    before = rows(plane)
    for _ in range(count):
        plane.publish(payload(task=task, **kwargs), queue)
    until(lambda: rows(plane) == before + count and not plane.messages(), 30)


def rows(plane: Plane, state: str = "%") -> int:
    return int(plane.scalar(f"SELECT count(*) FROM celery_task_failures WHERE state LIKE '{state}'"))


def time_passes(plane: Plane, interval: str) -> None:
    change(plane, f"UPDATE celery_task_failures SET last_failed_at = last_failed_at - interval '{interval}'")


def first(of: str) -> str:
    """The first cell of the first row of a table that a command printed."""
    below = of.partition("┡")[2].splitlines()
    return below[1].split("│")[1].strip()


def last_cell_but_one(of: str) -> str:
    """The example's number in the first row of a table of groups."""
    below = of.partition("┡")[2].splitlines()
    return below[1].split("│")[-3].strip()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_its_sections_and_a_test(name: str) -> None:
    page = runbooks.read_page(runbooks.RUNBOOKS / name)
    assert page.sections == runbooks.SECTIONS
    assert {block.section for block in page.blocks} == {"Diagnosis", "Mitigation", "Verify recovered"}
    assert f'"{name}"' in Path(__file__).read_text()


def test_the_readmes_commands_run_as_they_stand_there(plane: Plane, tmp_path: Path) -> None:
    ids = [
        plane.fail(payload(task=PING), Failure.of("timeout", "TimeLimitExceeded", "m"), "housekeeping")
        for _ in range(7)
    ]
    run = runbooks.bash(operators_environment(plane, tmp_path), tmp_path)
    [block] = re.findall(r"```sh\n(skeldir dlq .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for command in block.splitlines():
        status, said = run(command.replace(" 42", f" {ids[-1]}"))
        assert status == 0, f"{command}\n{said}"
    until(lambda: rows(plane, "in_progress") == 0, 20)
    assert (rows(plane, "resolved"), rows(plane, "ignored")) == (7, 0)


def test_a_failure_burst(plane: Plane, reader: Callable[[str], runbooks.Reader]) -> None:
    break_it(plane)
    fail(plane, REFRESH, 12, "maintenance")
    page = reader("dlq-failure-burst.md")
    *_, ping, still = look(plane, page, GROUP=first, ID=first)
    assert ping.count(" ok ") == len(plane.sheet.queues)
    assert page.variables["GROUP"] in still
    *_, plan = page.paste("Mitigation")
    assert " 12 " in plan
    repair_it(plane)
    time_passes(plane, "10 minutes")
    *_, left = page.paste("Verify recovered")
    assert page.variables["GROUP"] in left
    assert plane.scalar("SELECT count(DISTINCT assignee) FROM celery_task_failures") == 1


def test_one_poison_job(plane: Plane, worker: Worker, reader: Callable[[str], runbooks.Reader]) -> None:
    lock = plane.database.connect("postgres")
    lock.autocommit = False
    lock.cursor().execute(
        "LOCK TABLE events"
    )  # so that the job is in the middle of its work when it is killed
    killed: set[int] = set()
    plane.publish(payload(task=REFRESH), "maintenance")
    for deaths in range(plane.sheet.queues["maintenance"].delivery_limit):
        until(lambda deaths=deaths: waiting(plane) > deaths, 30, worker.stdout)
        for pid in children(worker) - killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
    until(lambda: rows(plane) == 1 and not plane.messages(), 30, worker.stdout)
    lock.close()
    page = reader("dlq-one-poison-job.md")
    look(plane, page, ID=first)
    *_, replayed, ignored = page.paste("Mitigation")
    assert "1 succeeded" in replayed
    assert "0 ignored" in ignored
    page.paste("Verify recovered")


def look(plane: Plane, page: runbooks.Reader, **answers: Any) -> list[str]:
    """Paste what is under Diagnosis, which changes nothing."""
    traces = (
        "SELECT (SELECT count(*) FROM celery_task_failure_audit), (SELECT count(*) FROM kombu_message),"
        " (SELECT count(*) FROM celery_task_failure_replays),"
        " (SELECT string_agg(f::text, ',' ORDER BY id) FROM celery_task_failures f)"
    )
    before = plane.database.rows(traces)
    said = page.paste("Diagnosis", **answers)
    assert plane.database.rows(traces) == before
    return said


def waiting(plane: Plane) -> int:
    """Sessions of jobs that wait for a lock; that of a killed job doesn't notice before it has it."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND usename = 'app_user'"
    return int(plane.scalar(query))


def children(worker: Worker) -> set[int]:
    """The worker's processes that run jobs."""
    return set(
        map(int, Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split())
    )


def test_replaying_after_a_fix(plane: Plane, reader: Callable[[str], runbooks.Reader]) -> None:
    break_it(plane)
    fail(plane, REFRESH, 5, "maintenance")
    fail(plane, PING, 1, "housekeeping", fail=True)
    repair_it(plane)
    page = reader("dlq-replay-after-a-fix.md")
    look(plane, page, GROUP=first)
    [said] = page.paste("Mitigation")
    assert "5 succeeded" in said
    page.paste("Verify recovered")
    assert (rows(plane, "resolved"), rows(plane, "pending")) == (5, 1)


def test_a_tenants_failures(plane: Plane, reader: Callable[[str], runbooks.Reader]) -> None:
    change(
        plane,
        f"""
        INSERT INTO tenants (id, name) VALUES ('{TENANT_A}', 'a'), ('{TENANT_B}', 'b');
        INSERT INTO events (tenant_id, occurred_at, kind)
            SELECT id, now() - interval '200 days', 'x' FROM tenants;
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'events of this tenant are held by an audit'; END $$;
        CREATE TRIGGER audit BEFORE DELETE ON events FOR EACH ROW WHEN (OLD.tenant_id = '{TENANT_A}')
            EXECUTE FUNCTION refuse()
        """,
    )
    plane.publish(payload(task=RETENTION, tenant_id=TENANT_B), "maintenance")
    fail(plane, RETENTION, 4, "maintenance", tenant_id=TENANT_A)
    change(plane, "DROP TRIGGER audit ON events")
    page = reader("dlq-tenant-failures.md")
    look(plane, page, TENANT=TENANT_A, GROUP=first, ID=last_cell_but_one)
    _, replayed, ignored = page.paste("Mitigation")
    assert "4 succeeded" in replayed
    assert "0 ignored" in ignored
    page.paste("Verify recovered")
    assert plane.scalar("SELECT count(*) FROM events") == 0


def test_too_many_are_kept_and_what_was_deleted_comes_back(
    plane: Plane, reader: Callable[[str], runbooks.Reader]
) -> None:
    fail(plane, PING, 6, "housekeeping", fail=True)
    break_it(plane)
    fail(plane, REFRESH, 3, "maintenance")
    repair_it(plane)
    page = reader("dlq-full.md")
    *_, groups, _ = look(plane, page)
    assert page.run(f"skeldir dlq replay --task {REFRESH} --wait --reason fixed")[0] == 0
    with plane.session() as session:
        pings = [row.id for row in store.find(session, Filter(task=PING), limit=2)]
        store.ignore(session, Filter(ids=tuple(pings)), actor="t", reason="a test")
    assert (rows(plane, "resolved"), rows(plane, "ignored"), rows(plane, "pending")) == (3, 2, 4)
    time_passes(plane, "10 days")
    _, purged, _, ignored = page.paste("Mitigation", AGE="7d", GROUP=first(groups))
    assert "5 purged" in purged
    assert "4 ignored" in ignored
    page.paste("Verify recovered")

    page = reader("dlq-restore-from-export.md")
    look(plane, page, FILE=lambda listed: listed.split()[-1])
    restored, *_, back = page.paste("Mitigation", GROUP=first)
    assert "5 imported, 0 were here already" in restored
    assert "6 taken back" in back
    page.paste("Verify recovered")
