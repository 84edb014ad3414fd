"""A tenant's transaction is that tenant's alone, and leaves nothing on the connection."""

import os
from collections.abc import Iterator
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from app.core.config import get_settings
from app.db.engine import _forget_the_tenant, get_engine
from app.db.session import get_session, set_tenant_guc
from tests.postgres import Database

TENANT, OTHER = uuid4(), uuid4()


@pytest.fixture(autouse=True)
def engine(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DATABASE_URL", database.dsn())
    get_settings.cache_clear()
    get_engine.cache_clear()
    yield
    get_engine().dispose()
    get_settings.cache_clear()
    get_engine.cache_clear()


def _seen(session: Session) -> tuple[int, str]:
    """The connection's own number, and the tenant that the database sees on it."""
    row = session.execute(
        text("SELECT pg_backend_pid(), coalesce(current_setting('app.current_tenant_id', true), '')")
    ).one()
    return row[0], row[1]


def _next_user(tenant: UUID | None = None) -> tuple[int, str]:
    with get_session(tenant) as session:
        return _seen(session)


def test_a_transaction_is_its_tenants() -> None:
    pid, seen = _next_user(TENANT)
    assert seen == str(TENANT)
    assert _next_user() == (pid, "")
    assert _next_user(OTHER) == (pid, str(OTHER))


def test_an_exception_leaves_nothing() -> None:
    with pytest.raises(ZeroDivisionError), get_session(TENANT) as session:  # noqa: PT012
        pid = _seen(session)[0]
        1 / 0  # noqa: B018 - any exception does
    assert _next_user() == (pid, "")


def test_an_error_of_the_database_leaves_nothing() -> None:
    with pytest.raises(Exception, match="division by zero"), get_session(TENANT) as session:  # noqa: PT012
        pid = _seen(session)[0]
        session.execute(text("SELECT 1 / 0"))
    assert _next_user() == (pid, "")


def test_every_transaction_of_a_block_is_the_tenants() -> None:
    with get_session(TENANT) as session:
        first = _seen(session)
        session.commit()
        assert _seen(session) == first
        session.rollback()
        assert _seen(session) == first == (first[0], str(TENANT))


def test_an_exception_rolls_back_and_an_end_commits(database: Database) -> None:
    connection = database.connect("postgres")
    connection.cursor().execute("INSERT INTO tenants (id, name) VALUES (%s, 'one')", [str(TENANT)])
    connection.close()
    add = text("INSERT INTO events (tenant_id, kind) VALUES (:tenant, :kind)")
    with get_session(TENANT) as session:
        session.execute(add, {"tenant": TENANT, "kind": "kept"})
    with pytest.raises(ZeroDivisionError), get_session(TENANT) as session:  # noqa: PT012
        session.execute(add, {"tenant": TENANT, "kind": "lost"})
        1 / 0  # noqa: B018 - any exception does
    assert database.rows("SELECT kind FROM events") == [("kept",)]


def test_a_tenant_sees_and_writes_only_its_own(database: Database) -> None:
    connection = database.connect("postgres")
    connection.cursor().execute(
        "INSERT INTO tenants (id, name) VALUES (%s, 'one'), (%s, 'other')", [str(TENANT), str(OTHER)]
    )
    connection.close()
    add = text("INSERT INTO events (tenant_id, kind) VALUES (:tenant, 'test')")
    with get_session(TENANT) as session:
        session.execute(add, {"tenant": TENANT})
    for tenant, count in [(TENANT, 1), (OTHER, 0), (None, 0)]:
        with get_session(tenant) as session:
            assert session.scalar(text("SELECT count(*) FROM events")) == count
    with pytest.raises(Exception, match="row-level security"), get_session(TENANT) as session:
        session.execute(add, {"tenant": OTHER})


def test_the_guc_may_be_set_for_one_transaction() -> None:
    with get_session(None) as session:
        set_tenant_guc(session, TENANT)
        assert _seen(session)[1] == str(TENANT)
        session.commit()
        assert _seen(session)[1] == ""


def test_the_guc_may_be_set_for_a_session_until_the_connection_goes_back() -> None:
    with get_engine().connect() as connection, Session(connection) as session:
        set_tenant_guc(session, TENANT, local=False)
        session.commit()
        pid, seen = _seen(session)
        assert seen == str(TENANT)
    assert _next_user() == (pid, "")


def test_the_tenant_ends_with_its_transaction_even_where_the_pool_forgets_nothing() -> None:
    event.remove(get_engine(), "reset", _forget_the_tenant)
    pid = _next_user(TENANT)[0]
    assert _next_user() == (pid, "")


def test_even_what_a_task_sets_by_itself_is_forgotten() -> None:
    with get_session(None) as session:
        pid = _seen(session)[0]
        session.execute(text(f"SET app.current_tenant_id = '{TENANT}'"))
        session.commit()
    with get_engine().connect() as connection:
        seen = connection.execute(text("SELECT pg_backend_pid(), current_setting('app.current_tenant_id')"))
        assert tuple(seen.one()) == (pid, "")


def test_a_lost_connection_is_replaced(database: Database) -> None:
    pid = _next_user(TENANT)[0]
    assert database.rows(f"SELECT pg_terminate_backend({pid}, 5000)") == [(True,)]
    assert _next_user(TENANT) != (pid, str(TENANT))


def test_a_forked_child_has_its_own_connection() -> None:
    parents = _next_user(TENANT)[0]
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, str(_next_user(OTHER)).encode())
        os._exit(0)
    os.wait()
    childs, seen = eval(os.read(reader, 1000))  # noqa: S307 - what was written three lines above
    assert childs != parents
    assert seen == str(OTHER)
    assert _next_user() == (parents, "")
