"""Find dead letters by the words of their errors, by who cares for them and by state, in a million rows.

The words are indexed where errors are appended and never changed, so a row that is replayed costs nothing.
"""

from alembic import op

revision = "dead_letters_0002"
down_revision = "dead_letters_0001"
branch_labels = None
depends_on = None

FUNCTIONS = """
CREATE FUNCTION celery_task_failure_words(_text text) RETURNS tsvector LANGUAGE sql IMMUTABLE PARALLEL SAFE
-- Letters and digits only: the parser would keep a path or a host name as one word. Too long a word is left
-- out.
RETURN to_tsvector('pg_catalog.simple', regexp_replace(_text, '[^[:alnum:]]+', ' ', 'g'));

CREATE FUNCTION celery_task_failure_search(_text text, _limit integer) RETURNS bigint[]
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
-- Rows of which some error has words that begin as these; null when they are more than the limit, or can't
-- be told. Under a policy of row-level security Postgres would use no such index, so this runs as the owner,
-- and is of use to operators alone, who see all rows. Nothing but ids leaves it.
DECLARE
    words tsquery := (SELECT string_agg(quote_literal(lexeme) || ':*', ' & ')::tsquery
                      FROM unnest(celery_task_failure_words(_text)));
    found bigint[];
BEGIN
    IF words IS NULL OR NOT pg_has_role(session_user, 'app_rw', 'MEMBER') THEN
        RETURN NULL;
    END IF;
    found := ARRAY(SELECT failure_id FROM celery_task_failure_errors
                   WHERE celery_task_failure_words(error_message) @@ words LIMIT _limit + 1);
    RETURN CASE WHEN cardinality(found) <= _limit THEN found END;
END $$;
REVOKE ALL ON FUNCTION celery_task_failure_words, celery_task_failure_search FROM PUBLIC;
GRANT EXECUTE ON FUNCTION celery_task_failure_search TO app_user, app_rw;
"""

# Built beside the work that goes on.
INDEXES = {
    "celery_task_failure_errors_words":
        "celery_task_failure_errors USING gin (celery_task_failure_words(error_message))",
    "celery_task_failures_assignee":
        "celery_task_failures (assignee, last_failed_at DESC, id DESC) WHERE assignee IS NOT NULL",
    "celery_task_failures_state": "celery_task_failures (state, fingerprint, tenant_id, queue)",
}  # fmt: skip


def upgrade() -> None:
    op.execute(FUNCTIONS)
    with op.get_context().autocommit_block():
        for name, what in INDEXES.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")  # of a run that was interrupted
            op.execute(f"CREATE INDEX CONCURRENTLY {name} ON {what}")


def downgrade() -> None:
    for name in INDEXES:
        op.execute(f"DROP INDEX {name}")
    op.execute("DROP FUNCTION celery_task_failure_search, celery_task_failure_words")
