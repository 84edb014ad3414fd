"""Give kombu's two tables what the broker needs, and take over the rows of the stock transport.

What the stock transport still had to deliver (`visible`) stays due, with its priority and its ETA; what it
had delivered already, and never deletes, is removed. The way back turns what is held into waiting messages
again.

Three choices that the statements below don't say:

- The stock indexes go: each message would pay for them three times, and none of them finds the next message.
- The functions set jit = off: what enable_seqscan = off can't avoid counts as so expensive that Postgres
  would compile it, for half a second each time.
- The foreign key goes: its check locks the queue's row once a message, and publishing looks the queue up
anyway.
"""

from alembic import op

revision = "broker"
down_revision = "celery_0001"
branch_labels = None
depends_on = None

# Advisory locks (two-key form): 1802331489 = somebody sleeps until a queue gets a message, 1802331490 = a
# holder lives.
_TABLES = """
-- The whole migration holds the lock; workers wait for the moment it takes.
-- squawk-ignore require-concurrent-index-deletion
DROP INDEX ix_kombu_message_visible;
-- squawk-ignore require-concurrent-index-deletion
DROP INDEX ix_kombu_message_timestamp;
-- squawk-ignore require-concurrent-index-deletion
DROP INDEX ix_kombu_message_timestamp_id;
-- squawk-ignore ban-drop-constraint
ALTER TABLE kombu_message DROP CONSTRAINT "FK_kombu_message_queue";

DELETE FROM kombu_message WHERE visible IS NOT TRUE OR queue_id IS NULL;

ALTER TABLE kombu_queue
    ADD COLUMN holder integer,
    ADD COLUMN message_ttl interval;
COMMENT ON COLUMN kombu_queue.holder IS 'the holder this queue lives and dies with; null for a durable queue';

ALTER TABLE kombu_message
    ALTER COLUMN visible SET DEFAULT true,
    ALTER COLUMN version SET DEFAULT 1,
    ALTER COLUMN "timestamp" SET DEFAULT (clock_timestamp() AT TIME ZONE 'UTC'),
    ADD COLUMN priority smallint NOT NULL DEFAULT 0 CHECK (priority BETWEEN 0 AND 9),
    ADD COLUMN due_at timestamptz,
    ADD COLUMN expires_at timestamptz,
    ADD COLUMN holder integer,
    ADD COLUMN delivery integer NOT NULL DEFAULT 0,
    ADD COLUMN returned integer NOT NULL DEFAULT 0,
    ADD COLUMN blamed boolean NOT NULL DEFAULT false,
    ADD COLUMN dead text;
COMMENT ON COLUMN kombu_message.visible IS 'waiting: neither held by a worker nor given up';
COMMENT ON COLUMN kombu_message.priority IS '0 to 9, 9 is delivered first';
COMMENT ON COLUMN kombu_message.due_at IS 'not delivered before; emptied when it is due';
COMMENT ON COLUMN kombu_message.holder IS 'who has it, a row of kombu_holder';
COMMENT ON COLUMN kombu_message.delivery IS 'number of its last delivery; with holder the fence of an ack';
COMMENT ON COLUMN kombu_message.returned IS 'deliveries that ended with the holder''s death or a requeue';
COMMENT ON COLUMN kombu_message.blamed IS 'one of these was its own doing; before, it is not given up';
COMMENT ON COLUMN kombu_message.dead IS 'why it will not be delivered again (nobody took it over)';

-- (id + 0), so that the planner can't take the primary key's order for this one and filter its way through.
CREATE INDEX kombu_message_ready ON kombu_message (queue_id, priority DESC, (id + 0))
    WHERE visible AND due_at IS NULL;
CREATE INDEX kombu_message_due ON kombu_message (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX kombu_message_held ON kombu_message (holder) WHERE holder IS NOT NULL;
CREATE INDEX kombu_message_dead ON kombu_message (queue_id) WHERE dead IS NOT NULL;

CREATE TABLE kombu_holder (
    id integer PRIMARY KEY,
    name text NOT NULL,
    joined_at timestamptz NOT NULL DEFAULT now(),
    beat_at timestamptz,
    suspect bigint
);
COMMENT ON TABLE kombu_holder IS 'a process that holds messages; alive while a session has its advisory lock';
COMMENT ON COLUMN kombu_holder.suspect IS
    'the message that is to blame if this holder dies: it ran when others died';
COMMENT ON COLUMN kombu_holder.beat_at IS 'last sign of life behind a pooler without locks, else null';

CREATE TABLE kombu_binding (
    exchange text NOT NULL,
    routing_key text NOT NULL,
    queue_id bigint NOT NULL REFERENCES kombu_queue ON DELETE CASCADE,
    pattern text NOT NULL,
    PRIMARY KEY (exchange, routing_key, queue_id)
);
CREATE INDEX kombu_binding_queue ON kombu_binding (queue_id);
COMMENT ON TABLE kombu_binding IS
    'bindings, but those of durable queues to direct exchanges: publishers know these';
COMMENT ON COLUMN kombu_binding.pattern IS
    'regular expression for the routing keys of a topic exchange, a dot before each word';
"""

