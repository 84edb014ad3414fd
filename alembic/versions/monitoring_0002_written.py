"""The oldest snapshot, seen also where a session has written and reads nothing just now.

Between two statements of a READ COMMITTED transaction `backend_xmin` is null. Once it has written, vacuum
waits for its own number, `backend_xid`: the commonest of all holders wrote and was left idle so.
"""

from alembic import op

revision = "monitoring_0002"
down_revision = "monitoring_0001"
branch_labels = None
depends_on = None

SESSIONS = """
CREATE OR REPLACE FUNCTION skeldir_watch_sessions(
    OUT oldest_xmin_age bigint, OUT oldest_transaction_age double precision, OUT roles text[],
    OUT connections bigint[])
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
-- Only numbers and names of roles leave this function.
BEGIN
    IF NOT pg_has_role(current_user, 'pg_read_all_stats', 'USAGE') THEN
        RAISE EXCEPTION '% may not see other sessions', current_user USING
            ERRCODE = 'insufficient_privilege',
            HINT = format('GRANT pg_read_all_stats TO %I', current_user);
    END IF;
    -- What keeps vacuum from removing rows here: sessions, prepared transactions, slots, standbys.
    SELECT max(x) INTO oldest_xmin_age FROM (
        SELECT age_of_a_session::bigint FROM pg_stat_activity
        WHERE (datname = current_database() OR datname IS NULL) AND pid <> pg_backend_pid()
            AND backend_type <> 'autovacuum worker'
        UNION ALL
        SELECT age(transaction) FROM pg_prepared_xacts WHERE database = current_database()
        UNION ALL
        SELECT greatest(age(xmin), age(catalog_xmin)) FROM pg_replication_slots
    ) AS held (x);
    SELECT extract(epoch FROM max(clock_timestamp() - xact_start)) INTO oldest_transaction_age
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend';
    oldest_xmin_age := coalesce(oldest_xmin_age, 0);
    oldest_transaction_age := coalesce(oldest_transaction_age, 0);
    SELECT array_agg(usename), array_agg(number) INTO roles, connections FROM (
        SELECT usename::text, count(*) AS number FROM pg_stat_activity
        WHERE backend_type = 'client backend' GROUP BY usename
    ) AS by_role;
END $$;
"""


def upgrade() -> None:
    # Whichever is older; greatest() passes over what is null.
    op.execute(SESSIONS.replace("age_of_a_session", "greatest(age(backend_xid), age(backend_xmin))"))


def downgrade() -> None:
    op.execute(SESSIONS.replace("age_of_a_session", "age(backend_xmin)"))
