"""Every password and the server's certificate replaced under load."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
from testinfra.host import Host

from tests.lab import SECRETS, Ledger, invocations, playbook, python, site, sql

pytestmark = pytest.mark.timeout(900)

RATE = 50
CREDENTIALS = ("/etc/skeldir/credentials/database_url", "/etc/skeldir/operator/database_url")
_LOGIN = """
import json, psycopg2
try:
    session = psycopg2.connect("{dsn}", connect_timeout=5)
    cursor = session.cursor()
    cursor.execute("SELECT current_user")
    print(json.dumps(cursor.fetchone()[0]))
except psycopg2.OperationalError as error:
    print(json.dumps(str(error)))
"""


@dataclass
class Rotated:
    """What was before, and what became of the jobs meanwhile."""

    old: dict[str, str]
    dsns: list[str]
    ledger: Ledger


def secrets() -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in SECRETS.iterdir()}


def answer(worker: Host, dsn: str) -> str:
    """As whom the database takes somebody who logs in so, or why it doesn't."""
    return str(python(worker, _LOGIN.format(dsn=dsn)))


@pytest.fixture(scope="module")
def rotated(worker: Host, database: Host, load: Callable[[int], AbstractContextManager[Ledger]]) -> Rotated:
    old, units = secrets(), invocations(worker)
    dsns = [worker.file(path).content_string.strip() for path in CREDENTIALS]
    with load(RATE) as ledger:
        renewed = site("--tags=postgres", "--extra-vars=tls_renew_days=9999")
        assert renewed.status == 0, renewed.output[-3000:]
        assert invocations(worker) == units
        run = playbook("playbooks/rotate.yml")
        assert run.status == 0, run.output[-3000:]
    print(ledger)
    return Rotated(old, dsns, ledger)


def test_no_job_is_lost_and_none_fails(rotated: Rotated) -> None:
    ledger = rotated.ledger
    assert ledger.published > 20 * RATE
    assert (ledger.done, ledger.failed) == (ledger.published, 0)


def test_the_old_passwords_are_refused_and_the_new_ones_taken(worker: Host, rotated: Rotated) -> None:
    new = secrets()
    assert new.keys() == rotated.old.keys()
    assert not set(new.values()) & set(rotated.old.values())
    for path, dsn in zip(CREDENTIALS, rotated.dsns, strict=True):
        assert "password authentication failed" in answer(worker, dsn)
        assert answer(worker, worker.file(path).content_string.strip()).startswith("app_")


def test_nothing_is_left_of_the_second_names(database: Host, rotated: Rotated) -> None:
    assert sql(database, "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'app\\_%next'") == "0"
    assert sql(database, "SELECT count(*) FROM pg_stat_activity WHERE usename LIKE '%next'") == "0"
    assert not (SECRETS / "next").exists()
