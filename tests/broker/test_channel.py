"""What users of kombu and Celery may rely on, on raw channels and a real Postgres."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import psycopg2
import pytest
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.exceptions import ChannelError
from psycopg2.extensions import cursor
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

import app.broker
from app.broker import DeadMessage
from app.broker.connection import ConnectionLost
from tests.broker.conftest import JOBS, Database, until

Connect = Callable[..., Connection]


def send(connection: Connection, *bodies: object, **options: object) -> None:
    producer = Producer(connection.default_channel, JOBS.exchange, JOBS.routing_key)
    for body in bodies:
        producer.publish(body, declare=[JOBS], **options)


class Taker:
    """A consumer that keeps what it gets."""

    def __init__(
        self, connection: Connection, prefetch: int = 0, queue: Queue = JOBS, no_ack: bool = False
    ) -> None:
        self.connection = connection
        self.messages: list[object] = []
        self.consumer = Consumer(
            connection.channel(),
            [queue],
            on_message=self.messages.append,
            prefetch_count=prefetch,
            no_ack=no_ack,
        )
        self.consumer.consume()

    def drain(self, seconds: float = 0.3) -> list[object]:
        """Bodies of all messages that come while none is longer in coming than this."""
        try:
            while True:
                self.connection.drain_events(timeout=seconds)
        except TimeoutError:
            return self.bodies

    @property
    def bodies(self) -> list[object]:
        return [message.decode() for message in self.messages]


def rows(sql: cursor, columns: str) -> list[tuple[object, ...]]:
    sql.execute(f"SELECT {columns} FROM kombu_message ORDER BY id")
    return sql.fetchall()


def test_messages_come_in_order_and_highest_priority_first(connect: Connect) -> None:
    send(connect(), "a", "b")
    send(connect(), "important 1", "important 2", priority=9)
    send(connect(), "c")
    assert Taker(connect()).drain() == ["important 1", "important 2", "a", "b", "c"]


def test_a_lost_connection_costs_no_cpu_while_the_keeper_has_none_either(
    connect: Connect, sql: cursor
) -> None:
    connection = connect()
    taker = Taker(connection)
    assert taker.drain(0.1) == []
    sql.execute("SELECT pg_terminate_backend(%s)", (connection.transport.session.connect().info.backend_pid,))
    connection.transport.holder().online = False
    used = time.thread_time()
    assert taker.drain(1) == []
    assert time.thread_time() - used < 0.3
    connection.transport.holder().online = True
    send(connect(), "a")
    until(lambda: taker.drain() == ["a"])


def test_what_was_taken_by_a_statement_whose_answer_was_lost_is_delivered_again(
    connect: Connect, sql: cursor, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(connect(), *range(5))
    connection = connect()
    session = connection.transport.session
    run = session.run

    def run_and_lose_the_answer(statement: str, *arguments: object) -> list[tuple[object, ...]]:
        taken = run(statement, *arguments)
        if "kombu_take" in statement and taken:
            monkeypatch.undo()
            session.close()
            raise ConnectionLost("the cable was cut after the commit")
        return taken

    monkeypatch.setattr(session, "run", run_and_lose_the_answer)
    taker = Taker(connection, prefetch=3)
    taker.drain()
    until(lambda: bool(taker.drain()))
    for _ in range(2):
        for message in taker.messages:
            if not message.acknowledged:
                message.ack()
        taker.drain(1)
    assert sorted(taker.bodies) == [0, 1, 2, 3, 4]
    assert rows(sql, "holder") == []


def test_waiting_costs_no_cpu_before_anything_is_consumed(connect: Connect) -> None:
    connection = connect()
    connection.connect()
    used = time.thread_time()
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=1)
    assert time.thread_time() - used < 0.3


def test_waiting_costs_no_cpu_while_only_the_keeper_has_no_connection(connect: Connect) -> None:
    connection = connect(polling_interval=0.1)
    taker = Taker(connection)
    assert taker.drain(0.1) == []
    connection.transport.holder().online = False
    used = time.thread_time()
    assert taker.drain(1) == []
    assert time.thread_time() - used < 0.3


def test_who_is_woken_while_it_wakes_up_can_be_woken_again(connect: Connect) -> None:
    transport = connect().transport
    here, there = transport._open_waker(), transport._waker[1]

    class Interrupted:
        """Another thread wakes it amid the reading."""

        def recv(self, size: int) -> bytes:
            transport.wake()
            return here.recv(size)

    transport.wake()
    transport._waker = (Interrupted(), there)
    transport._drain_waker()
    transport._waker = (here, there)
    transport.wake()
    assert here.recv(64)


def test_a_queue_that_is_gone_each_time_is_said(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    channel = connect().default_channel
    monkeypatch.setattr(channel, "_declare", lambda _: 0)  # as if somebody deleted it at once
    with pytest.raises(ChannelError, match="nosuch"):
        Producer(channel).publish("a", routing_key="nosuch")


def test_a_full_window_takes_nothing(connect: Connect, sql: cursor) -> None:
    send(connect(), *range(10))
    taker = Taker(connect(), prefetch=3)
    assert taker.drain() == [0, 1, 2]
    sql.execute("SELECT count(*) FROM kombu_message WHERE holder IS NOT NULL")
    assert sql.fetchone() == (3,)
    for message in taker.messages[:2]:
        message.ack()
    assert taker.drain() == [0, 1, 2, 3, 4]


def test_a_quick_taker_takes_ahead_and_a_slow_one_shares(connect: Connect, sql: cursor) -> None:
    def held() -> int:
        sql.execute("SELECT count(*) FROM kombu_message WHERE holder IS NOT NULL")
        row = sql.fetchone()
        assert row
        return int(row[0])

    with app.broker.batch():
        send(connect(), *range(2000))
    taker = Taker(connect(), prefetch=4)
    ahead = 0
    while len(taker.messages) < 1000:
        taker.connection.drain_events(timeout=5)
        taker.messages[-1].ack()
        if len(taker.messages) % 50 == 0:
            ahead = max(ahead, held())
    assert ahead > 4
    bodies = taker.drain()  # nothing is acknowledged any more
    assert bodies == list(range(1004))
    until(lambda: held() == 4)
    assert Taker(connect(), prefetch=1).drain() == [1004]


def test_an_acknowledged_message_is_deleted_and_the_rest_goes_back(connect: Connect, sql: cursor) -> None:
    send(connect(), 0, 1, 2)
    connection = connect()
    taker = Taker(connection)
    taker.drain()
    taker.messages[1].ack()
    connection.release()
    assert rows(sql, "visible, holder, returned") == [(True, None, 0), (True, None, 0)]
    assert Taker(connect()).drain() == [0, 2]
    sql.execute("SELECT count(*) FROM kombu_holder")
    assert sql.fetchone() == (1,)


def test_a_requeued_message_comes_again_and_says_so(connect: Connect) -> None:
    send(connect(), "x")
    taker = Taker(connect())
    taker.drain()
    taker.messages[0].requeue()
    taker.drain(1)
    first, second = (message.delivery_info for message in taker.messages)
    assert (first["redelivered"], first["delivery_count"]) == (False, 0)
    assert (second["redelivered"], second["delivery_count"]) == (True, 1)
    assert second["queue"] == "jobs"
    assert second["routing_key"] == "jobs"
    assert taker.messages[1].headers["x-delivery-count"] == 1


def test_only_who_has_the_latest_delivery_can_settle_it(connect: Connect, sql: cursor) -> None:
    send(connect(), "x", "y", "z")
    late = Taker(connect())
    late.drain()
    sql.execute(
        "UPDATE kombu_message SET visible = true, holder = NULL"
    )  # as if it had been given up for dead
    current = connect()
    sql.execute("INSERT INTO kombu_holder (id, name) VALUES (1, 'another')")
    sql.execute("UPDATE kombu_message SET visible = false, holder = 1, delivery = delivery + 1")
    late.messages[0].ack()
    late.messages[1].requeue()
    late.messages[2].reject()
    late.connection.release()
    assert rows(sql, "holder, delivery, dead") == [(1, 2, None)] * 3
    current.release()


def test_what_is_not_due_waits_in_the_table(connect: Connect, sql: cursor) -> None:
    due = datetime.now(UTC) + timedelta(seconds=1.5)
    send(connect(), "later", headers={"eta": due.isoformat()})
    send(connect(), "now")
    taker = Taker(connect())
    assert taker.drain() == ["now"]
    assert rows(sql, "holder IS NULL")[0] == (True,)
    assert taker.drain(2) == ["now", "later"]
    assert datetime.now(UTC) >= due
    assert taker.messages[1].headers["eta"] is None


def test_what_expired_is_not_delivered(connect: Connect, sql: cursor) -> None:
    send(connect(), "short", expiration=0.1)
    send(connect(), "long", expiration=60)
    time.sleep(0.2)
    taker = Taker(connect())
    assert taker.drain() == ["long"]
    until(lambda: len(rows(sql, "1")) == 1)


def test_sizes_and_purges_tell_the_truth(connect: Connect) -> None:
    connection = connect()
    send(connection, *range(5))
    taker = Taker(connect(), prefetch=2)
    taker.drain()
    queue = JOBS(connection.default_channel)
    assert queue.queue_declare(passive=True).message_count == 3
    assert queue.purge() == 3
    assert queue.queue_declare(passive=True).message_count == 0
    taker.connection.release()
    assert queue.queue_declare(passive=True).message_count == 2
    assert queue.get().decode() == 0
    queue.delete()
    with pytest.raises(ChannelError):
        queue.queue_declare(passive=True)


def test_get_takes_one_or_nothing(connect: Connect, sql: cursor) -> None:
    connection = connect()
    send(connection, "x")
    queue = JOBS(connection.default_channel)
    message = queue.get()
    assert message is not None
    assert queue.get() is None
    message.ack()
    connection.release()
    assert rows(sql, "1") == []


@pytest.mark.parametrize(
    ("kind", "bound", "sent", "arrives"),
    [
        ("fanout", "", "whatever", True),
        ("topic", "worker.#", "worker.heartbeat.now", True),
        ("topic", "worker.#", "worker", True),
        ("topic", "worker.*", "worker.heartbeat.now", False),
        ("topic", "#.now", "worker.now", True),
        ("topic", "task.*", "worker.x", False),
        ("direct", "me", "me", True),
        ("direct", "me", "you", False),
    ],
)
def test_exchanges_route_to_queues_of_other_processes(
    connect: Connect, sql: cursor, kind: str, bound: str, sent: str, arrives: bool
) -> None:
    exchange = Exchange("news", kind, durable=False)
    takers = [
        Taker(
            connect(),
            queue=Queue(f"reader {i}", exchange, bound, auto_delete=True, durable=False),
            no_ack=True,
        )
        for i in range(2)
    ]
    Producer(connect().channel(), exchange).publish("hello", routing_key=sent, delivery_mode=1)
    assert [taker.drain() for taker in takers] == [["hello"] if arrives else []] * 2
    for taker in takers:
        taker.connection.release()
    assert rows(sql, "1") == []
    sql.execute("SELECT name FROM kombu_queue")
    assert sql.fetchall() == []


def test_a_batch_is_all_or_nothing_and_in_order(connect: Connect, sql: cursor) -> None:
    connection = connect()
    with app.broker.batch():
        send(connection, *range(300))
        assert rows(sql, "1") == []
    assert Taker(connect()).drain() == list(range(300))

    def fail() -> None:
        with app.broker.batch():
            send(connection, "never")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(rows(sql, "1")) == 300


@pytest.mark.parametrize("commits", [True, False])
def test_a_message_exists_exactly_if_the_caller_commits(
    connect: Connect, database: Database, sql: cursor, commits: bool
) -> None:
    connection = connect()
    taker = Taker(connect())
    taker.drain()
    engine = create_engine(f"postgresql+psycopg2://{database.dsn().split('://')[1]}")
    with Session(engine) as session:
        with app.broker.in_transaction(session):
            send(connection, "x", priority=7, headers={"custom": "kept"})
        assert taker.drain() == []
        session.commit() if commits else session.rollback()
        began = time.monotonic()
        assert taker.drain(1) == (["x"] if commits else [])
        assert not commits or time.monotonic() - began < 1.5  # it was woken, not found by the poll
        if commits:
            assert taker.messages[0].headers["custom"] == "kept"
            assert rows(sql, "priority") == [(7,)]
    engine.dispose()


def test_who_will_not_get_it_again_is_told_in_the_same_transaction(connect: Connect, sql: cursor) -> None:
    told: list[DeadMessage] = []

    def on_dead(transaction: cursor, dead: DeadMessage) -> None:
        transaction.execute("INSERT INTO kombu_queue (name) VALUES (%s)", (f"dead {dead.reason}",))
        if len(told) < 1:
            told.append(dead)
            raise psycopg2.DataError("not yet")  # the message must survive this
        told.append(dead)

    send(connect(), ["rejected"], ["buried"])
    taker = Taker(connect(on_dead=on_dead))
    taker.drain()
    taker.messages[0].reject()
    until(lambda: len(told) == 1)
    assert len(rows(sql, "1")) == 2
    taker.messages[1].channel.dead_letter(taker.messages[1].delivery_tag, "permanent", {"why": "it raised"})
    until(lambda: not rows(sql, "1"))
    assert sorted(dead.reason for dead in told) == ["permanent", "rejected", "rejected"]
    assert [dead.detail for dead in told if dead.reason == "permanent"] == [{"why": "it raised"}]
    assert json.loads(json.loads(told[0].payload)["body"]) == ["rejected"]
    sql.execute("SELECT name FROM kombu_queue WHERE name LIKE 'dead%' ORDER BY 1")
    assert sql.fetchall() == [("dead permanent",), ("dead rejected",)]


def test_what_a_crash_of_the_server_undid_is_not_held_for_ever(connect: Connect, database: Database) -> None:
    cluster = database.cluster

    def flush_wal_every(setting: str) -> None:
        cluster.execute(f"ALTER SYSTEM {setting}")
        cluster.execute("SELECT pg_reload_conf()")

    # Like a dead letter, this doesn't wait for the disk.
    taker = Taker(connect(on_dead=lambda cursor, _: cursor.execute("SET LOCAL synchronous_commit = off")))
    flush_wal_every("SET wal_writer_delay = '10s'")
    try:
        for attempt in range(1, 6):  # sometimes it is on the disk all the same
            send(connect(), attempt)
            until(lambda number=attempt: taker.drain(0.1)[-1:] == [number])
            cluster.execute("CHECKPOINT")  # that it was taken is not forgotten
            taker.messages[-1].channel.dead_letter(taker.messages[-1].delivery_tag, "permanent", None)
            until(lambda: database.rows("SELECT count(*) FROM kombu_message") == [(0,)])
            cluster.restart("immediate")
            if database.rows("SELECT count(*) FROM kombu_message") != [(0,)]:
                break
        else:
            pytest.fail("the server never forgot a disposal")
        until(lambda: taker.drain(0.1)[-2:] == [attempt, attempt], 20)
    finally:
        flush_wal_every("RESET wal_writer_delay")


def test_without_anyone_to_tell_it_stays_and_is_counted(connect: Connect, sql: cursor) -> None:
    send(connect(), "x")
    taker = Taker(connect())
    taker.drain()
    taker.messages[0].reject()
    until(lambda: rows(sql, "dead, holder, visible") == [("rejected", None, False)])
    assert JOBS(taker.connection.default_channel).queue_declare(passive=True).message_count == 0


@pytest.mark.parametrize("payload", ["{not json", '{"headers": ' + "[" * 3000 + "]" * 3000 + "}"])
def test_a_message_that_cannot_be_read_stops_nobody(connect: Connect, sql: cursor, payload: str) -> None:
    send(connect(), "before")
    sql.execute("INSERT INTO kombu_message (queue_id, payload) SELECT id, %s FROM kombu_queue", [payload])
    send(connect(), "after")
    assert Taker(connect()).drain() == ["before", "after"]
    until(lambda: ("invalid",) in rows(sql, "dead"))


def test_events_that_nobody_fetches_do_not_pile_up(connect: Connect, sql: cursor) -> None:
    events = Queue("events", Exchange("celeryev", "topic"), "#", exclusive=True, message_ttl=0.2)
    taker = Taker(connect(), queue=events, no_ack=True)
    producer = Producer(connect().default_channel, events.exchange, "task.sent")
    for _ in range(20):
        producer.publish("old", delivery_mode=1)
    time.sleep(0.3)
    for _ in range(12):
        producer.publish("new", delivery_mode=1)
    assert len(rows(sql, "id")) == 12
    assert taker.drain() == ["new"] * 12


def test_a_requeued_message_reaches_its_limit(connect: Connect, sql: cursor) -> None:
    send(connect(), "x")
    taker = Taker(connect(delivery_limits={"jobs": 2}))
    for delivery in range(2):
        taker.drain(1)
        taker.messages[delivery].requeue()
    assert len(taker.drain(1)) == 2
    until(lambda: rows(sql, "dead, returned") == [("poison", 2)])


def test_an_idle_consumer_is_woken_at_once_and_asks_rarely(connect: Connect, sql: cursor) -> None:
    taker = Taker(connect())
    taker.drain()
    producer = connect()
    send(producer, "warm")
    waits = []
    for i in range(20):
        taker.drain(0.05)
        sent = time.monotonic()
        send(producer, i)
        taker.connection.drain_events(timeout=2)
        waits.append(time.monotonic() - sent)
    assert sorted(waits)[len(waits) // 2] < 0.1  # far below the poll, also on a busy machine


def test_a_message_that_leads_nowhere_is_refused_and_not_dropped(connect: Connect, sql: cursor) -> None:
    connection = connect()
    send(connection, "x")
    with pytest.raises(ChannelError, match="no queue is bound"):
        Producer(connection.default_channel, JOBS.exchange, "a typo").publish("y")
    assert len(rows(sql, "1")) == 1
    # An answer, that nobody waits for any more, is not.
    Producer(connection.default_channel, JOBS.exchange, "a typo").publish("y", delivery_mode=1)


def test_another_process_takes_over_the_queue_name_of_a_dead_one(connect: Connect, sql: cursor) -> None:
    sql.execute("INSERT INTO kombu_holder (id, name) VALUES (7, 'dead')")
    sql.execute("INSERT INTO kombu_queue (name, holder) VALUES ('box', 7), ('other box', 7)")
    queue = Queue("box", Exchange("boxes", "fanout"), auto_delete=True, durable=False)
    taker = Taker(connect(), queue=queue, no_ack=True)
    sql.execute("SELECT holder <> 7 FROM kombu_queue WHERE name = 'box'")
    assert sql.fetchone() == (True,)

    def queues() -> list[tuple[object, ...]]:
        sql.execute("SELECT name FROM kombu_queue")
        return sql.fetchall()

    until(lambda: queues() == [("box",)])
    taker.connection.release()
    assert queues() == []
