"""The operator's command, `skeldir`.

Exit status: 0 done, 1 it didn't work, 2 wrong usage, 78 unusable configuration.
"""

import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from celery import Celery
from kombu.exceptions import OperationalError as BrokerError
from rich.console import Console
from rich.table import Table
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.beat.listing import listing
from app.beat.process import run as run_beat
from app.beat.schedule import Entry, load_schedule, misfits
from app.celery_app import celery_app, topology
from app.core.config import EX_CONFIG, ConfigurationError, get_settings, get_sheet_settings
from app.core.topology import Queue, Topology, TopologyError, load_topology
from app.db.session import get_engine
from app.dlq.command import dlq_cli
from app.exporter.process import run as run_exporter
from app.observability.context import correlation
from app.observability.logging import configure_logging
from app.observability.worker_monitoring import stand_by
from app.tasks import housekeeping
from app.tasks.discovery import disagreements, discover
from app.top.command import TOP_PAGES, show_top
from app.top.source import PrometheusError

cli = typer.Typer(
    help="Look at and run the worker plane.", no_args_is_help=True, pretty_exceptions_enable=False
)
topology_cli = typer.Typer(help="The sheet that everything is read from.", no_args_is_help=True)
cli.add_typer(topology_cli, name="topology")
cli.add_typer(dlq_cli, name="dlq")
# A checkout; what hosts get has nothing of it. (From / the folder /dev would be a package without an origin.)
if (_dev := find_spec("dev")) and _dev.origin:
    from dev.command import dev, new_cli

    cli.command()(dev)
    cli.add_typer(new_cli, name="new")

