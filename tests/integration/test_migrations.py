"""Migrations on a real server: each branch alone, all together, and what happens when one can't run."""

import pytest

from tests.postgres import Database, run_alembic

TABLES = {
    "core_schema": {"tenants", "events", "tenant_event_counts", "tenant_event_counts_all"},
    "celery_foundation": {"kombu_queue", "kombu_message", "celery_taskmeta", "celery_tasksetmeta"},
}


def relations(database: Database) -> set[object]:
    """Tables, views, sequences and functions in the schema, without Alembic's own table."""
    found = database.rows(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        " AND relkind IN ('r', 'v', 'm', 'S') AND relname <> 'alembic_version'"
        " UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
    )
    return {row[0] for row in found}


def alembic(database: Database, *arguments: str) -> None:
    done = run_alembic(database.dsn("app_owner"), *arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("branch", TABLES)
def test_a_branch_alone_goes_up_down_and_up_again(empty_database: Database, branch: str) -> None:
    alembic(empty_database, "upgrade", f"{branch}@head")
    made = relations(empty_database)
    assert made >= TABLES[branch]
    assert not made & set().union(*(tables for name, tables in TABLES.items() if name != branch))
    alembic(empty_database, "downgrade", f"{branch}@base")
    assert relations(empty_database) == set()
    alembic(empty_database, "upgrade", f"{branch}@head")
    assert relations(empty_database) == made
