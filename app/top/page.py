"""Views as one page for a browser, that fetches nothing: charts are drawn here, as SVG."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from math import floor, isfinite, log10

from app.top.panels import Panel
from app.top.view import Cell, Shown, View, written

_COLOURS = ("#3274d9", "#e0862e", "#56a64b", "#a352cc", "#e02f44", "#00a3a3", "#b5a000", "#8f6b4e")
_COLUMN, _HEIGHT = 55.0, 150.0  # of a chart; a page has 24 columns
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 6.0, 8.0, 18.0
_MOST_LINES = 8


def rendered(views: list[View]) -> str:
    """The whole page; views are of one moment or nearly so."""
    at = datetime.fromtimestamp(views[0].moment, UTC)
    links = "".join(
        f'<a href="#{view.page.uid}">{escape(view.page.title.rpartition(": ")[2])}</a>' for view in views
    )
    style = files("app.top").joinpath("page.css").read_text()
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>Worker plane</title><style>{style}</style>"
        f"<header><b>Worker plane</b>{links}"
        f"<time>{at:%Y-%m-%d %H:%M:%S} UTC, {escape(views[0].source)}</time>"
        f"</header><main>{''.join(map(_section, views))}</main></html>\n"
    )


def _section(view: View) -> str:
    rows = "".join(
        f"<h2>{escape(title)}</h2><div class=row>{''.join(_article(shown, view) for shown in panels)}</div>"
        for title, panels in view.rows
    )
    page = view.page
    about = f"<h1>{escape(page.title)}</h1><p>{escape(page.description)}</p>"
    return f"<section id={page.uid}>{about}{rows}</section>"


def _article(shown: Shown, view: View) -> str:
    panel = shown.panel
    match panel.kind:
        case "stat":
            body = _stat(shown)
        case "graph":
            body = _chart(shown, view)
        case _:
            body = _table(shown)
    title = f'<h3 title="{escape(panel.description)}">{escape(panel.title)}</h3>'
    return f'<article style="grid-column: span {panel.width}">{title}{body}</article>'


def _stat(shown: Shown) -> str:
    cells = shown.cells.values() or [Cell(None)]
    return "".join(f'<div class="big {cell.state}">{escape(cell.text)}</div>' for cell in cells)


def _table(shown: Shown) -> str:
    if not shown.rows:
        return f"<p>Nothing{f': {escape(shown.panel.may_be_empty)}' if shown.panel.may_be_empty else ''}.</p>"
    numbers = [isinstance(cell, Cell) for cell in shown.rows[0]]
    head = "".join(
        f"<th{' class=n' if is_number else ''}>{escape(name)}</th>"
        for name, is_number in zip(shown.header, numbers, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in shown.rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        kind = {"critical": "bad", "warning": "warn"}.get(cell, "")
        return f'<td class="{kind}">{escape(cell)}</td>'
    return f'<td class="n {_wrong(cell)}">{escape(cell.text)}</td>'


def _wrong(cell: Cell) -> str:
    # What is good needs no colour: the eye shall fall on what is not.
    return cell.state if cell.state != "good" else ""


@dataclass(frozen=True)
class _Scale:
    """Where a moment and a value lie in a chart."""

    begin: float
    seconds: float
    top: float
    width: float

    def x(self, moment: float) -> float:
        return _LEFT + (moment - self.begin) / self.seconds * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - min(max(value, 0), self.top) / self.top * (_HEIGHT - _TOP - _BOTTOM)


def _chart(shown: Shown, view: View) -> str:
    """Lines over time, from 0 up; the highest ones, where there are more than can be told apart."""
    heights = {name: max(found) for name, points in shown.lines.items() if (found := _values(points))}
    if not heights:
        return "<p>Nothing in this time.</p>"
    by_height = sorted(heights, key=lambda name: -heights[name])
    names = sorted(by_height[:_MOST_LINES])
    width = _COLUMN * shown.panel.width
    scale = _Scale(view.moment - view.seconds, view.seconds, _round_up(heights[by_height[0]]), width)
    parts = [*_axes(scale, shown.panel.unit), *_bounds(scale, shown.panel)]
    legend = []
    for colour, name in zip(_COLOURS, names, strict=False):
        for piece in _pieces(shown.lines[name], view.seconds / 30):
            path = " ".join(f"{scale.x(moment):.1f},{scale.y(value):.1f}" for moment, value in piece)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"'
                f' stroke-linejoin="round" stroke-linecap="round"><title>{escape(name)}</title></polyline>'
            )
        cell = shown.cells[name]
        legend.append(
            f'<li class="{_wrong(cell)}"><i style="background:{colour}"></i>{escape(name)}'
            f" <b>{escape(cell.text)}</b></li>"
        )
    if more := len(by_height) - len(names):
        legend.append(f"<li>and {more} more</li>")
    return (
        f'<svg viewBox="0 0 {scale.width:g} {_HEIGHT:g}" role="img" aria-label="{escape(shown.panel.title)}">'
        f"{''.join(parts)}</svg><ul>{''.join(legend)}</ul>"
    )


def _axes(scale: _Scale, unit: str) -> Iterator[str]:
    for share in (0, 0.5, 1):
        y = scale.y(scale.top * share)
        yield (
            f'<line x1="{_LEFT}" x2="{scale.width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
            ' stroke="#888" opacity="0.3"/>'
            f'<text x="{_LEFT - 5}" y="{y + 3:.1f}" text-anchor="end" font-size="10">'
            f"{escape(written(scale.top * share, unit))}</text>"
        )
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        moment = scale.begin + scale.seconds * share
        at = datetime.fromtimestamp(moment, UTC)
        yield (
            f'<text x="{scale.x(moment):.1f}" y="{_HEIGHT - 4}" text-anchor="{anchor}" font-size="10">'
            f"{at:%H:%M}</text>"
        )


def _bounds(scale: _Scale, panel: Panel) -> Iterator[str]:
    """From where on it is bad, dashed; where that lies in the picture."""
    for value, colour in zip(panel.bounds or (), ("#e0862e", "#e02f44"), strict=False):
        if value <= scale.top:
            y = scale.y(value)
            yield (
                f'<line x1="{_LEFT}" x2="{scale.width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
                f' stroke="{colour}" stroke-dasharray="4 3" opacity="0.8"/>'
            )


def _pieces(points: list[tuple[float, float]], gap: float) -> Iterator[list[tuple[float, float]]]:
    """A line without the times for which nothing is known."""
    piece: list[tuple[float, float]] = []
    for moment, value in points:
        if not isfinite(value) or (piece and moment - piece[-1][0] > gap):
            yield piece
            piece = []
        if isfinite(value):
            piece.append((moment, value))
    yield piece


def _values(points: list[tuple[float, float]]) -> list[float]:
    return [value for _, value in points if isfinite(value)]


def _round_up(value: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** floor(log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.9999)
