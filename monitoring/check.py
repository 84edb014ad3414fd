"""Four numbers that must be 0: `python -m monitoring check`.

- dead rules: a rule reads a series that no target of the recording has and no rule makes, or records nothing;
- unproved alerts: no case in prometheus/tests that fires and ends, none that stays silent, no recorded
  trouble in which it fires and after which it ends, or no runbook and dashboard where its annotations point;
- empty panels: a query that fails or finds nothing in a real Prometheus which holds the recording, a
  variable without a value, panels that overlap, a link to nowhere; also what celery-mixin's panels ask for;
- unexecuted commands: runbooks that the test on lab hosts can't paste as they stand; that every block was
  pasted indeed, `python -m monitoring pasted evidence/pasted.txt` says after a full run of the tests.
"""

import json
import re
import socket
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from app.top.panels import PAGES, Page, filled_in
from monitoring import dashboards, mixin, proofs, recordings
from monitoring.promql import reads, selectors
from monitoring.recordings import Moment

ROOT = Path(__file__).parents[1]
RULES, TESTS, RUNBOOKS = (ROOT / name for name in ("prometheus/rules", "prometheus/tests", "runbooks"))
_HELD = 120
"""Seconds that a moment lasts in the Prometheus that panels are asked in."""

Findings = dict[str, list[str]]


def check() -> Findings:
    """What is wrong, by the name of the number it counts for."""
    moments = recordings.read()
    sheet = proofs.sheet_of_the_recording()
    with prometheus(moments, sheet) as ask:
        silent = silent_rules(ask)
        empty = empty_panels(ask) + list(mixin.unanswered(ask))
    return {
        "dead rules": dead_rules(moments, sheet) + silent,
        "unproved alerts": unproved_alerts(moments, sheet),
        "empty panels": empty,
        "runbooks with an unexecuted command": unexecuted(),
    }


def rules() -> list[dict[str, Any]]:
    """Every rule of the project, in order."""
    documents = [yaml.safe_load(path.read_text()) for path in sorted(RULES.glob("*.yml"))]
    return [rule for document in documents for group in document["groups"] for rule in group["rules"]]


def dead_rules(moments: list[Moment], sheet: str) -> list[str]:
    """Rules that read what nobody says."""
    known = {series for moment in moments for series in moment.series}
    made = {rule["record"] for rule in rules() if "record" in rule}
    made |= {rule["record"] for rule in yaml.safe_load(sheet)["groups"][0]["rules"]}
    return [
        f"{rule.get('alert') or rule['record']} reads {_shown(selector)}, which no target has"
        for rule in rules()
        for selector in sorted(selectors(rule["expr"]))
        if selector[0] not in made and not any(reads(selector, series) for series in known)
    ]


def silent_rules(ask: Any) -> list[str]:
    """Recording rules that record nothing in a Prometheus which has seen all there is."""
    names = dict.fromkeys(rule["record"] for rule in rules() if "record" in rule)
    return [f"{name} records nothing" for name in names if not ask("query", query=name)["result"]]


def _shown(selector: tuple[str, tuple[tuple[str, str], ...]]) -> str:
    name, labels = selector
    return name + ("{" + ",".join(f'{key}="{value}"' for key, value in labels) + "}" if labels else "")


def unproved_alerts(moments: list[Moment], sheet: str) -> list[str]:
    """Alerts that nobody has seen fire, stay silent and end."""
    found = [*_cases(), *_links()]
    for path in sorted(TESTS.glob("*-*.yml")):
        done = subprocess.run(
            ["promtool", "test", "rules", path], capture_output=True, text=True, check=False
        )
        if done.returncode:
            found.append(f"{path.name}: {done.stdout}{done.stderr}")
    failed = proofs.unproved(moments, sheet)
    return found + [f"{alert}, in the recorded trouble: {said}" for alert, said in failed.items()]


