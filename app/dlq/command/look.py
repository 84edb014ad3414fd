"""Look at dead letters: list, groups, show, stats."""

import dataclasses
import json
from typing import Annotated

import typer
from rich.table import Table

from app.dlq import store
from app.dlq.command.options import AsJson, Number, filtered, operator, spoken
from app.dlq.command.printing import ago, cell, print_json, print_table
from app.dlq.message import editable
from app.dlq.store import STATES, DeadLetterError, Filter
from app.dlq.text import printable


@filtered
def list_(
    which: Filter,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows a page.")] = 50,
    before: Annotated[
        int | None, typer.Option(help="The next page: the last number of the one before.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List dead letters, what failed last first."""
    with operator() as session:
        start = None
        if before:
            last = store.find(session, Filter(ids=(before,), states=STATES))
            if not last:
                raise DeadLetterError(f"there is no dead letter {before}")
            start = (last[0].last_failed_at, last[0].id)
        rows = store.find(session, which, limit=limit, before=start)
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
        return
    table = Table("id", "state", "class", "task", "queue", "tenant", "failed", "tries", "error")
    for row in rows:
        table.add_row(
            str(row.id),
            row.state,
            row.failure_class,
            cell(row.task),
            cell(row.queue),
            cell(row.tenant_id),
            ago(row.last_failed_at),
            f"{row.attempts}",
            cell(f"{row.error_type}: {row.error_message}", 90),
        )
    print_table(table, "No dead letters." if not rows else None)
    if len(rows) == limit:
        print(f"There may be more: add --before {rows[-1].id}")


@filtered
def groups(
    which: Filter,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The largest groups.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Show equal failures together: is it one bad job or ten thousand?"""
    with operator() as session:
        found = store.groups(session, which, limit=limit)
    if as_json:
        print_json([dataclasses.asdict(group) for group in found])
        return
    table = Table("group", "count", "tenants", "class", "task", "queue", "first", "last", "example", "error")
    for group in found:
        table.add_row(
            group.fingerprint,
            f"{group.count:,}",
            str(group.tenants),
            group.failure_class,
            cell(group.task),
            cell(group.queue),
            ago(group.first_failed_at),
            ago(group.last_failed_at),
            str(group.example_id),
            cell(f"{group.error_type}: {group.error_message}", 90),
        )
    print_table(table, "No dead letters." if not found else None)


@spoken
def show(
    number: Number,
    reveal: Annotated[bool, typer.Option("--reveal", help="Also what is hidden by its name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show all that is known of one dead letter."""
    with operator() as session:
        details = store.show(session, number)
    message = editable(details.message, reveal=reveal)
    if as_json:
        print_json(
            dataclasses.asdict(details.row)
            | {"message": message, "problem": details.message.problem, "versions": details.versions}
            | {"errors": details.errors, "history": details.history}
        )
        return
    facts = Table(show_header=False, box=None)
    for name, value in dataclasses.asdict(details.row).items():
        if value is not None:
            facts.add_row(name.replace("_", " "), cell(value, 2000))
    print_table(facts)
    if details.message.problem:
        print(f"\nIts message can't be read: {printable(details.message.problem)}")
    else:
        print("\nIts message" + ("" if reveal else " (--reveal shows what is hidden)") + ":")
        print(json.dumps(message, indent=2))
    for version in details.versions[1:]:
        print(f"\nEdit {version['version'] - 1} by {cell(version['actor'])}: {cell(version['reason'])}")
        if reveal and version["diff"]:
            print(printable(version["diff"]))
    for error in details.errors:
        print(
            f"\nFailure {error['number']} at {error['failed_at']:%Y-%m-%d %H:%M:%S}:"
            f" {cell(error['error_type'])}"
        )
        print(printable(error["traceback"] or error["error_message"]))
    if details.history:
        table = Table("at", "what", "who", "as", "why")
        for event in details.history:
            table.add_row(
                f"{event['at']:%Y-%m-%d %H:%M:%S}",
                event["action"],
                cell(event["actor"]),
                event["db_user"],
                cell(event["reason"]),
            )
        print()
        print_table(table)


@spoken
def stats(as_json: AsJson = False) -> None:
    """Count dead letters by state, class and queue; works as app_ro too."""
    with operator() as session:
        rows = store.stats(session)
    if as_json:
        print_json(rows)
        return
    table = Table("state", "class", "queue", "count")
    for row in rows:
        table.add_row(row["state"], row["failure_class"], cell(row["queue"]), f"{row['count']:,}")
    print_table(table, "No dead letters." if not rows else None)
