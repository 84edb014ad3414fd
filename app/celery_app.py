"""The Celery application: where settings, broker, results, logs and tasks are put together."""

import inspect
import logging
import os
import sys
import warnings
from functools import cache
from typing import Any

from celery import Celery, signals
from celery.app.amqp import AMQP
from celery.exceptions import CPendingDeprecationWarning
from celery.local import Proxy
from kombu.connection import Connection
from kombu.entity import Exchange, Queue

from app import broker, results
from app.core.config import EX_CONFIG, ConfigurationError, get_settings
from app.core.topology import Topology, TopologyError
from app.db import engine  # noqa: F401 - `postgresql://` means psycopg2 from here on
from app.dlq import worker as dead_letter_worker
from app.dlq.answer import answer_of
from app.dlq.capture import DeadLetters
from app.observability import worker_monitoring
from app.observability.context import CORRELATION_HEADER, Context, current_context, set_context
from app.observability.logging import configure_logging
from app.tasks.base import PolicyTask, retry_options
from app.tasks.discovery import disagreements, discover

logger = logging.getLogger(__name__)


class NoRoute(Exception):  # noqa: N818 - it is the name of what is wrong
    """A task was published to where no worker would ever find it."""


class _Connection(Connection):
    """Tries again every second or two; kombu's own waits grow to half a minute."""

    def _ensure_connection(self, *args: Any, **options: Any) -> Any:
        waits = {"interval_start": 1, "interval_step": 0.5, "interval_max": 2}
        return super()._ensure_connection(*args, **(waits | options))  # type: ignore[no-untyped-call] # kombu's own


class _Amqp(AMQP):
    Connection = _Connection


@cache
def topology() -> Topology:
    """The sheet with this environment's overrides.

    Raises:
        ConfigurationError: the settings, the sheet or an override can't be used.
    """
    try:
        return get_settings().topology
    except TopologyError as error:
        raise ConfigurationError(str(error)) from error


def route(name: str, _args: Any, _kwargs: Any, options: dict[str, Any], **_: Any) -> dict[str, str]:
    """Celery's router: the queue of the caller's choice, or else the one that carries the task.

    Raises:
        NoRoute: there is neither in the sheet.
    """
    queues = topology().queues
    if queue := options.get("queue"):
        if queue.name not in queues:
            raise NoRoute(f"There is no queue {queue.name} in app/topology.yml, so {name} was not published.")
        return {}
    if exchange := options.get("exchange"):
        for entry in queues.values():
            if (exchange, options.get("routing_key")) == (entry.exchange, entry.routing_key):
                return {"queue": entry.name}
        raise NoRoute(f"No queue of app/topology.yml is bound to {exchange}, so {name} was not published.")
    if name in topology().queue_by_task:
        return {"queue": topology().queue_by_task[name].name}
    raise NoRoute(
        f"No queue carries the task {name}, so it was not published: "
        "add it to a queue in app/topology.yml, or correct the name."
    )


@cache
def _configuration() -> dict[str, Any]:
    settings = get_settings()
    queues = topology().queues.values()
    # Celery lets these two of the environment outrank its configuration, so they are put right in place.
    if "CELERY_BROKER_URL" in os.environ:
        os.environ["CELERY_BROKER_URL"] = settings.broker_url
    if "CELERY_RESULT_BACKEND" in os.environ:
        os.environ["CELERY_RESULT_BACKEND"] = settings.result_backend_url
    return {
        "broker_url": settings.broker_url,
        "broker_transport_options": {
            "delivery_limits": {queue.name: queue.delivery_limit for queue in queues},
        },
        "result_backend": settings.result_backend_url,
        # JSON alone: whoever can write a message must not be able to run code.
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "enable_utc": True,
        "timezone": "UTC",
        # The sheet's queues and no other.
        "task_queues": [
            Queue(queue.name, Exchange(queue.exchange, "direct"), queue.routing_key) for queue in queues
        ],
        "task_default_queue": next(iter(queues)).name,  # must name one; `route` never leaves it to this
        "task_create_missing_queues": False,
        "task_routes": (route,),
        "task_annotations": {
            task: {"soft_time_limit": queue.soft_time_limit, "time_limit": queue.time_limit}
            | retry_options(queue.retry_of(task))
            for queue in queues
            for task in queue.tasks
        },
        # A message is done when its task is, and is there for another worker when this one dies.
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "worker_prefetch_multiplier": 1,
        # The database going away never ends a worker, nor what it is running.
        "broker_connection_retry": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
    }


def _tenant_argument(task: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """The value of `tenant_id` among a task's arguments, also when it was passed by position."""
    try:
        bound = inspect.signature(celery_app.tasks[task].run).bind_partial(*args, **kwargs)
    except (KeyError, TypeError):  # nobody knows the task, or its arguments are not its own
        return None
    return bound.arguments.get("tenant_id")


celery_app = Celery("skeldir", amqp=_Amqp, task_cls=PolicyTask)
# Evaluated when first needed, so that importing this module asks nothing of the environment.
celery_app.config_from_object(Proxy(_configuration))
dead_letters = DeadLetters(lambda task: task in celery_app.tasks, _tenant_argument, answer_of(celery_app))
broker.register(on_dead=dead_letters)
results.register(celery_app)


@signals.import_modules.connect
def _discover_tasks(**_: Any) -> None:
    discover(topology())


@signals.setup_logging.connect
def _configure_logging(loglevel: int | str | None = None, **_: Any) -> None:
    configure_logging(loglevel or "INFO")


@signals.celeryd_init.connect
def _prepare_worker(instance: Any, options: dict[str, Any], **_: Any) -> None:
    problems = disagreements(celery_app.tasks, topology())
    asked = options.get("queues") or []
    asked = asked.split(",") if isinstance(asked, str) else asked
    problems += [
        f"There is no queue {name} in app/topology.yml, which has {', '.join(topology().queues)}."
        for name in asked
        if name not in topology().queues
    ]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        sys.exit(EX_CONFIG)
    instance.quiet = True  # no banner: it isn't JSON
    celery_app.log.setup(options.get("loglevel") or "INFO")
    # Nothing that is deprecated for Celery's next major version is news to whoever reads the journal.
    warnings.simplefilter("ignore", CPendingDeprecationWarning)


@signals.before_task_publish.connect
def _send_correlation_id(headers: dict[str, Any], **_: Any) -> None:
    known = headers.get(CORRELATION_HEADER) or current_context().correlation_id
    headers[CORRELATION_HEADER] = known or headers.get("root_id") or headers.get("id")


@signals.task_received.connect
def _log_received(request: Any, **_: Any) -> None:
    known = {"correlation_id": request.request_dict.get(CORRELATION_HEADER)}
    logger.info("Task %(name)s[%(id)s] received", {"name": request.name, "id": request.id}, extra=known)


@signals.task_prerun.connect
def _enter_task(task: PolicyTask, **_: Any) -> None:
    request = task.request
    request.context_outside = set_context(
        Context(getattr(request, CORRELATION_HEADER, None) or request.root_id)
    )


@signals.task_postrun.connect
def _leave_task(task: PolicyTask, **_: Any) -> None:
    set_context(getattr(task.request, "context_outside", Context()))


# Last, so that a worker that can't start says why before it listens on a port.
worker_monitoring.install(celery_app, topology, rescued=broker.rescued)
dead_letter_worker.install(celery_app, dead_letters)
