"""What the tests of every scenario share."""

import json
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from testinfra.host import Host

from tests.lab import ROOT, SCENARIO, SECRETS, Ledger, container, lab_host, sql, wait_until

EXPECTED = {"default": 102, "queues": 43, "refusals": 23, "fleet": 8}
"""Tests each scenario runs at least: a scenario that finds none of its tests must not be green."""


def pytest_collection_finish(session: pytest.Session) -> None:
    if len(session.items) < EXPECTED.get(SCENARIO, 0):
        pytest.exit(
            f"only {len(session.items)} tests of {SCENARIO} were found, {EXPECTED[SCENARIO]} were expected",
            returncode=1,
        )


@pytest.fixture(scope="session")
def worker() -> Host:
    return lab_host("worker1")


@pytest.fixture(scope="session")
def database() -> Host:
    return lab_host("db1")


@pytest.fixture(scope="session")
def secrets() -> list[str]:
    """Every password of the lab."""
    found = [path.read_text().strip() for path in SECRETS.iterdir()]
    assert len(found) == 4
    return found


@pytest.fixture(scope="session")
def load(worker: Host, database: Host) -> Callable[[int], AbstractContextManager[Ledger]]:
    """So many jobs a second through all queues, published by the release that is current when it begins."""
    subprocess.run(
        ["docker", "cp", ROOT / "tests/load.py", f"{container('worker1')}:/opt/load.py"], check=True
    )

    @contextmanager
    def loaded(rate: int) -> Iterator[Ledger]:
        ledger = Ledger()
        # A folder that stays, whatever is rolled out meanwhile.
        release = worker.check_output("readlink --canonicalize /opt/skeldir/current")
        run = f"{release}/venv/bin/python /opt/load.py"
        environment = "CREDENTIALS_DIRECTORY=/etc/skeldir/operator"
        worker.check_output("rm -f /opt/ledger")
        worker.check_output(
            f"systemd-run --collect --unit=load --setenv={environment} {run} publish {rate} /opt/ledger"
        )
        wait_until(lambda: worker.run("test -s /opt/ledger").rc == 0, 20)
        try:
            yield ledger
        finally:
            worker.check_output("systemctl stop load")
        wait_until(lambda: sql(database, "SELECT count(*) FROM kombu_message") == "0", 60)
        for name, value in json.loads(worker.check_output(f"{environment} {run} judge /opt/ledger")).items():
            setattr(ledger, name, value)

    return loaded


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the units' last journal lines beside a test that failed."""
    report = yield
    if report.failed and report.when == "call" and SCENARIO != "refusals":
        journal = lab_host("worker1").run("journalctl --no-pager --output=cat --lines=30 --unit='skeldir-*'")
        report.sections.append(("journal of the units", journal.stdout))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep the units' whole journal when something failed: the hosts are taken away."""
    if session.testsfailed and SCENARIO != "refusals":
        journal = lab_host("worker1").run("journalctl --no-pager --output=short-precise --unit='skeldir-*'")
        evidence = ROOT / "evidence"
        evidence.mkdir(exist_ok=True)
        (evidence / f"journal-{SCENARIO}-worker1.txt").write_text(journal.stdout)
