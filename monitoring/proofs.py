"""Which recorded trouble must let each alert fire, and what of it: proved by promtool on the recording.

A trouble is the moment before it, the moment while it lasted, and the moment when it was over. Each is held
for a while: an alert must fire while the second lasts, and not at the end of the first and of the third.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from monitoring import recordings
from monitoring.promql import selectors
from monitoring.recordings import Moment
from monitoring.sheet import sheet_rules

RULES = Path(__file__).parents[1] / "prometheus/rules"
STEP = 60
BEFORE = 10
"""Minutes of the moment before."""


@dataclass(frozen=True)
class Trouble:
    """Moments by name; without `before` the one recorded before it. Minutes that it and what follows last."""

    during: str
    after: str
    before: str | None = None
    lasts: int = 20
    then: int = 60


TROUBLES = {
    "PostgresDown": Trouble("postgres_stopped", "postgres_again"),
    "CeleryPlaneDown": Trouble("all_killed", "all_again"),
    "CeleryQueueNoConsumer": Trouble("stopped", "started_again"),
    "CeleryWorkerDown": Trouble("stopped", "started_again"),
    "CeleryWorkerLoopStalled": Trouble("loop_stands", "loop_moves"),
    "SkeldirBeatDown": Trouble("beat_killed", "beat_again"),
    "SkeldirBeatOverdue": Trouble("beat_refused", "beat_allowed"),
    "SkeldirExporterDown": Trouble("exporter_killed", "exporter_again"),
    "SkeldirExporterCollectorFailing": Trouble("no_dead_letters", "dead_letters_again"),
    "CeleryMessagesHeldByDead": Trouble("all_killed", "all_again"),
    "CeleryQueueOldestAge": Trouble("stopped", "started_again"),
    "CeleryTaskWorkerLost": Trouble("processes_lost", "processes_lost", lasts=10),
    "CeleryTaskTimeouts": Trouble("time_limits", "time_limits", lasts=10),
    "CeleryRetryStorm": Trouble("retries", "retries", lasts=12),
    "CelerySuccessBudgetBurn": Trouble("failures", "failures", lasts=10, then=120),
    "CeleryWaitBudgetBurn": Trouble("started_late", "started_late", lasts=10, then=120),
    "CeleryDlqCaptureErrors": Trouble("no_dead_letters", "dead_letters_again", lasts=5),
    "CeleryDlqBurst": Trouble("failures", "failures", lasts=5),
    "CeleryDlqArrivals": Trouble("failures", "failures", lasts=5),
    "CeleryDlqOld": Trouble("failures", "calm", before="calm", lasts=25 * 60),
    "CeleryDlqReplayStuck": Trouble("stopped", "started_again", lasts=80),
    "PostgresConnectionsHigh": Trouble("no_connections", "connections_again"),
    "PostgresOldTransaction": Trouble("old_snapshot", "snapshot_gone", lasts=80),
    "PostgresXminHeld": Trouble("old_snapshot", "snapshot_gone"),
    "PostgresVacuumBehind": Trouble("old_snapshot", "snapshot_gone", lasts=90),
    "PostgresCertificateEnding": Trouble("certificate_ending", "certificate_renewed"),
    "HostDiskFilling": Trouble("disk_full", "disk_free"),
    "TargetDown": Trouble("node_away", "calm", before="calm"),
    "PrometheusRuleFailing": Trouble("busy", "busy", lasts=10),
    "AlertmanagerNotificationsFailing": Trouble("busy", "busy", lasts=10),
}
AGAIN = {
    "CeleryDlqArrivals": Trouble("exporter_again", "exporter_again", before="disk_free", lasts=5),
    "CeleryDlqBurst": Trouble("exporter_again", "exporter_again", before="disk_free", lasts=5),
}
"""Another trouble in which an alert must fire: dead letters that came while no exporter counted them."""

ALWAYS = ("Watchdog",)
"""Alerts that fire in every moment."""


def unproved(moments: list[Moment], sheet: str) -> dict[str, str]:
    """Alerts that don't fire in their trouble, or outside of it, and what promtool says."""
    failed = {}
    by_name = {moment.name: moment for moment in moments}
    with tempfile.TemporaryDirectory(prefix="skeldir-proofs-") as folder:
        (Path(folder) / "sheet.yml").write_text(sheet)
        for file in sorted(RULES.glob("*.yml")):
            rules = [rule for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]
            names = {name for rule in rules for name, _ in selectors(rule["expr"])}
            for alert in dict.fromkeys(rule["alert"] for rule in rules if "alert" in rule):
                if alert in ALWAYS:
                    continue
                if alert not in TROUBLES:
                    failed[alert] = "no recorded trouble is named for it in monitoring/proofs.py"
                    continue
                try:
                    troubles = [TROUBLES[alert], *([AGAIN[alert]] if alert in AGAIN else [])]
                    tests = [_test(alert, trouble, moments, by_name, names) for trouble in troubles]
                except KeyError as error:
                    failed[alert] = f"the recording has no moment {error}"
                    continue
                document = {
                    "rule_files": [str(file), "sheet.yml"],
                    "evaluation_interval": f"{STEP}s",
                    "group_eval_order": ["sheet", file.stem.partition("-")[2]],
                    "tests": tests,
                }
                path = Path(folder) / f"{alert}.yml"
                path.write_text(json.dumps(document))
                done = subprocess.run(
                    ["promtool", "test", "rules", path], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    failed[alert] = done.stdout + done.stderr
    return failed


def _test(
    alert: str, trouble: Trouble, moments: list[Moment], by_name: dict[str, Moment], names: set[str]
) -> dict[str, Any]:
    during = by_name[trouble.during]
    before = by_name[trouble.before] if trouble.before else moments[moments.index(during) - 1]
    phases = [(before, BEFORE), (during, trouble.lasts), (by_name[trouble.after], trouble.then)]
    firing = f'ALERTS{{alertname="{alert}", alertstate="firing"}}'
    total = BEFORE + trouble.lasts + trouble.then
    return {
        "interval": f"{STEP}s",
        "input_series": list(_input(phases, names)),
        "promql_expr_test": [
            _expect(f"count({firing}) or vector(0)", BEFORE - 1, 0),
            _expect(
                f"count(max_over_time({firing}[{trouble.lasts}m])) > bool 0", BEFORE + trouble.lasts - 1, 1
            ),
            _expect(f'count({firing[:-1]}, severity="critical"}}) or vector(0)', total - 1, 0)
            if alert.endswith("BudgetBurn")  # its ticket looks back for days
            else _expect(f"count({firing}) or vector(0)", total - 1, 0),
        ],
    }


def _expect(expression: str, minute: int, value: float) -> dict[str, Any]:
    return {
        "expr": expression,
        "eval_time": f"{minute}m",
        "exp_samples": [{"labels": "{}", "value": value}],
    }


def _input(phases: list[tuple[Moment, int]], names: set[str]) -> Iterable[dict[str, str]]:
    wanted = {
        series for moment, _ in phases for series in moment.series if recordings.name_of(series) in names
    }
    begins, parts = 0.0, []
    for moment, minutes in phases:
        lasting = dict(recordings.held(moment, minutes * 60, STEP, begins))
        parts.append((lasting, minutes))
        begins += minutes * 60
    for series in sorted(wanted):
        words = [lasting.get(series) or f"_x{minutes}" for lasting, minutes in parts]
        yield {"series": series, "values": " ".join(words)}


def sheet_of_the_recording() -> str:
    """The constants of the plane that was recorded."""
    from tests.rules.troubled_plane import SHEET  # noqa: PLC0415 - it changes the application

    return sheet_rules(SHEET)
