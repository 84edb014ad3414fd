"""Counting what becomes of every delivery, in the worker's main process.

Celery's `Request` is the one place that sees each delivery's start and end once in every pool: exceptions,
retries, both time limits and a child that was killed (docs.celeryq.dev, "Requests and custom requests").
Signals do not: `task_failure` is sent twice for one hard time limit, and a killed child sends none.
"""

from time import monotonic, time
from typing import Any, ClassVar

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.exceptions import Ignore, Reject, Retry, Terminated, TimeLimitExceeded, WorkerLostError
from celery.worker.request import Request

from app.observability.context import PUBLISHED_HEADER
from app.observability.health import Pulse
from app.observability.metrics import TaskMetrics, TaskSeries, lock

_NUMBER = (int, float)


class MeteredRequest(Request):
    """A delivery that is counted once when it starts and once when it ends, whatever ends it first."""

    metrics: ClassVar[TaskMetrics]
    pulse: ClassVar[Pulse]

    _began = False
    _ended = False
    _accepted_at: float | None = None
    _runtime: float | None = None
    _series: TaskSeries | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        # For every task Celery derives a class with an `on_success` of its own, which never calls that of
        # its base (celery/celery#4526); so it is taken where it comes into being.
        super().__init_subclass__(**options)
        if "on_success" in vars(cls):
            cls.on_success = _metered(cls.on_success)

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """A process of the pool took it."""
        self._accepted_at = time_accepted
        with lock:
            if not self._began:
                self._count_begin()
        if self.pulse.tasks_hold_the_loop:
            self.pulse.hold(self.time_limits[0] or self.task.time_limit)
        super().on_accepted(pid, time_accepted)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """A time limit passed. The soft one is raised inside the task, which may still end in any way."""
        with lock:
            self._of_metrics().timeout["soft" if soft else "hard"] += 1
        if not soft:
            self._end("failure", TimeLimitExceeded())
        super().on_timeout(soft, timeout)

    def on_failure(
        self, exc_info: ExceptionInfo, send_failed_event: bool = True, return_ok: bool = False
    ) -> None:
        """It ended by an exception, which need not mean that it failed."""
        try:
            super().on_failure(exc_info, send_failed_event, return_ok)
        finally:
            error = _unwrapped(exc_info.exception)
            self._end(_outcome(error), error)

    def _success_was_stored(self) -> Any:
        # Asked when a process was lost: the task may have succeeded just before.
        stored = super()._success_was_stored()
        if stored:
            self._end("success")
        return stored

    def _announce_revoked(self, reason: str, *args: Any) -> None:
        self._end(reason)
        super()._announce_revoked(reason, *args)

    def _announce_cancelled(self, *args: Any, **options: Any) -> None:
        self._end("retry")  # the worker stops before the task did, and the message is delivered again
        super()._announce_cancelled(*args, **options)

    def _of_metrics(self) -> TaskSeries:
        if self._series is None:
            self._series = self.metrics.of(self.task.name, self.metrics.queue_of(self.delivery_info))
        return self._series

    def _count_begin(self) -> None:
        self._began = True
        series = self._of_metrics()
        series.started += 1
        published = self._request_dict.get(PUBLISHED_HEADER)
        # Another delivery waited for something else: that the worker which had the first one died.
        if isinstance(published, _NUMBER) and not self.delivery_info.get("redelivered"):
            waited = time() - published
            series.queue_wait.observe(waited if waited > 0 else 0.0)

    def _end(self, outcome: str, error: BaseException | None = None) -> None:
        with lock:
            if self._ended:
                return
            self._ended = True
            self._count_end(outcome, error)
        if self.pulse.tasks_hold_the_loop and self._began:
            self.pulse.tick()

    def _count_end(self, outcome: str, error: BaseException | None) -> None:
        series = self._of_metrics()
        if outcome in ("revoked", "expired"):  # it never ran
            series.revoked[outcome] += 1
            return
        if not self._began:  # a process can be lost before it said that it took the task
            self._count_begin()
        if outcome == "success":
            series.success += 1
        elif outcome == "retry":
            series.retry += 1
        elif outcome == "terminated":
            series.revoked[outcome] += 1
        else:
            # Celery, too, takes these for a lost process.
            if isinstance(error, SystemExit | KeyboardInterrupt):
                error = WorkerLostError()
            series.failure[self.metrics.kind_of(error or Exception())] += 1
            if isinstance(error, WorkerLostError):
                series.worker_lost += 1
        if self._runtime is None:
            self._runtime = monotonic() - self._accepted_at if self._accepted_at else 0.0
        series.duration.observe(self._runtime)


def _unwrapped(error: BaseException) -> BaseException:
    # Only the wrapper is taken off: a Retry, too, has an attribute `exc`, the reason for the retry.
    return error.exc if isinstance(error, ExceptionWithTraceback) else error


def _outcome(error: BaseException) -> str:
    match error:
        case Retry() | Reject(requeue=True):
            return "retry"
        case Ignore():
            return "success"
        case Terminated():
            return "terminated"
        case _:
            return "failure"


def _metered(celerys_own: Any) -> Any:
    def on_success(self: MeteredRequest, result: Any, **options: Any) -> Any:
        if isinstance(result, ExceptionInfo):  # what solo and threads report for SystemExit and its like
            return self.on_failure(result)
        failed, _, self._runtime = result
        if not failed:
            self._end("success")
        return celerys_own(self, result, **options)  # comes to on_failure when it failed

    return on_success
