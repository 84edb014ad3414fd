"""The sheet: what is wrong with it is refused in a sentence that names the entry."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.core.topology import TopologyError, load_topology

Sheet = dict[str, Any]


def _queue(name: str, port: int) -> Sheet:
    return {
        "exchange": name,
        "routing_key": name,
        "tasks": [f"app.tasks.{name}.work"],
        "metrics_port": port,
        "concurrency": 1,
        "prefetch": 1,
        "soft_time_limit": 10,
        "time_limit": 20,
        "delivery_limit": 3,
        "retry": {"max_retries": 3, "backoff": 1, "backoff_max": 60},
    }


GOOD: Sheet = {"queues": {"first": _queue("first", 9001), "second": _queue("second", 9002)}}


def _load(tmp_path: Path, sheet: Any, overrides: Any = None) -> Any:
    path = tmp_path / "sheet.yml"
    path.write_text(sheet if isinstance(sheet, str) else yaml.safe_dump(sheet))
    return load_topology(path, overrides)


def test_a_right_sheet_is_read(tmp_path: Path) -> None:
    topology = _load(tmp_path, GOOD)
    assert list(topology.queues) == ["first", "second"]
    assert topology.queue_by_task["app.tasks.second.work"].metrics_port == 9002


@pytest.mark.parametrize(
    ("services", "named"),
    [
        ({"beat": {"port": 9001}}, "beat.port 9001"),
        ({"exporter": {"port": 9002}}, "exporter.port 9002"),
        ({"exporter": {"port": 9003}, "beat": {"port": 9003}}, "beat.port 9003"),
        ({"beat": {"port": 80}}, "beat.port"),
    ],
)
def test_a_service_wants_a_port_of_its_own(tmp_path: Path, services: Sheet, named: str) -> None:
    with pytest.raises(TopologyError, match=named):
        _load(tmp_path, GOOD | services)


@pytest.mark.parametrize(
    ("entry", "value", "named"),
    [
        ("colour", "red", "first.colour"),  # an unknown key
        ("metrics_port", 9002, "9002"),  # another queue's port
        ("metrics_port", 9540, "9540"),  # the port of workers started by hand
        ("metrics_port", 80, "first.metrics_port"),
        ("metrics_port", 65536, "first.metrics_port"),
        ("metrics_port", "9001", "first.metrics_port"),
        ("tasks", ["app.tasks.second.work"], "app.tasks.second.work"),  # another queue's task
        ("tasks", ["a.b", "a.b"], "a.b"),
        ("tasks", ["work"], "'work'"),
        ("tasks", [], "first.tasks"),
        ("soft_time_limit", 20, "first"),  # not below the hard limit
        ("soft_time_limit", 0, "first.soft_time_limit"),
        ("time_limit", 1.5, "first.time_limit"),
        ("concurrency", 0, "first.concurrency"),
        ("prefetch", True, "first.prefetch"),
        ("delivery_limit", 0, "first.delivery_limit"),
        ("retry", {"max_retries": 1, "backoff": 9, "backoff_max": 8}, "first.retry"),
        ("retry", {"max_retries": -1, "backoff": 1, "backoff_max": 8}, "first.retry.max_retries"),
        ("retry", {"max_retries": 1, "backoff": 1, "backoff_max": 8, "jitter": 1.5}, "first.retry.jitter"),
        (
            "retry",
            {"max_retries": 1, "backoff": 1, "backoff_max": 8, "transient": ["Oops"]},
            "first.retry.transient",
        ),
        ("task_retry", {"a.b": {"max_retries": 1, "backoff": 1, "backoff_max": 8}}, "task_retry names a.b"),
        ("success_target", 1, "first.success_target"),
        ("success_target", 0, "first.success_target"),
        ("queue_wait_target_seconds", 45, "first.queue_wait_target_seconds"),  # waits aren't counted by it
        ("name", "two words", "first"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(tmp_path: Path, entry: str, value: Any, named: str) -> None:
    sheet = deepcopy(GOOD)
    sheet["queues"]["first"][entry] = value
    with pytest.raises(TopologyError) as refused:
        _load(tmp_path, sheet)
    assert all(named in problem for problem in refused.value.problems)


@pytest.mark.parametrize("entry", GOOD["queues"]["first"])
def test_a_missing_entry_is_refused_by_name(tmp_path: Path, entry: str) -> None:
    sheet = deepcopy(GOOD)
    del sheet["queues"]["first"][entry]
    with pytest.raises(TopologyError, match=f"first.{entry}"):
        _load(tmp_path, sheet)


@pytest.mark.parametrize("name", ["Upper", "two words", "1st", "a@b", "a/b", "x" * 41, ""])
def test_a_name_that_no_unit_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TopologyError, match="unit"):
        _load(tmp_path, {"queues": {name: _queue("first", 9001)}})


@pytest.mark.parametrize(
    "sheet", ["", "[]", "queues: {}", "queues: [first]", "queues:\n  a: 1\n  a: 2\n", "a: [", "colour: red"]
)
def test_what_is_no_sheet_is_refused(tmp_path: Path, sheet: str) -> None:
    with pytest.raises(TopologyError):
        _load(tmp_path, sheet)


def test_a_queue_that_stands_twice_is_refused(tmp_path: Path) -> None:
    once = yaml.safe_dump({"first": _queue("first", 9001)})
    twice = "queues:\n" + "".join(f"  {line}\n" for line in (once + once).splitlines())
    with pytest.raises(TopologyError, match="first"):
        _load(tmp_path, twice)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"nothing\.yml"):
        load_topology(tmp_path / "nothing.yml")


def test_an_environment_may_change_numbers(tmp_path: Path) -> None:
    topology = _load(
        tmp_path, GOOD, {"first": {"concurrency": 5, "soft_time_limit": 15, "success_target": 0.9}}
    )
    assert topology.queues["first"].concurrency == 5
    assert topology.queues["first"].soft_time_limit == 15
    assert topology.queues["first"].success_target == 0.9
    assert topology.queues["second"].concurrency == 1


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"third": {"concurrency": 1}}, "third"),
        ({"first": {"metrics_port": 9009}}, "first.metrics_port"),
        ({"first": {"name": "other"}}, "first.name"),
        ({"first": {"concurrency": "many"}}, "first.concurrency"),
        ({"first": {"soft_time_limit": 30}}, "soft_time_limit"),
        ({"first": {"queue_wait_target_seconds": 45}}, "queue_wait_target_seconds"),
        ({"first": ["concurrency"]}, "first"),
    ],
)
def test_a_wrong_override_is_refused_by_name(tmp_path: Path, overrides: Any, named: str) -> None:
    with pytest.raises(TopologyError) as refused:
        _load(tmp_path, GOOD, overrides)
    assert named in str(refused.value)


def test_the_projects_own_sheet_is_right() -> None:
    assert load_topology().queue_by_task
