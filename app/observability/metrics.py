"""The metric families of a worker, counted in its main process.

Every job pays for what is counted of it, so the numbers are plain: the client library makes its metrics of
them when they are asked for.

`celery_task_started_total` equals, for every task and queue, the sum of success, failure, retry and
`celery_task_revoked_total{reason="terminated"}`, plus `celery_task_in_flight`. Each delivery of a message
counts by itself: a message that came back because its process died was started, and failed, once more.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from math import inf
from threading import Lock
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

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

Run = tuple[tuple[str, str | None, str], Any, Any, float, float | None]
"""A run that began: its task, exchange and routing key; what its message says of when it was published and of
deliveries that failed before (whatever it holds there, or None); when it began; if it succeeded, the seconds
it took."""

# Ends can be reported by several threads at the same time, and numbers asked for by another.
lock = Lock()
"""Held by who changes numbers, and by who reads them: a scrape shows one moment."""


class Distribution:
    """Seconds, by upper bounds."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = (*bounds, inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, seconds: Iterable[float]) -> None:
        """So many more."""
        seen = sorted(seconds)
        for place, bound in enumerate(self._bounds):
            self._counts[place] += bisect_right(seen, bound)
        self._sum += sum(seen)

    def add_to(self, family: HistogramMetricFamily, labels: tuple[str, ...]) -> None:
        """Show what was observed so far."""
        names = map(floatToGoString, self._bounds)
        family.add_metric(labels, list(zip(names, self._counts, strict=True)), self._sum)


_COUNTERS = {
    "started": "Deliveries a process of the pool began to run.",
    "success": "Runs that returned, or ended themselves by Ignore.",
    "failure": "Runs that raised, were rejected for good, hit a time limit or lost their process.",
    "retry": "Runs that ended by asking to be run again.",
    "revoked": "Deliveries given up before or while they ran.",
    "timeout": "Time limits that passed while a run went on.",
    "worker_lost": "Runs whose process ended under them.",
}
_MORE_LABELS = {"failure": "exception", "revoked": "reason", "timeout": "kind"}
_HISTOGRAMS = {
    "queue_wait": "Time from publishing to the start of the first run,"
    " but for jobs with an ETA or a countdown.",
    "duration": "Time a run took, however it ended.",
}


class TaskSeries:
    """All numbers of one task on one queue, each changed and read under `lock`."""

    __slots__ = (*_COUNTERS, *_HISTOGRAMS)

    def __init__(self, exceptions: Iterable[str]) -> None:
        self.started = 0
        self.success = 0
        self.failure = dict.fromkeys(exceptions, 0)
        self.retry = 0
        self.revoked = dict.fromkeys(REVOKED, 0)
        self.timeout = dict.fromkeys(TIMEOUTS, 0)
        self.worker_lost = 0
        self.queue_wait = Distribution(QUEUE_WAIT_BOUNDS)
        self.duration = Distribution(BUCKETS)

    def count(self, runs: list[Run]) -> None:
        """Count that these began, and which of them succeeded."""
        self.started += len(runs)
        self.queue_wait.observe(_waits(runs))
        seconds = [took for run in runs if (took := run[4]) is not None]
        self.success += len(seconds)
        self.duration.observe(seconds)

    @property
    def in_flight(self) -> int:
        """Runs that began and have not ended."""
        ended = self.success + sum(self.failure.values()) + self.retry + self.revoked["terminated"]
        return self.started - ended


def _waits(runs: Iterable[Run]) -> list[float]:
    """The seconds that runs waited, as far as that is known."""
    # After a delivery that failed it waited for something else: that its worker died. But one that was only
    # handed back goes on waiting.
    return [
        began - published if began > published else 0.0
        for _, published, failed_before, began, _ in runs
        if failed_before is None and type(published) is float
    ]


class TaskMetrics(Collector):
    """The families, and which queue of the sheet a delivery belongs to.

    A task's name comes from the registered task and a queue's from the sheet, never from a message, so nobody
    who can publish can mint series.
    """

    def __init__(self, sheet: Topology) -> None:
        self.registry = CollectorRegistry()
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
        self.runs: list[Run] = []
        """What began and is not counted yet; whoever has one may append it, without the lock."""
        self.count_starts: Callable[[], None] = lambda: None
        """Called under `lock` before the numbers are read."""
        self.registry.register(self)

    def collect(self) -> list[Metric]:
        """The families, as they are at one moment."""
        with lock:
            self.count_starts()
            self.count()
            return list(self._families())

    def count(self) -> None:
        """Count what is not counted yet. The caller has the lock."""
        runs = self.runs[:]
        del self.runs[: len(runs)]  # a thread may append meanwhile
        of_route = defaultdict(list)
        for run in runs:
            try:
                of_route[run[0]].append(run)
            except TypeError:  # as in `of_delivery`
                self.of_delivery(*run[0]).count([run])
        for route, its in of_route.items():
            self.of_delivery(*route).count(its)

    def _families(self) -> Iterator[Metric]:
        for name, documentation in _COUNTERS.items():
            more = [_MORE_LABELS[name]] if name in _MORE_LABELS else []
            counter = CounterMetricFamily(f"celery_task_{name}", documentation, labels=[*_LABELS, *more])
            for labels, series in self._series.items():
                number = getattr(series, name)
                if more:
                    for label, each in number.items():
                        counter.add_metric((*labels, label), each)
                else:
                    counter.add_metric(labels, number)
            yield counter
        gauge = GaugeMetricFamily("celery_task_in_flight", "Runs going on just now.", labels=_LABELS)
        for labels, series in self._series.items():
            gauge.add_metric(labels, series.in_flight)
        yield gauge
        for name, documentation in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"celery_task_{name}_seconds", documentation, labels=_LABELS)
            for labels, series in self._series.items():
                getattr(series, name).add_to(histogram, labels)
            yield histogram

    def of(self, task_name: str, queue: str) -> TaskSeries:
        """The series of a task on a queue; they begin at 0 when first asked for, all together."""
        series = self._series.get((task_name, queue))
        if series is None:
            series = self._series[task_name, queue] = TaskSeries(self._exceptions)
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

    def of_delivery(self, task_name: str, exchange: str | None, routing_key: str) -> TaskSeries:
        """The series of a task on the queue that an exchange and a routing key lead to, else on `OTHER`."""
        try:
            queue = self._queues.get((exchange or "", routing_key), OTHER)
        except TypeError:  # a message can hold a list there, or whatever can't be looked up
            queue = OTHER
        return self.of(task_name, queue)

    def kind_of(self, error: BaseException) -> str:
        """The label of an exception: the nearest of its classes that has one, else `OTHER`.

        Those are a few common ones and what the sheet calls transient, so that tasks can't mint series.
        """
        # What a child could not send over comes as a wrapper that knows the name.
        names = [getattr(error, "exc_cls_name", None), *(kind.__name__ for kind in type(error).__mro__)]
        return next((name for name in names if name in self._exceptions), OTHER)
