"""What the tests of every scenario share."""

from collections.abc import Generator

import pytest
from testinfra.host import Host

from tests.lab import INVENTORY, SCENARIO, lab_host

EXPECTED = {"default": 103, "queues": 34, "refusals": 16}
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
    found = [path.read_text().strip() for path in (INVENTORY / ".secrets").iterdir()]
    assert len(found) == 4
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the units' last journal lines beside a test that failed."""
    report = yield
    if report.failed and report.when == "call" and SCENARIO != "refusals":
        journal = lab_host("worker1").run("journalctl --no-pager --output=cat --lines=30 --unit='skeldir-*'")
        report.sections.append(("journal of the units", journal.stdout))
    return report
