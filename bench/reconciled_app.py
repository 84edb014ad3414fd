"""A Celery application put together like the real one, whose runs write a ledger that no metric knows of.

Each line of the ledger is one event as JSON. `began` and `ended` are written where the task runs, `revoked`
where Celery announces it. What began and never ended was ended by something else.
"""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from celery import Celery, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from kombu import Exchange, Queue

from app import broker, results
from app.core.config import get_settings
from app.core.topology import Topology
from app.db import engine  # noqa: F401 - `postgresql://` means psycopg2 from here on
from app.dlq import worker as dead_letter_worker
from app.dlq.capture import DeadLetters
from app.observability import worker_monitoring
from app.tasks.base import PolicyTask, retry_options

BOOKS, CHILDREN = "books", "children"
"""The queues: one for every worker, and one for those whose pool are processes."""
EVERYWHERE = (
    *("job", "quick", "raises", "retried", "given_up", "transient", "rejected", "requeued_once", "ignored"),
    *("exits", "memory", "hold"),
)
IN_PROCESSES = ("soft", "soft_caught", "hard", "terminated", "poison", "died_stored", "died_unstored")
"""Tasks that only processes can be interrupted in, or outlive."""


def _queue(name: str, port: int, tasks: tuple[str, ...]) -> dict[str, object]:
    return {
        **{"exchange": name, "routing_key": name, "metrics_port": port, "concurrency": 2, "prefetch": 2},
        **{"soft_time_limit": 100, "time_limit": 110, "delivery_limit": 3},
        "tasks": [f"{BOOKS}.{task}" for task in tasks],
        "retry": {"max_retries": 2, "backoff": 1, "backoff_max": 1},
    }


SHEET = Topology.model_validate(
    {
        "queues": {
            BOOKS: _queue(BOOKS, 9998, EVERYWHERE),
            CHILDREN: _queue(CHILDREN, 9999, IN_PROCESSES),
        },
        "exporter": {"port": 9997},
    }
)
_FOLDER = Path(os.environ["LEDGER_FOLDER"])
LEDGER = _FOLDER / "ledger"
GO = _FOLDER / "go"
"""While this file isn't there, the task `hold` holds on."""

_main = os.getpid()


