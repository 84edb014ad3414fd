"""Let a worker know which tenants there are, by their ids alone: what the schedule does for every tenant.

A worker sees no tenant but the one it acts for, and the owner is bound by row-level security as well. So the
function that lists the ids runs as the owner, whom a policy lets read them only while it runs.
"""

from alembic import op

revision = "core_0002"
down_revision = "core_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        "CREATE POLICY list_of_ids ON tenants FOR SELECT TO app_owner"
        " USING (current_setting('app.listing_tenants', true) = 'on')"
    )
    op.execute(
        """
        CREATE FUNCTION tenant_ids() RETURNS SETOF uuid
        LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp
        AS $$
        BEGIN
            PERFORM set_config('app.listing_tenants', 'on', true);
            RETURN QUERY SELECT id FROM public.tenants ORDER BY id;
            PERFORM set_config('app.listing_tenants', '', true);
        END
        $$
        """
    )
    op.execute("REVOKE ALL ON FUNCTION tenant_ids() FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION tenant_ids() TO app_user")


def downgrade() -> None:
    op.execute("DROP FUNCTION tenant_ids()")
    op.execute("DROP POLICY list_of_ids ON tenants")
