"""What the scheduler remembers: the last run of each entry of app/schedule.yml.

It is written in the transaction that enqueues the run. Nothing is removed by itself: an entry that left the
schedule leaves its row, and goes on from there when it comes back.
"""

from alembic import op

revision = "schedule_0001"
down_revision = None
branch_labels = ("schedule",)
depends_on = "broker"  # a run is a message of its

TABLE = """
CREATE TABLE celery_schedule (
    name text PRIMARY KEY,
    rhythm text NOT NULL,
    last_due timestamptz NOT NULL,
    enqueued_at timestamptz,
    task_id text
);
COMMENT ON COLUMN celery_schedule.rhythm IS 'its times when last_due was written; others begin anew';
COMMENT ON COLUMN celery_schedule.last_due IS 'all runs that were due until then are enqueued, or given up';
COMMENT ON COLUMN celery_schedule.enqueued_at IS 'when the last run was enqueued; null before the first one';
COMMENT ON COLUMN celery_schedule.task_id IS 'the job that the last run is';
"""

SECURITY = """
-- Default privileges gave more. The scheduler logs in as app_user, operators look as app_rw.
REVOKE ALL ON celery_schedule FROM app_user, app_rw, app_ro;
GRANT SELECT, INSERT, UPDATE ON celery_schedule TO app_user;
GRANT SELECT ON celery_schedule TO app_rw;
"""


def upgrade() -> None:
    op.execute(TABLE)
    op.execute(SECURITY)


def downgrade() -> None:
    op.execute("DROP TABLE celery_schedule")
