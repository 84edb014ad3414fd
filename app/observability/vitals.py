"""What a worker is and how it is, as gauges that are read when they are asked for."""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from celery.worker import state
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.observability.health import Health


class Vitals(Collector):
    """Each gauge once for every queue the worker was started for; a unit has one.

    Args:
        health: of the worker.
        queues: names of the sheet.
        rescued: how many messages of dead workers this one has given back.
    """

    def __init__(self, health: Health, queues: Sequence[str], rescued: Callable[[], int]) -> None:
        self._health = health
        self._queues = queues
        self._rescued = rescued
        self._build = {"release": release(), "python": platform.python_version(), "celery": version("celery")}

    def collect(self) -> Iterator[Metric]:
        """The gauges, as they are now."""
        health = self._health
        running = len(state.active_requests)
        # Reserved are those that run, too, until they end.
        prefetched = max(0, len(state.reserved_requests) - running) + len(state.scheduled_requests)
        # While a task may hold the loop, its last sign of life lies in the future.
        since_tick = max(0.0, time.monotonic() - health.pulse.last)
        yield self._gauge("prefetched", "Messages held by this worker that no process runs yet.", prefetched)
        yield self._gauge(
            "pool_size", "Tasks its pool can run at the same time; 0 while it starts.", _pool_size(health)
        )
        yield self._gauge("ready", "1 while jobs are taken and can be done.", health.ready)
        yield self._gauge(
            "draining",
            "1 from when it was told to stop, and while an operator keeps it drained.",
            bool(health.draining or health.drained),
        )
        # Apart, because draining ends by itself within minutes, and this lasts until somebody undoes it.
        yield self._gauge("drained", "1 while an operator keeps it drained.", bool(health.drained))
        yield self._gauge(
            "loop_last_tick_timestamp_seconds",
            "When the consumer's loop last moved; now while a task may hold it.",
            time.time() - since_tick,
        )
        yield self._gauge("database_connected", "1 while the database answers.", health.probe.reachable)
        rescued = CounterMetricFamily(
            "celery_worker_rescued_messages",
            "Messages that it gave back to their queues from workers that died.",
            value=self._rescued(),
        )
        yield rescued
        build = GaugeMetricFamily("celery_worker_build_info", "What it runs.", labels=[*self._build])
        build.add_metric([*self._build.values()], 1)
        yield build

    def _gauge(self, name: str, documentation: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"celery_worker_{name}", documentation, labels=["queue"])
        for queue in self._queues:
            family.add_metric([queue], float(value))
        return family


def _pool_size(health: Health) -> int:
    # A pool of processes knows their number from when it was started.
    return getattr(getattr(health.consumer, "pool", None), "num_processes", None) or 0


def release() -> str:
    """The id of the deployed release this process runs from, else the package's version."""
    try:
        return str(json.loads((Path(sys.prefix).resolve().parent / "release.json").read_text())["id"])
    except (OSError, ValueError, KeyError):
        return version("skeldir-worker-plane")
