"""Dead letters: what failed, its message to the byte, what was done about it and who did it.

One trigger is the state machine and one writes the audit, so both hold for whoever changes a row and however.
What a worker may do is in functions that run as the owner: a worker has no right on the tables but to read
its tenant's own rows.
"""

from alembic import op

revision = "dead_letters_0001"
down_revision = None
branch_labels = ("dead_letters",)
depends_on = "broker"  # the columns of kombu_message that a replay writes

TABLES = """
CREATE TABLE celery_task_failures (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    uid uuid NOT NULL DEFAULT gen_random_uuid() UNIQUE, -- the same row after an export and an import
    state text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'in_progress', 'resolved', 'ignored')),
    class text NOT NULL CHECK (class IN
        ('permanent', 'transient', 'timeout', 'poison', 'unknown_task', 'invalid', 'expired')),
    task text,
    task_id text,
    tenant_id uuid,
    correlation_id text,
    queue text NOT NULL,
    exchange text,
    routing_key text,
    error_type text NOT NULL,
    error_message text NOT NULL CHECK (length(error_message) <= 2000),
    fingerprint text NOT NULL CHECK (length(fingerprint) = 16),
    worker text,
    host text,
    attempts integer NOT NULL CHECK (attempts >= 0),
    deliveries integer NOT NULL CHECK (deliveries >= 0),
    failures integer NOT NULL DEFAULT 1, -- how often it failed for good: once, and once a failed replay
    first_failed_at timestamptz NOT NULL DEFAULT now(),
    last_failed_at timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now(),
    message_id bigint, -- the message that ended as this row, or the one that replays it; null after an import
    decodable boolean NOT NULL, -- whether the message names a task and its arguments can be read
    payload_version integer NOT NULL DEFAULT 1,
    replays integer NOT NULL DEFAULT 0,
    replay_id bigint,
    assignee text,
    note text,
    exported_at timestamptz,
    imported_at timestamptz
) WITH (fillfactor = 90);
-- A message ends as one row. Replays are messages too.
CREATE UNIQUE INDEX celery_task_failures_message ON celery_task_failures (message_id)
    WHERE state IN ('pending', 'in_progress');
CREATE INDEX celery_task_failures_open ON celery_task_failures (last_failed_at DESC, id DESC)
    WHERE state IN ('pending', 'in_progress');
CREATE INDEX celery_task_failures_time ON celery_task_failures (last_failed_at DESC, id DESC);
-- Counting reads this index alone. Its entries repeat and are stored once, which INCLUDE would end.
CREATE INDEX celery_task_failures_group ON celery_task_failures (fingerprint, tenant_id, queue, state);
CREATE INDEX celery_task_failures_group_time
    ON celery_task_failures (fingerprint, last_failed_at DESC, id DESC);
CREATE INDEX celery_task_failures_tenant ON celery_task_failures (tenant_id, last_failed_at DESC, id DESC)
    WHERE tenant_id IS NOT NULL;
CREATE INDEX celery_task_failures_replay ON celery_task_failures (replay_id, state) WHERE replay_id IS NOT
    NULL;
CREATE INDEX celery_task_failures_closed ON celery_task_failures (state, changed_at)
    WHERE state IN ('resolved', 'ignored');

-- Apart from the row so that lists stay fast: version 1 is the original to the byte, the others are edits
-- of it.
CREATE TABLE celery_task_failure_payloads (
    failure_id bigint NOT NULL REFERENCES celery_task_failures ON DELETE CASCADE,
    version integer NOT NULL CHECK (version >= 1),
    payload text NOT NULL,
    diff text,
    reason text,
    actor text,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (failure_id, version)
);

-- Every time it failed for good.
CREATE TABLE celery_task_failure_errors (
    failure_id bigint NOT NULL REFERENCES celery_task_failures ON DELETE CASCADE,
    number integer NOT NULL,
    failed_at timestamptz NOT NULL,
    class text NOT NULL,
    error_type text NOT NULL,
    error_message text NOT NULL,
    traceback text CHECK (length(traceback) <= 33000),
    worker text,
    replay_id bigint,
    PRIMARY KEY (failure_id, number)
);

CREATE TABLE celery_task_failure_replays (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    state text NOT NULL DEFAULT 'running' CHECK (state IN ('running', 'paused', 'stopped', 'cancelled',
        'done')),
    actor text NOT NULL,
    reason text NOT NULL,
    filter jsonb NOT NULL,
    target_queue text,
    rate double precision CHECK (rate > 0),
    canary integer NOT NULL DEFAULT 0 CHECK (canary >= 0),
    stop_ratio double precision NOT NULL CHECK (stop_ratio BETWEEN 0 AND 1),
    max_replays integer NOT NULL CHECK (max_replays > 0),
    failure_ids bigint[] NOT NULL,
    position integer NOT NULL DEFAULT 0,
    skipped integer NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now(),
    state_reason text
) WITH (fillfactor = 50);

-- No reference to the row: what was done outlives it. Nothing personal is kept here.
CREATE TABLE celery_task_failure_audit (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    failure_id bigint NOT NULL,
    failure_uid uuid NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    action text NOT NULL,
    from_state text,
    to_state text,
    actor text NOT NULL,
    db_user text NOT NULL,
    client_addr inet,
    reason text,
    replay_id bigint,
    message_id bigint
);
CREATE INDEX celery_task_failure_audit_failure ON celery_task_failure_audit (failure_id, id);
"""