def _cases() -> Iterator[str]:
    fires, ends, silent = set(), set(), set()
    for path in TESTS.glob("*-*.yml"):
        for test in yaml.safe_load(path.read_text())["tests"]:
            seen: dict[str, list[bool]] = defaultdict(list)
            for case in test["alert_rule_test"]:
                seen[case["alertname"]].append(bool(case["exp_alerts"]))
            for alert, firing in seen.items():
                if not any(firing):
                    silent.add(alert)
                else:
                    fires.add(alert)
                    if not firing[-1]:
                        ends.add(alert)
    for alert in dict.fromkeys(rule["alert"] for rule in rules() if "alert" in rule):
        if alert not in fires:
            yield f"{alert} fires in no case of prometheus/tests"
        elif alert not in proofs.ALWAYS:
            if alert not in ends:
                yield f"{alert} ends in no case of prometheus/tests"
            if alert not in silent:
                yield f"{alert} has no case of prometheus/tests in which it only nearly fires"


def _links() -> Iterator[str]:
    pages = {page.uid: {variable.name for variable in page.variables} for page in PAGES}
    index = (RUNBOOKS / "README.md").read_text()
    alerts = [rule for rule in rules() if "alert" in rule]
    for rule in alerts:
        name, said = rule["alert"], rule.get("annotations", {})
        if rule.get("labels", {}).get("severity") not in ("critical", "warning", "none"):
            yield f"{name} has no severity"
        if missing := {"summary", "description", "runbook_url", "dashboard_url"} - said.keys():
            yield f"{name} has no {', '.join(sorted(missing))}"
            continue
        if (
            said["runbook_url"] != f"{dashboards.RUNBOOKS}/{name}.md"
            or not (RUNBOOKS / f"{name}.md").exists()
        ):
            yield f"{name}: there is no runbook at {said['runbook_url']}"
        if f"| [{name}]({name}.md) |" not in index:
            yield f"{name} is not in runbooks/README.md"
        uid, _, variables = said["dashboard_url"].rpartition("/")[2].partition("?")
        used = set(re.findall(r"var-(\w+)=", variables))
        if uid not in pages or not used <= pages[uid]:
            yield f"{name}: there is no dashboard {said['dashboard_url']}"
    for path in RUNBOOKS.glob("[A-Z]*.md"):
        if path.stem != "README" and path.stem not in {rule["alert"] for rule in alerts}:
            yield f"runbooks/{path.name} is of no alert"


def empty_panels(ask: Any) -> list[str]:
    """What is wrong with the dashboards."""
    found = [f"{name} is not what app/top/panels.py says" for name in dashboards.stale()]
    found += [problem for page in PAGES for problem in _layout(page)]
    for page in PAGES:
        for variable in page.variables:
            series, _, label = variable.query.removeprefix("label_values(")[:-1].rpartition(", ")
            if not ask(f"label/{label}/values", **{"match[]": series}):
                found.append(f"{page.uid}: the variable {variable.name} has no value")
        for _, panels in page.rows:
            for panel in panels:
                for expression in panel.expressions:
                    try:
                        answer = ask("query_range", query=filled_in(expression, "5m"))["result"]
                    except ValueError as error:
                        found.append(f"{page.uid}, {panel.title}: {error}")
                        continue
                    seen = any(value != "NaN" for line in answer for _, value in line["values"])
                    if not seen and panel.may_be_empty is None:
                        found.append(f"{page.uid}, {panel.title}: nothing for {expression}")
    return found


