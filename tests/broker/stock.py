"""kombu's and Celery's own code, without this project's: python -m tests.broker.stock URL STEP."""

import sys
from datetime import UTC, datetime, timedelta

from celery import Celery
from kombu import Exchange, Queue
from sqlalchemy.dialects import registry

registry.register("postgresql", "sqlalchemy.dialects.postgresql.psycopg2", "dialect")
TASK = "tests.broker.app_for_tests.job"
QUEUES = [Queue(name, Exchange(name, "direct"), name) for name in ("jobs", "others")]


def main(url: str, step: str) -> None:
    """`leave`: waiting, delayed and delivered messages, and a result. `consume`: print what waits."""
    app = Celery("stock", broker=f"sqla+{url}", backend=f"db+{url}")
    app.conf.update(task_queues=QUEUES, task_default_queue="jobs")
    with app.connection() as connection:
        assert connection.transport.__class__.__module__ == "kombu.transport.sqlalchemy"
        channel = connection.default_channel
        for queue in QUEUES:
            queue(channel).declare()
        if step == "leave":
            for i in range(3):
                app.send_task(TASK, [f"delivered{i}"], queue="jobs", connection=connection)
            for _ in range(3):
                QUEUES[0](channel).get(no_ack=True)
            for i in range(5):
                app.send_task(TASK, [f"j{i}"], queue="jobs", connection=connection)
            app.send_task(TASK, ["other"], queue="others", connection=connection)
            eta = datetime.now(UTC) + timedelta(seconds=12)
            app.send_task(TASK, ["later"], queue="jobs", eta=eta, connection=connection)
            app.backend.store_result("stored", "an answer", "SUCCESS")
        else:
            for queue in QUEUES:
                while (message := queue(channel).get(no_ack=True)) is not None:
                    print(queue.name, message.payload[0][0])


main(*sys.argv[1:])
