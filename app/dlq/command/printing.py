"""Tables for people, JSON for machines; nothing that a job said can act on the terminal."""

import json
import sys
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from app.dlq.text import cut, printable


def print_json(value: Any) -> None:
    """Print JSON."""
    print(json.dumps(value, indent=2, default=str))  # ASCII: no escape sequence gets through


def print_table(table: Table, otherwise: str | None = None) -> None:
    """Print a table, page by page when it is long; or something else instead."""
    if otherwise:
        print(otherwise)
        return
    # A pipe or a journal has no width of its own: don't cut names there. What a job said is never markup.
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False, emoji=False)
    if sys.stdout.isatty() and table.row_count > console.height - 4:
        with console.pager(styles=True):
            console.print(table)
    else:
        console.print(table)


def print_changed(ids: list[int], what: str, *, as_json: bool) -> None:
    """Print how many rows were changed."""
    if as_json:
        print_json({"ids": ids})
    else:
        print(f"{len(ids):,} {printable(what)}")


def cell(value: Any, limit: int = 200) -> str:
    """What stands in a cell of a table."""
    return "-" if value is None else printable(cut(str(value), limit) if limit > 200 else str(value)[:limit])


def ago(moment: datetime) -> str:
    """How long ago that was."""
    seconds = int((datetime.now(UTC) - moment).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{max(seconds, 0)} s ago"
