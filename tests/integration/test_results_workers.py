"""The result backend under real workers of each pool, also while Postgres goes away."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError

POOLS = {
    "prefork": ["-P", "prefork", "-c", "2"],
    "solo": ["-P", "solo"],
    "threads": ["-P", "threads", "-c", "4"],
}


@pytest.fixture(scope="module")
def database(postgres):
    yield postgres.copy_database("skeldir", "results_workers")
    postgres.drop_database("results_workers")


@pytest.fixture(scope="module")
def tasks(database, tmp_path_factory):
    """The tasks' module, imported here as the workers import it."""
    folder = tmp_path_factory.mktemp("broker")
    os.environ["RESULTS_TEST_FOLDER"] = str(folder)
    os.environ["RESULTS_TEST_DSN"] = database.dsn("app_user")
    from tests.integration import results_app  # noqa: PLC0415 - reads the environment

    yield results_app
    results_app.app.close()


@contextmanager
def worker(tasks, *options):
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "tests.integration.results_app",
        "worker",
        "-l",
        "WARNING",
    ]
    log = open(f"{tasks._FOLDER}.log", "ab")  # noqa: SIM115 - the worker's, until it ends
    process = subprocess.Popen(
        [*command, "--without-mingle", "--without-gossip", "--without-heartbeat", *options],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        assert tasks.add.delay(1, 1).get(timeout=20) == 2
        yield process
        assert process.poll() is None, "the worker ended"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


@pytest.fixture(scope="module", params=POOLS)
def pool(request, tasks):
    with worker(tasks, *POOLS[request.param]):
        yield request.param


@pytest.fixture
def query(database):
    def run(statement, *parameters):
        with closing(database.connect("postgres")) as connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall()

    return run


def test_results_of_every_kind(tasks, pool, query):
    failed, silent, progress = tasks.fail.delay("k"), tasks.silent.delay(), tasks.progress.delay()
    assert chain(tasks.add.s(1, 2), tasks.add.s(3)).delay().get(timeout=10) == 6
    assert group(tasks.add.s(i, i) for i in range(10)).delay().get(timeout=10) == [2 * i for i in range(10)]
    assert chord([tasks.add.s(i, i) for i in range(5)], tasks.total.s()).delay().get(timeout=15) == 20
    assert tasks.stubborn.delay().get(timeout=10) == 2
    assert progress.get(timeout=10) == "whole"
    with pytest.raises(KeyError):
        failed.get(timeout=10)
    assert "raise KeyError" in failed.traceback
    assert query("SELECT count(*) FROM celery_taskmeta WHERE task_id = %s", silent.id) == [(0,)]


def test_a_chord_whose_header_fails(tasks, pool):
    result = chord([tasks.add.s(1, 1), tasks.fail.s("k")], tasks.total.s()).delay()
    assert isinstance(result.get(timeout=15, propagate=False), ChordError)


def test_progress_can_be_followed(tasks, pool):
    result = tasks.progress.delay()
    seen = set()
    deadline = time.monotonic() + 10
    while not result.ready() and time.monotonic() < deadline:
        seen.add(result.state)
        time.sleep(0.05)
    assert "PROGRESS" in seen


def test_one_connection_a_process(tasks, pool, query):
    group(tasks.add.s(i, i) for i in range(20)).delay().get(timeout=10)
    [(sessions,)] = query(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND pid <> pg_backend_pid()",
        f"results-worker-{os.path.basename(tasks._FOLDER)}",
    )
    assert sessions <= {"prefork": 4, "solo": 2, "threads": 2}[pool]  # with this process's own


def test_nothing_is_lost_when_postgres_goes_away(tasks, pool, postgres, query):
    """The broker stays here: so every job is acknowledged, and what its result met was Postgres alone."""
    jobs = [tasks.slow.delay(i, 0.1) for i in range({"prefork": 50, "solo": 25, "threads": 100}[pool])]
    jobs[0].get(timeout=10)
    query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
        f"results-worker-{os.path.basename(tasks._FOLDER)}",
    )
    jobs[5].get(timeout=10)
    postgres.restart("immediate")
    assert not jobs[-1].ready(), "all were done before Postgres went away"
    assert [job.get(timeout=20) for job in jobs] == list(range(len(jobs)))


def test_children_that_are_replaced(tasks, query):
    with worker(tasks, *POOLS["prefork"], "--max-tasks-per-child", "1"):
        parents = [tasks.publish_children.delay(2) for _ in range(10)]
        assert [parent.get(timeout=20) for parent in parents] == [2] * 10
        assert group(tasks.add.s(i, 1) for i in range(10)).delay().get(timeout=20) == list(range(1, 11))
