"""What kombu's users expect of a transport: its integration cases in our words, and some that only we have.

kombu's own suite for transports runs by `python -m tests.upstream kombu`. docs/celery-compatibility.md says
what is different here, and why.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.asynchronous import Hub
from kombu.exceptions import OperationalError
from kombu.pools import producers
from psycopg2.extensions import cursor

from tests.broker.conftest import JOBS, until

Connect = Callable[..., Connection]


def drained(connection: Connection, *queues: Queue, seconds: float = 0.3, **options: object) -> list[object]:
    """Acknowledge what comes, until nothing more does."""
    bodies: list[object] = []

    def take(body: object, message: object) -> None:
        bodies.append(body)
        message.ack()  # type: ignore[attr-defined]

    with Consumer(connection, queues, callbacks=[take], **options):
        try:
            while True:
                connection.drain_events(timeout=seconds)
        except TimeoutError:
            return bodies


def test_a_connection_opens_by_itself_and_again(connect: Connect) -> None:
    connection = connect()
    connection.connect()
    connection.close()
    assert connection.connection is None
    assert connection.default_channel.queue_declare("jobs").queue == "jobs"
    assert connection.connected
    assert connection.as_uri().startswith("sqla+postgresql://app_user:**@")


def test_nobody_there_is_an_error_that_kombu_retries() -> None:
    with Connection("sqla+postgresql://nobody@127.0.0.1:1/nothing") as connection:
        tries: list[float] = []
        with pytest.raises(OperationalError):
            connection.ensure_connection(
                lambda error, interval: tries.append(interval), max_retries=2, interval_start=0
            )
        assert len(tries) == 2
        with pytest.raises(connection.connection_errors):
            connection.transport.establish_connection()


def test_published_before_anybody_consumes(connect: Connect) -> None:
    with connect() as publisher:
        producer = Producer(publisher, routing_key="early", serializer="json")
        producer.publish({"n": 1}, declare=[Queue("early")])
        producer.publish({"n": 2}, compression="zlib")
        producer.publish(b"\x00\xff", content_type="application/data", content_encoding="binary")
    assert drained(connect(), Queue("early"), accept=["json", "application/data"]) == [
        {"n": 1},
        {"n": 2},
        b"\x00\xff",
    ]


def test_the_default_exchange_leads_to_the_queue_of_that_name(connect: Connect) -> None:
    connection = connect()
    Producer(connection).publish("x", routing_key="by.name", declare=[Queue("by.name")])
    assert drained(connection, Queue("by.name")) == ["x"]


def test_exchanges_of_each_type(connect: Connect) -> None:
    connection = connect()
    direct, fanout, topic = (Exchange(f"e.{type_}", type=type_) for type_ in ("direct", "fanout", "topic"))
    queues = {
        "d1": Queue("d1", direct, "one"),
        "d2": Queue("d2", direct, "two"),
        "f1": Queue("f1", fanout),
        "f2": Queue("f2", fanout),
        "t1": Queue("t1", topic, "t.*"),
        "t2": Queue("t2", topic, "t.#"),
        "t3": Queue("t3", topic, "t"),
    }
    for queue in queues.values():
        queue(connection.default_channel).declare()
    producer = Producer(connection)
    producer.publish("1", exchange=direct, routing_key="one")
    producer.publish("all", exchange=fanout, routing_key="whatever")
    producer.publish("t.1", exchange=topic, routing_key="t.1")
    producer.publish("t.1.2", exchange=topic, routing_key="t.1.2")
    got = {name: drained(connection, queue, seconds=0.1) for name, queue in queues.items()}
    assert got == {
        "d1": ["1"],
        "d2": [],
        "f1": ["all"],
        "f2": ["all"],
        "t1": ["t.1"],
        "t2": ["t.1", "t.1.2"],
        "t3": [],
    }


def test_nobody_bound_to_a_broadcast_is_no_error(connect: Connect, sql: cursor) -> None:
    Producer(connect(), Exchange("empty", type="topic")).publish("x", routing_key="t.1")
    sql.execute("SELECT count(*) FROM kombu_message")
    assert sql.fetchone() == (0,)


def test_higher_priorities_first_also_when_they_come_later(connect: Connect) -> None:
    connection = connect()
    producer = Producer(connection, routing_key="jobs")
    for body, priority in (("first", 3), ("second", 6), ("third", 3)):
        producer.publish(body, priority=priority, declare=[JOBS])
    seen: list[tuple[object, object]] = []
    keep = [lambda body, message: seen.append((body, message))]
    with Consumer(connection, [JOBS], callbacks=keep) as consumer:
        for _ in range(3):
            connection.drain_events(timeout=5)
        assert [body for body, _ in seen] == ["second", "first", "third"]
        consumer.cancel()
        for _, message in seen:
            message.requeue()
        producer.publish("fourth", priority=9)
    until(lambda: JOBS(connection.default_channel).queue_declare(passive=True).message_count == 4, 5)
    assert drained(connection, JOBS) == ["fourth", "second", "first", "third"]


def test_what_expired_is_dropped(connect: Connect) -> None:
    connection = connect()
    short, lossy = connection.SimpleQueue("short"), connection.SimpleBuffer("buffer")
    with closing(short) as queue, closing(lossy) as buffer:
        queue.put("gone", expiration=0.05)
        buffer.put("gone", expiration=0.05)
        queue.put("there", expiration=60)
        time.sleep(0.1)
        assert queue.get(timeout=5).payload == "there"
        with pytest.raises(queue.Empty):
            queue.get(timeout=0.1)
        with pytest.raises(buffer.Empty):
            buffer.get(timeout=0.1)


def test_simple_queues_and_buffers(connect: Connect) -> None:
    connection = connect()
    with closing(connection.SimpleQueue("simple")) as queue:
        assert queue.qsize() == 0
        queue.put({"Hello": "World"}, headers={"k1": "v1"})
        assert queue.qsize() == 1
        message = queue.get(timeout=5)
        assert (message.payload, message.content_type) == ({"Hello": "World"}, "application/json")
        assert message.headers == {"k1": "v1"}
        message.reject(requeue=True)
        again = queue.get_nowait()
        assert (again.payload, again.headers["x-delivery-count"]) == ({"Hello": "World"}, 1)
        again.requeue()
        queue.get_nowait().ack()
        queue.put("no")
        queue.get_nowait().reject()
        with pytest.raises(queue.Empty):
            queue.get_nowait()
        queue.put("more")
        assert queue.clear() == 1
    with closing(connection.SimpleBuffer("buffer")) as buffer:
        buffer.put("once")
        assert buffer.get(timeout=5).payload == "once"


def test_publishing_survives_the_loss_of_the_connection(connect: Connect, sql: cursor) -> None:
    connection = connect()
    with producers[connection].acquire(block=True) as producer:
        producer.publish("before", routing_key="jobs", declare=[JOBS], retry=True)
        sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
            (f"broker transport {os.getpid()}",),
        )
        producer.publish("after", routing_key="jobs", retry=True)
    assert drained(connect(), JOBS) == ["before", "after"]


def test_consuming_survives_the_loss_of_the_connection(connect: Connect, sql: cursor) -> None:
    connection, publisher = connect(), connect()
    seen: list[object] = []
    with Consumer(connection, [JOBS], callbacks=[lambda body, message: (seen.append(body), message.ack())]):
        sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE %s",
            (f"broker % {os.getpid()}",),
        )
        Producer(publisher).publish("x", routing_key="jobs", retry=True, declare=[JOBS])
        connection.drain_events(timeout=10)
    assert seen == ["x"]


def hub_until(hub: Hub, true: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it didn't come in time"
        hub.run_once()


def test_acknowledged_from_another_thread_on_celerys_event_loop(connect: Connect) -> None:
    connection, hub, done = connect(), Hub(), []

    def later(body: object, message: object) -> None:
        threading.Timer(0.05, hub.call_soon, (lambda: (message.ack(), done.append(body)),)).start()  # type: ignore

    for body in range(2):
        Producer(connection).publish(body, routing_key="jobs", declare=[JOBS])
    with Consumer(connection, [JOBS], callbacks=[later], prefetch_count=1):
        connection.register_with_event_loop(hub)
        hub_until(hub, lambda: len(done) == 2, 3)
    hub.close()
    assert done == [0, 1]


def test_a_notification_that_comes_with_an_answer_is_heard(connect: Connect, sql: cursor) -> None:
    """The socket isn't readable any more then, and only the poll, seconds later, would find the message."""
    connection, publisher, hub, seen = connect(), connect(), Hub(), []
    JOBS(publisher.default_channel).declare()
    with Consumer(connection, [JOBS], callbacks=[lambda body, message: seen.append(body)]):
        connection.register_with_event_loop(hub)
        sleeping = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND classid = 1802331489"

        def asleep() -> bool:
            sql.execute(sleeping)
            return sql.fetchone() is not None

        hub_until(hub, asleep, 3)
        Producer(publisher).publish("x", routing_key="jobs")
        connection.transport.session.run("SELECT pg_sleep(0.1)")  # its answer brings the notification
        hub_until(hub, lambda: seen, 1)
    hub.close()