def note(event: str, **details: object) -> None:
    """One line of the ledger, whole whoever else writes or is killed."""
    line = json.dumps({"event": event, "worker": _main, "at": time.time(), **details})
    file = os.open(LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def _about(request: Any) -> dict[str, object]:
    return {
        "task": request.task.removeprefix(f"{BOOKS}."),
        "id": request.id,
        "message": request.properties["delivery_tag"].partition(".")[0],
    }


class BookedTask(PolicyTask):
    """A task whose every run is in the ledger."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run, between two lines."""
        run = f"{os.getpid()}-{time.monotonic_ns()}"
        self.request.run = run
        note("began", run=run, pid=os.getpid(), **_about(self.request))
        try:
            result = self.run(*args, **kwargs)
        except BaseException as error:
            note("ended", run=run, by=type(error).__name__)
            raise
        note("ended", run=run, by="success")
        return result


settings = get_settings()
app = Celery("books", broker=settings.broker_url, backend=settings.result_backend_url, task_cls=BookedTask)
app.conf.update(
    accept_content=["json"],
    task_queues=[Queue(name, Exchange(name, "direct"), name) for name in SHEET.queues],
    task_default_queue=BOOKS,
    task_routes={task: {"queue": CHILDREN} for task in SHEET.queues[CHILDREN].tasks},
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=2,
    broker_connection_retry_on_startup=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_transport_options={
        "delivery_limits": {queue.name: queue.delivery_limit for queue in SHEET.queues.values()}
    },
    task_annotations={"*": retry_options(SHEET.queues[BOOKS].retry)},
)
dead_letters = DeadLetters(lambda task: task in app.tasks)
broker.register(on_dead=dead_letters)
results.register(app)
worker_monitoring.install(app, lambda: SHEET)
dead_letter_worker.install(app, dead_letters)


@signals.celeryd_init.connect
def _this_is_the_main_process(**_: object) -> None:
    global _main  # noqa: PLW0603 - children of the pool are forked with it
    _main = os.getpid()


@signals.task_revoked.connect
def _revoked(request: Any, terminated: bool, expired: bool, **_: object) -> None:
    note("revoked", by="terminated" if terminated else "expired" if expired else "revoked", **_about(request))


@signals.task_internal_error.connect
def _could_not_be_ended(request: Any, exception: BaseException, **_: object) -> None:
    note("broken", id=request["id"], by=type(exception).__name__)


@signals.task_success.connect
def _die_after_success(sender: Any, **_: object) -> None:
    if "died" in sender.name and not _before(sender.request.id):
        note("died", run=sender.request.run)
        os.kill(os.getpid(), signal.SIGKILL)


def _before(name: str) -> bool:
    """Whether this was asked for that name before, by whatever process."""
    try:
        (_FOLDER / name).touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def _task(**options: Any) -> Any:
    return lambda function: app.task(name=f"{BOOKS}.{function.__name__}", bind=True, **options)(function)


@_task()
def job(_: Any, seconds: float = 0.0) -> None:
    """Take a while."""
    time.sleep(seconds)


@_task(ignore_result=True)
def quick(_: Any) -> None:
    """Take no time."""


@_task()
def raises(_: Any) -> None:
    """Raise what no policy retries."""
    raise ValueError("on purpose")


@_task()
def retried(self: Any) -> None:
    """Ask for two more runs."""
    if self.request.retries < 2:
        raise self.retry(countdown=0)


@_task()
def given_up(self: Any) -> None:
    """Ask for more runs than there may be."""
    raise self.retry(countdown=0, exc=KeyError("on purpose"))


@_task(ignore_result=True)
def transient(_: Any) -> None:
    """Raise what the policy retries, every time."""
    raise ConnectionError("on purpose")


@_task()
def rejected(_: Any) -> None:
    """Refuse the message for good."""
    raise Reject("on purpose", requeue=False)


@_task()
def requeued_once(self: Any) -> None:
    """Give the message back, the first time."""
    if not _before(self.request.id):
        raise Reject("on purpose", requeue=True)


@_task()
def ignored(_: Any) -> None:
    """End without a state."""
    raise Ignore


@_task(reject_on_worker_lost=False)
def exits(_: Any) -> None:
    """Leave the process."""
    raise SystemExit(3)


@_task()
def memory(_: Any) -> None:
    """Ask for more memory than there is, at once."""
    bytearray(2**60)


@_task()
def hold(_: Any) -> None:
    """Run until it is told to go."""
    while not GO.exists():
        time.sleep(0.05)


@_task(soft_time_limit=1)
def soft(_: Any) -> None:
    """Run into the soft limit."""
    time.sleep(30)


@_task(soft_time_limit=1)
def soft_caught(_: Any) -> None:
    """Run into the soft limit and tidy up."""
    with suppress(SoftTimeLimitExceeded):
        time.sleep(30)


@_task(time_limit=1)
def hard(_: Any) -> None:
    """Run into the hard limit."""
    time.sleep(30)


@_task()
def terminated(_: Any) -> None:
    """Run until somebody ends it."""
    time.sleep(100)


@_task()
def poison(_: Any) -> None:
    """End the process it runs in."""
    os.kill(os.getpid(), signal.SIGKILL)


@_task()
def died_stored(_: Any) -> None:
    """Succeed; its process dies when that is stored."""


@_task(ignore_result=True)
def died_unstored(_: Any) -> None:
    """Succeed; its process dies before it could say so."""


def publish(jobs: int, seconds: float) -> None:
    """Publish jobs that become due over so many seconds, one in three of which goes wrong."""
    wrong = [name for name in EVERYWHERE + IN_PROCESSES if not name.startswith(("job", "hold", "died"))]
    wrong += ["expired", "revoked", "unknown"]
    with broker.batch():
        for number in range(jobs):
            due = seconds * number / jobs
            if number % 3:
                job.apply_async((0.05 * (number % 5),), countdown=due, task_id=f"job-{number}")
                continue
            kind = wrong[number // 3 % len(wrong)]
            options = {"task_id": f"{kind}-{number}", "countdown": due}
            if kind == "unknown":
                note("unknown")
                app.send_task("nobody.knows.this", queue=BOOKS, **options)
            elif kind == "expired":
                quick.apply_async(expires=-1, **options)
            elif kind == "revoked":
                quick.apply_async(**options | {"countdown": due + 3})
            else:
                app.tasks[f"{BOOKS}.{kind}"].apply_async(**options)
