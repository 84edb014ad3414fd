"""What of the drills needs no plane; molecule/queues/tests/test_drills.py runs them on one."""

import re
import subprocess
import sys
from itertools import combinations, permutations
from pathlib import Path

import pytest
import yaml

from app.core.topology import load_topology
from drills.faults import DRILLS, UNDRILLED, Drill
from drills.run import in_the_way
from monitoring import deployed
from tests.postgres import ROOT
from tests.rules.runbooks import alert_pages, front_matter
from tests.runbooks import read_page

SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def durations(text: str) -> list[float]:
    """Every window and every pause, in seconds, in the order of the text."""
    found = re.findall(r"\[(\d+)([smhd]|ms)\]|(?:for|_wait|_interval): (\d+)([smhd]|ms)\b", text)
    return [int(a or b) * SECONDS[of_a or of_b] for a, of_a, b, of_b in found]


def test_every_alert_has_a_drill_or_a_reason() -> None:
    assert DRILLS.keys().isdisjoint(UNDRILLED)
    assert {page.stem for page in alert_pages()} == DRILLS.keys() | UNDRILLED.keys()


@pytest.mark.parametrize("alert", DRILLS)
def test_a_drill_answers_what_its_page_asks(alert: str) -> None:
    asked = {block.asks for block in read_page(ROOT / f"runbooks/{alert}.md").blocks if block.asks}
    assert asked == DRILLS[alert].answers.keys()


@pytest.mark.parametrize("alert", DRILLS)
def test_a_drills_scripts_are_sound(alert: str) -> None:
    for fault in DRILLS[alert].faults:
        for script in (fault.make, fault.undo):
            command = ["shellcheck", "--shell=bash", "-"]
            done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout


def test_drills_that_would_disturb_each_other_do_not_run_together() -> None:
    for one, other in combinations(DRILLS.values(), 2):
        assert in_the_way(one, other) == in_the_way(other, one)
    assert in_the_way(DRILLS["PostgresDown"], DRILLS["CeleryDlqBurst"])
    assert in_the_way(DRILLS["SkeldirExporterDown"], DRILLS["CeleryDlqBurst"])
    assert not in_the_way(DRILLS["PostgresDown"], DRILLS["SkeldirExporterDown"])


def test_a_drill_whose_page_starts_a_service_never_runs_beside_one_that_stops_it() -> None:
    def stopped(drill: Drill) -> set[str]:
        scripts = "\n".join(fault.make for fault in drill.faults)
        return set(re.findall(r"systemctl (?:kill .*|stop )\b(skeldir-[\w@]+|prometheus[\w-]*)", scripts))

    def started(alert: str) -> set[str]:
        blocks = read_page(ROOT / f"runbooks/{alert}.md").blocks
        mending = "\n".join(block.text for block in blocks if block.section == "Mitigation")
        if "systemctl start" not in mending and "systemctl restart" not in mending:
            return set()
        return set(re.findall(r"skeldir-[\w@]+|prometheus[\w-]*", mending))

    meetings = [
        (alert, other)
        for alert, other in permutations(DRILLS, 2)
        if started(alert) & stopped(DRILLS[other]) and not in_the_way(DRILLS[alert], DRILLS[other])
    ]
    assert any(started(alert) & stopped(drill) for alert in DRILLS for drill in DRILLS.values())
    assert meetings == []


def test_a_time_scale_divides_every_duration_and_nothing_else(tmp_path: Path) -> None:
    def made(scale: float) -> tuple[str, str]:
        rules = deployed.rules(load_topology(), scale, "https://r", "https://d")
        return yaml.safe_dump(rules, width=9999), yaml.safe_dump(deployed.routes(scale))

    for full, short in zip(made(1), made(15), strict=True):
        assert durations(full)
        assert durations(short) == pytest.approx([seconds / 15 for seconds in durations(full)])
        pattern = r"\d+([smhd]|ms)\b"
        assert re.sub(pattern, "", full) == re.sub(pattern, "", short)
    (tmp_path / "rules.yml").write_text(made(15)[0])
    subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], check=True, capture_output=True)


def test_production_gets_the_rules_as_they_are() -> None:
    made = deployed.rules(load_topology(), 1, "https://runbooks.example", "https://grafana.example")
    files = sorted((ROOT / "prometheus/rules").glob("*.yml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    assert made["groups"][:-1] == groups
    assert made["groups"][-1]["name"] == "sheet"


def test_no_drill_on_a_plane_that_is_not_marked_for_it() -> None:
    command = [sys.executable, "-m", "drills", "--inventory", "inventory/single", "CeleryWorkerDown"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "skeldir_drills_allowed" in done.stderr
    assert done.stdout == ""


def test_pages_are_for_places_that_drills_have() -> None:
    from drills.plane import PLACES  # noqa: PLC0415

    assert {front_matter(page)["host"] for page in alert_pages()} <= PLACES.keys()
