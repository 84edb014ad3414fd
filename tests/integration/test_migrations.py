"""Migrations on a real server: each branch alone, all together, and what happens when one can't run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from celery.backends.database.session import ResultModelBase
from kombu import Connection
from sqlalchemy import BigInteger, Column, Integer, NullPool, Table, create_engine, inspect

from app.core.dsn import sqlalchemy_url
from tests.postgres import BIN, PASSWORDS, ROOT, Cluster, Database, free_port, run_alembic

TABLES = {
    "core_schema": {"tenants", "events", "tenant_event_counts", "tenant_event_counts_all"},
    "celery_foundation": {"kombu_queue", "kombu_message", "celery_taskmeta", "celery_tasksetmeta"},
}
ONE_RUN_AT_A_TIME = 7_365_126_941  # as in alembic/env.py


def relations(database: Database) -> set[object]:
    """Tables, views, sequences and functions in the schema, without Alembic's own table."""
    found = database.rows(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        " AND relkind IN ('r', 'v', 'm', 'S') AND relname <> 'alembic_version'"
        " UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
    )
    return {row[0] for row in found}


def alembic(database: Database, *arguments: str) -> str:
    done = run_alembic(database.dsn("app_owner"), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(dsn: str | None, *arguments: str) -> str:
    """What a run that must fail says: one line at the end, and nothing of a traceback or a password."""
    done = run_alembic(dsn, *arguments)
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert "Traceback" not in said
    assert "://" not in said
    for password in PASSWORDS.values():
        assert password not in said
    return done.stderr.strip().splitlines()[-1]


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


def test_all_branches_go_down_and_up_again(database: Database) -> None:
    made = relations(database)
    alembic(database, "downgrade", "base")
    assert relations(database) == set()
    alembic(database, "upgrade", "heads")
    assert relations(database) == made


def test_models_and_migrations_agree(database: Database) -> None:
    alembic(database, "check")


def compatible(declared: Column[object], found: object) -> bool:
    """Whether a column holds what its model declares; ids are BIGINT where kombu and Celery say INTEGER."""
    if isinstance(declared.type, Integer) and (declared.primary_key or declared.foreign_keys):
        return isinstance(found, BigInteger)
    return isinstance(found, declared.type.as_generic().__class__)


def kombus_tables() -> list[Table]:
    """The tables of kombu's own SQL transport, which it declares when a channel first needs them."""
    channel = Connection(transport="kombu.transport.sqlalchemy:Transport", hostname="sqlite:").channel()
    return [channel.queue_cls.__table__, channel.message_cls.__table__]


@pytest.mark.parametrize("library", ["kombu", "celery"])
def test_tables_are_what_the_installed_library_expects(database: Database, library: str) -> None:
    tables = kombus_tables() if library == "kombu" else list(ResultModelBase.metadata.tables.values())
    assert len(tables) == 2
    engine = create_engine(sqlalchemy_url(database.dsn("app_user")), poolclass=NullPool)
    inspector = inspect(engine)
    for table in tables:
        found = {column["name"]: column for column in inspector.get_columns(table.name)}
        for column in table.columns:
            assert compatible(column, found[column.name]["type"].as_generic()), f"{table.name}.{column.name}"
            assert found[column.name]["nullable"] == column.nullable, f"{table.name}.{column.name}"
            if column.default is not None and column.default.is_sequence:
                assert inspector.has_sequence(column.default.name)
        # What we add of our own must not stand in the way of the library's own INSERT.
        for added in found.keys() - {column.name for column in table.columns}:
            assert found[added]["nullable"] or found[added]["default"], f"{table.name}.{added}"
        unique = {tuple(u["column_names"]) for u in inspector.get_unique_constraints(table.name)}
        assert unique >= {(column.name,) for column in table.columns if column.unique}


def test_two_runs_take_turns(empty_database: Database) -> None:
    runs = [
        subprocess.Popen(
            [BIN / "alembic", "upgrade", "heads"],
            cwd=ROOT,
            env={"DATABASE_URL": empty_database.dsn("app_owner")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert sum(text.count("Running upgrade") for text in said) == len(
        alembic(empty_database, "history").splitlines()
    )


def test_waiting_for_another_run_ends(empty_database: Database) -> None:
    other = empty_database.connect("app_owner")
    other.cursor().execute("SELECT pg_advisory_lock(%s)", (ONE_RUN_AT_A_TIME,))
    said = refusal(empty_database.dsn("app_owner"), "-x", "wait=300ms", "upgrade", "heads")
    other.close()
    assert "another migration" in said
    assert relations(empty_database) == set()


def test_a_lock_of_another_session_leaves_everything_as_it_was(database: Database) -> None:
    before, revisions = relations(database), database.rows("SELECT * FROM alembic_version ORDER BY 1")
    other = database.connect("app_user")
    other.autocommit = False
    other.cursor().execute("SELECT * FROM tenants")  # dropping the table has to wait for this transaction
    said = refusal(database.dsn("app_owner"), "-x", "lock_timeout=300ms", "downgrade", "core_schema@base")
    other.close()
    assert "lock" in said
    assert relations(database) == before
    assert database.rows("SELECT * FROM alembic_version ORDER BY 1") == revisions


def test_a_missing_role_is_named(postgres: Cluster, empty_database: Database) -> None:
    postgres.execute("ALTER ROLE app_ro RENAME TO app_gone")
    try:
        said = refusal(empty_database.dsn("app_owner"), "upgrade", "heads")
    finally:
        postgres.execute("ALTER ROLE app_gone RENAME TO app_ro")
    assert "app_ro" in said
    assert "role `database`" in said
    assert relations(empty_database) == set()


def test_only_the_owner_migrates(empty_database: Database) -> None:
    assert "app_owner" in refusal(empty_database.dsn("app_rw"), "upgrade", "heads")
    # A superuser does so in the owner's name.
    run_alembic(empty_database.dsn("postgres"), "upgrade", "core_schema@head").check_returncode()
    owners = empty_database.rows("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'")
    assert owners == [("app_owner",)]


def test_a_database_that_cannot_be_used_is_one_sentence(postgres: Cluster) -> None:
    wrong = postgres.dsn("app_owner", "skeldir").replace("app_owner:", "app_owner:wrong", 1)
    assert "password authentication failed" in refusal(wrong, "upgrade", "heads")
    away = postgres.dsn("app_owner", "skeldir").replace(f":{postgres.port}/", f":{free_port()}/")
    assert "can't be reached" in refusal(away, "upgrade", "heads")
    assert "DATABASE_URL" in run_alembic(None, "upgrade", "heads").stderr.splitlines()[-1]


def test_runs_from_a_release_with_any_form_of_the_dsn(postgres: Cluster, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "alembic", tmp_path / "alembic")
    shutil.copy(ROOT / "alembic.ini", tmp_path)
    dsn = postgres.dsn("app_owner", "skeldir").replace("postgresql:", "postgresql+asyncpg:")
    done = run_alembic(f"{dsn}?channel_binding=prefer", "current", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    heads = run_alembic(dsn, "heads", cwd=tmp_path).stdout
    assert {line.split()[0] for line in heads.splitlines()} <= {
        line.split()[0] for line in done.stdout.splitlines()
    }


CONTRACT = """
revision = "contract_0001"
down_revision = None
branch_labels = ("contract",)
depends_on = "monitoring_0001"


def upgrade():
    pass
"""


def test_compose_runs_a_contract_migration_only_when_it_is_asked_to(
    empty_database: Database, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "alembic", tmp_path / "alembic")
    for file in ("alembic.ini", "compose/migrate.py", "roles/schema/files/pending.py"):  # as in the image
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "alembic/versions/contract_0001_nothing_old.py").write_text(CONTRACT)
    dsn = empty_database.dsn("app_owner")
    # A database of the release before: one that is new has nobody to wait for.
    alembic(empty_database, "upgrade", "celery_foundation@head")

    def migrate(**environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-I", tmp_path / "migrate.py"],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "DATABASE_URL": dsn} | environment,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def applied() -> set[object]:
        return {row[0] for row in empty_database.rows("SELECT version_num FROM alembic_version")}

    assert "contract_0001 would take away" in migrate()
    assert "contract_0001" not in applied()
    assert TABLES["core_schema"] <= relations(empty_database)
    migrate()
    assert "contract_0001" not in applied()
    migrate(SKELDIR_CONTRACT="true")
    assert "contract_0001" in applied()
    assert migrate() == ""


# Rules of squawk that don't apply, each with its reason.
SQUAWK_EXCLUDED = {
    "prefer-text-field": "kombu and Celery declare these lengths",
    "prefer-bigint-over-int": "the ids are BIGINT; Celery's count of retries needn't be",
    "prefer-bigint-over-smallint": "kombu's version of a message counts its deliveries",
    "prefer-timestamp-tz": "kombu and Celery declare timestamps without time zone",
    "prefer-robust-stmts": "each migration is one transaction: there is nothing half-done to step over",
    "require-concurrent-index-creation": "the indexes come with their new, empty tables",
}


def test_squawk_finds_nothing_in_the_sql(tmp_path: Path) -> None:
    script = tmp_path / "upgrade.sql"
    script.write_text(run_alembic(None, "upgrade", "heads", "--sql").stdout)
    done = subprocess.run(
        [BIN / "squawk", f"--exclude={','.join(SQUAWK_EXCLUDED)}", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
