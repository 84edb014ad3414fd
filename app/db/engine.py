"""The one connection pool of a process."""

import os
from functools import cache
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.dialects import registry

from app.core.config import get_settings
from app.core.dsn import sqlalchemy_url

# To SQLAlchemy 2.1 a plain `postgresql://` means psycopg 3. Here it means psycopg2, also in the DSNs that
# kombu's and Celery's own code hands to create_engine.
registry.register("postgresql", "sqlalchemy.dialects.postgresql.psycopg2", "dialect")

# A database host that vanished without a word is noticed within a minute, not after the kernel's two hours.
_NETWORK = {
    "connect_timeout": 5,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "fallback_application_name": "skeldir",
}


@cache
def get_engine() -> Engine:
    """The engine on `DATABASE_URL`; connections are opened when first needed and tested before each use.

    Raises:
        ConfigurationError: `DATABASE_URL` is missing or unusable.
    """
    url = sqlalchemy_url(get_settings().database_url.get_secret_value())
    network = {option: value for option, value in _NETWORK.items() if option not in url.query}
    # A child of the prefork pool runs one task at a time; the overflow serves the threads pool.
    engine = create_engine(
        url, pool_pre_ping=True, pool_size=1, max_overflow=15, connect_args=network, hide_parameters=True
    )
    event.listen(engine, "reset", _forget_the_tenant)
    return engine


def _forget_the_tenant(connection: Any, _record: Any, state: Any) -> None:
    """Nothing that a task set for its session may be there for the next user of the connection."""
    if state.terminate_only:
        return
    connection.rollback()
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute("RESET app.current_tenant_id")
    finally:
        connection.autocommit = False


def _leave_the_parents_connections() -> None:
    if get_engine.cache_info().currsize:
        get_engine().dispose(close=False)


# Whoever forks (Celery's pool, a test, a web server): two processes must never share a connection.
os.register_at_fork(after_in_child=_leave_the_parents_connections)
