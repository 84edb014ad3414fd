"""A worker whose failures become dead letters: what Celery would acknowledge, the broker is told to give up.

Both classes are mixed into whatever request and consumer the application has. They act in the worker's main
process, the only one that sees exceptions, both time limits and lost children. With a broker other than
the one on Postgres nothing changes.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from copy import copy
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from celery import Celery, signals
from celery.exceptions import Ignore, Retry, TimeLimitExceeded
from celery.utils.imports import symbol_by_name
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from app.dlq.capture import FAILED, SUCCEEDED, DeadLetters
from app.dlq.classify import Failure, failure_of
from app.dlq.message import REPLAY_HEADER, InvalidMessageError, check
from app.observability.metrics import TaskMetrics

logger = logging.getLogger(__name__)


def give_up(message: Any, reason: str, detail: Any = None) -> None:
    """Let the broker hand a message over when Celery acknowledges or rejects it."""
    bury, tag = getattr(message.channel, "dead_letter", None), message.delivery_tag
    if bury:
        # Over the message's own methods, so that Celery's book-keeping around them stays as it is.
        message.ack = message.reject = lambda *_, **__: bury(tag, reason, detail)


class _OutOfMemoryError(RuntimeError):
    """A task's MemoryError; counted as what it is."""

    exc_cls_name = "MemoryError"


class DeadLetterRequest:
    """A request whose message is acknowledged only when it was done, or asked to be run again."""

    _failure: Failure | None = None
    _not_over = False  # it is run again, or somebody revoked it

    def on_failure(self: Any, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """It ended by an exception."""
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if isinstance(error, Retry):
            self._not_over = True
        elif not isinstance(error, Ignore) and self._failure is None:
            transient = tuple(getattr(self.task, "autoretry_for", ()))
            self._failure = failure_of(error, exc_info.traceback, transient=transient, worker=self.hostname)
        if isinstance(error, MemoryError):
            # Celery would end the whole worker for it, though it was one task that asked for too much.
            exc_info = copy(exc_info)
            exc_info.exception = _OutOfMemoryError(f"MemoryError: {error}")
        super().on_failure(exc_info, send_failed_event, return_ok)  # the one mixed with

    def on_timeout(self: Any, soft: bool, timeout: float) -> None:
        """A time limit passed; the soft one is raised inside the task."""
        if not soft:
            self._failure = failure_of(TimeLimitExceeded(timeout), None, worker=self.hostname)
        super().on_timeout(soft, timeout)

    def _success_was_stored(self: Any) -> Any:
        stored = super()._success_was_stored()
        if stored:  # its process died after it was done
            self._failure = None
        return stored

    def _announce_revoked(self: Any, reason: str, *args: Any) -> None:
        self._not_over = True
        self._failure = None
        if reason == "expired":
            self._failure = Failure.of(
                "expired",
                "Expired",
                f"it expired at {self.expires} before it was run",
                worker=self.hostname,
                attempts=0,
            )
        super()._announce_revoked(reason, *args)

    def acknowledge(self: Any) -> None:
        """Celery is done with it, whichever way."""
        self._hand_over()
        super().acknowledge()

    def reject(self: Any, requeue: bool = False) -> None:
        """Celery gives it back, or gives it up."""
        if not requeue:
            self._hand_over()
        super().reject(requeue)

    def _hand_over(self: Any) -> None:
        if self.acknowledged:
            return
        if self._failure:
            give_up(self._message, FAILED, self._failure)
        elif REPLAY_HEADER in self._message.headers and not self._not_over:
            give_up(self._message, SUCCEEDED)


class DeadLetterConsumer:
    """A consumer that hands over what Celery can't run, before it stumbles over it."""

    def create_task_handler(self: Any, *args: Any, **options: Any) -> Any:
        """Look at every message first."""
        handle = super().create_task_handler(*args, **options)

        def on_task_received(message: Any) -> None:
            try:
                check(message.headers, message.payload)
            except Exception as error:  # whatever a message can do to a decoder is its own fault
                problem = (
                    str(error) if isinstance(error, InvalidMessageError) else f"it can't be decoded: {error}"
                )
                logger.error(  # noqa: TRY400 - a traceback would show the message
                    "A message that can't be run was given up: %s", type(error).__name__
                )
                give_up(
                    message,
                    FAILED,
                    Failure.of("invalid", "InvalidMessage", problem, worker=self.hostname, attempts=0),
                )
                message.reject_log_error(logger, self.connection_errors)
                return
            handle(message)

        return on_task_received

    def on_invalid_task(self: Any, body: Any, message: Any, exc: Exception) -> None:
        """Its headers have the right types but make no sense."""
        give_up(
            message,
            FAILED,
            Failure.of("invalid", type(exc).__name__, str(exc), worker=self.hostname, attempts=0),
        )
        super().on_invalid_task(body, message, exc)


class _Counters(Collector):
    def __init__(self, dead_letters: DeadLetters, metrics: TaskMetrics) -> None:
        self._dead_letters = dead_letters
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        errors = CounterMetricFamily(
            "celery_worker_dlq_capture_errors",
            "Attempts to write a dead letter that failed; its message stays held.",
            labels=["queue"],
        )
        counts = Counter(dict.fromkeys(self._metrics.queues, 0))
        # A worker also gives up what other workers left, of whatever queue.
        for queue, number in list(self._dead_letters.errors_by_queue.items()):
            counts[self._metrics.known(queue)] += number
        for queue, number in counts.items():
            errors.add_metric([queue], number)
        yield errors


def install(app: Celery, dead_letters: DeadLetters) -> None:
    """Let every worker of `app` hand its failures over; last of what gives it a request and a consumer."""

    @signals.celeryd_init.connect(weak=False)
    def mix_in(instance: Any, conf: Any, **_: Any) -> None:
        if instance.app is not app:
            return
        request = symbol_by_name(app.Task.Request)
        app.Task.Request = type("Request", (DeadLetterRequest, request), {})
        consumer = symbol_by_name(conf.worker_consumer)
        conf.worker_consumer = type("Consumer", (DeadLetterConsumer, consumer), {})
        if health := getattr(consumer, "health", None):
            health.dead_letters = dead_letters.health
        if metrics := getattr(request, "metrics", None):
            registry: CollectorRegistry = metrics.registry
            registry.register(_Counters(dead_letters, metrics))