Overrides = Annotated[
    str | None,
    typer.Option(
        help='Numbers by queue as JSON, such as {"llm": {"concurrency": 4}}; default, this environment\'s.'
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

_MOST_PINGS = 16
_LOOK_AGAIN = 5.0  # seconds until a worker that is busy is asked again whether it still is


def main() -> None:
    """Run the command; what keeps it from working is said in a sentence."""
    try:
        cli()
    except ConfigurationError as error:
        print(error.message, file=sys.stderr)
        sys.exit(EX_CONFIG)
    except (DBAPIError, BrokerError) as error:
        reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
        sys.exit(
            f"The database can't be used: {reason}\n"
            "Check that it runs, that DATABASE_URL names it with a user that may do this, "
            "and that its schema is there (alembic upgrade heads)."
        )


def _sheet(overrides: str | None) -> Topology:
    try:
        return load_topology(overrides=_parsed(overrides)) if overrides else get_sheet_settings().topology
    except TopologyError as error:
        raise ConfigurationError(str(error)) from error


def _schedule(sheet: Topology) -> dict[str, Entry]:
    try:
        return load_schedule(sheet)
    except TopologyError as error:
        raise ConfigurationError(str(error)) from error


def _parsed(overrides: str) -> Any:
    try:
        parsed = json.loads(overrides)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--overrides is not valid JSON: {error}") from error
    if not isinstance(parsed, dict) or not all(isinstance(value, dict) for value in parsed.values()):
        raise typer.BadParameter('--overrides must be written like {"llm": {"concurrency": 4}}')
    return parsed


@topology_cli.command()
def check(overrides: Overrides = None) -> None:
    """Check the sheet and the schedule, and that the code has exactly their tasks."""
    sheet = _sheet(overrides)
    schedule = _schedule(sheet)
    discover(sheet)
    # Shared tasks belong to every application; this one asks for no database.
    tasks = Celery(set_as_current=False).tasks
    if problems := disagreements(tasks, sheet) + misfits(tasks, schedule):
        raise ConfigurationError("\n".join(problems))
    print(
        f"The sheet is right: {len(sheet.queues)} queues, {len(sheet.queue_by_task)} tasks,"
        f" {len(schedule)} of them by themselves."
    )


@topology_cli.command()
def show(overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show the queues, with their numbers as they are in this environment."""
    sheet = _sheet(overrides)
    if as_json:
        print(sheet.model_dump_json(indent=2))
        return
    table = Table("queue", "port", "concurrency", "prefetch", "soft / hard limit", "wait target", "tasks")
    for queue in sheet.queues.values():
        numbers = (queue.metrics_port, queue.concurrency, queue.prefetch)
        limits = f"{queue.soft_time_limit} s / {queue.time_limit} s"
        target = f"{queue.queue_wait_target_seconds} s"
        table.add_row(queue.name, *map(str, numbers), limits, target, "\n".join(queue.tasks))
    _print(table)


@cli.command()
def worker(queue: Annotated[str, typer.Argument(help="The queue of the sheet to work on.")]) -> None:
    """Become the Celery worker of a queue, with the sheet's numbers."""
    if queue not in topology().queues:
        known = ", ".join(topology().queues)
        raise ConfigurationError(f"There is no queue {queue} in app/topology.yml, which has {known}.")
    entry = topology().queues[queue]
    os.environ["CELERY_METRICS_PORT"] = str(entry.metrics_port)
    if reason := get_settings().drained:
        get_settings.cache_clear()  # the port was not known yet
        configure_logging("INFO")
        stand_by(topology(), queue, reason)
    # Resolved, so that the worker and its children keep to this release when `current` moves on to the next.
    python = Path(sys.prefix).resolve() / "bin" / "python"
    arguments = [str(python), "-m", "celery", "-A", "app.celery_app", "worker"]
    arguments += ["--queues", queue, "--hostname", f"{queue}@%h", "--pool", "prefork", "--loglevel", "INFO"]
    arguments += ["--concurrency", str(entry.concurrency), "--prefetch-multiplier", str(entry.prefetch)]
    os.execv(python, arguments)  # noqa: S606 - no shell, and every word is from the sheet


@cli.command()
def exporter() -> None:
    """Tell Prometheus about queues, dead letters and the database; one process a plane, as app_ro."""
    run_exporter(topology())


@cli.command()
def beat() -> None:
    """Enqueue what app/schedule.yml says, when it says so; any number may run, and one is active."""
    schedule = _schedule(topology())
    discover(topology())
    if problems := misfits(celery_app.tasks, schedule):
        raise ConfigurationError("\n".join(problems))
    run_beat(topology(), schedule)


@cli.command()
def schedule(as_json: AsJson = False) -> None:
    """Show what is enqueued by itself: each entry's last run and its next one."""
    rows = listing(_schedule(topology()))
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("entry", "task", "when (UTC)", "last run", "late by", "next run")
    for row in rows:
        late = "-" if row["late_seconds"] is None else f"{row['late_seconds']:.1f} s"
        last, following = (_second(row[name]) for name in ("last_due", "next_due"))
        table.add_row(row["entry"], row["task"], row["when"], last, late, following)
    _print(table)


def _second(moment: str | None) -> str:
    return moment[:19].replace("T", " ") if moment else "-"


@cli.command()
def top(  # noqa: PLR0917 - typer makes options of arguments
    page: Annotated[str, typer.Argument(help=f"What to look at: {', '.join(TOP_PAGES)}.")] = "oncall",
    prometheus: Annotated[
        str, typer.Option(envvar="SKELDIR_PROMETHEUS", help="Address of the Prometheus to ask.")
    ] = "http://127.0.0.1:9090",
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON once and end.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write every page into one file for a browser and end.")
    ] = None,
    interval: Annotated[float, typer.Option(min=1, help="Seconds between two looks.")] = 5,
    hours: Annotated[float, typer.Option(min=0.1, help="How far back graphs go.")] = 3,
) -> None:
    """Show the plane as its dashboards do, live, from what a Prometheus knows of it."""
    if page not in TOP_PAGES:
        raise typer.BadParameter(f"there is no page {page}; there are {', '.join(TOP_PAGES)}")
    try:
        show_top(page, prometheus, once=once, as_json=as_json, html=html, interval=interval, hours=hours)
    except PrometheusError as error:
        sys.exit(str(error))


@cli.command()
def ping(
    queue: Annotated[list[str] | None, typer.Option(help="Only this queue; may be repeated.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for all answers.")] = 30,
    on: Annotated[
        str | None,
        typer.Option(help="Only this worker's answer counts, such as llm@worker1: again until it answers."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send a job through every queue and wait for its result."""
    unknown = [name for name in queue or [] if name not in topology().queues]
    if unknown:
        raise typer.BadParameter(f"there is no queue {', '.join(unknown)}; see `skeldir topology show`")
    with get_engine().connect() as connection:  # says at once when the database is away
        connection.execute(text("SELECT 1"))
    if on is None:
        rows = _ping(queue or list(topology().queues), timeout)
    elif queue and len(queue) == 1:
        rows = [_ping_worker(topology().queues[queue[0]], on, timeout)]
    else:
        raise typer.BadParameter("--on goes with one --queue, the one that this worker serves")
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        table = Table("queue", "worker", "seconds", "result")
        for row in rows:
            table.add_row(row["queue"], row["worker"] or "-", f"{row['seconds']:.2f}", row["result"])
        _print(table)
    if any(row["result"] != "ok" for row in rows):
        raise typer.Exit(1)


def _ping(queues: list[str], timeout: float) -> list[dict[str, Any]]:
    started = time.monotonic()
    with correlation():
        sent = {name: housekeeping.ping.apply_async(queue=name) for name in queues}
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < len(sent) and time.monotonic() - started < timeout:
        for name, result in sent.items():
            if name not in rows and result.ready():
                rows[name] = _row(name, result.result, time.monotonic() - started)
        time.sleep(0.1)
    return [rows.get(name) or _row(name, None, timeout) for name in queues]


def _ping_worker(queue: Queue, worker: str, timeout: float) -> dict[str, Any]:
    """Ping a queue until one of its workers took it, for longer while that one is busy with other jobs."""
    started = time.monotonic()
    until, busy_until = started + timeout, started + queue.time_limit + timeout
    row = _row(queue.name, None, timeout)
    burst = 1
    while True:
        # Ahead of what waits, and ever more at once, in case another worker is always faster.
        with correlation():
            sent = [housekeeping.ping.apply_async(queue=queue.name, priority=9) for _ in range(burst)]
        burst = min(2 * burst, _MOST_PINGS)
        while sent:
            for result in [result for result in sent if result.ready()]:
                sent.remove(result)
                answered = _row(queue.name, result.result, time.monotonic() - started)
                if answered["worker"] == worker or answered["worker"] is None:
                    return answered
                row = answered | {"result": f"no answer of {worker}"}
            if time.monotonic() > until:
                if not _is_busy(worker) or time.monotonic() > busy_until:
                    return row
                until = time.monotonic() + _LOOK_AGAIN
            time.sleep(0.05)


def _is_busy(worker: str) -> bool:
    answer = celery_app.control.inspect([worker], timeout=2, limit=1).active()
    return bool(answer and answer.get(worker))


def _row(queue: str, answer: Any, seconds: float) -> dict[str, Any]:
    row = {"queue": queue, "worker": None, "seconds": round(seconds, 3), "result": "no answer"}
    if isinstance(answer, dict):
        right = answer.get("pong") is True and answer.get("queue") == queue
        row |= {"worker": answer.get("worker"), "result": "ok" if right else f"wrong answer: {answer}"}
    elif answer is not None:
        row["result"] = f"failed: {type(answer).__name__}"
    return row


def _print(table: Table) -> None:
    # A pipe or a journal has no width of its own: don't cut names there.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