TRIGGERS = """
CREATE FUNCTION celery_task_failure_guard() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
-- The state machine. Runs as whoever changes the row, so that it can tell the owner's functions from a role.
DECLARE
    way text := OLD.state || ' -> ' || NEW.state;
    reason text := nullif(btrim(current_setting('app.reason', true)), '');
    by_function boolean := current_user = (SELECT relowner::regrole::text FROM pg_class WHERE oid = TG_RELID);
BEGIN
    IF NEW.exported_at IS NOT DISTINCT FROM OLD.exported_at THEN -- an export changes nothing
        NEW.changed_at := now();
    END IF;
    IF OLD.state = NEW.state THEN
        IF (NEW.message_id, NEW.replays, NEW.replay_id) IS DISTINCT FROM (OLD.message_id, OLD.replays,
            OLD.replay_id)
        THEN
            RAISE EXCEPTION 'dead letter %: a row that stays % keeps its message and its replays', OLD.id,
                OLD.state
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END IF;
    CASE way
        WHEN 'pending -> in_progress' THEN
            IF NEW.replays <> OLD.replays + 1 OR NEW.replay_id IS NULL
               OR NEW.message_id IS NOT DISTINCT FROM OLD.message_id
               OR NOT EXISTS (SELECT FROM kombu_message WHERE id = NEW.message_id) THEN
                RAISE EXCEPTION 'dead letter %: % needs a replay that has put a new message into its queue',
                    OLD.id, way USING ERRCODE = 'check_violation';
            END IF;
        WHEN 'pending -> ignored', 'ignored -> pending' THEN
            IF reason IS NULL THEN
                RAISE EXCEPTION 'dead letter %: % needs a reason', OLD.id, way USING ERRCODE =
                    'check_violation';
            END IF;
        WHEN 'in_progress -> pending', 'in_progress -> resolved' THEN
            IF NOT by_function THEN
                RAISE EXCEPTION 'dead letter %: % follows from the replay''s outcome and can''t be set',
                    OLD.id, way
                    USING ERRCODE = 'insufficient_privilege';
            END IF;
        ELSE
            RAISE EXCEPTION 'dead letter %: there is no way %', OLD.id, way USING ERRCODE = 'check_violation';
    END CASE;
    RETURN NEW;
END $$;
CREATE TRIGGER guard BEFORE UPDATE ON celery_task_failures
    FOR EACH ROW EXECUTE FUNCTION celery_task_failure_guard();

CREATE FUNCTION celery_task_failure_keep_open() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.state IN ('pending', 'in_progress') AND current_setting('app.purge_open', true) IS DISTINCT FROM
        'on' THEN
        RAISE EXCEPTION 'dead letter % is %: only closed rows are deleted unless open ones are asked for',
            OLD.id, OLD.state USING ERRCODE = 'check_violation';
    END IF;
    RETURN OLD;
END $$;
CREATE TRIGGER keep_open BEFORE DELETE ON celery_task_failures
    FOR EACH ROW EXECUTE FUNCTION celery_task_failure_keep_open();

CREATE FUNCTION celery_task_failure_record() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
-- A capture is not recorded: the row is its own record. Each thing done to it afterwards is.
DECLARE
    r celery_task_failures := coalesce(NEW, OLD);
    what text;
BEGIN
    what := CASE
        WHEN TG_OP = 'INSERT' THEN 'imported'
        WHEN TG_OP = 'DELETE' THEN 'purged'
        WHEN OLD.state <> NEW.state THEN CASE NEW.state
            WHEN 'in_progress' THEN 'replayed'
            WHEN 'resolved' THEN 'resolved'
            WHEN 'ignored' THEN 'ignored'
            ELSE CASE OLD.state WHEN 'ignored' THEN 'reopened' ELSE 'returned' END
        END
        WHEN NEW.payload_version <> OLD.payload_version THEN 'edited'
        WHEN NEW.assignee IS DISTINCT FROM OLD.assignee THEN 'assigned'
        WHEN NEW.note IS DISTINCT FROM OLD.note THEN 'noted'
        WHEN NEW.exported_at IS DISTINCT FROM OLD.exported_at THEN 'exported'
        ELSE 'changed'
    END;
    INSERT INTO celery_task_failure_audit
        (failure_id, failure_uid, action, from_state, to_state, actor, db_user, client_addr,
         reason, replay_id, message_id)
    VALUES (r.id, r.uid, what,
        CASE WHEN TG_OP <> 'INSERT' THEN OLD.state END, CASE WHEN TG_OP <> 'DELETE' THEN NEW.state END,
        coalesce(nullif(current_setting('app.actor', true), ''), session_user), session_user,
            inet_client_addr(),
        nullif(left(current_setting('app.reason', true), 1000), ''), r.replay_id, r.message_id);
    RETURN NULL;
END $$;
CREATE TRIGGER record AFTER UPDATE OR DELETE ON celery_task_failures
    FOR EACH ROW EXECUTE FUNCTION celery_task_failure_record();
CREATE TRIGGER record_import AFTER INSERT ON celery_task_failures
    FOR EACH ROW WHEN (NEW.imported_at IS NOT NULL) EXECUTE FUNCTION celery_task_failure_record();

CREATE FUNCTION celery_task_failure_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON celery_task_failure_audit
    FOR EACH STATEMENT EXECUTE FUNCTION celery_task_failure_append_only();
CREATE TRIGGER append_only BEFORE UPDATE ON celery_task_failure_payloads
    FOR EACH STATEMENT EXECUTE FUNCTION celery_task_failure_append_only();
CREATE TRIGGER append_only BEFORE UPDATE ON celery_task_failure_errors
    FOR EACH STATEMENT EXECUTE FUNCTION celery_task_failure_append_only();
CREATE TRIGGER append_only BEFORE TRUNCATE ON celery_task_failures
    FOR EACH STATEMENT EXECUTE FUNCTION celery_task_failure_append_only();
"""

