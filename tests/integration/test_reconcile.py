"""The short form of `python -m bench.reconcile`, and what it says when the metrics are wrong."""

import pytest

from bench.reconcile import Ledger, counters, reconcile
from tests.postgres import Cluster


@pytest.mark.timeout(300)
def test_the_metrics_are_what_happened(postgres: Cluster) -> None:
    assert reconcile(postgres.copy_database("skeldir", "books"), seed=7, jobs=120, seconds=6)


def test_a_run_that_is_counted_wrongly_is_named() -> None:
    began = {"event": "began", "run": "1", "pid": 2, "worker": 1, "task": "job", "id": "a", "message": "7"}
    ledger = Ledger([{**began, "at": 1.0}, {"event": "ended", "run": "1", "by": "ValueError", "at": 2.0}])
    text = (
        'celery_task_started_total{task_name="books.job",queue="books"} 1.0\n'
        'celery_task_success_total{task_name="books.job",queue="books"} 1.0\n'
        'celery_task_duration_seconds_count{task_name="books.job",queue="books"} 1.0\n'
    )
    wanted, seen = ledger.counters()[1], counters(text)
    assert {key for key in {*wanted, *seen} if wanted[key] != seen[key]} == {
        ("failure", "job", "ValueError"),
        ("success", "job"),
    }
    assert ledger.dead_letters() == {("job", "permanent"): 1}
