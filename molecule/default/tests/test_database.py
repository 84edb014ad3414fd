"""The server's files: who is let in, and what happens when one of them can't be used."""

from collections.abc import Iterator

import pytest
from testinfra.host import Host

from tests.lab import Run, site, sql

pytestmark = pytest.mark.timeout(300)


def deploy(*arguments: str) -> Run:
    return site("--limit=db1", "--tags=postgres", *arguments)


@pytest.fixture
def put_right(database: Host) -> Iterator[None]:
    """The server lets in whom it let in before the test, without having been restarted."""
    state = "SELECT pg_postmaster_start_time(), array_agg(address) FROM pg_hba_file_rules"
    before = sql(database, state)
    yield
    run = deploy()
    assert run.status == 0, run.output[-3000:]
    assert sql(database, state) == before


def test_hosts_that_only_publish_are_let_in(database: Host) -> None:
    rules = sql(
        database,
        "SELECT type || ' ' || auth_method || ' ' || array_to_string(user_name, ',')"
        " FROM pg_hba_file_rules WHERE address = '192.0.2.0'",
    )
    assert rules == "hostssl scram-sha-256 +app_owner,+app_user,+app_rw,+app_ro"


@pytest.mark.usefixtures("put_right")
@pytest.mark.parametrize(
    ("variable", "word"),
    [
        ('{"postgres_max_wal_size": "2QB"}', "max_wal_size"),
        ('{"postgres_client_addresses": ["192.0.2.0/240"]}', "pg_hba.conf"),
    ],
)
def test_what_the_server_cannot_use_ends_the_run_before_a_restart(
    database: Host, variable: str, word: str
) -> None:
    run = deploy(f"--extra-vars={variable}")
    assert run.status != 0
    assert word in run.sentences[0]
    assert sql(database, "SELECT 1") == "1"


def test_data_in_another_version_is_not_left_behind(database: Host) -> None:
    run = deploy("--extra-vars=postgres_version=99")
    assert run.status != 0
    assert run.changed == 0
    assert "99 would begin with nothing" in run.sentences[0]
