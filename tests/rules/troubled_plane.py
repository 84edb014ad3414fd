"""The plane's own application with more tasks on one queue, which end in every way that alerts are about.

Everything else is the real thing: sheet, broker, dead letters, metering. Targets are short, so that a
recording need not wait for half an hour.
"""

import os
import signal
import time

from celery import shared_task, signals

from app.core import config
from app.core.topology import Beat, Exporter, Topology, load_topology

MODULE = "tests.rules.troubled_plane"
FROZEN = 70.0


def _sheet() -> Topology:
    sheet = load_topology().model_dump(mode="json")
    queue = sheet["queues"]["housekeeping"]
    names = ("ok", "slow", "fails", "retried", "hard", "soft", "killed", "freeze")
    queue["tasks"] += [f"{MODULE}.{name}" for name in names]
    queue["queue_wait_target_seconds"] = 1
    return Topology.model_validate(sheet)


SHEET = _sheet()
config.load_topology = lambda **_: SHEET  # before anything asks for it

from app.celery_app import celery_app  # noqa: E402

app = celery_app


@shared_task
def ok() -> None:
    """Succeed."""


@shared_task
def slow(seconds: float) -> None:
    """Take a while."""
    time.sleep(seconds)


@shared_task
def fails() -> None:
    """Raise what no policy retries."""
    raise ValueError("on purpose")


@shared_task(bind=True, max_retries=3)
def retried(self) -> None:  # type: ignore[no-untyped-def]
    """Ask to be run again until there is no more of it."""
    raise self.retry(countdown=0, exc=ConnectionError("on purpose"))


@shared_task
def hard() -> None:
    """Run into the hard limit that its publisher gives."""
    time.sleep(30)


@shared_task
def soft() -> None:
    """Run into the soft limit that its publisher gives."""
    time.sleep(30)


@shared_task(reject_on_worker_lost=False)
def killed() -> None:
    """End the process it runs in."""
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task
def freeze() -> None:
    """Its arrival alone stops the consumer's loop."""


@signals.task_received.connect
def _freeze_the_loop(request, **_) -> None:  # type: ignore[no-untyped-def]
    if request.name == f"{MODULE}.freeze":
        time.sleep(FROZEN)


def stand_by_for(queue: str) -> None:
    """Become a drained unit of this plane."""
    from app.observability.worker_monitoring import stand_by  # noqa: PLC0415 - only this process is one

    stand_by(SHEET, queue, "recorded")


def run_exporter(port: int) -> None:
    """Become the exporter of this plane."""
    from app.exporter.process import run  # noqa: PLC0415 - only this process is one

    run(SHEET.model_copy(update={"exporter": Exporter(port=port)}))


def run_beat(port: int) -> None:
    """Become the scheduler of this plane, of one job that is due when nobody records."""
    from app.beat.process import run  # noqa: PLC0415 - only this process is one
    from app.beat.schedule import Entry  # noqa: PLC0415

    entry = Entry(name="clean-up-results", task="celery.backend_cleanup", crontab="10 3 * * *")
    run(SHEET.model_copy(update={"beat": Beat(port=port)}), {entry.name: entry})
