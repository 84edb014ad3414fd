"""What each role of the database is refused, and what it may: tried by logging in as that role.

Each attempt that must fail is also made as the superuser and must succeed there, so that a refusal is never
just a statement that doesn't work. Every attempt is rolled back.
"""

from collections.abc import Iterator
from typing import NamedTuple

import psycopg2
import pytest
from psycopg2.errors import InsufficientPrivilege

from tests.postgres import Cluster, Database

A = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
B = "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"


class Attempt(NamedTuple):
    """One statement, or several of which the last counts, by a role that acts for a tenant or for none."""

    role: str
    tenant: str | None
    sql: str


@pytest.fixture(scope="module")
def furnished(postgres: Cluster) -> Iterator[Database]:
    """Two tenants with events, a message, results, and objects that app_owner made after provisioning."""
    database = postgres.copy_database("skeldir", "privileges")
    with database.connect("postgres") as session:
        cursor = session.cursor()
        cursor.execute("INSERT INTO tenants (id, name) VALUES (%s, 'A'), (%s, 'B')", (A, B))
        cursor.execute(
            "INSERT INTO events (tenant_id, kind, payload) SELECT tenant::uuid, 'seen', '{\"n\": 1}'"
            " FROM unnest(%s) AS tenant, generate_series(1, 20)",
            ([A, B],),
        )
        cursor.execute("INSERT INTO kombu_queue (name) VALUES ('llm')")
        cursor.execute(
            "INSERT INTO kombu_message (visible, payload, version, queue_id)"
            " SELECT true, 'private', 1, id FROM kombu_queue, generate_series(1, 20)"
        )
        cursor.execute(
            "INSERT INTO celery_taskmeta (task_id, status, result, traceback)"
            " VALUES ('t', 'SUCCESS', 'private', 'private')"
        )
        cursor.execute("INSERT INTO celery_tasksetmeta (taskset_id, result) VALUES ('g', 'private')")
        cursor.execute(
            "INSERT INTO celery_schedule (name, rhythm, last_due) VALUES ('tidy', 'every 1 s', now())"
        )
        cursor.execute("SELECT refresh_all_materialized_views()")
        cursor.execute("ANALYZE")
    session.close()
    with database.connect("app_owner") as session:
        session.cursor().execute("CREATE TABLE later (id bigserial, payload text)")
        session.cursor().execute("INSERT INTO later (payload) VALUES ('private')")
        session.cursor().execute("CREATE FUNCTION later_function() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    session.close()
    yield database
    postgres.drop_database(database.name)


def affected(database: Database, attempt: Attempt) -> int:
    """Make an attempt and take it back; answers how many rows it read or changed."""
    session = database.connect(attempt.role)
    try:
        # app_ro's transactions are read-only by default; the grants must hold for who changes that.
        session.set_session(readonly=False, autocommit=False)
        cursor = session.cursor()
        if attempt.tenant is not None:
            cursor.execute("SELECT set_config('app.current_tenant_id', %s, true)", (attempt.tenant,))
        if attempt.sql.startswith("COPY") and attempt.sql.endswith("STDOUT"):
            with open("/dev/null", "w") as nowhere:
                cursor.copy_expert(attempt.sql, nowhere)
        else:
            cursor.execute(attempt.sql)
        return int(cursor.rowcount)
    finally:
        session.rollback()
        session.close()


READ_EVENTS = "SELECT * FROM events"

# The server answers "permission denied", or that a row would violate row-level security.
REFUSED = [
    # a tenant's border, written over
    Attempt("app_user", None, f"INSERT INTO events (tenant_id, kind) VALUES ('{A}', 'x')"),
    Attempt("app_user", "", f"INSERT INTO events (tenant_id, kind) VALUES ('{A}', 'x')"),
    Attempt("app_user", "garbage", f"INSERT INTO events (tenant_id, kind) VALUES ('{A}', 'x')"),
    Attempt("app_user", A, f"INSERT INTO events (tenant_id, kind) VALUES ('{B}', 'x')"),
    Attempt("app_user", A, f"UPDATE events SET tenant_id = '{B}' WHERE tenant_id = '{A}'"),
    Attempt("app_user", A, f"SET LOCAL row_security = off; {READ_EVENTS}"),
    Attempt("app_user", A, "INSERT INTO tenants (name) VALUES ('C')"),
    Attempt("app_user", A, f"UPDATE tenants SET name = 'mine' WHERE id = '{A}'"),
    Attempt("app_user", A, f"DELETE FROM tenants WHERE id = '{A}'"),
    Attempt("app_user", A, "SELECT * FROM tenant_event_counts_all"),
    Attempt("app_user", A, "COPY (SELECT kind FROM tenant_event_counts_all) TO STDOUT"),
    Attempt("app_user", A, "REFRESH MATERIALIZED VIEW tenant_event_counts_all"),
    Attempt("app_owner", None, f"INSERT INTO events (tenant_id, kind) VALUES ('{A}', 'x')"),
    Attempt("app_rw", None, READ_EVENTS),
    Attempt("app_rw", A, READ_EVENTS),
    Attempt("app_rw", A, f"INSERT INTO events (tenant_id, kind) VALUES ('{A}', 'x')"),
    Attempt("app_rw", A, "SELECT * FROM tenant_event_counts"),
    Attempt("app_rw", None, "SELECT * FROM tenant_event_counts_all"),
    # the guards themselves
    Attempt("app_user", A, "ALTER TABLE events DISABLE ROW LEVEL SECURITY"),
    Attempt("app_user", A, "ALTER TABLE events NO FORCE ROW LEVEL SECURITY"),
    Attempt("app_user", A, "CREATE POLICY everything ON events USING (true)"),
    Attempt("app_user", A, "DROP POLICY own_events ON events"),
    Attempt("app_user", A, "SET session_replication_role = replica"),
    Attempt("app_user", A, "ALTER DEFAULT PRIVILEGES FOR ROLE app_owner GRANT ALL ON TABLES TO app_user"),
    Attempt("app_user", None, "UPDATE alembic_version SET version_num = version_num || 'x'"),
    Attempt("app_rw", None, "DELETE FROM alembic_version"),
    # what the scheduler remembers, and which tenants there are
    Attempt("app_user", None, "DELETE FROM celery_schedule"),
    Attempt("app_user", None, "TRUNCATE celery_schedule"),
    Attempt("app_rw", None, "UPDATE celery_schedule SET last_due = now()"),
    Attempt("app_rw", None, "INSERT INTO celery_schedule (name, rhythm, last_due) VALUES ('x', 'y', now())"),
    Attempt("app_rw", None, "DELETE FROM celery_schedule"),
    Attempt("app_ro", None, "SELECT name FROM celery_schedule"),
    Attempt("app_rw", None, "SELECT tenant_ids()"),
    Attempt("app_ro", None, "SELECT tenant_ids()"),
    # becoming somebody else
    Attempt("app_user", None, "SET ROLE app_owner"),
    Attempt("app_user", None, "SET ROLE app_rw"),
    Attempt("app_user", None, "SET ROLE postgres"),
    Attempt("app_user", None, "SET SESSION AUTHORIZATION app_owner"),
    Attempt("app_user", None, "ALTER ROLE app_user BYPASSRLS"),
    Attempt("app_user", None, "ALTER ROLE app_user SUPERUSER"),
    Attempt("app_user", None, "GRANT app_owner TO app_user"),
    Attempt("app_user", None, "CREATE ROLE mine"),
    Attempt("app_rw", None, "SET ROLE app_owner"),
    Attempt("app_ro", None, "SET ROLE app_rw"),
    Attempt("app_owner", None, "SET ROLE postgres"),
    Attempt("app_owner", None, "ALTER ROLE app_owner BYPASSRLS"),
    Attempt("app_owner", None, "CREATE ROLE mine"),
    # the server's own secrets and files
    Attempt("app_user", None, "SELECT * FROM pg_authid"),
    Attempt("app_rw", None, "SELECT * FROM pg_shadow"),
    Attempt("app_ro", None, "SELECT * FROM pg_authid"),
    Attempt("app_owner", None, "SELECT * FROM pg_authid"),
    Attempt("app_user", None, "SELECT pg_read_file('PG_VERSION')"),
    Attempt("app_user", A, "COPY events (kind) FROM PROGRAM 'true'"),
    # making, changing and emptying objects
    Attempt("app_user", None, "CREATE TABLE mine ()"),
    Attempt("app_user", None, "CREATE TEMPORARY TABLE mine ()"),
    Attempt("app_user", None, "CREATE SCHEMA mine"),
    Attempt("app_user", None, "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'"),
    Attempt("app_user", None, "CREATE INDEX ON kombu_message (payload)"),
    Attempt("app_user", None, "DROP TABLE kombu_message"),
    Attempt("app_user", None, "ALTER TABLE kombu_message ADD COLUMN mine int"),
    Attempt("app_user", None, "TRUNCATE kombu_message"),
    Attempt("app_user", A, "TRUNCATE events"),
    Attempt("app_user", None, "SELECT setval('message_id_sequence', 10000)"),
    Attempt("app_user", None, "TRUNCATE later"),
    Attempt("app_user", None, "SELECT later_function()"),
    Attempt("app_rw", None, "CREATE TABLE mine ()"),
    Attempt("app_rw", None, "CREATE TEMPORARY TABLE mine ()"),
    Attempt("app_rw", None, "DROP TABLE kombu_message"),
    Attempt("app_rw", None, "ALTER TABLE celery_taskmeta DROP COLUMN result"),
    Attempt("app_rw", None, "TRUNCATE kombu_message"),
    Attempt("app_rw", None, "TRUNCATE later"),
    Attempt("app_rw", None, "SELECT * FROM refresh_all_materialized_views()"),
    # payloads, by whatever way
    Attempt("app_ro", None, "SELECT payload FROM kombu_message"),
    Attempt("app_ro", None, "SELECT * FROM kombu_message"),
    Attempt("app_ro", None, "SELECT m FROM kombu_message AS m"),
    Attempt("app_ro", None, "SELECT to_json(m) FROM kombu_message AS m"),
    Attempt("app_ro", None, "SELECT id FROM kombu_message WHERE payload LIKE 'p%'"),
    Attempt("app_ro", None, "SELECT id FROM kombu_message ORDER BY payload"),
    Attempt("app_ro", None, "SELECT query_to_xml('SELECT payload FROM kombu_message', true, true, '')"),
    Attempt("app_ro", None, "SELECT table_to_xml('kombu_message', true, true, '')"),
    Attempt("app_ro", None, "COPY kombu_message TO STDOUT"),
    Attempt("app_ro", None, "COPY kombu_message (payload) TO STDOUT"),
    Attempt("app_ro", None, "COPY (SELECT payload FROM kombu_message) TO STDOUT"),
    *(
        Attempt("app_ro", None, f"SELECT {column} FROM celery_taskmeta")
        for column in ("result", "traceback", "children", "args", "kwargs", "stamps")
    ),
    Attempt("app_ro", None, "SELECT result FROM celery_tasksetmeta"),
    Attempt("app_ro", None, "SELECT name FROM tenants"),
    Attempt("app_ro", A, "SELECT payload FROM events"),
    Attempt("app_ro", A, "SELECT count(*) FROM events"),
    Attempt("app_ro", A, "SELECT kind FROM tenant_event_counts_all"),
    Attempt("app_ro", A, "SELECT * FROM tenant_event_counts"),
    Attempt("app_ro", None, "SELECT payload FROM later"),
    Attempt("app_ro", None, "SELECT later_function()"),
    # app_ro writing anything
    Attempt("app_ro", None, "INSERT INTO kombu_queue (name) VALUES ('mine')"),
    Attempt("app_ro", None, "UPDATE kombu_message SET visible = false"),
    Attempt("app_ro", None, "DELETE FROM kombu_message"),
    Attempt("app_ro", None, "SELECT id FROM kombu_message FOR UPDATE"),
    Attempt("app_ro", None, "DELETE FROM celery_taskmeta"),
    Attempt("app_ro", None, "TRUNCATE kombu_message"),
    Attempt("app_ro", None, "INSERT INTO tenants (name) VALUES ('C')"),
    Attempt("app_ro", None, "INSERT INTO later (payload) VALUES ('x')"),
    Attempt("app_ro", None, "SELECT nextval('message_id_sequence')"),
    Attempt("app_ro", None, "SELECT * FROM refresh_all_materialized_views()"),
    Attempt("app_ro", None, "CREATE TEMPORARY TABLE mine ()"),
    Attempt("app_ro", None, "CREATE TABLE mine ()"),
]

# The statement runs, and finds nothing that it may read or change.
NOTHING_THERE = [
    *(
        Attempt("app_user", tenant, READ_EVENTS)
        for tenant in (
            None,
            "",
            " ",
            "garbage",
            "' OR true --",
            f"{A} ",
            f"{A}\n{B}",
            f"{{{A}}}",
            f"{A},{B}",
            A[:-1],
            "00000000-0000-0000-0000-000000000000",
        )
    ),
    Attempt("app_user", None, "SELECT * FROM tenants"),
    Attempt("app_user", None, "UPDATE events SET kind = 'x'"),
    Attempt("app_user", None, "DELETE FROM events"),
    Attempt("app_user", A, f"SELECT * FROM events WHERE tenant_id = '{B}'"),
    Attempt("app_user", A, f"UPDATE events SET kind = 'x' WHERE tenant_id = '{B}'"),
    Attempt("app_user", A, f"DELETE FROM events WHERE tenant_id = '{B}'"),
    Attempt("app_user", A, f"SELECT * FROM tenants WHERE id = '{B}'"),
    Attempt("app_user", None, f"SET LOCAL app.refreshing_materialized_views = 'on'; {READ_EVENTS}"),
    Attempt("app_user", None, "SET LOCAL app.listing_tenants = 'on'; SELECT * FROM tenants"),
    Attempt("app_user", None, "SELECT tenant_ids(); SELECT * FROM tenants"),
    Attempt("app_owner", None, "SELECT tenant_ids(); SELECT * FROM tenants"),
    Attempt("app_user", A, "SELECT * FROM pg_stats WHERE tablename = 'events'"),
    Attempt(
        "app_ro", None, "SELECT * FROM pg_stats WHERE tablename = 'kombu_message' AND attname = 'payload'"
    ),
    Attempt("app_owner", None, READ_EVENTS),
    Attempt("app_owner", None, "DELETE FROM events"),
    Attempt("app_owner", None, "SET LOCAL app.refreshing_materialized_views = 'on'; DELETE FROM events"),
]

ALLOWED = [
    Attempt("app_user", A, READ_EVENTS),
    Attempt("app_user", A.upper(), READ_EVENTS),
    Attempt("app_user", A, f"INSERT INTO events (tenant_id, kind) VALUES ('{A}', 'x')"),
    Attempt("app_user", A, "UPDATE events SET kind = 'x'"),
    Attempt("app_user", A, "DELETE FROM events"),
    Attempt("app_user", A, "SELECT * FROM tenants"),
    Attempt("app_user", A, "SELECT * FROM tenant_event_counts"),
    Attempt("app_user", None, "SELECT * FROM refresh_all_materialized_views()"),
    Attempt("app_user", None, "SELECT tenant_ids()"),
    Attempt(
        "app_user", None, "INSERT INTO celery_schedule (name, rhythm, last_due) VALUES ('x', 'y', now())"
    ),
    Attempt("app_user", None, "UPDATE celery_schedule SET last_due = now()"),
    Attempt("app_user", None, "INSERT INTO later (payload) VALUES ('x')"),
    Attempt("app_user", None, "SELECT * FROM alembic_version"),
    *(
        Attempt(role, None, statement)
        for role in ("app_user", "app_rw")
        for statement in (
            "INSERT INTO kombu_message (payload, version) VALUES ('x', 1)",
            "SELECT payload FROM kombu_message FOR UPDATE SKIP LOCKED",
            "UPDATE kombu_message SET visible = false",
            "DELETE FROM kombu_message",
            "INSERT INTO kombu_queue (name) VALUES ('mine')",
            "INSERT INTO celery_taskmeta (task_id) VALUES ('x')",
            "SELECT result FROM celery_taskmeta",
            "DELETE FROM celery_tasksetmeta",
            "DELETE FROM later",
            "SELECT nextval('task_id_sequence')",
        )
    ),
    Attempt("app_rw", None, "SELECT * FROM celery_schedule"),
    Attempt("app_rw", None, "INSERT INTO tenants (name) VALUES ('C')"),
    Attempt("app_rw", None, f"UPDATE tenants SET name = 'C' WHERE id = '{B}'"),
    Attempt("app_ro", None, "SELECT count(*) FROM kombu_message"),
    Attempt("app_ro", None, 'SELECT id, visible, "timestamp", version, queue_id FROM kombu_message'),
    Attempt("app_ro", None, "SELECT * FROM kombu_queue"),
    Attempt("app_ro", None, "SELECT status, count(*) FROM celery_taskmeta GROUP BY status"),
    Attempt("app_ro", None, "SELECT tenant_id, sum(events) FROM tenant_event_counts_all GROUP BY tenant_id"),
    Attempt("app_ro", None, "SELECT id, created_at FROM tenants"),
    Attempt("app_ro", None, "SELECT pg_total_relation_size('kombu_message')"),
]


def name(attempt: Attempt) -> str:
    who = attempt.role if attempt.tenant is None else f"{attempt.role} for {attempt.tenant[:9]!r}"
    return f"{who}: {attempt.sql[-70:]}"


@pytest.mark.parametrize("attempt", REFUSED, ids=name)
def test_is_refused(furnished: Database, attempt: Attempt) -> None:
    with pytest.raises(InsufficientPrivilege):
        affected(furnished, attempt)


@pytest.mark.parametrize("attempt", NOTHING_THERE, ids=name)
def test_finds_nothing(furnished: Database, attempt: Attempt) -> None:
    assert affected(furnished, attempt) == 0


@pytest.mark.parametrize("attempt", NOTHING_THERE, ids=name)
def test_would_find_something_as_superuser(furnished: Database, attempt: Attempt) -> None:
    assert affected(furnished, attempt._replace(role="postgres")) > 0


@pytest.mark.parametrize("attempt", REFUSED, ids=name)
def test_would_succeed_as_superuser(furnished: Database, attempt: Attempt) -> None:
    affected(furnished, attempt._replace(role="postgres"))


@pytest.mark.parametrize("attempt", ALLOWED, ids=name)
def test_is_allowed(furnished: Database, attempt: Attempt) -> None:
    assert affected(furnished, attempt) > 0


def test_a_tenant_reads_its_own_rows_alone(furnished: Database) -> None:
    assert affected(furnished, Attempt("app_user", A, READ_EVENTS)) == 20
    assert affected(furnished, Attempt("app_user", A, "SELECT * FROM tenant_event_counts")) == 1
    assert affected(furnished, Attempt("app_user", None, "SELECT * FROM tenant_event_counts")) == 0
    assert affected(furnished, Attempt("app_rw", None, "SELECT * FROM tenants")) == 2


def test_a_stranger_is_not_let_in(postgres: Cluster, furnished: Database) -> None:
    postgres.execute("CREATE ROLE stranger LOGIN PASSWORD 'superuser of the test cluster'")
    try:
        with pytest.raises(psycopg2.OperationalError, match="CONNECT"):
            furnished.connect("stranger")
    finally:
        postgres.execute("DROP ROLE stranger")


def test_readers_transactions_are_read_only_and_passwords_are_scram(furnished: Database) -> None:
    assert furnished.rows("SHOW default_transaction_read_only", user="app_ro") == [("on",)]
    stored = furnished.rows(
        "SELECT rolpassword LIKE 'SCRAM-SHA-256$%' FROM pg_authid WHERE rolname LIKE 'app%'"
    )
    assert stored == [(True,)] * 4


def test_whatever_has_a_tenant_is_guarded(furnished: Database) -> None:
    """New tables are usable for app_user at once: one that a migration forgot to guard must be seen."""
    relations = furnished.rows(
        "SELECT relname, relkind, relrowsecurity AND relforcerowsecurity,"
        " coalesce('security_barrier=true' = ANY (reloptions), false)"
        " FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid AND attname = 'tenant_id'"
        " WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm')"
        " AND has_any_column_privilege('app_user', pg_class.oid, 'SELECT, INSERT, UPDATE')"
    )
    assert relations
    for relation, kind, forced, barrier in relations:
        assert forced if kind in "rp" else barrier, relation