# Rows of the stock transport carry priority and ETA in their payload only. One that can't be read stays as it
# is.
_TAKE_OVER = """
DO $$
DECLARE
    message record;
    content jsonb;
BEGIN
    FOR message IN SELECT id, payload FROM kombu_message LOOP
        BEGIN
            content := message.payload::jsonb;
            IF content #>> '{headers,eta}' IS NOT NULL
                OR coalesce(content #>> '{properties,priority}', '0') <> '0' THEN
                UPDATE kombu_message SET
                    due_at = (content #>> '{headers,eta}')::timestamptz,
                    priority = least(greatest(coalesce((content #>> '{properties,priority}')::integer, 0), 0),
                    9)
                WHERE id = message.id;
            END IF;
        EXCEPTION WHEN data_exception THEN
            RAISE NOTICE 'kombu_message % can''t be read; it stays as it is', message.id;
        END;
    END LOOP;
END $$;
"""

_FUNCTIONS = """
-- Store a message; in the caller's transaction. no_data_found when there is no such queue.
CREATE FUNCTION kombu_put(
    p_queue text, p_priority integer, p_due timestamptz, p_expires timestamptz, p_payload text)
RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    v_queue integer;
BEGIN
    SELECT id INTO v_queue FROM kombu_queue WHERE name = p_queue;
    IF v_queue IS NULL THEN
        RAISE no_data_found USING MESSAGE = format('there is no queue %s', p_queue);
    END IF;
    INSERT INTO kombu_message (queue_id, priority, due_at, expires_at, payload)
    VALUES (v_queue, p_priority, CASE WHEN p_due > clock_timestamp() THEN p_due END, p_expires, p_payload);
    RETURN v_queue;
END $$;

-- Notify who sleeps on these queues. Only after the commit of what they are to find: who falls asleep later
-- looks again first. Awake consumers cost no NOTIFY, whose commits Postgres runs one after the other.
CREATE FUNCTION kombu_wake(p_queues integer[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_queue integer;
BEGIN
    FOREACH v_queue IN ARRAY p_queues LOOP
        IF NOT pg_try_advisory_xact_lock(1802331489, v_queue) THEN
            PERFORM set_config('synchronous_commit', 'off', true);
            PERFORM pg_notify('kombu_' || v_queue, '');
        END IF;
    END LOOP;
END $$;

-- Publish in a transaction of its own that waits for the disk, whatever the session's default; a transient
-- message doesn't.
CREATE PROCEDURE kombu_publish(
    p_queue text, p_priority integer, p_due timestamptz, p_expires timestamptz, p_payload text,
    p_transient boolean)
LANGUAGE plpgsql AS $$
DECLARE
    v_queue integer;
BEGIN
    IF p_transient THEN
        PERFORM set_config('synchronous_commit', 'off', true);
    ELSIF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    v_queue := kombu_put(p_queue, p_priority, p_due, p_expires, p_payload);
    COMMIT;
    PERFORM kombu_wake(ARRAY[v_queue]);
END $$;

-- The same for many, in one transaction, in the order given.
CREATE FUNCTION kombu_put_many(
    p_queues text[], p_priorities integer[], p_dues timestamptz[], p_expires timestamptz[], p_payloads text[])
RETURNS integer[] LANGUAGE plpgsql AS $$
DECLARE
    v_missing text;
BEGIN
    SELECT name INTO v_missing FROM unnest(p_queues) AS wanted (name)
    WHERE NOT EXISTS (SELECT 1 FROM kombu_queue q WHERE q.name = wanted.name) LIMIT 1;
    IF v_missing IS NOT NULL THEN
        RAISE no_data_found USING MESSAGE = format('there is no queue %s', v_missing);
    END IF;
    INSERT INTO kombu_message (queue_id, priority, due_at, expires_at, payload)
    SELECT q.id, m.priority, CASE WHEN m.due > clock_timestamp() THEN m.due END, m.expires, m.payload
    FROM unnest(p_queues, p_priorities, p_dues, p_expires, p_payloads) WITH ORDINALITY
        AS m (queue, priority, due, expires, payload, place)
    JOIN kombu_queue q ON q.name = m.queue
    ORDER BY m.place;
    RETURN ARRAY(SELECT id FROM kombu_queue WHERE name = ANY (p_queues));
END $$;

CREATE PROCEDURE kombu_publish_many(
    p_queues text[], p_priorities integer[], p_dues timestamptz[], p_expires timestamptz[], p_payloads text[])
LANGUAGE plpgsql AS $$
DECLARE
    v_queues integer[];
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    v_queues := kombu_put_many(p_queues, p_priorities, p_dues, p_expires, p_payloads);
    COMMIT;
    PERFORM kombu_wake(v_queues);
END $$;

-- A copy for every queue that is bound in kombu_binding: broadcasts, events, replies. Nobody bound, nothing
-- written; but no_data_found for a persistent message to a direct exchange, which was meant for somebody.
CREATE PROCEDURE kombu_broadcast(
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
    ), copies AS (
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

-- Acknowledge, by deleting. Holder and delivery number are the fence: what was given to another since stays.
-- (holder + 0: the index of what is held is full of dead entries of the same holder; the primary key finds it
-- at once.)
CREATE FUNCTION kombu_ack(p_holder integer, p_ids bigint[], p_deliveries integer[]) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
    v_count integer;
BEGIN
    DELETE FROM kombu_message m
    WHERE m.id = ANY (p_ids) AND m.holder + 0 = p_holder
        AND m.delivery = p_deliveries[array_position(p_ids, m.id)];
    GET DIAGNOSTICS v_count = ROW_COUNT;
    RETURN v_count;
END $$;

-- Acknowledge what is done and take up to p_want messages, in one transaction that doesn't wait for the disk.
--
-- The index is searched in segments: a queue's priorities from p_low to p_high, and in them ids above p_from.
-- A taker that goes on where it stopped doesn't wade through what was deleted before and can't be vacuumed
-- yet. With p_sleep, and nothing found: says that it sleeps on these queues (a session's lock), then looks
-- once more. dead = 'poison' or 'expired': taken, but not to be run.
CREATE FUNCTION kombu_take(
    p_holder integer, p_acks bigint[], p_ack_deliveries integer[],
    p_queues integer[], p_low smallint[], p_high smallint[], p_from bigint[], p_limits integer[],
    p_want integer, p_sleep boolean, p_asleep boolean)
RETURNS TABLE (
    id bigint, queue_id bigint, priority smallint, delivery integer, returned integer, dead text,
    payload text)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off
SET plan_cache_mode = force_generic_plan SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_left integer := p_want;
    v_found integer;
    v_queue integer;
    v_queues integer[] := ARRAY(SELECT DISTINCT q FROM unnest(p_queues) AS q);
    v_locked boolean := p_asleep;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    IF cardinality(p_acks) > 0 THEN
        PERFORM kombu_ack(p_holder, p_acks, p_ack_deliveries);
    END IF;
    LOOP
        FOR i IN 1..cardinality(p_queues) LOOP
            EXIT WHEN v_left <= 0;
            IF p_low[i] = p_high[i] THEN
                RETURN QUERY
                UPDATE kombu_message m SET visible = false, holder = p_holder, delivery = m.delivery + 1
                WHERE m.id = ANY (ARRAY(
                    SELECT r.id FROM kombu_message r
                    WHERE r.queue_id = p_queues[i] AND r.priority = p_low[i] AND r.id + 0 > p_from[i]
                        AND r.visible AND r.due_at IS NULL
                    ORDER BY r.id + 0 LIMIT v_left FOR UPDATE SKIP LOCKED))
                RETURNING m.id, m.queue_id, m.priority, m.delivery, m.returned,
                    CASE WHEN m.returned >= p_limits[i] AND m.blamed THEN 'poison'
                        WHEN m.expires_at <= clock_timestamp() THEN 'expired' END, m.payload;
            ELSE
                RETURN QUERY
                UPDATE kombu_message m SET visible = false, holder = p_holder, delivery = m.delivery + 1
                WHERE m.id = ANY (ARRAY(
                    SELECT r.id FROM kombu_message r
                    WHERE r.queue_id = p_queues[i] AND r.priority BETWEEN p_low[i] AND p_high[i]
                        AND r.visible AND r.due_at IS NULL
                    ORDER BY r.priority DESC, r.id + 0 LIMIT v_left FOR UPDATE SKIP LOCKED))
                RETURNING m.id, m.queue_id, m.priority, m.delivery, m.returned,
                    CASE WHEN m.returned >= p_limits[i] AND m.blamed THEN 'poison'
                        WHEN m.expires_at <= clock_timestamp() THEN 'expired' END, m.payload;
            END IF;
            GET DIAGNOSTICS v_found = ROW_COUNT;
            v_left := v_left - v_found;
        END LOOP;
        EXIT WHEN v_left < p_want OR v_locked OR NOT p_sleep;
        FOREACH v_queue IN ARRAY v_queues LOOP
            PERFORM pg_advisory_lock_shared(1802331489, v_queue);
        END LOOP;
        v_locked := true;
    END LOOP;
    IF v_left < p_want AND v_locked THEN
        FOREACH v_queue IN ARRAY v_queues LOOP
            PERFORM pg_advisory_unlock_shared(1802331489, v_queue);
        END LOOP;
    END IF;
END $$;

-- Take from queues whose consumers acknowledge nothing (remote control, events): by deleting.
CREATE FUNCTION kombu_pop(p_queues integer[], p_want integer)
RETURNS TABLE (
    id bigint, queue_id bigint, priority smallint, delivery integer, returned integer, dead text,
    payload text)
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    RETURN QUERY
    DELETE FROM kombu_message m
    WHERE m.id = ANY (ARRAY(
        SELECT r.id FROM kombu_message r
        WHERE r.queue_id = ANY (p_queues) AND r.visible AND r.due_at IS NULL
        ORDER BY r.priority DESC, r.id + 0 LIMIT p_want FOR UPDATE SKIP LOCKED))
    RETURNING m.id, m.queue_id, m.priority, m.delivery + 1, m.returned,
        CASE WHEN m.expires_at <= clock_timestamp() THEN 'expired' END, m.payload;
END $$;

-- Give messages back, fenced like an acknowledgement. Counted: a delivery that counts towards the delivery
-- limit. 'back' in the notification: something stands before the place where takers stopped.
CREATE FUNCTION kombu_return(p_holder integer, p_ids bigint[], p_deliveries integer[], p_counted boolean[])
RETURNS integer LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
    v_queues integer[];
    v_count integer;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    WITH back AS (
        UPDATE kombu_message m SET visible = true, holder = NULL,
            returned = m.returned + p_counted[array_position(p_ids, m.id)]::integer,
            blamed = m.blamed OR p_counted[array_position(p_ids, m.id)]
        WHERE m.id = ANY (p_ids) AND m.holder + 0 = p_holder
            AND m.delivery = p_deliveries[array_position(p_ids, m.id)]
        RETURNING m.queue_id
    )
    SELECT array_agg(DISTINCT queue_id), count(*) INTO v_queues, v_count FROM back;
    PERFORM pg_notify('kombu_' || queue, 'back') FROM unnest(v_queues) AS queue;
    RETURN v_count;
END $$;

-- What every holder does twice a second: show life where no session lock can, make due what is due, look for
-- the dead. Returns holders without a sign of life, and the seconds until the next message is due.
CREATE FUNCTION kombu_tick(
    p_holder integer, p_lease interval, OUT gone integer[], OUT next_due double precision)
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
    v_queues integer[];
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    IF p_lease IS NOT NULL THEN
        UPDATE kombu_holder SET beat_at = clock_timestamp() WHERE id = p_holder;
    END IF;
    SELECT extract(epoch FROM min(due_at) - clock_timestamp()) INTO next_due
    FROM kombu_message WHERE due_at IS NOT NULL;
    IF next_due <= 0 THEN
        WITH due AS (
            UPDATE kombu_message SET due_at = NULL
            WHERE id = ANY (ARRAY(
                SELECT id FROM kombu_message WHERE due_at <= clock_timestamp()
                ORDER BY due_at LIMIT 1000 FOR UPDATE SKIP LOCKED))
            RETURNING queue_id
        )
        SELECT array_agg(DISTINCT queue_id) INTO v_queues FROM due;
        PERFORM pg_notify('kombu_' || queue, 'back') FROM unnest(v_queues) AS queue;
        SELECT extract(epoch FROM min(due_at) - clock_timestamp()) INTO next_due
        FROM kombu_message WHERE due_at IS NOT NULL;
    END IF;
    gone := ARRAY(
        SELECT h.id FROM kombu_holder h
        LEFT JOIN pg_locks l ON l.locktype = 'advisory' AND l.classid = 1802331490 AND l.objsubid = 2
            AND l.objid = h.id::oid
            AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        WHERE h.id <> p_holder AND l.objid IS NULL
            AND (h.beat_at IS NULL OR h.beat_at < clock_timestamp() - coalesce(p_lease, interval '20 s')));
END $$;

-- Give back what a dead holder held, and remove what lived with it. Null when it is alive after all.
-- Nobody knows what killed it: the death counts for all it held; or for the suspect, if it was trying one.
CREATE FUNCTION kombu_rescue(p_gone integer, p_lease interval) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
    v_queues integer[];
    v_count integer;
    v_suspect bigint;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    IF NOT pg_try_advisory_xact_lock(1802331490, p_gone) THEN
        RETURN NULL;
    END IF;
    PERFORM 1 FROM kombu_holder
    WHERE id = p_gone AND beat_at > clock_timestamp() - coalesce(p_lease, interval '20 s');
    IF FOUND THEN
        RETURN NULL;
    END IF;
    SELECT m.id INTO v_suspect FROM kombu_holder h JOIN kombu_message m ON m.id = h.suspect
    WHERE h.id = p_gone AND m.holder = p_gone;
    WITH back AS (
        UPDATE kombu_message SET visible = true, holder = NULL,
            returned = returned + (id = coalesce(v_suspect, id))::integer,
            blamed = blamed OR id IS NOT DISTINCT FROM v_suspect
        WHERE holder = p_gone RETURNING queue_id
    )
    SELECT array_agg(DISTINCT queue_id), count(*) INTO v_queues, v_count FROM back;
    PERFORM pg_notify('kombu_' || queue, 'back') FROM unnest(v_queues) AS queue;
    WITH gone AS (DELETE FROM kombu_queue WHERE holder = p_gone RETURNING id)
    DELETE FROM kombu_message m USING gone WHERE m.queue_id = gone.id;
    DELETE FROM kombu_holder WHERE id = p_gone;
    RETURN v_count;
END $$;

-- After a crash of the server, which may have forgotten the last takes and acknowledgements (they don't wait
-- for the disk): say again what is done and what is held, where nobody else has taken it meanwhile.
CREATE FUNCTION kombu_reassert(
    p_holder integer, p_done bigint[], p_done_deliveries integer[],
    p_held bigint[], p_held_deliveries integer[])
RETURNS void LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    DELETE FROM kombu_message m
    WHERE m.id = ANY (p_done) AND coalesce(m.holder, p_holder) = p_holder
        AND m.delivery <= p_done_deliveries[array_position(p_done, m.id)]
        AND (m.holder IS NOT NULL OR m.delivery < p_done_deliveries[array_position(p_done, m.id)]);
    UPDATE kombu_message m
    SET visible = false, holder = p_holder, delivery = p_held_deliveries[array_position(p_held, m.id)]
    WHERE m.id = ANY (p_held) AND m.holder IS NULL AND m.dead IS NULL
        AND m.delivery < p_held_deliveries[array_position(p_held, m.id)];
END $$;

-- Queues: with a holder it lives and dies with that holder, and the last who declares it has it.
CREATE FUNCTION kombu_declare(p_queue text, p_holder integer, p_ttl interval) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    v_queue kombu_queue;
BEGIN
    LOOP
        SELECT * INTO v_queue FROM kombu_queue WHERE name = p_queue;
        EXIT WHEN FOUND;
        INSERT INTO kombu_queue (name, holder, message_ttl) VALUES (p_queue, p_holder, p_ttl)
        ON CONFLICT (name) DO NOTHING;
    END LOOP;
    IF p_holder IS NOT NULL AND v_queue.holder IS DISTINCT FROM p_holder THEN
        UPDATE kombu_queue SET holder = p_holder WHERE id = v_queue.id;
    END IF;
    RETURN v_queue.id;
END $$;
"""

