"""A database with messages that fail on demand: what the broker does to a message, without a worker."""

import base64
import itertools
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from app.core.dsn import sqlalchemy_url
from app.core.topology import load_topology
from app.dlq import store
from app.dlq.classify import Failure
from app.dlq.message import REPLAY_HEADER, read, tenant_of

TASK = "app.tasks.housekeeping.ping"
TENANT_A = "aaaaaaaa-0000-4000-8000-000000000001"
TENANT_B = "bbbbbbbb-0000-4000-8000-000000000002"
TRACEBACK = (
    'Traceback (most recent call last):\n  File "/srv/app/tasks/x.py", line 3, in run\nValueError: no\n'
)

_numbers = itertools.count(1)


def payload(
    *, task: str = TASK, task_id: str | None = None, args: Any = (), headers: Any = None, **kwargs: Any
) -> str:
    """A message as Celery publishes it."""
    task_id = task_id or str(uuid.uuid4())
    body = json.dumps(
        [list(args), kwargs, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    )
    return json.dumps(
        {
            "body": base64.b64encode(body.encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"lang": "py", "task": task, "id": task_id, "retries": 0, "timelimit": [None, None]}
            | (headers or {}),
            "properties": {
                "correlation_id": task_id,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "housekeeping", "routing_key": "housekeeping"},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )


class Plane:
    """One database, seen as its roles; queues of the sheet are declared."""

    def __init__(self, database: Any) -> None:
        self.database = database
        self.sheet = load_topology()
        self._engines: dict[str, Engine] = {}
        with self.session("app_user") as session:
            for queue in self.sheet.queues:
                session.execute(text("INSERT INTO kombu_queue (name) VALUES (:name)"), {"name": queue})

    def engine(self, role: str = "app_rw") -> Engine:
        if role not in self._engines:
            self._engines[role] = create_engine(sqlalchemy_url(self.database.dsn(role)), hide_parameters=True)
        return self._engines[role]

    @contextmanager
    def session(self, role: str = "app_rw", tenant: str | None = None) -> Iterator[Session]:
        with Session(self.engine(role)) as session:
            if tenant:
                session.execute(text("SELECT set_config('app.current_tenant_id', :t, true)"), {"t": tenant})
            yield session
            session.commit()

    def publish(self, message: str | None = None, queue: str = "housekeeping") -> int:
        with self.session("app_user") as session:
            return session.execute(
                text(
                    "INSERT INTO kombu_message (queue_id, payload) SELECT id, :payload FROM kombu_queue"
                    " WHERE name = :queue RETURNING id"
                ),
                {"payload": payload() if message is None else message, "queue": queue},
            ).scalar_one()

    def capture(self, message_id: int, failure: Failure | None = None) -> int:
        """Dead-letter a message as the broker's transaction does."""
        connection = self.database.connect("app_user")
        connection.autocommit = False
        try:
            cursor = connection.cursor()
            cursor.execute(
                "DELETE FROM kombu_message m USING kombu_queue q WHERE m.id = %s AND q.id = m.queue_id"
                " RETURNING q.name, m.payload",
                (message_id,),
            )
            queue, content = cursor.fetchone()
            message = read(content)
            row = store.insert(
                cursor,
                message_id=message_id,
                queue=queue,
                payload=content,
                message=message,
                failure=failure
                or Failure.of("permanent", "ValueError", "no", TRACEBACK, worker="worker@host"),
                deliveries=1,
                tenant=tenant_of(message),
                host="host",
            )
            connection.commit()
            return row
        finally:
            connection.close()

    def fail(
        self, message: str | None = None, failure: Failure | None = None, queue: str = "housekeeping"
    ) -> int:
        """Publish a message and let it fail for good; the id of its row."""
        return self.capture(self.publish(message, queue), failure)

    def messages(self) -> list[tuple[int, dict[str, Any]]]:
        """What waits in the queues."""
        return [
            (int(id_), json.loads(content))  # type: ignore[call-overload, arg-type]
            for id_, content in self.database.rows("SELECT id, payload FROM kombu_message ORDER BY id")
        ]

    def succeed(self) -> int:
        """Let every waiting message succeed, as a worker does; how many."""
        connection = self.database.connect("app_user")
        try:
            for id_, message in (waiting := self.messages()):
                cursor = connection.cursor()
                cursor.execute("BEGIN")
                cursor.execute("DELETE FROM kombu_message WHERE id = %s", (id_,))
                if row := message["headers"].get(REPLAY_HEADER):
                    cursor.execute(
                        "SELECT celery_task_failure_resolve(%s, %s)", (row, message["headers"]["id"])
                    )
                cursor.execute("COMMIT")
        finally:
            connection.close()
        return len(waiting)

    def state(self, row: int) -> str:
        return str(self.database.rows(f"SELECT state FROM celery_task_failures WHERE id = {row}")[0][0])

    def scalar(self, query: str) -> Any:
        return self.database.rows(query)[0][0]

    def close(self) -> None:
        for engine in self._engines.values():
            engine.dispose()
