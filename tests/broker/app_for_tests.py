"""A Celery application on the broker alone, for workers that tests start, kill and freeze."""

import os
import time
from pathlib import Path

from celery import Celery
from celery.signals import task_received
from celery.worker.request import Request
from kombu import Exchange, Queue

import app.broker

app.broker.register(delivery_limit=int(os.environ.get("DELIVERY_LIMIT", "3")))
celery = Celery("tests", broker=f"sqla+{os.environ['DATABASE_URL']}")
celery.conf.update(
    task_queues=[
        Queue(name, Exchange(name, "direct"), name) for name in os.environ.get("QUEUES", "jobs").split(",")
    ],
    task_default_queue="jobs",
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=int(os.environ.get("PREFETCH", "4")),
    broker_connection_retry_on_startup=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    task_publish_retry_policy={
        "max_retries": 50,
        "interval_start": 0,
        "interval_step": 0.2,
        "interval_max": 1,
    },
)
LEDGER = Path(os.environ["LEDGER"])


def note(line: str) -> None:
    """One line in the ledger, whole whoever else writes or is killed."""
    file = os.open(LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    worker = os.environ.get("WORKER", "")  # where several are told apart
    os.write(file, f"{line} {worker and worker + ' '}{time.time():.6f}\n".encode())
    os.close(file)


if "WORKER" in os.environ:
    # Where several are told apart, it also counts how long each had a job that it had not begun yet.
    @task_received.connect(weak=False)
    def got(request: Request, **_: object) -> None:
        """Note which job a worker has now."""
        note(f"got {(request.args or ['poison'])[0]}")


@celery.task
def job(name: str, seconds: float = 0.0) -> None:
    """Note that it began and that it ended."""
    note(f"began {name}")
    time.sleep(seconds)
    note(f"ended {name}")


@celery.task(bind=True, max_retries=1)
def retrying(self, name: str) -> None:  # type: ignore[no-untyped-def]
    """Retry once, a second later."""
    note(f"tried {name}")
    if not self.request.retries:
        raise self.retry(countdown=0.5)
    note(f"ended {name}")


@celery.task
def parent(name: str) -> None:
    """Publish a job from inside a job."""
    job.delay(name)
    note(f"passed {name}")


@celery.task(bind=True)
def poison(self) -> None:  # type: ignore[no-untyped-def]
    """End the process it runs in."""
    note(f"began poison {self.request.get('x-delivery-count') or 0}")
    os.kill(os.getpid(), 9)
