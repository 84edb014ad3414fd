"""The text that Prometheus reads, beside the client library's own."""

import pytest
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)

from app.observability.exposition import exposition


def test_it_is_what_the_client_library_writes() -> None:
    disable_created_metrics()
    registry = CollectorRegistry()
    Counter("jobs", "A \\ and\na new line.", registry=registry).inc(3)
    for value in ('quo"te', "back\\slash", "new\nline", "ü"):
        Gauge(f"g_{len(value)}_{ord(value[0])}", "", ["z", "a"], registry=registry).labels(value, "b").set(
            0.1
        )
    histogram = Histogram("took_seconds", "Time.", ["task"], registry=registry, buckets=(0.5, 10))
    histogram.labels("x").observe(1e9)
    Gauge("odd", "", registry=registry).set(float("nan"))
    Gauge("endless", "", registry=registry).set(float("-inf"))
    assert exposition(registry) == generate_latest(registry)
    assert exposition(registry) == generate_latest(registry), "also when labels are remembered"


def test_what_it_can_not_write_it_refuses() -> None:
    registry = CollectorRegistry()
    Info("build", "What it is.", registry=registry)
    with pytest.raises(ValueError, match="build"):
        exposition(registry)
