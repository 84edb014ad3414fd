"""The rules and routes as one environment gets them: its sheet, its links and, on a staging plane, its pace.

A time scale divides what a person would wait for (every `for`, every window of a rule, every pause of a
route), so that a drill of an alert takes seconds. Levels stay as they are: an age of an hour is an hour.
Proportions stay, too, so what explains another alert still comes before it.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from app.core.topology import Topology
from monitoring.sheet import sheet_rules

PROMETHEUS = Path(__file__).parents[1] / "prometheus"
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WINDOW = re.compile(r"(?<=\[)\d+[smhd](?=\])|(?<=\boffset )\d+[smhd]\b")
_PAUSES = ("group_wait", "group_interval", "repeat_interval")


def rules(sheet: Topology, scale: float, runbook_url: str, dashboard_url: str) -> dict[str, Any]:
    """One rule file of all that are in prometheus/rules/, and the sheet's numbers.

    Args:
        sheet: with what the inventory overrides.
        scale: by what every `for` and every window is divided; 1 in production.
        runbook_url: what stands before an alert's runbook in its links.
        dashboard_url: the same for its dashboard.
    """
    texts = [path.read_text() for path in sorted((PROMETHEUS / "rules").glob("*.yml"))]
    links = {"https://runbooks.example": runbook_url, "https://grafana.example": dashboard_url}
    for example, own in links.items():
        texts = [text.replace(example, own) for text in texts]
    groups = [group for text in (*texts, sheet_rules(sheet)) for group in yaml.safe_load(text)["groups"]]
    for rule in (rule for group in groups for rule in group["rules"]):
        rule["expr"] = _WINDOW.sub(lambda window: _divided(window[0], scale), rule["expr"])
        _divide(rule, ("for",), scale)
    return {"groups": groups}


def routes(scale: float) -> dict[str, Any]:
    """What prometheus/routing.yml says, with every pause divided by `scale`."""
    routing: dict[str, Any] = yaml.safe_load((PROMETHEUS / "routing.yml").read_text())
    for route in (routing["route"], *routing["route"]["routes"]):
        _divide(route, _PAUSES, scale)
    return routing


def _divide(of: dict[str, Any], keys: Iterable[str], scale: float) -> None:
    of |= {key: _divided(of[key], scale) for key in keys if key in of}


def _divided(duration: str, scale: float) -> str:
    if scale == 1:
        return duration
    return f"{int(duration[:-1]) * SECONDS[duration[-1]] * 1000 / scale:.0f}ms"
