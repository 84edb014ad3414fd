"""Celery jobs that are published in the caller's own transaction."""

import json
import time
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
from celery import Celery, chain, group
from kombu import Exchange, Queue
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from app import broker


@pytest.fixture
def celery(database):
    broker.register()
    app = Celery(broker=f"sqla+{database.dsn()}", set_as_current=False)
    app.conf.task_queues = [Queue(name, Exchange(name), name) for name in ("one", "other")]
    app.conf.task_default_queue = "one"
    app.conf.task_routes = {"routed": {"queue": "other"}}

    def nothing(*_args):
        pass

    for name in ("plain", "routed"):
        app.task(nothing, name=name, shared=False)
    yield app
    app.close()


@pytest.fixture
def session(database):
    engine = create_engine(database.dsn().replace("postgresql:", "postgresql+psycopg2:", 1))
    with Session(engine) as session:
        yield session
    engine.dispose()


@pytest.fixture
def waiting(database):
    """What everybody else sees: task, queue, priority, seconds until it is due, and the message."""

    def look():
        rows = database.rows(
            "SELECT q.name, m.priority, extract(epoch FROM m.due_at - now())::float, m.payload"
            " FROM kombu_message m JOIN kombu_queue q ON q.id = m.queue_id ORDER BY m.id"
        )
        return [(json.loads(row[3])["headers"]["task"], *row[:3], json.loads(row[3])) for row in rows]

    return look


def test_as_apply_async_publishes_it(celery, session, waiting):
    options = {
        "countdown": 60,
        "expires": datetime(2100, 1, 1, tzinfo=UTC),
        "priority": 7,
        "headers": {"custom": "kept"},
        "correlation_id": "mine",
        "task_id": "the same",
    }
    with broker.in_transaction(session):
        celery.tasks["routed"].apply_async((1, {"a": "ä"}), **options)
    assert waiting() == []
    session.commit()
    celery.tasks["routed"].apply_async((1, {"a": "ä"}), **options)
    within, alone = waiting()
    assert within[:3] == alone[:3] == ("routed", "other", 7)
    assert 50 < within[3] <= 60
    for message in (within[4], alone[4]):
        message["headers"].pop("eta")
        for differs in ("delivery_tag", "expiration"):
            message["properties"].pop(differs)
    assert within[4] == alone[4]
    assert within[4]["headers"]["custom"] == "kept"
    assert within[4]["properties"]["correlation_id"] == "mine"


def test_in_one_transaction_with_the_callers_rows(celery, session, waiting):
    for commits in (False, True):
        with broker.in_transaction(session):
            session.execute(text("INSERT INTO celery_tasksetmeta (taskset_id) VALUES ('mine')"))
            celery.tasks["plain"].delay(1)
        session.commit() if commits else session.rollback()
        assert len(waiting()) == session.scalar(text("SELECT count(*) FROM celery_tasksetmeta")) == commits
        session.rollback()


def test_savepoints(celery, session, waiting):
    with broker.in_transaction(session):
        celery.tasks["plain"].delay("outside")
        with session.begin_nested():
            celery.tasks["routed"].delay("kept")
        with session.begin_nested() as savepoint:
            celery.tasks["plain"].delay("undone")
            savepoint.rollback()
    assert waiting() == []
    session.commit()
    assert [message[0] for message in waiting()] == ["plain", "routed"]


def test_groups_and_chains(celery, session, waiting):
    plain, routed = celery.tasks["plain"], celery.tasks["routed"]
    with broker.in_transaction(session):
        group(plain.si(i) for i in range(3)).delay()
        chain(routed.si(1), plain.si(2)).delay()
    session.commit()
    assert [message[0] for message in waiting()] == ["plain"] * 3 + ["routed"]


def test_outside_of_the_block_nothing_changes(celery, session, waiting):
    with broker.in_transaction(session):
        pass
    celery.tasks["plain"].delay(1)
    assert len(waiting()) == 1


@contextmanager
def sleeping_consumer(celery, queue):
    """Somebody who waits for a message and has found none; yields what it gets."""
    got = []
    with celery.connection_for_read() as connection:
        consumer = celery.amqp.TaskConsumer(
            connection.channel(), queues=[celery.amqp.queues[queue]], on_message=got.append
        )
        with consumer:

            def drain(seconds):
                deadline = time.monotonic() + seconds
                while not got and (left := deadline - time.monotonic()) > 0:
                    try:
                        connection.drain_events(timeout=left)
                    except TimeoutError:
                        break
                return got

            yield drain


def test_who_sleeps_is_woken_by_the_commit_that_counts(celery, session):
    """Not by the end of a savepoint, when there is nothing to find yet, nor by the poll, seconds later."""
    with sleeping_consumer(celery, "other") as drain:
        assert drain(0.5) == []
        with broker.in_transaction(session), session.begin_nested():
            celery.tasks["routed"].delay(1)
        assert drain(0.5) == []
        session.commit()
        start = time.monotonic()
        assert len(drain(5)) == 1
        assert time.monotonic() - start < 0.5
