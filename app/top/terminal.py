"""A view in a terminal."""

from datetime import UTC, datetime
from itertools import groupby
from math import isfinite

from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel as Box
from rich.table import Table
from rich.text import Text

from app.top.view import Cell, Shown, View

STYLES = {"good": "green", "warn": "yellow", "bad": "bold red", "": ""}
_BARS = "▁▂▃▄▅▆▇█"
_SPARK = 24
_MOST_LINES = 6


def rendered(view: View, said: str = "") -> RenderableType:
    """Everything below each other; `said` is what is wrong with it at the moment."""
    at = datetime.fromtimestamp(view.moment, UTC)
    head = Table.grid(expand=True)
    head.add_column()
    head.add_column(justify="right", style="dim")
    head.add_row(Text(view.page.title, style="bold"), f"{view.source}   {at:%H:%M:%S} UTC")
    parts: list[RenderableType] = [head, ""]
    if said:
        parts.append(Text(said, style="bold red"))
    for title, panels in view.rows:
        parts.append(Text(title, style="bold cyan"))
        for kind, alike in groupby(panels, key=lambda shown: _LAYOUT[shown.panel.kind]):
            parts.append(kind(list(alike), view))
    return Group(*parts)


def _stats(panels: list[Shown], _: View) -> RenderableType:
    grid = Table.grid(expand=True)
    boxes = []
    for shown in panels:
        grid.add_column(ratio=1)
        lines = [Text(cell.text, style=STYLES[cell.state]) for cell in shown.cells.values() or [Cell(None)]]
        boxes.append(Box(Group(*lines), title=shown.panel.title, title_align="left", box=box.ROUNDED))
    grid.add_row(*boxes)
    return Group(grid, "")


def _tables(panels: list[Shown], _: View) -> RenderableType:
    """Those that need no whole line stand beside each other where there is room."""
    rows = groupby(panels, key=lambda shown: shown.panel.width < 24)
    return Group(
        *(
            Columns(map(_table, row), padding=(0, 3)) if narrow else Group(*map(_table, row))
            for narrow, row in rows
        )
    )


def _table(shown: Shown) -> RenderableType:
    title = Text(shown.panel.title, style="bold")
    if not shown.rows:
        why = shown.panel.may_be_empty
        return Group(title, Text(f" nothing{f': {why}' if why else ''}\n", style="dim"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    for number, name in enumerate(shown.header):
        is_number = isinstance(shown.rows[0][number], Cell)
        table.add_column(name, justify="right" if is_number else "left", no_wrap=number == 0)
    for row in shown.rows:
        table.add_row(*map(_cell, row))
    return Group(title, table, "")


def _graphs(panels: list[Shown], view: View) -> RenderableType:
    return Columns([_graph(shown, view) for shown in panels], padding=(0, 1))


def _cell(cell: str | Cell) -> Text:
    if isinstance(cell, str):
        return Text(cell, style=STYLES[{"critical": "bad", "warning": "warn"}.get(cell, "")])
    # What is good needs no colour: the eye shall fall on what is not.
    return Text(cell.text, style=STYLES[cell.state] if cell.state in ("warn", "bad") else "")


def _graph(shown: Shown, view: View) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True, max_width=18)
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    highest = max(
        (value for points in shown.lines.values() for _, value in points if isfinite(value)), default=0
    )
    for name in list(shown.lines)[:_MOST_LINES]:
        cell = shown.cells[name]
        grid.add_row(Text(name), Text(_spark(shown.lines[name], highest, view), style="cyan"), _cell(cell))
    if len(shown.lines) > _MOST_LINES:
        grid.add_row(Text(f"and {len(shown.lines) - _MOST_LINES} more", style="dim"), "", "")
    if not shown.lines:
        grid.add_row(Text("nothing", style="dim"), "", "")
    return Box(
        grid,
        title=shown.panel.title,
        subtitle=f"{view.seconds / 3600:g} h",
        title_align="left",
        box=box.ROUNDED,
    )


def _spark(points: list[tuple[float, float]], highest: float, view: View) -> str:
    """The highest of each part of the time; bars are alike for all lines of a panel, a blank is no value."""
    tops: dict[int, float] = {}
    for moment, value in points:
        part = min(_SPARK - 1, int((1 - (view.moment - moment) / view.seconds) * _SPARK))
        if isfinite(value):
            tops[part] = max(value, tops.get(part, 0.0))
    return "".join(
        _BARS[min(7, int(tops[part] / (highest or 1) * 7.999))] if part in tops else " "
        for part in range(_SPARK)
    )


_LAYOUT = {"stat": _stats, "table": _tables, "summary": _tables, "graph": _graphs}
