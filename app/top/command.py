"""`skeldir top`: once, live, as JSON or as a page."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live

from app.top.page import rendered as page_of
from app.top.panels import PAGES
from app.top.source import PrometheusError, Source
from app.top.terminal import rendered
from app.top.view import look

TOP_PAGES = {page.uid.removeprefix("skeldir-"): page for page in PAGES}
"""The pages by the names they have here."""


def show_top(
    page: str,
    address: str,
    *,
    once: bool,
    as_json: bool,
    html: Path | None,
    interval: float,
    hours: float,
) -> None:
    """Do what was asked for.

    Raises:
        PrometheusError: there was no answer, or the file can't be written.
    """
    source, seconds = Source(address), hours * 3600
    if html:
        views = [look(source, each, seconds) for each in PAGES]
        try:
            html.write_text(page_of(views))
        except OSError as error:
            raise PrometheusError(f"{html} can't be written: {error.strerror}.") from None
    elif as_json:
        print(json.dumps(look(source, TOP_PAGES[page], seconds).as_json(), indent=2))
    else:
        view = look(source, TOP_PAGES[page], seconds)
        # A pipe or a journal has no width of its own.
        console = Console(width=None if sys.stdout.isatty() else 160)
        if once or not console.is_terminal:
            console.print(rendered(view))
            return
        with suppress(KeyboardInterrupt), Live(rendered(view), console=console, screen=True) as live:
            while True:
                time.sleep(interval)
                try:
                    view, said = look(source, TOP_PAGES[page], seconds), ""
                except PrometheusError as error:  # what was known stays to be seen, with its time
                    said = str(error)
                live.update(rendered(view, said), refresh=True)
