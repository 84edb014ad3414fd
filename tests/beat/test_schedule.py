"""The schedule: what is wrong with it is refused in a sentence that names the entry; when an entry is due."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from celery import Celery
from hypothesis import given, settings
from hypothesis import strategies as st

from app.beat.schedule import MADE_UP, Entry, load_schedule, misfits
from app.core.topology import TopologyError, load_topology
from app.tasks.discovery import discover

SHEET = load_topology()
PING = "app.tasks.housekeeping.ping"
SECOND, MINUTE, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(days=1)


def load(tmp_path: Path, content: Any) -> dict[str, Entry]:
    path = tmp_path / "schedule.yml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load_schedule(SHEET, path)


def test_the_projects_own_schedule_is_right() -> None:
    schedule = load_schedule(SHEET)
    assert schedule
    discover(SHEET)
    assert misfits(Celery(set_as_current=False).tasks, schedule) == []


def test_no_entries_are_no_mistake(tmp_path: Path) -> None:
    assert load(tmp_path, "# nothing as yet\n") == {}


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"task": "app.tasks.nowhere.at_all", "every": 60}, "app.tasks.nowhere.at_all"),
        ({"task": PING}, "crontab or every"),
        ({"task": PING, "every": 60, "crontab": "* * * * *"}, "crontab or every"),
        ({"task": PING, "every": 0}, "tidy: every"),
        ({"task": PING, "every": "60"}, "tidy: every"),
        ({"task": PING, "every": 1.5}, "tidy: every"),
        ({"task": PING, "crontab": "* * * *"}, "tidy: crontab"),
        ({"task": PING, "crontab": "61 * * * *"}, "tidy: crontab"),
        ({"task": PING, "crontab": "* * * * funday"}, "tidy: crontab"),
        ({"task": PING, "crontab": "*/0 * * * *"}, "tidy: crontab"),
        ({"task": PING, "crontab": "0 0 30 2 *"}, "tidy: crontab"),
        ({"task": PING, "crontab": 5}, "tidy: crontab"),
        ({"task": PING, "every": 60, "kwargs": [1]}, "tidy: kwargs"),
        ({"task": PING, "every": 60, "colour": "red"}, "tidy: colour"),
        ({"every": 60}, "tidy: task"),
        ("often", "tidy"),
        (None, "tidy"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(tmp_path: Path, entry: Any, named: str) -> None:
    with pytest.raises(TopologyError) as refused:
        load(tmp_path, {"tidy": entry, "right": {"task": PING, "every": 60}})
    (problem,) = refused.value.problems
    assert named in problem
    assert "\n" not in problem


@pytest.mark.parametrize("name", ["Tidy", "two words", "9lives", "x" * 61, 5])
def test_a_wrong_name_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(TopologyError, match=str(name)):
        load(tmp_path, {name: {"task": PING, "every": 60}})


@pytest.mark.parametrize(
    "content",
    [
        f"tidy: {{task: {PING}, every: 60}}\ntidy: {{task: {PING}, every: 61}}\n",
        "[tidy]\n",
        "tidy: {task: [\n",
    ],
    ids=["twice", "a list", "no YAML"],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(TopologyError, match=r"schedule\.yml"):
        load(tmp_path, content)


def test_arguments_that_the_task_does_not_take_are_named(tmp_path: Path) -> None:
    discover(SHEET)
    tasks = Celery(set_as_current=False).tasks
    right = load(tmp_path, {"tidy": {"task": PING, "every": 60, "kwargs": {"fail": True}}})
    assert misfits(tasks, right) == []
    wrong = load(tmp_path, {"tidy": {"task": PING, "every": 60, "kwargs": {"loud": True}}})
    (problem,) = misfits(tasks, wrong)
    assert "tidy" in problem
    assert "loud" in problem


moments = st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


def fields(low: int, high: int) -> st.SearchStrategy[str]:
    number = st.integers(low, high)
    several = st.sets(number, min_size=1, max_size=4).map(lambda found: ",".join(map(str, sorted(found))))
    return st.one_of(st.just("*"), number.map(str), several, st.integers(2, 9).map(lambda step: f"*/{step}"))


def matches(crontab: str, moment: datetime) -> bool:
    """Whether a crontab of the fields above names a minute, by looking at each field alone."""
    found = (moment.minute, moment.hour, moment.day, moment.month, moment.isoweekday() % 7)
    for field, value, low in zip(crontab.split(), found, (0, 0, 1, 1, 0), strict=True):
        if field.startswith("*/"):
            if (value - low) % int(field[2:]):
                return False
        elif field != "*" and value not in map(int, field.split(",")):
            return False
    return True


@settings(deadline=None, max_examples=150)
@given(
    st.tuples(fields(0, 59), fields(0, 23), fields(1, 28), fields(1, 12), fields(0, 6)).map(" ".join), moments
)
def test_a_crontabs_next_time_is_the_first_that_fits(crontab: str, moment: datetime) -> None:
    found = Entry(name="tidy", task=PING, crontab=crontab).next_after(moment)
    assert found > moment
    assert found.second == found.microsecond == 0
    assert matches(crontab, found)
    # Nothing fits in between; of long waits the last two days are looked at, and the first two.
    first = moment.replace(second=0, microsecond=0) + MINUTE
    for begin in {first, max(first, found - 2 * DAY)}:
        minute = begin
        while minute < min(found, begin + 2 * DAY):
            assert not matches(crontab, minute)
            minute += MINUTE


@given(st.integers(1, 10**6), moments)
def test_seconds_are_counted_from_the_epoch(every: int, moment: datetime) -> None:
    found = Entry(name="tidy", task=PING, every=every).next_after(moment)
    assert moment < found <= moment + every * SECOND
    assert found.timestamp() % every == 0


@settings(deadline=None)
@given(st.integers(1, 90), moments, st.floats(0, 60))
def test_of_a_short_gap_every_run_is_made_up(every: int, moment: datetime, gap: float) -> None:
    entry = Entry(name="tidy", task=PING, every=every)
    until = entry.next_after(moment) + gap * SECOND
    runs, one_for_all = entry.missed(moment, until)
    assert not one_for_all
    assert [run.timestamp() for run in runs] == [
        second
        for second in range(int(moment.timestamp()) + 1, int(until.timestamp()) + 1)
        if second % every == 0
    ]
    assert entry.missed(runs[-1], until) == ([], False)


@pytest.mark.parametrize("gap", [MADE_UP + 60 * SECOND, DAY, 40 * DAY, 800 * DAY])
@pytest.mark.parametrize(
    "rhythm",
    [{"every": 7}, {"crontab": "* * * * *"}, {"crontab": "7 * * * *"}, {"crontab": "0 4 1 1 *"}],
    ids=str,
)
def test_of_a_long_gap_the_latest_run_alone(rhythm: dict[str, Any], gap: timedelta) -> None:
    entry = Entry(name="tidy", task=PING, **rhythm)
    last = datetime(2026, 1, 1, 4, 0, tzinfo=UTC)
    until = entry.next_after(last) + gap
    runs, one_for_all = entry.missed(last, until)
    assert one_for_all
    (run,) = runs
    assert last < run <= until < entry.next_after(run)


def test_before_its_time_nothing_is_missed() -> None:
    entry = Entry(name="tidy", task=PING, every=60)
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    assert entry.missed(moment, moment + 59 * SECOND) == ([], False)
