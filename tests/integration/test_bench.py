"""The benchmarks still run; only what they need no rival for, and with figures nobody should quote."""

from contextlib import closing
from dataclasses import replace

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from app.core.dsn import sqlalchemy_url
from app.core.topology import load_topology
from bench import dlq, measures, metering
from bench.__main__ import POOLS, table


@pytest.fixture(scope="module")
def ours(postgres):
    yield metering.contender(postgres.copy_database("skeldir", "bench"))
    postgres.drop_database("bench")


def waiting(ours):
    with closing(ours.database.connect("postgres")) as session, session.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM kombu_message")
        return cursor.fetchone()[0]


def test_publish_and_drain(ours):
    assert measures.publish(ours, 20, many=True) > 0
    assert measures.drain(ours, 40, POOLS["prefork -c 2"], with_results=True) > 0
    with closing(ours.database.connect("postgres")) as session, session.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS'")
        assert cursor.fetchone() == (40,)
    assert waiting(ours) == 0


def test_pickup_and_raw_channels(ours):
    p50, p99 = measures.pickup(ours, 3)
    assert 0 < p50 <= p99
    assert measures.consumers(ours, 100, 2) > 0


def test_recovery_and_idling(ours):
    assert 0 < measures.recovery(ours, 0) < measures.TOO_LONG
    assert measures.idle_transactions(ours, 1) >= 0


def test_metering(ours, postgres):
    metered = replace(metering.contender(postgres.copy_database("skeldir", "twin")), metered=True)
    pair = metering.side_by_side(ours, metered, POOLS["solo"], jobs=4000, number=0)
    postgres.drop_database("twin")
    assert metering.show("solo", [pair, pair]) < 1


def test_questions_about_dead_letters_and_their_capture(ours):
    dlq.fill(ours.database, 300, list(load_topology().queues))
    engine = create_engine(sqlalchemy_url(ours.database.dsn("app_rw")))
    with Session(engine) as session:
        answers = {name: ask(session, which, **more) for name, (ask, which, more) in dlq.looks().items()}
    engine.dispose()
    assert answers["list --assignee"] == []
    assert len(answers["list "]) == 50
    assert sum(group.count for group in answers["groups --text, every row"]) > 200
    assert all(seconds > 0 for seconds in dlq.capture_in_postgres(ours.database, 3))


def test_table_says_how_many_times_better():
    samples = {
        "drain /s": {"stock": [100.0, 200.0, 150.0], "ours": [300.0]},
        "idle pick-up p50, ms": {"stock": [600.0], "ours": [6.0]},
        "kill -9 to run again, s": {"stock": [float("inf")], "ours": [1.0]},
        "idle transactions /s": {"ours": [2.0]},
    }
    columns = {column.header: list(column.cells) for column in table(samples, ["stock", "ours"]).columns}
    assert columns["stock"] == ["150", "600", "never", ""]
    assert columns["ours : stock"] == ["2.0x", "100.0x", "∞", ""]
