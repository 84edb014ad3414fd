"""Tasks for test_celery_cases.py: broker, results and dead letters as the plane has them."""

import os
import signal
import time
from pathlib import Path

from celery import Celery, Task
from celery.exceptions import Reject

import app.broker
from app import results
from app.dlq import worker
from app.dlq.answer import answer_of
from app.dlq.capture import DeadLetters

_DSN = os.environ["CASES_DSN"]
LEDGER = Path(os.environ["CASES_LEDGER"])

celery = Celery("cases", broker=f"sqla+{_DSN}", backend=f"db+{_DSN}")
celery.conf.update(
    task_default_queue="cases",
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_track_started=True,
    task_send_sent_event=True,
    result_extended=True,
    result_chord_retry_interval=0.1,
    worker_send_task_events=True,
    worker_prefetch_multiplier=2,
    broker_connection_retry_on_startup=True,
    broker_transport_options={"delivery_limit": 2},
)
results.register(celery)
dead_letters = DeadLetters(lambda task: task in celery.tasks, answer=answer_of(celery))
app.broker.register(on_dead=dead_letters)
worker.install(celery, dead_letters)


def note(line):
    """One line in the ledger, whole whoever else writes."""
    file = os.open(LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


class OddError(Exception):
    """Can't be unpickled: it wants two arguments and hands on none."""

    def __init__(self, one, other):
        super().__init__()


@celery.task
def add(a, b=0):
    return a + b


@celery.task
def total(values):
    return sum(values)


@celery.task
def same(value):
    return value


@celery.task
def nap(seconds, value=None):
    time.sleep(seconds)
    return value


@celery.task
def fail(*_, message="no"):
    raise ValueError(message)


@celery.task
def odd():
    raise OddError(1, 2)


@celery.task(ignore_result=True)
def silent():
    note("silent")


@celery.task(bind=True, max_retries=3)
def retry_once(self, countdown=0):
    if self.request.retries:
        return {
            "retries": self.request.retries,
            "priority": self.request.delivery_info["priority"],
            "header": (self.request.headers or {}).get("x-mine"),
        }
    raise self.retry(countdown=countdown)


@celery.task(bind=True, max_retries=1)
def retry_in_vain(self):
    raise self.retry(exc=KeyError("gone"), countdown=0)


class Stubborn(Task):
    """A task made of a class, which tries again by itself."""

    name = "cases.stubborn"
    autoretry_for = (ConnectionError,)
    retry_kwargs = {"max_retries": 1, "countdown": 0}  # noqa: RUF012 - Celery's interface

    def run(self):
        if not self.request.retries:
            raise ConnectionError
        return self.request.retries


stubborn = celery.register_task(Stubborn())


@celery.task(bind=True)
def reject(self, requeue):
    if self.request.delivery_info["redelivered"]:
        return "again"
    raise Reject("not here", requeue=requeue)


@celery.task(bind=True)
def about_me(self):
    return {
        key: getattr(self.request, key)
        for key in ("id", "root_id", "parent_id", "hostname", "timelimit", "delivery_info", "loglevel")
    }


@celery.task(bind=True)
def replace_by_chain(self, value):
    raise self.replace(add.s(value, 1) | add.s(10))


@celery.task
def publish_children(n):
    for i in range(n):
        add.delay(i, i)
    return n


@celery.task
def on_error(request, exc, traceback):
    """A callback of the kind that Celery calls where the failure happened."""
    note(f"failed {request.id} {type(exc).__name__}")


@celery.task
def on_error_by_id(task_id):
    """A callback of the kind that is a task of its own."""
    note(f"told {task_id}")


@celery.task(soft_time_limit=0.5, time_limit=30)
def soft_limit():
    time.sleep(20)


@celery.task(time_limit=1)
def hard_limit():
    time.sleep(20)


@celery.task
def kill_process():
    note(f"killing {os.getpid()}")
    os.kill(os.getpid(), signal.SIGKILL)


@celery.task(ignore_result=True)
def kill_process_silently():
    os.kill(os.getpid(), signal.SIGKILL)


@celery.task
def kill_main():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


@celery.task
def pid():
    return os.getpid()
