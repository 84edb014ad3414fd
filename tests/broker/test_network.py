"""Hosts that vanish without a word: cut off, their connections neither closed nor reset."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.broker.conftest import Ledger, Worker, celery_environment, until
from tests.cable import Cable, cluster_at, laid_cable, needs_cable
from tests.postgres import Cluster, Database

pytestmark = needs_cable


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    yield from laid_cable()


@pytest.fixture(scope="module")
def postgres(cable: Cable) -> Iterator[Cluster]:
    yield from cluster_at(cable)


@pytest.fixture
def far_worker(database: Database, tmp_path: Path, cable: Cable) -> Iterator[Worker]:
    one = object.__new__(Worker)
    one.name, one.log = "far@test", tmp_path / "far.log"
    with one.log.open("wb") as log:
        one.process = subprocess.Popen(
            [
                *("ip", "netns", "exec", cable.namespace, sys.executable, "-m", "celery"),
                *("-A", "tests.broker.app_for_tests", "worker", "-Q", "jobs", "-n", one.name, "-l", "INFO"),
                *("-c", "1"),
            ],
            env=celery_environment(database.dsn(), tmp_path) | {"PREFETCH": "4"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    yield one
    one.stop()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("run", range(int(os.environ.get("SKELDIR_VANISHED_RUNS", "1"))))
def test_a_vanished_hosts_jobs_run_elsewhere_and_it_changes_nothing_when_it_is_back(
    run: int,
    cable: Cable,
    far_worker: Worker,
    worker: Callable[..., Worker],
    publish: Callable[[str], None],
    ledger: Ledger,
    database: Database,
) -> None:
    far_worker.ready()
    # The first runs while the host is cut off and ends after it is back: its acknowledgement is a zombie's.
    publish("tasks.job.delay('j0', 22.0)\nfor i in range(1, 4): tasks.job.delay(f'j{i}', 0.1)")
    until(lambda: ledger.count("began j0") == 1)
    until(lambda: database.rows("SELECT count(*) FROM kombu_message WHERE holder IS NOT NULL") == [(4,)])
    holders = "SELECT DISTINCT holder FROM kombu_message WHERE holder IS NOT NULL"
    ((zombie,),) = database.rows(holders)
    near = worker("-c", "4", PREFETCH="1").ready()
    cable.cut()
    cut = time.time()
    try:
        # Whoever listens to the queue is told, and that host doesn't confirm it: so it is missed the latest.
        publish("import time; time.sleep(3.5); tasks.job.delay('meanwhile')")
        until(lambda: ledger.count("began j0") == 2 and ledger.count("ended j3") == 1, 30)
        elsewhere = max(ledger.when("began j0"), ledger.when("ended j3")) - cut
    finally:
        cable.mend()
    print(f"vanished host: its jobs ran elsewhere after {elsewhere:.1f} s")
    assert elsewhere < 15
    ((heir,),) = database.rows(holders)
    assert heir != zombie
    until(lambda: ledger.count("ended j0") == 1, 40)  # the zombie's: ours began later
    until(lambda: "given up for dead" in far_worker.text, 20)
    # Its acknowledgement changed nothing: the message is still its heir's, until that one is done too.
    assert database.rows("SELECT holder, delivery FROM kombu_message") == [(heir, 2)]
    until(lambda: database.rows("SELECT count(*) FROM kombu_message") == [(0,)], 30)
    # What it had fetched too is in its pool, which runs it again: a job may run twice, never not at all.
    assert all(ledger.count(f"ended j{i}") >= 1 for i in range(4))
    # And it goes on working, as somebody new.
    near.stop()
    publish("tasks.job.delay('after')")
    until(lambda: ledger.count("ended after") == 1)
    names = database.rows(f"SELECT count(*) FROM kombu_holder WHERE id = {zombie}")
    assert names == [(0,)]
