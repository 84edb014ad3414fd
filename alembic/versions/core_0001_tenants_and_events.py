"""Tenants, their events, and a materialized view on them, all under row-level security.

Who may see what:

* A session acts for the tenant whose id stands in the setting `app.current_tenant_id`. Unset, empty or not
  a UUID, it acts for nobody: it reads no row and writes none, and nothing is raised.
* Row-level security is forced, so that it binds `app_owner` as well. A materialized view, though, must hold
  all tenants' rows. `app_owner` therefore has one more policy, for reading events only, and only while
  `refresh_all_materialized_views()` runs. It opens nothing that an owner could not open with ALTER TABLE;
  it keeps a person or a tool that is logged in as app_owner from reading tenants' data by accident.
* A materialized view can't have policies of its own. So nobody but app_owner reads
  `tenant_event_counts_all` whole; tenants read it through the view `tenant_event_counts`, and app_ro reads
  the columns that are plain numbers.
* `app_rw` keeps the list of tenants, and has no business in their events.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "core_0001"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = ("core_schema",)
depends_on: str | Sequence[str] | None = None

# Default privileges give app_user and app_rw each new table: taken back before what is meant is given.
NEW_TABLE = "REVOKE ALL ON {} FROM app_user, app_rw, app_ro"


def upgrade() -> None:
    op.execute(NEW_TABLE.format("alembic_version"))
    op.execute("GRANT SELECT ON alembic_version TO app_user, app_rw, app_ro")

    # A function body in SQL's standard form is bound when it is created: no search_path can bend it.
    op.execute(
        """
        CREATE FUNCTION current_tenant_id() RETURNS uuid
        LANGUAGE sql STABLE PARALLEL SAFE
        RETURN CASE
            WHEN current_setting('app.current_tenant_id', true)
                ~ '^[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$'
            THEN current_setting('app.current_tenant_id', true)::uuid
        END
        """
    )
    op.execute("GRANT EXECUTE ON FUNCTION current_tenant_id() TO app_user, app_rw, app_ro")

    op.create_table(
        "tenants",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
        sa.UniqueConstraint("name", name="uq_tenants_name"),
    )
    op.execute("ALTER TABLE tenants ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE tenants FORCE ROW LEVEL SECURITY")
    op.execute("CREATE POLICY own_tenant ON tenants USING (id = current_tenant_id())")
    op.execute("CREATE POLICY every_tenant ON tenants TO app_rw USING (true)")
    op.execute("CREATE POLICY count_tenants ON tenants FOR SELECT TO app_ro USING (true)")
    op.execute(NEW_TABLE.format("tenants"))
    op.execute("GRANT SELECT ON tenants TO app_user")
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON tenants TO app_rw")
    op.execute("GRANT SELECT (id, created_at) ON tenants TO app_ro")

    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("payload", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("occurred_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenants.id"], name="fk_events_tenant_id", ondelete="CASCADE"
        ),
    )
    # Serves retention (a tenant's oldest events) and everything else that asks for one tenant's.
    op.create_index("ix_events_tenant_id_occurred_at", "events", ["tenant_id", "occurred_at"])
    op.execute("ALTER TABLE events ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE events FORCE ROW LEVEL SECURITY")
    op.execute("CREATE POLICY own_events ON events USING (tenant_id = current_tenant_id())")
    op.execute(
        "CREATE POLICY refresh_of_views ON events FOR SELECT TO app_owner"
        " USING (current_setting('app.refreshing_materialized_views', true) = 'on')"
    )
    op.execute(NEW_TABLE.format("events"))
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON events TO app_user")

    op.execute(
        """
        CREATE MATERIALIZED VIEW tenant_event_counts_all AS
        SELECT tenant_id, (occurred_at AT TIME ZONE 'UTC')::date AS day, kind,
            count(*) AS events, max(occurred_at) AS last_event_at
        FROM events GROUP BY 1, 2, 3
        """
    )
    op.execute(NEW_TABLE.format("tenant_event_counts_all"))
    op.execute("GRANT SELECT (tenant_id, day, events) ON tenant_event_counts_all TO app_ro")
    # Also what lets a refresh run while the view is being read.
    op.create_index(
        "uq_tenant_event_counts_all", "tenant_event_counts_all", ["tenant_id", "day", "kind"], unique=True
    )
    op.execute(
        """
        CREATE VIEW tenant_event_counts WITH (security_barrier) AS
        SELECT * FROM tenant_event_counts_all WHERE tenant_id = current_tenant_id()
        """
    )
    op.execute(NEW_TABLE.format("tenant_event_counts"))
    op.execute("GRANT SELECT ON tenant_event_counts TO app_user")

    # Each view needs a unique index. A refresh that fails puts the setting back too: it is the transaction's.
    op.execute(
        """
        CREATE FUNCTION refresh_all_materialized_views() RETURNS SETOF text
        LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp
        AS $$
        DECLARE
            view record;
        BEGIN
            PERFORM set_config('app.refreshing_materialized_views', 'on', true);
            FOR view IN
                SELECT matviewname FROM pg_matviews
                WHERE schemaname = 'public' AND matviewowner = current_user ORDER BY matviewname
            LOOP
                EXECUTE format('REFRESH MATERIALIZED VIEW CONCURRENTLY public.%I', view.matviewname);
                RETURN NEXT view.matviewname;
            END LOOP;
            PERFORM set_config('app.refreshing_materialized_views', '', true);
        END
        $$
        """
    )
    op.execute("REVOKE ALL ON FUNCTION refresh_all_materialized_views() FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION refresh_all_materialized_views() TO app_user")


def downgrade() -> None:
    op.execute("DROP FUNCTION refresh_all_materialized_views()")
    op.execute("DROP VIEW tenant_event_counts")
    op.execute("DROP MATERIALIZED VIEW tenant_event_counts_all")
    op.drop_table("events")
    op.drop_table("tenants")
    op.execute("DROP FUNCTION current_tenant_id()")