# What a worker and its housekeeping may do, as the owner. A session bound to a tenant acts for that tenant
# only.
FUNCTIONS = """
CREATE FUNCTION celery_task_failure_capture(
    _message_id bigint, _replay_of bigint, _payload text, _class text, _task text, _task_id text, _tenant_id
        uuid,
    _correlation_id text, _queue text, _exchange text, _routing_key text, _error_type text, _error_message
        text,
    _traceback text, _fingerprint text, _worker text, _host text, _attempts integer, _deliveries integer,
    _decodable boolean
) RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
-- The caller deletes the message in the same transaction. Returns the row that the message ended as.
DECLARE
    r celery_task_failures;
    session_tenant uuid := nullif(current_setting('app.current_tenant_id', true), '')::uuid;
BEGIN
    IF session_tenant IS NOT NULL AND session_tenant IS DISTINCT FROM _tenant_id THEN
        RAISE EXCEPTION 'a tenant''s session can''t write dead letters of another'
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    -- As with an acknowledgement nobody waits for the disk: a crash undoes row and deletion together.
    PERFORM set_config('synchronous_commit', 'off', true);
    -- A failed replay goes back to the row it came from. The task id is compared because anyone can write a
    -- header.
    IF _replay_of IS NOT NULL THEN
        PERFORM set_config('app.reason', 'the replay failed: ' || _error_type, true);
        UPDATE celery_task_failures SET
            state = 'pending', class = _class, error_type = _error_type, error_message = _error_message,
            fingerprint = _fingerprint, worker = _worker, host = _host, attempts = attempts + _attempts,
            deliveries = deliveries + _deliveries, failures = failures + 1, last_failed_at = now(),
            message_id = _message_id
        WHERE id = _replay_of AND state = 'in_progress' AND task_id IS NOT DISTINCT FROM _task_id
        RETURNING * INTO r;
        PERFORM set_config('app.reason', '', true);
    END IF;
    IF r.id IS NULL THEN
        INSERT INTO celery_task_failures
            (class, task, task_id, tenant_id, correlation_id, queue, exchange, routing_key, error_type,
             error_message, fingerprint, worker, host, attempts, deliveries, message_id, decodable)
        VALUES (_class, _task, _task_id, _tenant_id, _correlation_id, _queue, _exchange, _routing_key,
            _error_type,
             _error_message, _fingerprint, _worker, _host, _attempts, _deliveries, _message_id, _decodable)
        RETURNING * INTO r;
        INSERT INTO celery_task_failure_payloads (failure_id, version, payload) VALUES (r.id, 1, _payload);
    END IF;
    INSERT INTO celery_task_failure_errors
        (failure_id, number, failed_at, class, error_type, error_message, traceback, worker, replay_id)
    VALUES (r.id, r.failures, now(), _class, _error_type, _error_message, _traceback, _worker, r.replay_id);
    RETURN r.id;
END $$;

CREATE FUNCTION celery_task_failure_resolve(_id bigint, _task_id text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
-- The replay succeeded; the caller deletes its message in the same transaction.
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE celery_task_failures SET state = 'resolved'
    WHERE id = _id AND state = 'in_progress' AND task_id IS NOT DISTINCT FROM _task_id;
    RETURN FOUND;
END $$;

CREATE FUNCTION celery_task_failure_edit(_id bigint, _payload text, _task text, _task_id text, _diff text,
    _actor text, _reason text) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
-- A right of its own: granted to nobody here.
DECLARE
    new_version integer;
BEGIN
    IF btrim(coalesce(_reason, '')) = '' THEN
        RAISE EXCEPTION 'dead letter %: an edit needs a reason', _id USING ERRCODE = 'check_violation';
    END IF;
    PERFORM set_config('app.actor', _actor, true), set_config('app.reason', _reason, true);
    UPDATE celery_task_failures
    SET payload_version = payload_version + 1, task = _task, task_id = _task_id, decodable = true,
        -- A group is of one task.
        fingerprint = CASE WHEN task IS NOT DISTINCT FROM _task THEN fingerprint
            ELSE left(md5(fingerprint || _task), 16) END
    WHERE id = _id AND state = 'pending'
    RETURNING payload_version INTO new_version;
    IF new_version IS NOT NULL THEN
        INSERT INTO celery_task_failure_payloads (failure_id, version, payload, diff, reason, actor)
        VALUES (_id, new_version, _payload, _diff, _reason, _actor);
    END IF;
    RETURN new_version;
END $$;

CREATE FUNCTION celery_task_failure_import(_row jsonb) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
-- One exported line; null when the row is here already. What was open is pending again: its message is gone.
DECLARE
    r celery_task_failures := jsonb_populate_record(NULL::celery_task_failures, _row -> 'failure');
    new_id bigint;
BEGIN
    INSERT INTO celery_task_failures
        (uid, state, class, task, task_id, tenant_id, correlation_id, queue, exchange, routing_key,
            error_type,
         error_message, fingerprint, worker, host, attempts, deliveries, failures, first_failed_at,
             last_failed_at,
         decodable, payload_version, replays, assignee, note, imported_at)
    VALUES
        (r.uid, CASE r.state WHEN 'in_progress' THEN 'pending' ELSE r.state END, r.class, r.task, r.task_id,
         r.tenant_id, r.correlation_id, r.queue, r.exchange, r.routing_key, r.error_type, r.error_message,
         r.fingerprint, r.worker, r.host, r.attempts, r.deliveries, r.failures, r.first_failed_at,
             r.last_failed_at,
         r.decodable, r.payload_version, r.replays, r.assignee, r.note, now())
    ON CONFLICT (uid) DO NOTHING RETURNING id INTO new_id;
    IF new_id IS NOT NULL THEN
        INSERT INTO celery_task_failure_payloads (failure_id, version, payload, diff, reason, actor,
            created_at)
        SELECT new_id, version, payload, diff, reason, actor, created_at
        FROM jsonb_populate_recordset(NULL::celery_task_failure_payloads, _row -> 'payloads');
        INSERT INTO celery_task_failure_errors
            (failure_id, number, failed_at, class, error_type, error_message, traceback, worker)
        SELECT new_id, number, failed_at, class, error_type, error_message, traceback, worker
        FROM jsonb_populate_recordset(NULL::celery_task_failure_errors, _row -> 'errors');
    END IF;
    RETURN new_id;
END $$;

CREATE FUNCTION celery_task_failure_tend(_resolved_after interval, _ignored_after interval, _stuck_after
    interval,
    _batch integer, OUT purged bigint, OUT not_exported bigint, OUT resolved bigint, OUT returned bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
-- Retention deletes only what was exported. A row is stuck when its replay's message is gone and nobody
-- said how
-- it ended: the result table knows, or it goes back to pending.
DECLARE
    in_flight bigint[];
BEGIN
    IF least(_resolved_after, _ignored_after) < interval '1 day' OR _stuck_after < interval '1 minute' THEN
        RAISE EXCEPTION 'retention is at least a day, and nothing is stuck before a minute has passed'
            USING ERRCODE = 'check_violation';
    END IF;
    PERFORM set_config('app.actor', 'housekeeping', true), set_config('app.reason', 'retention', true);
    WITH due AS (
        SELECT id FROM celery_task_failures
        WHERE exported_at >= changed_at
          AND ((state = 'resolved' AND changed_at < now() - _resolved_after)
            OR (state = 'ignored' AND changed_at < now() - _ignored_after))
        LIMIT _batch FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM celery_task_failures f USING due WHERE f.id = due.id RETURNING 1
    ) SELECT count(*) INTO purged FROM gone;
    SELECT count(*) INTO not_exported FROM celery_task_failures
    WHERE (exported_at IS NULL OR exported_at < changed_at)
      AND ((state = 'resolved' AND changed_at < now() - _resolved_after)
        OR (state = 'ignored' AND changed_at < now() - _ignored_after));

    resolved := 0;
    returned := 0;
    IF EXISTS (SELECT FROM celery_task_failures WHERE state = 'in_progress' AND changed_at < now() -
        _stuck_after) THEN
        -- A retry of the replay is another message of the same row: its header names the row.
        SELECT array_agg(substring(payload FROM '"skeldir_replay_of": ?([0-9]{1,18})')::bigint) INTO in_flight
        FROM kombu_message WHERE payload LIKE '%"skeldir_replay_of"%';
        PERFORM set_config('app.reason', 'its message is gone and its result is SUCCESS', true);
        WITH done AS (
            UPDATE celery_task_failures f SET state = 'resolved' FROM celery_taskmeta t
            WHERE f.state = 'in_progress' AND f.changed_at < now() - _stuck_after
              AND f.id <> ALL (coalesce(in_flight, '{}')) AND t.task_id = f.task_id AND t.status = 'SUCCESS'
            RETURNING 1
        ) SELECT count(*) INTO resolved FROM done;
        PERFORM set_config('app.reason', 'its message is gone without a result', true);
        WITH back AS (
            UPDATE celery_task_failures SET state = 'pending', message_id = NULL
            WHERE state = 'in_progress' AND changed_at < now() - _stuck_after
              AND id <> ALL (coalesce(in_flight, '{}'))
            RETURNING 1
        ) SELECT count(*) INTO returned FROM back;
    END IF;
    PERFORM set_config('app.actor', '', true), set_config('app.reason', '', true);
END $$;
"""

