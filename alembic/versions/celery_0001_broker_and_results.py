"""The broker's and the results' tables, as kombu 5.7 and Celery 5.7 expect them.

Column names and nullability are theirs. One thing is wider: ids are BIGINT where both declare INTEGER,
because the two message sequences count every job and would pass 2^31 within a year at 100 jobs a second.
Both read it the same.

Tables that kombu's and Celery's own code made on this database are taken over: queues, messages that were
not delivered yet, and results are copied into the new tables. Messages that were delivered (`visible` is
false) are left behind: the stock transport never deletes one, so a finished job looks like one whose worker
was killed. A worker that is stopped warmly gives back what it hadn't finished; stop all of them so before
this migration.

Workers (`app_user`) and operators (`app_rw`) use the tables; neither may create, empty or alter one.
`app_ro` reads the columns that count and describe: never a payload, arguments, a result or a traceback.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from sqlalchemy.schema import CreateSequence

revision: str = "celery_0001"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = ("celery_foundation",)
depends_on: str | Sequence[str] | None = None

SEQUENCES = {
    "queue_id_sequence": "kombu_queue",
    "message_id_sequence": "kombu_message",
    "task_id_sequence": "celery_taskmeta",
    "taskset_id_sequence": "celery_tasksetmeta",
}
# What app_ro may read.
SHAPES = {
    "kombu_queue": "id, name",
    "kombu_message": 'id, visible, "timestamp", version, queue_id',
    "celery_taskmeta": "id, task_id, status, date_done, name, worker, retries, queue",
    "celery_tasksetmeta": "id, taskset_id, date_done",
}
# Rows live for seconds. Vacuum after a thousand dead ones, at full speed, however large the table has become;
# leave room in each page so that an update of a message stays in its page.
HOT = {
    "fillfactor": 70,
    "autovacuum_vacuum_scale_factor": 0.0,
    "autovacuum_vacuum_threshold": 1000,
    "autovacuum_vacuum_insert_scale_factor": 0.0,
    "autovacuum_vacuum_insert_threshold": 10000,
    "autovacuum_analyze_scale_factor": 0.0,
    "autovacuum_analyze_threshold": 5000,
    "autovacuum_vacuum_cost_delay": 0,
}
# Rows stay until the results expire: dead ones come from updates and from the clean-up.
WARM = {"fillfactor": 85, "autovacuum_vacuum_scale_factor": 0.02, "autovacuum_analyze_scale_factor": 0.02}


def identifier(sequence: str) -> sa.Column[int]:
    """A primary key fed by the sequence whose name kombu's and Celery's models know."""
    return sa.Column(
        "id",
        sa.BigInteger(),
        server_default=sa.text(f"nextval('{sequence}')"),
        primary_key=True,
        nullable=False,
    )


def storage(table: str, parameters: dict[str, float]) -> None:
    """Set a table's storage parameters."""
    settings = ", ".join(f"{name} = {value}" for name, value in parameters.items())
    op.execute(f"ALTER TABLE {table} SET ({settings})")


def stock_tables() -> list[str]:
    """Which of the four tables exist already; the printed SQL of an offline run expects none.

    Raises:
        CommandError: app_owner doesn't own them.
    """
    if op.get_context().as_sql:
        return []
    found = op.get_bind().execute(
        sa.text(
            "SELECT relname, relkind, pg_has_role(current_user, relowner, 'USAGE') FROM pg_class"
            " WHERE relnamespace = 'public'::regnamespace AND relname = ANY (:names)"
        ),
        {"names": [*SEQUENCES, *SEQUENCES.values()]},
    )
    rows = found.all()
    foreign = [
        f"ALTER {'SEQUENCE' if kind == 'S' else 'TABLE'} {name} OWNER TO app_owner"
        for name, kind, mine in rows
        if not mine
    ]
    if foreign:
        raise CommandError(
            "there are tables of kombu's or Celery's own that belong to another role than app_owner; as that"
            f" role (a member of app_owner) or a superuser: {'; '.join(sorted(foreign))}; then migrate"
        )
    return [table for table in SEQUENCES.values() if any(name == table for name, _, _ in rows)]


def set_aside(tables: list[str]) -> None:
    """Copy what stays out of the way and drop the rest: as fast as that is, however much was delivered."""
    if not tables:
        return
    op.execute(f"LOCK TABLE {', '.join(tables)}")
    for table in tables:
        waiting = "WHERE visible AND queue_id IS NOT NULL" if table == "kombu_message" else ""
        op.execute(f"CREATE TABLE stock_{table} AS SELECT * FROM {table} {waiting}")  # noqa: S608 - names above
    op.execute(f"DROP TABLE {', '.join(tables)}")


