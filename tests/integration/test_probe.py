"""The probe of the database, on a real one."""

import time
from collections.abc import Callable

import pytest
from sqlalchemy.engine import make_url

from app.observability import health
from app.observability.health import DatabaseProbe
from tests.postgres import Cluster, Database

MINE = "application_name = 'skeldir-health'"


@pytest.fixture
def probe(database: Database) -> DatabaseProbe:
    probe = DatabaseProbe(make_url(database.dsn()))
    probe.start()
    _until(lambda: probe.reachable)
    return probe


def _until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_asks_over_one_session(database: Database, probe: DatabaseProbe) -> None:
    sessions = f"SELECT pid FROM pg_stat_activity WHERE {MINE}"
    before = database.rows(sessions)
    time.sleep(2 * health._EVERY)
    assert len(before) == 1
    assert database.rows(sessions) == before


def test_a_session_that_was_ended_is_no_outage(database: Database, probe: DatabaseProbe) -> None:
    assert database.rows(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {MINE}") == [(True,)]
    until = time.monotonic() + 2 * health._EVERY
    while time.monotonic() < until:
        assert probe.reachable
        time.sleep(0.05)


def test_a_server_that_is_frozen_does_not_answer(postgres: Cluster, probe: DatabaseProbe) -> None:
    postgres.pause()
    try:
        _until(lambda: not probe.reachable)
    finally:
        postgres.resume()
    _until(lambda: probe.reachable)


def test_that_it_may_no_longer_sign_in_is_found_out(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_SESSION_SECONDS", 1.0)
    probe = DatabaseProbe(make_url(database.dsn()))
    probe.start()
    _until(lambda: probe.reachable)
    database.rows("ALTER ROLE app_user NOLOGIN; SELECT 1")
    try:
        _until(lambda: not probe.reachable)
    finally:
        database.rows("ALTER ROLE app_user LOGIN; SELECT 1")
    _until(lambda: probe.reachable)