SECURITY = """
DO $$
DECLARE
    t text;
    owner text := current_user;
BEGIN
    FOREACH t IN ARRAY ARRAY['celery_task_failures', 'celery_task_failure_payloads',
        'celery_task_failure_errors',
                             'celery_task_failure_replays', 'celery_task_failure_audit'] LOOP
        EXECUTE format('REVOKE ALL ON %I FROM PUBLIC, app_user, app_rw, app_ro', t);
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', t);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', t);
        EXECUTE format('CREATE POLICY owner ON %I TO %I USING (true) WITH CHECK (true)', t, owner);
    END LOOP;
    FOR t IN SELECT oid::regprocedure FROM pg_proc
             WHERE proname LIKE 'celery\\_task\\_failure\\_%' AND pronamespace = 'public'::regnamespace LOOP
        EXECUTE 'REVOKE ALL ON FUNCTION ' || t || ' FROM PUBLIC';
    END LOOP;
END $$;

CREATE FUNCTION celery_task_failure_tenant() RETURNS uuid LANGUAGE sql STABLE
    RETURN nullif(current_setting('app.current_tenant_id', true), '')::uuid;

-- In a sub-select each policy asks once, not once a row.
CREATE POLICY tenant ON celery_task_failures FOR SELECT TO app_user
    USING (tenant_id = (SELECT celery_task_failure_tenant()));
-- An operator sees all, or one tenant's rows when the session is bound to it.
CREATE POLICY operator ON celery_task_failures TO app_rw
    USING ((SELECT celery_task_failure_tenant()) IS NULL OR tenant_id = (SELECT
        celery_task_failure_tenant()));
CREATE POLICY operator ON celery_task_failure_payloads FOR SELECT TO app_rw
    USING ((SELECT celery_task_failure_tenant()) IS NULL
        OR EXISTS (SELECT FROM celery_task_failures f WHERE f.id = failure_id));
CREATE POLICY operator ON celery_task_failure_errors FOR SELECT TO app_rw
    USING ((SELECT celery_task_failure_tenant()) IS NULL
        OR EXISTS (SELECT FROM celery_task_failures f WHERE f.id = failure_id));
CREATE POLICY operator ON celery_task_failure_audit FOR SELECT TO app_rw
    USING ((SELECT celery_task_failure_tenant()) IS NULL
        OR EXISTS (SELECT FROM celery_task_failures f WHERE f.id = failure_id));
CREATE POLICY operator ON celery_task_failure_replays TO app_rw USING ((SELECT celery_task_failure_tenant())
    IS NULL);
CREATE POLICY reader ON celery_task_failures FOR SELECT TO app_ro USING (true);
CREATE POLICY reader ON celery_task_failure_replays FOR SELECT TO app_ro USING (true);

GRANT EXECUTE ON FUNCTION celery_task_failure_tenant TO app_user, app_rw, app_ro;
GRANT SELECT ON celery_task_failures TO app_user;
GRANT EXECUTE ON FUNCTION celery_task_failure_capture, celery_task_failure_resolve, celery_task_failure_tend
    TO app_user;

GRANT SELECT ON celery_task_failures, celery_task_failure_payloads, celery_task_failure_errors,
    celery_task_failure_replays, celery_task_failure_audit TO app_rw;
GRANT UPDATE (state, message_id, replays, replay_id, assignee, note, exported_at), DELETE
    ON celery_task_failures TO app_rw;
GRANT INSERT (actor, reason, filter, target_queue, rate, canary, stop_ratio, max_replays, failure_ids),
    UPDATE (state, position, skipped, changed_at, state_reason) ON celery_task_failure_replays TO app_rw;
GRANT EXECUTE ON FUNCTION celery_task_failure_import, celery_task_failure_tend TO app_rw;

-- Counts and shapes: no argument, message, traceback or note.
GRANT SELECT (id, state, class, task, tenant_id, queue, error_type, fingerprint, worker, host, attempts,
    deliveries,
    failures, first_failed_at, last_failed_at, changed_at, decodable, payload_version, replays, replay_id,
    exported_at, imported_at) ON celery_task_failures TO app_ro;
GRANT SELECT (id, state, target_queue, rate, canary, stop_ratio, max_replays, position, skipped, created_at,
    changed_at) ON celery_task_failure_replays TO app_ro;
"""


def upgrade() -> None:
    for part in (TABLES, TRIGGERS, FUNCTIONS, SECURITY):
        op.execute(part)


def downgrade() -> None:
    op.execute("""
        DROP TABLE celery_task_failure_audit, celery_task_failure_replays, celery_task_failure_errors,
            celery_task_failure_payloads, celery_task_failures CASCADE;
    """)
    for function in (
        "guard",
        "keep_open",
        "record",
        "append_only",
        "capture",
        "resolve",
        "edit",
        "import",
        "tend",
        "tenant",
    ):
        op.execute(f"DROP FUNCTION celery_task_failure_{function}")
