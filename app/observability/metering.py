"""Counting what becomes of every delivery, in the worker's main process.

Celery's `Request` is the one place that sees each delivery's start and end once in every pool: exceptions,
retries, both time limits and a child that was killed (docs.celeryq.dev, "Requests and custom requests").
Signals do not: `task_failure` is sent twice for one hard time limit, and a killed child sends none.
"""

from time import time
from typing import Any, ClassVar

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.exceptions import Ignore, Reject, Retry, Terminated, TimeLimitExceeded, WorkerLostError
from celery.worker import state
from celery.worker.request import Request

from app.observability.context import PUBLISHED_HEADER
from app.observability.metrics import Run, TaskMetrics, TaskSeries, lock

_FAILED_DELIVERIES = "x-delivery-count"
"""Message header: how many deliveries of it failed before; named as by RabbitMQ's quorum queues."""
_AT_ONCE = 250
"""How many successes are counted at once: that many times in a row the code that counts is in the caches."""


class MeteredRequest(Request):
    """A delivery that is counted once, whatever ends it first.

    Its start is counted when it ends, or before that when somebody looks (`count_starts`): most jobs are
    over long before, and are counted once instead of twice.
    """

    metrics: ClassVar[TaskMetrics]

    _runtime: float | None = None
    _ended = False  # and counted, but for a success that `_metered` kept

    def __init_subclass__(cls, **options: Any) -> None:
        # For every task Celery derives a class with an `on_success` of its own, which never calls that of
        # its base (celery/celery#4526); so it is taken where it comes into being.
        super().__init_subclass__(**options)
        if "on_success" in vars(cls):
            cls.on_success = _metered(cls.on_success, cls.metrics)

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
        delivery = self._delivery_info
        return self.metrics.of_delivery(self._task.name, delivery["exchange"], delivery["routing_key"])

    def begun(self, took: float | None = None) -> Run:
        """That it began to run; if it succeeded, with the seconds it took."""
        delivery, headers = self._delivery_info, self._request_dict
        return (
            (self._task.name, delivery["exchange"], delivery["routing_key"]),
            headers.get(PUBLISHED_HEADER),
            headers.get(_FAILED_DELIVERIES),
            self.time_start or time(),
            took,
        )

    def keep(self, run: Run) -> Run:
        """Keep what is to be counted of its start, unless another thread was first; returns the first."""
        # Of two threads one sets a key that isn't there; so a job needs no lock.
        first: Run = self.__dict__.setdefault("_run", run)
        if first is run:
            self.metrics.runs.append(run)
        return first

    def _end(self, outcome: str, error: BaseException | None = None) -> None:
        with lock:
            if not self._ended:
                self._ended = True
                self._count_end(outcome, error)

    def _count_end(self, outcome: str, error: BaseException | None) -> None:
        if outcome in ("revoked", "expired"):  # it never ran
            self._of_metrics().revoked[outcome] += 1
            return
        # A process can be lost before it said that it took the task.
        *_, took = self.keep(self.begun())
        if took is not None:
            return  # it succeeded, and is counted as that
        self.metrics.count()
        series = self._of_metrics()
        match outcome:
            case "success":
                series.success += 1
            case "retry":
                series.retry += 1
            case "terminated":
                series.revoked[outcome] += 1
            case _:
                # Celery, too, takes these for a lost process.
                if isinstance(error, SystemExit | KeyboardInterrupt):
                    error = WorkerLostError()
                series.failure[self.metrics.kind_of(error or Exception())] += 1
                if isinstance(error, WorkerLostError):
                    series.worker_lost += 1
        if self._runtime is None:
            self._runtime = max(0.0, time() - self.time_start) if self.time_start else 0.0
        series.duration.observe([self._runtime])


def running() -> list[Any]:
    """The deliveries that the pool runs now, of any class; from any thread."""
    # Celery goes on adding and taking away; a set is copied at one moment, a WeakSet is not.
    return [request for ref in state.active_requests.data.copy() if (request := ref()) is not None]


def count_starts() -> None:
    """Count the starts of those that run now. The caller has the lock."""
    for request in running():
        if isinstance(request, MeteredRequest):
            request.keep(request.begun())


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


def _metered(celerys_own: Any, metrics: TaskMetrics) -> Any:
    runs = metrics.runs

    def on_success(self: MeteredRequest, result: Any) -> Any:
        if isinstance(result, ExceptionInfo):  # what solo and threads report for SystemExit and its like
            return self.on_failure(result)
        failed, _, runtime = result
        if failed:
            self._runtime = runtime
            return celerys_own(self, result)  # comes to on_failure
        # Nearly every job comes here, so all but a note is put off: whatever is touched after a job costs
        # several times as much as in a loop, the caches are full of other things.
        took = self.keep(self.begun(runtime))[-1]
        if took is None:  # somebody looked while it ran
            self._runtime = runtime
            self._end("success")
        elif len(runs) >= _AT_ONCE:
            with lock:
                metrics.count()
        return celerys_own(self, result)

    return on_success
