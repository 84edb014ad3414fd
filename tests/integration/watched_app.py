"""A Celery application with tasks that end in every way, watched like the real one."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from celery import Celery, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from kombu import Exchange, Queue

from app import broker, results
from app.core.config import get_settings
from app.core.topology import Topology
from app.db import engine  # noqa: F401 - `postgresql://` means psycopg2 from here on
from app.observability import worker_monitoring

MODULE = "tests.integration.watched_app"
TASKS = (
    "ok fails retried given_up soft soft_caught hard killed killed_once rejected requeued_once ignored exits "
    "slow freeze"
)
LOOP_BOUND = 4.0
FROZEN = 9.0

SHEET = Topology.model_validate(
    {
        "queues": {
            "watched": {
                "exchange": "watched-exchange",
                "routing_key": "watched-key",
                "tasks": [f"{MODULE}.{name}" for name in TASKS.split()],
                "metrics_port": 9999,
                "concurrency": 2,
                "prefetch": 4,
                "soft_time_limit": 30,
                "time_limit": 60,
                "delivery_limit": 3,
                "retry": {"max_retries": 2, "backoff": 1, "backoff_max": 1},
            }
        }
    }
)

broker.register()
settings = get_settings()
app = Celery("watched", broker=settings.broker_url, backend=settings.result_backend_url)
results.register(app)
app.conf.update(
    task_queues=[Queue("watched", Exchange("watched-exchange", "direct"), "watched-key")],
    task_default_queue="watched",
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    broker_connection_retry_on_startup=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
)
worker_monitoring.install(app, lambda: SHEET, loop_bound=LOOP_BOUND, rescued=broker.rescued)


@signals.task_received.connect
def _freeze_the_loop(request, **_) -> None:
    if request.name.endswith(".freeze"):
        time.sleep(FROZEN)


def _first_time(name: str) -> bool:
    try:
        Path(os.environ["WATCHED_FOLDER"], name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@app.task
def ok() -> None:
    pass


@app.task
def fails() -> None:
    raise ValueError("on purpose")


@app.task(bind=True, max_retries=2)
def retried(self) -> None:
    if self.request.retries < 2:
        raise self.retry(countdown=0)


@app.task(bind=True, max_retries=2)
def given_up(self) -> None:
    raise self.retry(countdown=0, exc=ValueError("on purpose"))


@app.task(soft_time_limit=1)
def soft() -> None:
    time.sleep(5)


@app.task(soft_time_limit=1)
def soft_caught() -> None:
    with suppress(SoftTimeLimitExceeded):
        time.sleep(5)


@app.task(time_limit=1)
def hard() -> None:
    time.sleep(5)


@app.task(reject_on_worker_lost=False)
def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
def killed_once(name: str) -> None:
    if _first_time(name):
        os.kill(os.getpid(), signal.SIGKILL)


@app.task
def rejected() -> None:
    raise Reject("on purpose", requeue=False)


@app.task
def requeued_once(name: str) -> None:
    if _first_time(name):
        raise Reject("on purpose", requeue=True)


@app.task
def ignored() -> None:
    raise Ignore


@app.task(reject_on_worker_lost=False)
def exits() -> None:
    raise SystemExit(1)


@app.task(time_limit=20)
def slow(seconds: float) -> None:
    time.sleep(seconds)


@app.task
def freeze() -> None:
    pass
