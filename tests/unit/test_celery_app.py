"""The sheet decides where tasks go; code and sheet must agree."""

import os
import subprocess
import sys

import pytest
from celery.exceptions import QueueNotFound
from kombu.entity import Queue

from app.celery_app import NoRoute, celery_app
from app.core.topology import load_topology
from app.tasks.discovery import disagreements, discover

SHEET = load_topology()


def _destination(task: str, **options: object) -> str:
    return str(celery_app.amqp.router.route(options, task)["queue"].name)


@pytest.mark.parametrize("task", SHEET.queue_by_task)
def test_a_task_goes_to_the_queue_that_carries_it(task: str) -> None:
    assert _destination(task) == SHEET.queue_by_task[task].name


@pytest.mark.parametrize("queue", SHEET.queues)
def test_the_caller_may_choose_another_queue_of_the_sheet(queue: str) -> None:
    assert _destination("app.tasks.housekeeping.ping", queue=queue) == queue
    entry = SHEET.queues[queue]
    chosen = {"exchange": entry.exchange, "routing_key": entry.routing_key}
    assert _destination("app.tasks.housekeeping.ping", **chosen) == queue


def test_a_task_without_a_queue_is_refused_when_published() -> None:
    with pytest.raises(NoRoute, match=r"app\.tasks\.nowhere\.work"):
        celery_app.send_task("app.tasks.nowhere.work")


def test_a_queue_that_is_not_in_the_sheet_is_refused_when_published() -> None:
    with pytest.raises(QueueNotFound, match="elsewhere"):
        celery_app.send_task("app.tasks.housekeeping.ping", queue="elsewhere")


def test_a_destination_that_is_not_in_the_sheet_is_refused_when_published() -> None:
    for options in ({"queue": Queue("elsewhere")}, {"exchange": "llm", "routing_key": "elsewhere"}):
        with pytest.raises(NoRoute):
            celery_app.send_task("app.tasks.housekeeping.ping", **options)


def test_the_workers_queues_are_the_sheets() -> None:
    queues = celery_app.amqp.queues
    assert {
        name: (queue.exchange.name, queue.exchange.type, queue.routing_key) for name, queue in queues.items()
    } == {queue.name: (queue.exchange, "direct", queue.routing_key) for queue in SHEET.queues.values()}


def test_code_and_sheet_agree() -> None:
    discover(SHEET)
    assert disagreements(celery_app.tasks, SHEET) == []


def test_a_task_without_a_queue_is_named() -> None:
    (problem,) = disagreements([*SHEET.queue_by_task, "app.tasks.stray.work"], SHEET)
    assert "app.tasks.stray.work" in problem


def test_a_queues_task_without_code_is_named() -> None:
    *others, last = SHEET.queue_by_task
    (problem,) = disagreements(others, SHEET)
    assert last in problem
    assert SHEET.queue_by_task[last].name in problem


def test_celerys_own_tasks_need_no_queue() -> None:
    assert disagreements([*SHEET.queue_by_task, "celery.starmap"], SHEET) == []


@pytest.mark.parametrize("task", SHEET.queue_by_task)
def test_limits_and_retries_come_from_the_sheet(task: str) -> None:
    discover(SHEET)
    code, queue = celery_app.tasks[task], SHEET.queue_by_task[task]
    assert (code.soft_time_limit, code.time_limit) == (queue.soft_time_limit, queue.time_limit)
    policy = queue.retry_of(task)
    assert (code.max_retries, code.backoff, code.jitter) == (
        policy.max_retries,
        policy.backoff,
        policy.jitter,
    )
    assert TimeoutError in code.autoretry_for
    assert code.acks_late
    assert code.reject_on_worker_lost


def test_only_json_is_accepted() -> None:
    conf = celery_app.conf
    assert conf.accept_content == conf.result_accept_content == ["json"]
    assert conf.task_serializer == conf.result_serializer == conf.event_serializer == "json"


def test_dsns_of_the_environment_are_put_right_too() -> None:
    given = "postgresql+asyncpg://u:pw@elsewhere/d?channel_binding=require"
    code = (
        "from app.celery_app import celery_app as app\n"
        "print(app.connection_for_write().as_uri(include_password=True))\n"
        "print(app.backend.as_uri(include_password=True))\n"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": "postgresql://here/d",
        "CELERY_BROKER_URL": f"sqla+{given}",
        "CELERY_RESULT_BACKEND": f"db+{given}",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    broker, backend = done.stdout.split()
    assert broker == "sqla+postgresql://u:pw@elsewhere/d"
    assert backend.endswith("postgresql://u:pw@elsewhere/d")
