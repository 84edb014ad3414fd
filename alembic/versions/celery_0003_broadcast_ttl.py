"""Let events and remote control that nobody fetches in time make room for the next.

Whoever stopped fetching (a Flower that hangs while its connections live) would fill the jobs' own table with
several events a job. Each copy that is written takes two away that are too old: so no queue grows for longer
than its messages live, and nobody has to look at all of them.
"""

from alembic import op

revision = "celery_0003"
down_revision = "broker"
branch_labels = None
depends_on = None

_BROADCAST = """
CREATE OR REPLACE PROCEDURE kombu_broadcast(
    p_exchange text, p_type text, p_routing_key text,
    p_priority integer, p_due timestamptz, p_expires timestamptz, p_payload text, p_transient boolean)
LANGUAGE plpgsql AS $$
DECLARE
    v_queues integer[];
BEGIN
    IF p_transient THEN
        PERFORM set_config('synchronous_commit', 'off', true);
    ELSIF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    WITH bound AS (
        SELECT DISTINCT b.queue_id, q.message_ttl FROM kombu_binding b JOIN kombu_queue q ON q.id = b.queue_id
        WHERE b.exchange = p_exchange AND CASE p_type
            WHEN 'fanout' THEN true
            WHEN 'topic' THEN '.' || p_routing_key ~ b.pattern
            ELSE b.routing_key = p_routing_key END
    ), {too_old}copies AS (
        INSERT INTO kombu_message (queue_id, priority, due_at, expires_at, payload)
        SELECT queue_id, p_priority, CASE WHEN p_due > clock_timestamp() THEN p_due END,
            least(p_expires, clock_timestamp() + message_ttl), p_payload
        FROM bound
        RETURNING queue_id
    )
    SELECT array_agg(queue_id) INTO v_queues FROM copies;
    IF v_queues IS NOT NULL THEN
        COMMIT;
        PERFORM kombu_wake(v_queues);
    ELSIF p_type = 'direct' AND NOT p_transient THEN
        RAISE no_data_found USING MESSAGE =
            format('no queue is bound to exchange %s with routing key %s', p_exchange, p_routing_key);
    END IF;
END $$;
"""

# The oldest stand first in the index of what can be taken. What somebody is just taking is left to them.
_TOO_OLD = """too_old AS (
        DELETE FROM kombu_message WHERE id = ANY (ARRAY(
            SELECT m.id FROM kombu_message m WHERE m.id = ANY (ARRAY(
                SELECT oldest.id FROM bound CROSS JOIN LATERAL (
                    SELECT r.id, r.expires_at FROM kombu_message r
                    WHERE r.queue_id = bound.queue_id AND r.visible AND r.due_at IS NULL
                    ORDER BY r.priority DESC, r.id + 0 LIMIT 2
                ) AS oldest
                WHERE bound.message_ttl IS NOT NULL AND oldest.expires_at <= clock_timestamp()))
            FOR UPDATE SKIP LOCKED))
    ), """


def upgrade() -> None:
    op.execute(_BROADCAST.replace("{too_old}", _TOO_OLD))


def downgrade() -> None:
    op.execute(_BROADCAST.replace("{too_old}", ""))
