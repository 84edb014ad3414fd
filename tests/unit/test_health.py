"""What health answers in each state of the consumer, its loop and the database."""

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
from celery.concurrency.prefork import TaskPool

from app.observability.health import Health, Pulse
from app.observability.vitals import Vitals

BOUND = 60.0


def health(
    *,
    in_loop: bool = True,
    connected: bool = True,
    online: bool = True,
    queues: list[str] | None = None,
    loop_age: float = 0.0,
    reachable: bool = True,
    draining: bool = False,
    drained: str = "",
) -> Health:
    """Health of a worker that is well, but for what is said."""
    pulse = Pulse(BOUND)
    pulse.ticked_at -= loop_age
    probe: Any = SimpleNamespace(reachable=reachable, away_at=-math.inf)
    found = Health(pulse, probe)
    found.draining = draining
    found.drained = drained
    names = ["llm"] if queues is None else queues
    found.consumer = SimpleNamespace(
        hostname="llm@host",
        in_loop=in_loop,
        connection=SimpleNamespace(transport=SimpleNamespace(online=online)) if connected else None,
        task_consumer=SimpleNamespace(queues=[SimpleNamespace(name=name) for name in names]),
    )
    return found


@pytest.mark.parametrize(
    ("state", "live", "ready", "broker"),
    [
        ({}, True, True, "ok"),
        ({"in_loop": False}, True, False, "connecting"),
        ({"connected": False}, True, False, "connecting"),
        ({"online": False}, True, False, "connecting"),
        ({"queues": []}, True, False, "no queue is consumed"),
        ({"draining": True}, True, False, "draining"),
        ({"drained": "new kernel", "loop_age": BOUND + 1}, True, False, "drained"),
        ({"loop_age": BOUND + 1}, False, False, "stalled"),
        ({"loop_age": BOUND - 5}, True, True, "ok"),
        # A restart would mend none of these.
        ({"loop_age": BOUND + 1, "reachable": False}, True, False, "ok"),
        ({"loop_age": BOUND + 1, "draining": True}, True, False, "draining"),
    ],
    ids=str,
)
def test_each_state_has_its_answers(state: dict[str, Any], live: bool, ready: bool, broker: str) -> None:
    found = health(**state)
    assert (found.live, found.ready, found.broker) == (live, ready, broker)
    assert found.report()["status"] == ("ok" if ready else "unhealthy")


def test_after_an_outage_the_loop_gets_the_whole_time_again() -> None:
    found = health(loop_age=10 * BOUND)
    found.probe.away_at = time.monotonic() - 1
    assert found.live


def test_a_consumer_that_just_lost_its_connection_is_not_an_error() -> None:
    found = health()
    assert found.consumer is not None
    found.consumer.task_consumer = None  # Celery does this in its own thread, whenever it likes
    assert found.queues == []
    assert found.report()["status"] == "unhealthy"


def test_before_the_consumer_exists_the_worker_is_starting() -> None:
    found = health()
    found.consumer = None
    assert found.broker == "starting"
    assert not found.ready
    assert found.report()["worker"] is None


def test_while_its_pool_starts_the_gauges_can_be_read() -> None:
    starting = health(in_loop=False)
    starting.consumer.pool = TaskPool(2)  # type: ignore[union-attr]
    gauges = {family.name: family for family in Vitals(starting, ["llm"], lambda: 0).collect()}
    assert [sample.value for sample in gauges["celery_worker_pool_size"].samples] == [0]