def bring_back(table: str) -> None:
    """Fill a new table with what was set aside."""
    columns = [column["name"] for column in sa.inspect(op.get_bind()).get_columns(f"stock_{table}")]
    names = ", ".join(f'"{name}"' for name in columns)
    op.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM stock_{table} ORDER BY id")  # noqa: S608
    op.execute(f"DROP TABLE stock_{table}")


def upgrade() -> None:
    op.execute("REVOKE ALL ON alembic_version FROM app_user, app_rw, app_ro")
    op.execute("GRANT SELECT ON alembic_version TO app_user, app_rw, app_ro")

    stock = stock_tables()
    set_aside(stock)
    for sequence in SEQUENCES:
        op.execute(CreateSequence(sa.Sequence(sequence), if_not_exists=bool(stock)))

    op.create_table(
        "kombu_queue",
        identifier("queue_id_sequence"),
        sa.Column("name", sa.String(200), nullable=True),
        sa.UniqueConstraint("name", name="kombu_queue_name_key"),
    )
    op.create_table(
        "kombu_message",
        identifier("message_id_sequence"),
        sa.Column("visible", sa.Boolean(), nullable=True),
        sa.Column("timestamp", sa.DateTime(), nullable=True),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("version", sa.SmallInteger(), nullable=False),
        sa.Column("queue_id", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["queue_id"], ["kombu_queue.id"], name="FK_kombu_message_queue"),
    )
    op.create_index("ix_kombu_message_timestamp_id", "kombu_message", ["timestamp", "id"])
    op.create_index("ix_kombu_message_timestamp", "kombu_message", ["timestamp"])
    op.create_index("ix_kombu_message_visible", "kombu_message", ["visible"])

    op.create_table(
        "celery_taskmeta",
        identifier("task_id_sequence"),
        sa.Column("task_id", sa.String(155), nullable=True),
        sa.Column("status", sa.String(50), nullable=True),
        sa.Column("result", sa.LargeBinary(), nullable=True),
        sa.Column("date_done", sa.DateTime(), nullable=True),
        sa.Column("traceback", sa.Text(), nullable=True),
        sa.Column("children", sa.LargeBinary(), nullable=True),
        sa.Column("name", sa.String(155), nullable=True),
        sa.Column("args", sa.LargeBinary(), nullable=True),
        sa.Column("kwargs", sa.LargeBinary(), nullable=True),
        sa.Column("worker", sa.String(155), nullable=True),
        sa.Column("retries", sa.Integer(), nullable=True),
        sa.Column("queue", sa.String(155), nullable=True),
        sa.Column("stamps", sa.LargeBinary(), nullable=True),
        sa.UniqueConstraint("task_id", name="celery_taskmeta_task_id_key"),
    )
    op.create_index("ix_celery_taskmeta_date_done", "celery_taskmeta", ["date_done"])
    op.create_table(
        "celery_tasksetmeta",
        identifier("taskset_id_sequence"),
        sa.Column("taskset_id", sa.String(155), nullable=True),
        sa.Column("result", sa.LargeBinary(), nullable=True),
        sa.Column("date_done", sa.DateTime(), nullable=True),
        sa.UniqueConstraint("taskset_id", name="celery_tasksetmeta_taskset_id_key"),
    )
    op.create_index("ix_celery_tasksetmeta_date_done", "celery_tasksetmeta", ["date_done"])

    for table in stock:  # the queues before their messages
        bring_back(table)

    storage("kombu_message", HOT)
    storage("celery_taskmeta", WARM)
    storage("celery_tasksetmeta", WARM)
    for sequence, table in SEQUENCES.items():
        op.execute(f"ALTER SEQUENCE {sequence} OWNED BY {table}.id")
        op.execute(f"REVOKE ALL ON SEQUENCE {sequence} FROM app_user, app_rw, app_ro")
        op.execute(f"GRANT USAGE ON SEQUENCE {sequence} TO app_user, app_rw")
        op.execute(f"REVOKE ALL ON {table} FROM app_user, app_rw, app_ro")
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO app_user, app_rw")
        op.execute(f"GRANT SELECT ({SHAPES[table]}) ON {table} TO app_ro")


def downgrade() -> None:
    for table in ("celery_tasksetmeta", "celery_taskmeta", "kombu_message", "kombu_queue"):
        op.drop_table(table)  # and the sequence that it owns