_GRANTS = """
REVOKE ALL ON kombu_holder, kombu_binding FROM app_user, app_rw, app_ro;
GRANT SELECT, INSERT, UPDATE, DELETE ON kombu_holder, kombu_binding TO app_user, app_rw;
GRANT SELECT ON kombu_holder, kombu_binding TO app_ro;
GRANT SELECT (holder, message_ttl) ON kombu_queue TO app_ro;
-- never the payload
GRANT SELECT (priority, due_at, expires_at, holder, delivery, returned, blamed, dead)
    ON kombu_message TO app_ro;
"""

_SIGNATURES = {
    "FUNCTION": [
        "kombu_put(text, integer, timestamptz, timestamptz, text)",
        "kombu_wake(integer[])",
        "kombu_put_many(text[], integer[], timestamptz[], timestamptz[], text[])",
        "kombu_ack(integer, bigint[], integer[])",
        "kombu_take(integer, bigint[], integer[], integer[], smallint[], smallint[], bigint[], integer[],"
        " integer, boolean, boolean)",
        "kombu_pop(integer[], integer)",
        "kombu_return(integer, bigint[], integer[], boolean[])",
        "kombu_tick(integer, interval)",
        "kombu_rescue(integer, interval)",
        "kombu_reassert(integer, bigint[], integer[], bigint[], integer[])",
        "kombu_declare(text, integer, interval)",
    ],
    "PROCEDURE": [
        "kombu_publish(text, integer, timestamptz, timestamptz, text, boolean)",
        "kombu_publish_many(text[], integer[], timestamptz[], timestamptz[], text[])",
        "kombu_broadcast(text, text, text, integer, timestamptz, timestamptz, text, boolean)",
    ],
}

