"""Schedulers that die, freeze, vanish and lose their database: every run that was due is enqueued once.

`SKELDIR_TAKE_OVERS=50 pytest -s tests/beat/test_take_over.py -k kill` is the long form.
"""

import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.beat.conftest import BOUND, Plan, Scheduler, now, until

Start = Callable[..., Scheduler]

TAKE_OVERS = int(os.environ.get("SKELDIR_TAKE_OVERS", "8"))


def active(schedulers: list[Scheduler]) -> list[Scheduler]:
    return [one for one in schedulers if one.process.poll() is None and one.role == "active"]


def goes_on(plan: Plan) -> None:
    """Wait until every entry has had a run that was due after this call."""
    since = now()
    until(lambda: all(moment > since for moment in plan.last_due().values()), 2 * BOUND)


@pytest.mark.timeout(100 + 15 * TAKE_OVERS)
def test_whoever_is_killed_every_run_is_enqueued_once(plan: Plan, scheduler: Start) -> None:
    begun = plan.last_due()
    schedulers = [scheduler(dawdle=0.05), scheduler(dawdle=0.05)]
    waits, amid = [], 0
    for number in range(TAKE_OVERS):
        until(lambda: len(active(schedulers)) == 1 and all(one.role for one in schedulers))
        (first,) = active(schedulers)
        time.sleep(random.uniform(0, 1.5))  # noqa: S311
        if number % 2:  # every second one at the worst moment
            until(first.amid.exists)
        first.kill()
        amid += first.amid.exists()
        schedulers.remove(first)
        schedulers.append(scheduler(dawdle=0.05))
        waits.append(until(lambda: active(schedulers), BOUND))
    goes_on(plan)
    until(lambda: all(one.role for one in schedulers))  # who was just started hears no signal yet
    for one in schedulers:
        one.stop()
    due, lost, doubled = plan.settle(begun)
    print(
        f"{TAKE_OVERS} take-overs, {amid} of them amid a transaction, the longest in {max(waits):.1f} s;"
        f" {due} runs were due, {lost} are lost and {doubled} doubled"
    )
    assert (lost, doubled) == (0, 0)
    assert due > TAKE_OVERS


def test_who_stops_hands_over_at_once(plan: Plan, scheduler: Start) -> None:
    begun = plan.last_due()
    first = scheduler()
    until(lambda: first.role == "active")
    second = scheduler()
    until(lambda: second.role == "standby")
    assert first.stop() < 3
    assert until(lambda: second.role == "active") < 3
    goes_on(plan)
    second.stop()
    assert plan.settle(begun)[1:] == (0, 0)


def test_a_frozen_one_loses_its_lock_and_changes_nothing_when_it_wakes(plan: Plan, scheduler: Start) -> None:
    begun = plan.last_due()
    first = scheduler(dawdle=0.1)
    until(lambda: first.role == "active")
    second = scheduler()
    until(lambda: second.role == "standby")
    until(first.amid.exists)
    first.send(signal.SIGSTOP)  # holding the lock, and a row
    try:
        assert until(lambda: second.role == "active") < BOUND
        goes_on(plan)
    finally:
        first.send(signal.SIGCONT)
    until(lambda: first.role == "standby")
    goes_on(plan)
    second.stop()
    until(lambda: first.role == "active")
    first.stop()
    assert plan.settle(begun)[1:] == (0, 0)


def test_two_that_both_take_themselves_for_active_double_nothing(plan: Plan, scheduler: Start) -> None:
    begun = plan.last_due()
    both = [scheduler(dawdle=0.1, TAKES_ITSELF_FOR_ACTIVE="1") for _ in range(2)]
    until(lambda: len(active(both)) == 2)
    for _ in range(3):
        goes_on(plan)
    for one in both:
        one.stop()
    due, lost, doubled = plan.settle(begun)
    assert (lost, doubled) == (0, 0)
    assert due >= 6
