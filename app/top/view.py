"""A page of panels with what Prometheus says to each: the same for terminal, JSON and HTML."""

import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from app.observability.metrics import OTHER
from app.top.panels import Bounds, Page, Panel, filled_in
from app.top.source import Series, Source

_STEPS = 120
_LABEL = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_DULL = ("__name__", "alertstate", "job")
_RATE_INTERVAL = "2m"


@dataclass(frozen=True)
class Cell:
    """A number with what it means."""

    value: float | None
    unit: str = "short"
    state: str = ""
    """`good`, `warn` or `bad`; nothing where no bounds are known."""

    @property
    def text(self) -> str:
        """The number for people."""
        return written(self.value, self.unit)


@dataclass
class Shown:
    """A panel and its answer: `cells` by legend for a stat or graph, `rows` for a table or summary."""

    panel: Panel
    cells: dict[str, Cell] = field(default_factory=dict)
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    header: list[str] = field(default_factory=list)
    rows: list[tuple[str | Cell, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class View:
    """A page at a moment."""

    page: Page
    source: str
    moment: float
    seconds: float
    """How far back the graphs go."""
    rows: list[tuple[str, list[Shown]]]

    def as_json(self) -> dict[str, Any]:
        """For machines: numbers as they are, None where there is none."""
        return {
            "page": self.page.uid,
            "prometheus": self.source,
            "time": self.moment,
            "panels": [_as_json(row, shown) for row, panels in self.rows for shown in panels],
        }


def look(source: Source, page: Page, seconds: float = 3 * 3600.0, moment: float | None = None) -> View:
    """Ask everything that a page shows, with graphs over so many seconds.

    Raises:
        PrometheusError: there was no answer.
    """
    moment = time.time() if moment is None else moment

    def answer(panel: Panel) -> Shown:
        return _answered(source, panel, moment, seconds)

    with ThreadPoolExecutor(8) as pool:
        rows = [(title, pool.map(answer, panels)) for title, panels in page.rows]
        return View(
            page, source.address, moment, seconds, [(title, list(answers)) for title, answers in rows]
        )


def _answered(source: Source, panel: Panel, moment: float, seconds: float) -> Shown:
    def now(query: str) -> list[Series]:
        return source.at(filled_in(query, _RATE_INTERVAL), moment)

    shown = Shown(panel)
    if panel.kind == "summary":
        _fill_summary(shown, [now(column.query) for column in panel.columns])
    elif panel.kind == "table":
        _fill_table(shown, [series for query, _ in panel.queries for series in now(query)])
    else:
        step = max(15.0, seconds / _STEPS)
        for query, legend in panel.queries:
            if panel.kind == "stat":
                found = now(query)
            else:
                found = source.over(filled_in(query, _RATE_INTERVAL), moment - seconds, moment, step)
            for series in found:
                name = _named(legend, series.labels)
                # A line that ended before now has no present value.
                value = series.value if moment - series.points[-1][0] < 2 * step else math.nan
                shown.cells[name] = Cell(_real(value), panel.unit, state_of(value, panel.bounds, panel.low))
                shown.lines[name] = series.points
    return shown


def _named(legend: str, labels: dict[str, str]) -> str:
    return _LABEL.sub(lambda match: labels.get(match[1], ""), legend)


def _fill_summary(shown: Shown, answers: list[list[Series]]) -> None:
    panel = shown.panel
    shown.header = [panel.by.replace("_", " "), *(column.title for column in panel.columns)]
    found: dict[str, dict[int, float]] = {}
    for number, answer in enumerate(answers):
        for series in answer:
            found.setdefault(series.labels.get(panel.by, ""), {})[number] = series.value
    for name, values in sorted(found.items()):
        if name == OTHER and not any(values.values()):
            continue  # it stands for what nobody knows, and there is nothing of that
        cells = [
            Cell(
                _real(value := values.get(number, math.nan)),
                column.unit,
                state_of(value, column.bounds, column.low),
            )
            for number, column in enumerate(panel.columns)
        ]
        shown.rows.append((name, *cells))


def _fill_table(shown: Shown, found: list[Series]) -> None:
    labels = dict.fromkeys(
        label for series in found for label in sorted(series.labels, key=_alert_first) if label not in _DULL
    )
    # A series whose value is always 1 only carries labels.
    worth = any(series.value != 1 for series in found)
    shown.header = [label.replace("_", " ") for label in labels] + (["value"] if worth else [])
    for series in found:
        words: list[str | Cell] = [series.labels.get(label, "") for label in labels]
        shown.rows.append((*words, *([Cell(_real(series.value), shown.panel.unit)] if worth else [])))
    shown.rows.sort(key=str)


def _alert_first(label: str) -> tuple[int, str]:
    order = ("alertname", "severity", "queue")
    return (order.index(label) if label in order else len(order), label)


def state_of(value: float, bounds: Bounds | None, low: bool) -> str:
    """Whether a value is good: `bounds` are those from which it is to be warned of, and bad."""
    if bounds is None or math.isnan(value):
        return ""
    warn, bad = bounds
    if low:
        # As in the dashboards: with one bound for both, there is nothing between.
        return "good" if value >= warn else "warn" if value >= bad != warn else "bad"
    return "bad" if value >= bad else "warn" if value >= warn else "good"


def _real(value: float) -> float | None:
    return None if math.isnan(value) else value


# From which size on a number is told in which unit of its own
_SCALES: dict[str, tuple[tuple[float, float, str], ...]] = {
    "s": (
        (172_800, 86_400, " d"),
        (7200, 3600, " h"),
        (120, 60, " min"),
        (1, 1, " s"),
        (1e-9, 0.001, " ms"),
        (0, 1, " s"),
    ),
    "bytes": (
        (2**40, 2**40, " TiB"),
        (2**30, 2**30, " GiB"),
        (2**20, 2**20, " MiB"),
        (2**10, 2**10, " KiB"),
        (0, 1, " B"),
    ),
    "short": ((1e9, 1e9, " G"), (1e6, 1e6, " M"), (1e4, 1e3, " k")),
    "percentunit": ((0, 0.01, " %"),),
    "ops": ((0, 1, "/s"),),
}


def written(value: float | None, unit: str) -> str:
    """A number and its unit (Grafana's names of units), as short as it stays true to be."""
    if value is None:
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    for least, one, name in _SCALES.get(unit, ()):
        if abs(value) >= least:
            return f"{_digits(value / one)}{name}"
    return _digits(value)


def _digits(value: float) -> str:
    if value == int(value) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2g}" if abs(value) < 1 else f"{value:.1f}"


def _as_json(row: str, shown: Shown) -> dict[str, Any]:
    panel = shown.panel
    found: dict[str, Any] = {"row": row, "title": panel.title, "kind": panel.kind}
    if panel.kind in ("stat", "graph"):
        found["unit"] = panel.unit
        found["values"] = {
            name: {"value": _finite(cell.value), "state": cell.state} for name, cell in shown.cells.items()
        }
    else:
        found["rows"] = [dict(zip(shown.header, _words(cells), strict=True)) for cells in shown.rows]
    return found


def _words(cells: tuple[str | Cell, ...]) -> Iterator[str | float | None]:
    for cell in cells:
        yield cell if isinstance(cell, str) else _finite(cell.value)


def _finite(value: float | None) -> float | None:
    """JSON knows no infinity."""
    return value if value is None or math.isfinite(value) else None
