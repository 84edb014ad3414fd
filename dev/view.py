"""What a developer sees: the plane's processes with their numbers, and log lines that fit in one line."""

import json
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

import psycopg2
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from app.core.topology import Topology
from dev.plane import Plane, Process, ask

_COUNTS = ("celery_task_started", "celery_task_success", "celery_task_failure")
_WAITING = """
    SELECT q.name, (SELECT count(*) FROM kombu_message m WHERE m.queue_id = q.id)
    FROM kombu_queue q WHERE q.holder IS NULL
"""
_DEAD = "SELECT queue, count(*) FROM celery_task_failures WHERE state = 'pending' GROUP BY queue"
_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


def short(line: str) -> str:
    """A line of JSON as people read it: level where it isn't INFO, message, and what was raised."""
    try:
        entry = json.loads(line)
        level, message = entry["level"], entry["message"]
    except (ValueError, KeyError, TypeError):
        return line
    raised = entry.get("exception", "").strip().splitlines()
    words = [entry["time"][11:19], *([level] if level != "INFO" else []), message]
    return " ".join(words) + "".join(f"\n    {each}" for each in raised)


class Screen:
    """The live view: a row a process, and the latest log lines below."""

    def __init__(self, plane: Plane, sheet: Topology, lines: int = 200) -> None:
        self.plane = plane
        self.sheet = sheet
        self.lines: deque[tuple[str, str]] = deque(maxlen=lines)
        self._numbers: dict[str, dict[str, int]] = {}

    def add(self, name: str, text: str) -> None:
        """Take a line of a process's log."""
        self.lines.extend((name, each) for each in text.splitlines())

    def look(self) -> None:
        """Ask the processes and the database for their numbers."""
        database = self._database()
        self._numbers = {
            name: _counted(process) | {kind: rows.get(name, 0) for kind, rows in database.items()}
            for name, process in self.plane.processes.items()
        }

    def _database(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        with suppress(psycopg2.Error):
            session = psycopg2.connect(self.plane.dsn("app_rw"), connect_timeout=1)
            try:
                with session.cursor() as cursor:
                    for kind, query in (("waiting", _WAITING), ("dead letters", _DEAD)):
                        cursor.execute(query)
                        found[kind] = dict(cursor.fetchall())
            finally:
                session.close()
        return found

    def rendered(self, height: int) -> RenderableType:
        """All of it in so many lines of a terminal."""
        table = Table(
            "process", "state", "port", "waiting", "started", "done", "failed", "dead letters", box=None
        )
        for name, process in self.plane.processes.items():
            state = process.state
            numbers = self._numbers.get(name, {})
            shown = [str(numbers.get(kind, 0)) for kind in ("waiting", *_COUNTS, "dead letters")]
            if name not in self.sheet.queues:
                shown = ["-"] * len(shown)
            colour = {"ready": "green", "starting": "yellow"}.get(state, "red")
            table.add_row(escape(name), f"[{colour}]{state}", str(process.port), *shown)
        room = max(1, height - len(self.plane.processes) - 4)
        width = max(map(len, self.plane.processes), default=0)
        log = Text(no_wrap=True, overflow="ellipsis")
        for name, line in list(self.lines)[-room:]:
            log.append(f"{name:>{width}} ", "cyan")
            log.append(line + "\n", next((c for word, c in _COLOURS.items() if f" {word} " in line), ""))
        return Group(table, Text("Ctrl-C ends it all\n", "dim"), log)


def _counted(process: Process) -> dict[str, int]:
    """What a worker did since it started, all its tasks together."""
    counts = dict.fromkeys(_COUNTS, 0)
    status, said = ask(process.port, "/metrics") if process.started else (0, b"")
    if status:
        for family in text_string_to_metric_families(said.decode()):
            if family.name in counts:
                counts[family.name] = int(_sum(s.value for s in family.samples if s.name.endswith("_total")))
    return counts


def _sum(values: Iterable[float]) -> float:
    return sum(values)
