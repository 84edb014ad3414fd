"""The metric families of a worker: one plain registry in its main process.

`celery_task_started_total` equals, for every task and queue, the sum of success, failure, retry and
`celery_task_revoked_total{reason="terminated"}`, plus `celery_task_in_flight`. Each delivery of a message
counts by itself: a message that came back because its process died was started, and failed, once more.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from app.core.topology import QUEUE_WAIT_BOUNDS, Topology

BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10)
"""Upper bounds of the duration histogram, in seconds."""

OTHER = "other"
"""Label of a queue that is not in the sheet, and of an exception of no known kind."""

REVOKED = ("revoked", "expired", "terminated")
"""Why a revoked delivery was given up: by id before it ran, too late to run, or stopped while it ran."""

TIMEOUTS = ("soft", "hard")
"""The time limits: the soft one is raised in the task, the hard one kills its process."""

_KNOWN = (
    *("SoftTimeLimitExceeded", "TimeLimitExceeded", "WorkerLostError", "Reject"),
    *("ArithmeticError", "AttributeError", "LookupError", "MemoryError", "OSError", "RuntimeError"),
    *("TypeError", "ValueError", "DBAPIError"),
)

_LABELS = ("task_name", "queue")


class TaskSeries(NamedTuple):
    """All series of one task on one queue."""

    started: Counter
    success: Counter
    failure: Mapping[str, Counter]
    retry: Counter
    revoked: Mapping[str, Counter]
    timeout: Mapping[str, Counter]
    worker_lost: Counter
    in_flight: Gauge
    duration: Histogram
    queue_wait: Histogram


class TaskMetrics:
    """The families, and which queue of the sheet a delivery belongs to.

    A task's name comes from the registered task and a queue's from the sheet, never from a message, so nobody
    who can publish can mint series.
    """

    def __init__(self, sheet: Topology) -> None:
        # They would double the number of series and say nothing.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._started = self._counter("started", "Deliveries a process of the pool began to run.")
        self._success = self._counter("success", "Runs that returned, or ended themselves by Ignore.")
        self._failure = self._counter(
            "failure",
            "Runs that raised, were rejected for good, hit a time limit or lost their process.",
            "exception",
        )
        self._retry = self._counter("retry", "Runs that ended by asking to be run again.")
        self._revoked = self._counter("revoked", "Deliveries given up before or while they ran.", "reason")
        self._timeout = self._counter("timeout", "Time limits that passed while a run went on.", "kind")
        self._worker_lost = self._counter("worker_lost", "Runs whose process ended under them.")
        self._in_flight = Gauge(
            "celery_task_in_flight", "Runs going on just now.", _LABELS, registry=self.registry
        )
        self._queue_wait = Histogram(
            "celery_task_queue_wait_seconds",
            "Time from publishing to the start of the first run, but for jobs with an ETA or a countdown.",
            _LABELS,
            registry=self.registry,
            buckets=QUEUE_WAIT_BOUNDS,
        )
        self._duration = Histogram(
            "celery_task_duration_seconds",
            "Time a run took, however it ended.",
            _LABELS,
            registry=self.registry,
            buckets=BUCKETS,
        )
        self._series: dict[tuple[str, str], TaskSeries] = {}
        self._queues = {("", queue.name): queue.name for queue in sheet.queues.values()} | {
            (queue.exchange, queue.routing_key): queue.name for queue in sheet.queues.values()
        }
        self._sheet = sheet
        self.queues: tuple[str, ...] = ()
        """The queues of the sheet this worker was started for."""
        transient = {
            name.rpartition(".")[2]
            for queue in sheet.queues.values()
            for policy in (queue.retry, *queue.task_retry.values())
            for name in policy.transient
        }
        self._exceptions = (*sorted({*_KNOWN, *transient}), OTHER)

    def _counter(self, name: str, documentation: str, *more_labels: str) -> Counter:
        return Counter(f"celery_task_{name}", documentation, _LABELS + more_labels, registry=self.registry)

    def of(self, task_name: str, queue: str) -> TaskSeries:
        """The series of a task on a queue; they begin at 0 when first asked for, all together."""
        series = self._series.get((task_name, queue))
        if series is None:
            labels = (task_name, queue)
            series = self._series[labels] = TaskSeries(
                self._started.labels(*labels),
                self._success.labels(*labels),
                {name: self._failure.labels(*labels, name) for name in self._exceptions},
                self._retry.labels(*labels),
                {reason: self._revoked.labels(*labels, reason) for reason in REVOKED},
                {kind: self._timeout.labels(*labels, kind) for kind in TIMEOUTS},
                self._worker_lost.labels(*labels),
                self._in_flight.labels(*labels),
                self._duration.labels(*labels),
                self._queue_wait.labels(*labels),
            )
        return series

    def begin_at_zero(self, queues: Iterable[str]) -> None:
        """Let the series of every task of these queues exist before anything happens to them.

        A counter that is born at 1 hides its first increase from every alert.
        """
        self.queues = tuple(name for name in queues if name in self._sheet.queues)
        for name in self.queues:
            for task in self._sheet.queues[name].tasks:
                self.of(task, name)

    def known(self, queue: str) -> str:
        """A queue's name as a label: its own, or `OTHER` when it is not in the sheet."""
        return queue if queue in self._sheet.queues else OTHER

    def queue_of(self, delivery_info: Mapping[str, Any]) -> str:
        """The queue that a message was delivered from, by its exchange and routing key; else `OTHER`."""
        key = (delivery_info.get("exchange") or "", delivery_info.get("routing_key"))
        return self._queues.get(key, OTHER)  # type: ignore[arg-type]

    def kind_of(self, error: BaseException) -> str:
        """The label of an exception: the nearest of its classes that has one, else `OTHER`.

        Those are a few common ones and what the sheet calls transient, so that tasks can't mint series.
        """
        # What a child could not send over comes as a wrapper that knows the name.
        names = [getattr(error, "exc_cls_name", None), *(kind.__name__ for kind in type(error).__mro__)]
        return next((name for name in names if name in self._exceptions), OTHER)