def _layout(page: Page) -> Iterator[str]:
    board = json.loads(dashboards.rendered(page))
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        if place["x"] + place["w"] > 24:
            yield f"{page.uid}: {panel['title']} is wider than the page"
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                if (x, y) in taken:
                    yield f"{page.uid}: {panel['title']} lies over {taken[x, y]}"
                    return
                taken[x, y] = panel["title"]
    queries = [expression for _, panels in page.rows for panel in panels for expression in panel.expressions]
    for variable in page.variables:
        if not any(f"${variable.name}" in expression for expression in queries):
            yield f"{page.uid}: nothing uses the variable {variable.name}"
    for _, panels in page.rows:
        for panel in panels:
            if len(panel.description) < 20:
                yield f"{page.uid}: {panel.title} does not say what is normal"
            if panel.runbook and not (RUNBOOKS / f"{panel.runbook}.md").exists():
                yield f"{page.uid}: {panel.title} links to no runbook"


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus to ask: `ask("query", query=…)`; ranges are those of the recording.

    Raises:
        ValueError: Prometheus refuses a query; the message is its own.
    """

    address: str
    begin: float

    def __call__(self, path: str, **parameters: Any) -> Any:
        """The data that its API answers."""
        if path == "query_range":
            # The last step is now: what rules record is there since a moment ago only.
            now = time.time()
            steps = (now - self.begin) // 30
            parameters |= {"start": now - steps * 30, "end": now, "step": 30}
        url = f"{self.address}/api/v1/{path}?{urlencode(parameters)}"
        try:
            with urlopen(url, timeout=30) as answer:  # noqa: S310 - http, see below
                return json.load(answer)["data"]
        except HTTPError as error:
            raise ValueError(json.load(error)["error"]) from error


@contextmanager
def prometheus(moments: list[Moment], sheet: str) -> Iterator[Prometheus]:
    """A real one with the project's rules that has seen the recording, moment after moment, until now."""
    end = time.time()
    begin = end - _HELD * len(moments)
    with tempfile.TemporaryDirectory(prefix="skeldir-prometheus-") as folder:
        home = Path(folder)
        (home / "history").write_text(_openmetrics(moments, begin))
        (home / "sheet.yml").write_text(sheet)
        _run("promtool", "tsdb", "create-blocks-from", "openmetrics", home / "history", home / "data")
        # What rules record begins when Prometheus does; counters of others' names must have risen before.
        (home / "prometheus.yml").write_text("{}")
        with _serving(home) as address:
            when = (f"--start={begin:.0f}", f"--end={end:.0f}", "--eval-interval=15s", f"--url={address}")
            made = ("promtool", "tsdb", "create-blocks-from", "rules", *when)
            _run(*made, f"--output-dir={home}/data", RULES / "7-compatibility.yml")
        (home / "prometheus.yml").write_text(
            f"global: {{evaluation_interval: 1s}}\nrule_files: [{RULES}/*.yml, {home}/sheet.yml]\n"
        )
        with _serving(home) as address:
            ask = Prometheus(address, begin)
            # Rules read rules: three rounds until all that is recorded is there; else it shows as empty.
            deadline = time.monotonic() + 20
            ready = 'celery_queue:late_starts:ratio_rate3d and on () ALERTS{alertstate="firing"}'
            while not ask("query", query=ready)["result"] and time.monotonic() < deadline:
                time.sleep(0.5)
            yield ask


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[:4]} failed: {done.stdout}{done.stderr}")


@contextmanager
def _serving(home: Path) -> Iterator[str]:
    """Prometheus with the configuration and the data of a folder; yields its address."""
    address = _free_address()
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={home}/prometheus.yml",
                f"--storage.tsdb.path={home}/data",
                "--storage.tsdb.retention.time=30d",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        _wait_for(home / "log", process)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def _free_address() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return "{}:{}".format(*server.getsockname())


def _wait_for(log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while "Server is ready to receive web requests" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError(f"Prometheus did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


def _openmetrics(moments: list[Moment], begin: float) -> str:
    """The moments one after the other; counters grow evenly from one to the next."""
    lines: dict[str, list[str]] = defaultdict(list)
    step = 15
    for number, moment in enumerate(moments):
        before = moments[number - 1].series if number else {}
        for series, value in moment.series.items():
            first = before.get(series, value)
            for point in range(_HELD // step):
                at = begin + number * _HELD + point * step
                shown = value
                if recordings.is_counter(series) and first < value:
                    shown = first + (value - first) * (point + 1) * step / _HELD
                elif recordings.tells_the_time(series) and value:
                    shown = at - (moment.at - value)
                lines[series].append(f"{series} {shown!r} {at:.3f}\n")
    return "".join(line for series in sorted(lines) for line in lines[series]) + "# EOF\n"


def unexecuted() -> list[str]:
    """Runbooks with a block that no test runs."""
    from tests.rules.runbooks import unexecuted_blocks  # noqa: PLC0415 - tests own the runner

    return unexecuted_blocks()
