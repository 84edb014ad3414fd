"""A scheduler's host that vanishes without a word, its connections neither closed nor reset."""

from collections.abc import Callable, Iterator

import pytest

from tests.beat.conftest import BOUND, Plan, Scheduler, until
from tests.beat.test_take_over import goes_on
from tests.cable import Cable, cluster_at, laid_cable, needs_cable
from tests.postgres import Cluster

pytestmark = needs_cable


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    yield from laid_cable()


@pytest.fixture(scope="module")
def postgres(cable: Cable) -> Iterator[Cluster]:
    yield from cluster_at(cable)


def test_the_other_host_takes_over_and_the_first_changes_nothing_when_it_is_back(
    cable: Cable, plan: Plan, scheduler: Callable[..., Scheduler]
) -> None:
    begun = plan.last_due()
    far = scheduler(inside=("ip", "netns", "exec", cable.namespace), dawdle=0.1)
    until(lambda: far.role == "active")
    near = scheduler()
    until(lambda: near.role == "standby")
    cable.cut()
    try:
        waited = until(lambda: near.role == "active", BOUND)
        goes_on(plan)
        until(lambda: far.role == "unknown", 30)  # it knows that it doesn't know
    finally:
        cable.mend()
    print(f"vanished host: another scheduler was active after {waited:.1f} s")
    until(lambda: far.role == "standby", 30)
    goes_on(plan)
    near.stop()
    goes_on(plan)  # the far one, again
    far.stop()
    due, lost, doubled = plan.settle(begun)
    assert (lost, doubled) == (0, 0)
    assert due > 20
