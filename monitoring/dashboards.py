"""Grafana's JSON from `app.top.panels`: `python -m monitoring dashboards` writes grafana/dashboards/."""

import json
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from app.top.panels import PAGES, Column, Page, Panel, Variable

FOLDER = Path(__file__).parents[1] / "grafana/dashboards"
RUNBOOKS = "https://runbooks.example"
"""Where runbooks are read; a deployment puts its own address in its place, a reader may in the variable."""

_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_RUNBOOK = "${runbooks}/${__data.fields.alertname}.md"
_HEIGHT = {"graph": 8, "stat": 4, "table": 8, "summary": 8}
_COLUMNS = 24

# A new release on any worker, and replays: what explains most sudden changes.
_ANNOTATIONS = (
    (
        "Deployments",
        "blue",
        # The hour before, so that a gap in the samples is no deployment.
        "count by (release) (celery_worker_build_info) "
        "unless count by (release) (max_over_time(celery_worker_build_info[1h] offset 5m))",
        "release",
    ),
    ("Replays", "purple", "sum by (result) (increase(celery_dlq_replays_total[1m])) > 0", "result"),
)


def rendered(page: Page) -> str:
    """A dashboard as Grafana imports it."""
    board = (
        dashboard.Dashboard(page.title)
        .uid(page.uid)
        .description(page.description)
        .tags(["worker-plane"])
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("Worker plane")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["worker-plane"])
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .annotations([_annotation(*each[:3]) for each in _ANNOTATIONS])
    )
    for variable in page.variables:
        board.with_variable(_variable(variable))
    board.with_variable(dashboard.TextBoxVariable("runbooks").label("Runbooks at").default_value(RUNBOOKS))
    top = number = 0
    for title, panels in page.rows:
        board.with_row(dashboard.Row(title).grid_pos(_place(0, top, _COLUMNS, 1)))
        top += 1
        left, tallest = 0, 0
        for panel in panels:
            if left + panel.width > _COLUMNS:
                left, top, tallest = 0, top + tallest, 0
            height = _HEIGHT[panel.kind]
            number += 1
            board.with_panel(_panel(panel).id(number).grid_pos(_place(left, top, panel.width, height)))
            left, tallest = left + panel.width, max(tallest, height)
        top += tallest
    made = json.loads(JSONEncoder().encode(board.build()))
    # The SDK doesn't know what an annotation says.
    for annotation, (name, _, _, label) in zip(made["annotations"]["list"], _ANNOTATIONS, strict=True):
        said = f"{name}: {{{{{label}}}}}"
        annotation |= {"titleFormat": said, "textFormat": f"{{{{{label}}}}}", "tagKeys": label}
    return json.dumps(made, sort_keys=True, indent=2) + "\n"


def write() -> None:
    """Write every dashboard into the folder that Grafana is provisioned from."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for page in PAGES:
        (FOLDER / f"{page.uid}.json").write_text(rendered(page))


def stale() -> list[str]:
    """What in the folder is not what this module makes."""
    wanted = {f"{page.uid}.json": rendered(page) for page in PAGES}
    found = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    return sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))


def _place(left: int, top: int, width: int, height: int) -> models.GridPos:
    return models.GridPos(x=left, y=top, w=width, h=height)


def _annotation(name: str, colour: str, expression: str) -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name(name)
        .datasource(_SOURCE)
        .enable(True)
        .icon_color(colour)
        .expr(expression)
    )


def _variable(variable: Variable) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(_SOURCE)
        .query({"query": variable.query, "refId": variable.name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(text="All", value="$__all", selected=True))
    )


def _panel(panel: Panel) -> timeseries.Panel | stat.Panel | table.Panel:
    made: timeseries.Panel | stat.Panel | table.Panel
    if panel.kind == "stat":
        made = stat.Panel().color_mode(BigValueColorMode.BACKGROUND)
    elif panel.kind == "table":
        made = _table(panel)
    elif panel.kind == "summary":
        made = _summary(panel)
    else:
        made = (
            timeseries.Panel()
            .fill_opacity(10)
            .min(0)
            .legend(
                common.VizLegendOptions()
                .display_mode(LegendDisplayMode.LIST)
                .placement(LegendPlacement.BOTTOM)
                .show_legend(True)
            )
        )
        if panel.stacked:
            made.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
        if panel.bounds:
            made.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED))
    made.title(panel.title).description(panel.description).unit(panel.unit).datasource(_SOURCE)
    made.thresholds(_thresholds(panel))
    if panel.runbook:
        url = f"${{runbooks}}/{panel.runbook}.md"
        made.links([dashboard.DashboardLink("Runbook").type(models.DashboardLinkType.LINK).url(url)])
    queries = panel.queries or [(column.query, "") for column in panel.columns]
    for number, (expression, legend) in enumerate(queries):
        query = prometheus.Dataquery().expr(expression).ref_id(chr(ord("A") + number))
        if legend:
            query.legend_format(legend)
        if panel.kind == "graph":
            query.range()
        else:
            query.instant()
        if panel.kind in ("table", "summary"):
            query.format(PromQueryFormat.TABLE)
        made.with_target(query)
    return made


def _table(panel: Panel) -> table.Panel:
    made = table.Panel()
    if any(expression.startswith("ALERTS") for expression in panel.expressions):
        made.override_by_name(
            "alertname", [models.DynamicConfigValue("links", [{"title": "Runbook", "url": _RUNBOOK}])]
        )
    return made


def _summary(panel: Panel) -> table.Panel:
    """Many queries as one table: a row for each value of a label, a column for each query."""
    fields = {f"Value #{chr(ord('A') + number)}": column for number, column in enumerate(panel.columns)}
    made = table.Panel().transformations(
        [
            models.DataTransformerConfig("merge", options={}),
            models.DataTransformerConfig(
                "organize",
                options={
                    "excludeByName": {"Time": True},
                    "indexByName": {name: number for number, name in enumerate([panel.by, *fields])},
                    "renameByName": {name: column.title for name, column in fields.items()},
                },
            ),
        ]
    )
    for column in panel.columns:
        properties = [models.DynamicConfigValue("unit", column.unit)]
        if column.bounds:
            properties += [
                models.DynamicConfigValue("thresholds", _thresholds(column).build()),
                models.DynamicConfigValue("custom.cellOptions", {"type": "color-text"}),
            ]
        made.override_by_name(column.title, properties)
    return made


def _thresholds(panel: Panel | Column) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(value=None, color="green")]
    if panel.bounds:
        warn, bad = panel.bounds
        if panel.low:  # red from below, yellow up to what is right
            steps = [models.Threshold(value=None, color="red"), models.Threshold(value=warn, color="green")]
            if bad != warn:
                steps.insert(1, models.Threshold(value=bad, color="yellow"))
        else:
            steps.append(models.Threshold(value=bad, color="red"))
            if bad != warn:
                steps.insert(1, models.Threshold(value=warn, color="yellow"))
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)
