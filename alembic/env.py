"""How migrations run: as app_owner, one at a time, a transaction each, and never waiting long for a lock.

`alembic -x lock_timeout=2s -x statement_timeout=1h -x wait=5s upgrade heads` changes the limits of one run.
Whatever goes wrong with the database ends in one sentence and a non-zero status.
"""

import sys
import time
from logging.config import fileConfig

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, pool, text
from sqlalchemy.exc import DBAPIError

from app.core.config import ConfigurationError, get_settings
from app.core.dsn import sqlalchemy_url
from app.db.models import Base

LIMITS = {
    "lock_timeout": "5s",  # a migration that waits for a lock makes everybody behind it wait too
    "statement_timeout": "10min",  # leaves room to build an index
    "wait": "30s",  # for another run to end
}
ONE_RUN_AT_A_TIME = 7_365_126_941  # the advisory lock's key: any number that nobody else uses
ROLES = {"app_owner", "app_user", "app_rw", "app_ro"}

LOCK_NOT_AVAILABLE, QUERY_CANCELED, INSUFFICIENT_PRIVILEGE = "55P03", "57014", "42501"


def limits() -> dict[str, str]:
    """The limits of this run; -x outranks the defaults."""
    given = context.get_x_argument(as_dictionary=True)
    if unknown := given.keys() - LIMITS.keys():
        raise CommandError(f"-x knows {', '.join(LIMITS)}, not {', '.join(sorted(unknown))}")
    return LIMITS | given


def only_the_models_tables(_object: object, name: str | None, kind: str, *_: object) -> bool:
    """`alembic check` compares the application's tables; kombu's and Celery's are compared by a test."""
    return kind != "table" or name in Base.metadata.tables


def missing_roles(connection: Connection) -> set[str]:
    """Which of the four roles the server doesn't have."""
    return ROLES - set(connection.scalars(text("SELECT rolname FROM pg_roles")))


def become_owner(connection: Connection) -> None:
    """Everything must belong to app_owner: default privileges and row-level security depend on it."""
    if missing := missing_roles(connection):
        raise CommandError(
            f"the database server has no role {', '.join(sorted(missing))}: the Ansible role `database` makes"
            " the four roles; run it (`ansible-playbook site.yml --tags database`), then migrate"
        )
    if not connection.scalar(text("SELECT pg_has_role('app_owner', 'member')")):
        user = connection.scalar(text("SELECT current_user"))
        raise CommandError(f"migrations run as app_owner, and {user} is not; use app_owner's DATABASE_URL")
    connection.execute(text("SET ROLE app_owner"))


def take_turns(connection: Connection, wait: str) -> None:
    """Hold the lock that keeps two runs apart, until the connection closes.

    It is asked for again and again, each time in a transaction of its own: CREATE INDEX CONCURRENTLY waits
    for every open transaction, and so for one that would wait here.
    """
    deadline = time.monotonic() + connection.scalar(
        text("SELECT extract(epoch FROM CAST(:wait AS interval))::double precision"), {"wait": wait}
    )
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": ONE_RUN_AT_A_TIME}):
        connection.commit()
        if time.monotonic() >= deadline:
            raise CommandError(f"another migration is still running after {wait}; nothing was changed")
        time.sleep(0.2)


def run_online() -> None:
    """Migrate the database of DATABASE_URL."""
    limit = limits()
    url = sqlalchemy_url(get_settings().database_url.get_secret_value())
    engine = create_engine(
        url,
        poolclass=pool.NullPool,
        hide_parameters=True,
        connect_args={"connect_timeout": 10, "application_name": "skeldir alembic"},
    )
    with engine.connect() as connection:
        become_owner(connection)
        take_turns(connection, limit["wait"])
        for name in ("lock_timeout", "statement_timeout"):
            connection.execute(
                text("SELECT set_config(:name, :value, false)"), {"name": name, "value": limit[name]}
            )
        connection.commit()  # so that the settings outlive a migration that is rolled back
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            include_object=only_the_models_tables,
            compare_server_default=True,
            transaction_per_migration=True,
        )
        with context.begin_transaction():
            context.run_migrations()


def run_offline() -> None:
    """Print the SQL; no database is asked."""
    limit = limits()
    context.configure(
        dialect_name="postgresql",
        target_metadata=Base.metadata,
        literal_binds=True,
        transaction_per_migration=True,
    )
    for name in ("lock_timeout", "statement_timeout"):
        context.execute(f"SET {name} = '{limit[name]}'")
    with context.begin_transaction():
        context.run_migrations()


def sentence(error: DBAPIError) -> str:
    """What the server or the driver said, on one line and without the statement."""
    code = getattr(error.orig, "pgcode", None)
    said = " ".join(str(error.orig).split("\n")[0].split())
    if code == LOCK_NOT_AVAILABLE:
        return (
            "the migration waited too long for a lock that another session holds and was rolled back;"
            f" try again when the other is done ({said})"
        )
    if code == QUERY_CANCELED:
        return f"the migration ran longer than statement_timeout allows and was rolled back ({said})"
    if code == INSUFFICIENT_PRIVILEGE:
        return f"app_owner lacks a privilege that the Ansible role `database` gives it ({said})"
    if code is None:
        return f"the database can't be reached or doesn't let app_owner in: {said.rpartition('failed: ')[2]}"
    return f"the migration failed and was rolled back: {said}"


if context.config.config_file_name and "pytest" not in sys.modules:
    fileConfig(context.config.config_file_name, disable_existing_loggers=False)
try:
    if context.is_offline_mode():
        run_offline()
    else:
        run_online()
except ConfigurationError as error:
    raise CommandError(error.message) from None
except DBAPIError as error:
    raise CommandError(sentence(error)) from None