_BACK = """
DROP TABLE kombu_binding;
DROP TABLE kombu_holder;
DELETE FROM kombu_message WHERE queue_id NOT IN (SELECT id FROM kombu_queue WHERE holder IS NULL);
DELETE FROM kombu_queue WHERE holder IS NOT NULL;
UPDATE kombu_message SET visible = true WHERE holder IS NOT NULL;
DROP INDEX kombu_message_ready;
DROP INDEX kombu_message_due;
DROP INDEX kombu_message_held;
DROP INDEX kombu_message_dead;
ALTER TABLE kombu_message
    DROP COLUMN priority, DROP COLUMN due_at, DROP COLUMN expires_at, DROP COLUMN holder,
    DROP COLUMN delivery, DROP COLUMN returned, DROP COLUMN blamed, DROP COLUMN dead,
    ALTER COLUMN "timestamp" DROP DEFAULT,
    ALTER COLUMN version DROP DEFAULT,
    ALTER COLUMN visible DROP DEFAULT;
ALTER TABLE kombu_queue DROP COLUMN holder, DROP COLUMN message_ttl;
ALTER TABLE kombu_message
    ADD CONSTRAINT "FK_kombu_message_queue" FOREIGN KEY (queue_id) REFERENCES kombu_queue;
CREATE INDEX ix_kombu_message_visible ON kombu_message (visible);
CREATE INDEX ix_kombu_message_timestamp ON kombu_message ("timestamp");
CREATE INDEX ix_kombu_message_timestamp_id ON kombu_message ("timestamp", id);
"""


def upgrade() -> None:
    for part in (_TABLES, _TAKE_OVER, _FUNCTIONS, _GRANTS):
        op.execute(part)
    for kind, signatures in _SIGNATURES.items():
        for signature in signatures:
            op.execute(f"REVOKE ALL ON {kind} {signature} FROM PUBLIC")
            op.execute(f"GRANT EXECUTE ON {kind} {signature} TO app_user, app_rw")


def downgrade() -> None:
    for kind, signatures in _SIGNATURES.items():
        for signature in signatures:
            op.execute(f"DROP {kind} {signature}")
    op.execute(_BACK)
