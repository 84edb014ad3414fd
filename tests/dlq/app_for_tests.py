"""A Celery application on the broker with dead letters, and tasks that fail in every way there is."""

import os
import signal
import time
from pathlib import Path

from celery import Celery, Task, signals
from celery.exceptions import Ignore, Reject
from kombu import Exchange, Queue

import app.broker
from app.dlq import worker
from app.dlq.capture import DeadLetters
from app.tasks.base import PolicyTask
from app.tasks.context import tenant_task

QUEUES = ("housekeeping", "maintenance", "llm")

celery = Celery("tests", broker=f"sqla+{os.environ['DATABASE_URL']}", task_cls=PolicyTask)
celery.conf.update(
    accept_content=["json"],
    task_queues=[Queue(name, Exchange(name, "direct"), name) for name in QUEUES],
    task_default_queue="housekeeping",
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=4,
    broker_connection_retry_on_startup=True,
    broker_transport_options={
        "delivery_limits": dict.fromkeys(QUEUES, int(os.environ.get("DELIVERY_LIMIT", "2")))
    },
)
dead_letters = DeadLetters(lambda task: task in celery.tasks)
app.broker.register(on_dead=dead_letters)
if os.environ.get("DEAD_LETTERS") != "off":  # to measure what they cost
    worker.install(celery, dead_letters)


@signals.task_prerun.connect
def note_run(task: Task, **_: object) -> None:
    """Write down which message is run now, for a test that keeps the books."""
    if path := os.environ.get("RUNS"):
        message_id = task.request.properties["delivery_tag"].partition(".")[0]
        with Path(path).open("a") as runs:
            print(message_id, task.name, file=runs, flush=True)


@celery.task(name="t.ok")
def ok() -> None:
    """Succeed."""


@celery.task(name="t.raise")
def raise_() -> None:
    """Raise what no policy retries."""
    raise ValueError("no\0 such \x1b[31muser, password=hunter2")


@celery.task(name="t.unpicklable")
def unpicklable() -> None:
    """Raise what can't be sent to another process."""

    class Odd(Exception):  # noqa: N818
        def __init__(self, file: object, other: object) -> None:
            super().__init__(file)

    raise Odd(open(os.devnull), 1)  # noqa: SIM115


@celery.task(name="t.transient", autoretry_for=(ConnectionError,), max_retries=2)
def transient() -> None:
    """Raise what may pass, every time."""
    raise ConnectionError("reset by peer")


transient.backoff = transient.backoff_max = 0.2


@celery.task(name="t.by_hand", bind=True, max_retries=1)
def by_hand(self) -> None:  # type: ignore[no-untyped-def]
    """Ask for a retry by hand, every time."""
    raise self.retry(exc=KeyError("x"), countdown=0.1)


@celery.task(name="t.soft", soft_time_limit=1, time_limit=10)
def soft() -> None:
    """Run into the soft limit."""
    time.sleep(8)


@celery.task(name="t.hard", time_limit=1)
def hard() -> None:
    """Run into the hard limit."""
    time.sleep(30)


@celery.task(name="t.killed")
def killed() -> None:
    """End the process it runs in."""
    os.kill(os.getpid(), 9)


@celery.task(name="t.kill_main")
def kill_main(pool: str) -> None:
    """End the worker itself, not the child that runs this."""
    os.kill(os.getppid() if pool == "prefork" else os.getpid(), signal.SIGKILL)
    time.sleep(60)


@celery.task(name="t.eat")
def eat() -> None:
    """Take memory until the kernel has none left for this container."""
    eaten = []
    while True:
        eaten.append(b"x" * 10_000_000)


@celery.task(name="t.memory")
def memory() -> None:
    """Ask for more memory than there is, at once."""
    bytearray(2**60)


@celery.task(name="t.exit")
def exit_() -> None:
    """Leave the process."""
    raise SystemExit(3)


@celery.task(name="t.reject")
def reject() -> None:
    """Refuse the message for good."""
    raise Reject("no", requeue=False)


@celery.task(name="t.ignore")
def ignore() -> None:
    """End without a result, on purpose."""
    raise Ignore


@celery.task(name="t.tenant")
@tenant_task
def tenant(tenant_id: object = None) -> None:
    """Need a tenant."""


@celery.task(name="t.slow")
def slow(seconds: float) -> None:
    """Take a while and raise."""
    time.sleep(seconds)
    raise ValueError("late")


@celery.task(name="t.once", bind=True)
def once(self) -> None:  # type: ignore[no-untyped-def]
    """Fail, unless it is replayed."""
    if "skeldir_replay_of" not in (self.request.headers or {}):
        raise ValueError("not yet")
