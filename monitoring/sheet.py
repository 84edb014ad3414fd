"""The one place that carries the sheet's numbers into Prometheus: a rule file of constants.

All other rules are plain files that join these series by `queue`, so a queue that comes, goes or gets
another target needs no rule to be edited. Constants, and not metrics of an exporter, because targets and
expected queues must be known just when the exporter or the database is away; and made at deployment, because
the inventory may override them.
"""

from typing import Any

import yaml

from app.core.topology import Queue, Topology

HEADER = "# Made by `python -m monitoring rules` from app/topology.yml and overrides: don't edit.\n"


def sheet_rules(sheet: Topology) -> str:
    """A Prometheus rule file that records, for every queue of the sheet, what its alerts are measured by."""
    rules = [rule for queue in sheet.queues.values() for rule in _rules(queue)]
    groups = {"groups": [{"name": "sheet", "rules": rules}]}
    return HEADER + yaml.safe_dump(groups, sort_keys=False)


def _rules(queue: Queue) -> list[dict[str, Any]]:
    # prometheus_client writes a bound as a float: le="60.0".
    bound = str(float(queue.queue_wait_target_seconds))
    return [
        _constant("celery_queue:metrics_port:info", 1, queue=queue.name, port=str(queue.metrics_port)),
        _constant("celery_queue:success:target", queue.success_target, queue=queue.name),
        _constant("celery_queue:wait_seconds:target", queue.queue_wait_target_seconds, queue=queue.name),
        _constant("celery_queue:wait_bound:info", 1, queue=queue.name, le=bound),
    ]


def _constant(record: str, value: float, **labels: str) -> dict[str, Any]:
    return {"record": record, "expr": f"vector({value:g})", "labels": labels}
