"""What the exporter may know beside counts: numbers about sessions and about the heads of queues.

`app_ro` must not see pg_stat_activity (it shows statements, and with them payloads), nor a payload. Two
functions give it numbers alone. They run as the owner, who needs pg_read_all_stats for the first (the Ansible
role `database` grants it); without, it refuses instead of telling half of the truth.
"""

from alembic import op

revision = "monitoring_0001"
down_revision = None
branch_labels = ("monitoring",)
depends_on = ("broker", "dead_letters_0001")

FUNCTIONS = """
CREATE FUNCTION skeldir_watch_sessions(
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
        SELECT age(backend_xmin)::bigint FROM pg_stat_activity
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

CREATE FUNCTION skeldir_watch_heads() RETURNS TABLE (queue_id bigint, waiting_since timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off AS $$
-- Since when the first messages of each queue and priority could have been taken. What had an ETA waits since
-- then, and only its payload still knows it.
DECLARE
    head record;
    since timestamptz;
BEGIN
    FOR head IN
        SELECT q.id, m.published, m.eta
        FROM kombu_queue q CROSS JOIN generate_series(0, 9) AS p (priority) CROSS JOIN LATERAL (
            SELECT r."timestamp" AT TIME ZONE 'UTC' AS published,
                substring(r.payload FROM '"eta": ?"([0-9T:.+Z-]{10,35})"') AS eta
            FROM kombu_message r
            WHERE r.queue_id = q.id AND r.priority = p.priority AND r.visible AND r.due_at IS NULL
            ORDER BY r.id + 0 LIMIT 20) AS m
        WHERE q.holder IS NULL
    LOOP
        since := head.published;
        IF head.eta IS NOT NULL THEN
            BEGIN
                since := greatest(since, head.eta::timestamptz);
            EXCEPTION WHEN data_exception THEN
                NULL; -- whoever wrote that never meant a time
            END;
        END IF;
        queue_id := head.id;
        waiting_since := least(since, clock_timestamp());
        RETURN NEXT;
    END LOOP;
END $$;
"""

SECURITY = """
REVOKE ALL ON FUNCTION skeldir_watch_sessions, skeldir_watch_heads FROM PUBLIC;
GRANT EXECUTE ON FUNCTION skeldir_watch_sessions, skeldir_watch_heads TO app_ro;
-- What was done to dead letters, but not by whom, to which, nor why.
CREATE POLICY reader ON celery_task_failure_audit FOR SELECT TO app_ro USING (true);
GRANT SELECT (id, at, action) ON celery_task_failure_audit TO app_ro;
"""


def upgrade() -> None:
    op.execute(FUNCTIONS)
    op.execute(SECURITY)


def downgrade() -> None:
    op.execute("""
        REVOKE SELECT (id, at, action) ON celery_task_failure_audit FROM app_ro;
        DROP POLICY reader ON celery_task_failure_audit;
        DROP FUNCTION skeldir_watch_heads();
        DROP FUNCTION skeldir_watch_sessions();
    """)
