"""What the published dashboards of celery-mixin ask for, in words of our own.

They ask of danihodovic/celery-exporter's metrics, by `job`, which a reader chooses among those of
`celery_worker_up`, and by `queue_name` and `name`; `cluster` and `namespace` are empty where there are none.
prometheus/rules/7-compatibility.yml records these.
"""

from collections.abc import Iterator
from typing import Any

_BY_QUEUE = 'cluster="", namespace="", job=~"celery-worker", queue_name=~"{queues}", queue_name!~"None"'
_BY_TASK = _BY_QUEUE + ', name=~"{tasks}", name!~"None"'
_ALL = 'cluster="", namespace="", job=~"celery-worker", queue_name!~"None"'
_STATES = ("sent", "received", "succeeded", "failed", "retried", "rejected")

CANNOT = {"revoked": "celery_task_revoked_total is a metric of ours with other labels"}
"""The one state whose series stay empty in the panels of task states, and why."""

_DONE, _FAILED = (f"sum(rate(celery_task_{state}_total{{{_ALL}}}[1h]))" for state in ("succeeded", "failed"))

QUERIES = {
    "workers": f"count(celery_worker_up{{{_ALL}}} == 1)",
    "active tasks": f"sum(celery_worker_tasks_active{{{_ALL}}})",
    "queues": f"count(group by (queue_name) (celery_queue_length{{{_ALL}}}))",
    "queue length": f"sum by (job, queue_name) (celery_queue_length{{{_BY_QUEUE}}})",
    **{
        f"{state}, by {what}": f"sum by (name) (increase(celery_task_{state}_total{{{labels}}}[1h]))"
        for state in _STATES
        for what, labels in (("queue", _BY_QUEUE), ("task", _BY_TASK))
    },
    "exceptions": f"sum by (name, exception) (increase(celery_task_failed_total{{{_BY_TASK}}}[1h]))",
    "success rate": f"{_DONE} / ({_DONE} + {_FAILED})",
    "mean runtime": f"sum by (name) (rate(celery_task_runtime_sum{{{_BY_QUEUE}}}[1h]))"
    f" / sum by (name) (rate(celery_task_runtime_count{{{_BY_QUEUE}}}[1h])) > 0",
    "runtime by quantile": "histogram_quantile(0.95, sum by (name, job, le) "
    f"(rate(celery_task_runtime_bucket{{{_BY_TASK}}}[1h])))",
}
"""One query for each way in which their panels read a metric."""

_VARIABLES = {
    "job": ("celery_worker_up", "job"),
    "queue_name": ("celery_task_received_total", "queue_name"),
    "task": ("celery_task_received_total", "name"),
}


def unanswered(ask: Any) -> Iterator[str]:
    """What of it finds nothing in a Prometheus (`monitoring.check.prometheus`)."""
    values: dict[str, list[str]] = {
        name: ask(f"label/{label}/values", **{"match[]": series})
        for name, (series, label) in _VARIABLES.items()
    }
    for name, found in values.items():
        if not found:
            yield f"celery-mixin: the variable {name} has no value"
    queues, tasks = "|".join(values["queue_name"]), "|".join(values["task"])
    for what, query in QUERIES.items():
        answer = ask("query", query=query.replace("{queues}", queues).replace("{tasks}", tasks))["result"]
        if not any(series["value"][1] != "NaN" for series in answer):
            yield f"celery-mixin, {what}: nothing for {query}"
