"""Attempts to get at what is another's, to forge what happened or to run something: none gets anywhere."""

import base64
import io
import json
import pickle
from pathlib import Path

import psycopg2
import pytest
from rich.console import Console
from sqlalchemy.exc import DBAPIError

from app.dlq import archive, replay, store
from app.dlq.classify import Failure
from app.dlq.message import editable, read
from app.dlq.store import DeadLetterError, Filter
from app.dlq.text import printable, redacted, without_secrets
from tests.dlq.plane import TENANT_A, TENANT_B, Plane, payload

REFUSED = (
    psycopg2.errors.InsufficientPrivilege,
    psycopg2.errors.CheckViolation,
    psycopg2.errors.ReadOnlySqlTransaction,  # all that app_ro begins are
)
F, P, E, A, R = (
    "celery_task_failures",
    "celery_task_failure_payloads",
    "celery_task_failure_errors",
    "celery_task_failure_audit",
    "celery_task_failure_replays",
)
CAPTURE = (
    "SELECT celery_task_failure_capture(NULL, {replay_of}, 'x', 'permanent', 't', {task_id}, {tenant}, NULL,"
    " 'q', NULL, NULL, 'e', 'm', NULL, '0123456789abcdef', 'w', 'h', 1, 1, true)"
)


@pytest.fixture(scope="module")
def plane(shared_plane: Plane) -> Plane:
    """One database for all attempts: none of them may change anything."""
    return shared_plane


@pytest.fixture(scope="module")
def rows(plane: Plane) -> dict[str, int]:
    """A row of each kind: of two tenants, of nobody, under way, resolved, ignored."""
    made = {
        "a": plane.fail(payload(tenant_id=TENANT_A)),
        "b": plane.fail(payload(tenant_id=TENANT_B)),
        "nobody": plane.fail(),
    }
    for name in ("resolved", "under_way"):
        made[name] = plane.fail(payload(task_id=name))
        with plane.session() as session:
            number = replay.start(session, Filter(ids=(made[name],)), plane.sheet, actor="m", reason="r")
        replay.run(plane.engine(), number, plane.sheet)
        if name == "resolved":
            plane.succeed()
    made["ignored"] = plane.fail()
    with plane.session() as session:
        store.ignore(session, Filter(ids=(made["ignored"],)), actor="m", reason="r")
    return made


def attempt(plane: Plane, role: str, statement: str, tenant: str | None = None) -> None:
    connection = plane.database.connect(role)
    try:
        cursor = connection.cursor()
        if tenant:
            cursor.execute("SELECT set_config('app.current_tenant_id', %s, false)", (tenant,))
        cursor.execute(statement)
    finally:
        connection.close()


def seen(plane: Plane, role: str, query: str, tenant: str | None = None) -> list[tuple[object, ...]]:
    connection = plane.database.connect(role)
    try:
        cursor = connection.cursor()
        if tenant is not None:
            cursor.execute("SELECT set_config('app.current_tenant_id', %s, false)", (tenant,))
        cursor.execute(query)
        return cursor.fetchall()
    finally:
        connection.close()


# What is another's


@pytest.mark.parametrize("tenant", [TENANT_A, TENANT_B])
def test_a_tenants_session_sees_its_rows_and_no_other(
    plane: Plane, rows: dict[str, int], tenant: str
) -> None:
    ids = {"a": TENANT_A, "b": TENANT_B}
    own = [(rows[name],) for name, owner in ids.items() if owner == tenant]
    assert seen(plane, "app_user", f"SELECT id FROM {F}", tenant) == own
    assert seen(plane, "app_rw", f"SELECT id FROM {F}", tenant) == own
    assert seen(plane, "app_rw", f"SELECT failure_id FROM {P}", tenant) == own
    assert seen(plane, "app_rw", f"SELECT failure_id FROM {E}", tenant) == own
    assert seen(plane, "app_rw", f"SELECT failure_id FROM {A}", tenant) == []
    assert seen(plane, "app_rw", f"SELECT id FROM {R}", tenant) == []


@pytest.mark.parametrize("tenant", [None, "", "00000000-0000-4000-8000-000000000000"])
def test_without_a_tenant_or_with_a_made_up_one_a_worker_sees_nothing(
    plane: Plane, rows: dict[str, int], tenant: str | None
) -> None:
    assert rows
    assert seen(plane, "app_user", f"SELECT * FROM {F}", tenant) == []


def test_a_tenant_that_is_sql_is_no_tenant(plane: Plane, rows: dict[str, int]) -> None:
    assert rows
    with pytest.raises(psycopg2.errors.InvalidTextRepresentation):
        seen(plane, "app_user", f"SELECT * FROM {F}", "' OR true --")


def test_a_leaky_function_in_a_filter_sees_no_other_tenants_row(plane: Plane, rows: dict[str, int]) -> None:
    assert rows
    # Would fail with a division by zero if it were asked about a row that the policy hides.
    query = f"SELECT id FROM {F} WHERE 1 / (CASE WHEN tenant_id = '{TENANT_B}' THEN 0 ELSE 1 END) = 1"
    assert len(seen(plane, "app_user", query, TENANT_A)) == 1


@pytest.mark.parametrize(
    ("role", "statement"),
    [
        # payloads, errors, messages and people's notes as the reader
        ("app_ro", f"SELECT payload FROM {P}"),
        ("app_ro", f"SELECT * FROM {P}"),
        ("app_ro", f"SELECT traceback FROM {E}"),
        ("app_ro", f"SELECT error_message FROM {F}"),
        ("app_ro", f"SELECT note FROM {F}"),
        ("app_ro", f"SELECT task_id FROM {F}"),
        ("app_ro", f"SELECT * FROM {F}"),
        ("app_ro", f"SELECT f FROM {F} f"),
        ("app_ro", f"SELECT to_jsonb(f) FROM {F} f"),
        ("app_ro", f"SELECT * FROM {A}"),
        ("app_ro", f"SELECT filter FROM {R}"),
        ("app_ro", f"SELECT id FROM {F} WHERE error_message LIKE 'n%'"),
        ("app_ro", f"SELECT id FROM {F} ORDER BY error_message"),
        ("app_ro", f"COPY {P} TO STDOUT"),
        ("app_ro", f"UPDATE {F} SET note = 'x'"),
        ("app_ro", f"DELETE FROM {F}"),
        ("app_ro", "SELECT celery_task_failure_resolve(1, 'x')"),
        ("app_ro", "SELECT celery_task_failure_tend('1 day', '1 day', '1 hour', 1)"),
        ("app_ro", "SELECT celery_task_failure_import('{}')"),
        ("app_ro", CAPTURE.format(replay_of="NULL", task_id="'i'", tenant="NULL")),
        # a task that has broken out of its own work
        ("app_user", f"SELECT * FROM {P}"),
        ("app_user", f"SELECT * FROM {E}"),
        ("app_user", f"SELECT * FROM {A}"),
        ("app_user", f"SELECT * FROM {R}"),
        ("app_user", f"INSERT INTO {F} (class) VALUES ('permanent')"),
        ("app_user", f"UPDATE {F} SET state = 'ignored'"),
        ("app_user", f"DELETE FROM {F}"),
        ("app_user", "SELECT celery_task_failure_edit(1, 'x', 't', 'i', 'd', 'a', 'r')"),
        ("app_user", "SELECT celery_task_failure_import('{}')"),
        ("app_user", "SELECT celery_task_failure_tend('0', '0', '0', 1000)"),
        ("app_user", "SELECT celery_task_failure_tend('-1 year', '1 year', '1 hour', 1000)"),
        # the operator
        ("app_rw", f"INSERT INTO {F} (class) VALUES ('permanent')"),
        ("app_rw", f"INSERT INTO {P} (failure_id, version, payload) VALUES (1, 2, 'forged')"),
        ("app_rw", f"UPDATE {P} SET payload = 'forged'"),
        ("app_rw", f"DELETE FROM {P}"),
        ("app_rw", f"UPDATE {E} SET traceback = 'forged'"),
        ("app_rw", f"UPDATE {F} SET payload_version = 2"),
        ("app_rw", f"UPDATE {F} SET task = 'x'"),
        ("app_rw", f"UPDATE {F} SET error_message = 'x'"),
        ("app_rw", f"UPDATE {F} SET tenant_id = NULL"),
        ("app_rw", f"UPDATE {F} SET first_failed_at = now()"),
        ("app_rw", "SELECT celery_task_failure_edit(1, 'x', 't', 'i', 'd', 'a', 'r')"),
        ("app_rw", CAPTURE.format(replay_of="1", task_id="'i'", tenant="NULL")),
        ("app_rw", "SELECT celery_task_failure_resolve(1, 'x')"),
        ("app_rw", f"INSERT INTO {A} (failure_id, failure_uid, action, actor, db_user)"
                   " VALUES (1, gen_random_uuid(), 'x', 'x', 'x')"),
        ("app_rw", f"UPDATE {A} SET actor = 'somebody else'"),
        ("app_rw", f"DELETE FROM {A}"),
        ("app_rw", f"TRUNCATE {A}"),
        ("app_rw", f"TRUNCATE {F} CASCADE"),
        ("app_rw", f"DELETE FROM {F}"),
        ("app_rw", f"DROP TABLE {A}"),
        ("app_rw", f"ALTER TABLE {A} DISABLE TRIGGER append_only"),
        ("app_rw", f"ALTER TABLE {F} DISABLE ROW LEVEL SECURITY"),
        ("app_rw", f"DROP POLICY operator ON {F}"),
        ("app_rw", "SET session_replication_role = replica"),
        ("app_rw", "CREATE OR REPLACE FUNCTION celery_task_failure_guard() RETURNS trigger LANGUAGE plpgsql"
                   " AS 'BEGIN RETURN NEW; END'"),
        ("app_rw", "SET ROLE app_owner"),
        # the schema's owner, and the superuser
        ("app_owner", f"UPDATE {A} SET actor = 'somebody else'"),
        ("app_owner", f"DELETE FROM {A}"),
        ("app_owner", f"TRUNCATE {A}"),
        ("app_owner", f"UPDATE {P} SET payload = 'forged'"),
        ("postgres", f"UPDATE {A} SET actor = 'somebody else'"),
        ("postgres", f"DELETE FROM {A}"),
    ],
)  # fmt: skip
def test_is_refused(plane: Plane, rows: dict[str, int], role: str, statement: str) -> None:
    assert rows
    before = [plane.database.rows(f"SELECT t::text FROM {table} t ORDER BY 1") for table in (F, P, E, A, R)]
    with pytest.raises(REFUSED):
        attempt(plane, role, statement)
    assert [
        plane.database.rows(f"SELECT t::text FROM {table} t ORDER BY 1") for table in (F, P, E, A, R)
    ] == before


# Forged transitions


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a", "state = 'resolved'"),
        ("a", "state = 'in_progress'"),
        ("a", "state = 'in_progress', replays = replays + 1, replay_id = 1, message_id = 987654"),
        ("a", "state = 'in_progress', replays = replays + 1, replay_id = 1"),
        ("a", "state = 'ignored'"),  # without a reason
        ("a", "state = 'nonsense'"),
        ("a", "replays = 0, replay_id = 7"),
        ("a", "message_id = NULL"),
        ("under_way", "state = 'resolved'"),
        ("under_way", "state = 'pending'"),
        ("under_way", "state = 'ignored'"),
        ("under_way", "replays = 0"),
        ("resolved", "state = 'pending'"),
        ("resolved", "state = 'in_progress'"),
        ("resolved", "state = 'ignored'"),
        ("ignored", "state = 'resolved'"),
        ("ignored", "state = 'in_progress'"),
        ("ignored", "state = 'pending'"),  # without a reason
    ],
)
@pytest.mark.parametrize("role", ["app_rw", "postgres"])
def test_a_forged_transition_is_refused(
    plane: Plane, rows: dict[str, int], role: str, name: str, change: str
) -> None:
    before = plane.state(rows[name])
    with pytest.raises(REFUSED):
        attempt(plane, role, f"UPDATE {F} SET {change} WHERE id = {rows[name]}")
    assert plane.state(rows[name]) == before


def test_a_table_of_ones_own_does_not_deceive_the_state_machine(plane: Plane, rows: dict[str, int]) -> None:
    with pytest.raises(REFUSED):
        attempt(
            plane,
            "app_rw",
            "CREATE TEMP TABLE kombu_message (id bigint); INSERT INTO kombu_message VALUES (987654);"
            "SET search_path = pg_temp, public;"
            f"UPDATE public.{F} SET state = 'in_progress', replays = 1, replay_id = 1, message_id = 987654"
            f" WHERE id = {rows['a']}",
        )


def test_a_tenants_task_cannot_write_another_tenants_dead_letter(plane: Plane, rows: dict[str, int]) -> None:
    assert rows
    forged = CAPTURE.format(replay_of="NULL", task_id="'i'", tenant=f"'{TENANT_B}'")
    with pytest.raises(REFUSED):
        attempt(plane, "app_user", forged, TENANT_A)


def test_an_outcome_for_a_row_of_another_task_changes_nothing(plane: Plane, rows: dict[str, int]) -> None:
    attempt(plane, "app_user", f"SELECT celery_task_failure_resolve({rows['under_way']}, 'not its id')")
    attempt(plane, "app_user", f"SELECT celery_task_failure_resolve({rows['a']}, NULL)")
    assert plane.state(rows["under_way"]) == "in_progress"
    assert plane.state(rows["a"]) == "pending"


def test_open_rows_are_not_deleted_by_a_slip(plane: Plane, rows: dict[str, int]) -> None:
    with pytest.raises(psycopg2.errors.CheckViolation, match="only closed rows"):
        attempt(plane, "app_rw", f"DELETE FROM {F} WHERE id = {rows['a']}")
    with plane.session() as session, pytest.raises(DeadLetterError, match="open"):
        archive.purge(session, Filter(ids=(rows["a"],)), None, actor="m", reason="r")


# SQL where a value is expected


@pytest.mark.parametrize(
    "value",
    [
        "'; DELETE FROM celery_task_failures; --",
        "' OR '1'='1",
        "%",
        "_",
        "\\",
        "%' ESCAPE '",
        ":ids",
        "\0",
        "\ud800",
        "$$",
    ],
)
@pytest.mark.parametrize("field", ["queue", "task", "error_type", "fingerprint", "text", "assignee"])
def test_sql_in_a_filter_is_only_a_word(plane: Plane, field: str, value: str) -> None:
    before = plane.scalar(f"SELECT count(*) FROM {F}")
    which = Filter(**{field: value})  # type: ignore[arg-type]
    with plane.session() as session:
        assert store.find(session, which) == []
        assert store.count(session, which) == 0
        assert store.groups(session, which) == []
        assert replay.plan(session, which, plane.sheet) == []
    assert plane.scalar(f"SELECT count(*) FROM {F}") == before


@pytest.mark.parametrize(
    "bad", [{"states": ("pending') OR true --",)}, {"failure_class": "x'"}, {"ids": (0,)}, {"ids": (2**70,)}]
)
def test_what_is_no_state_class_or_number_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(DeadLetterError):
        Filter(**bad)  # type: ignore[arg-type]


# Payloads that would like to run


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path("/tmp/dlq-owned").touch, ())  # noqa: S108 - it must never come to be


@pytest.mark.parametrize(
    "content_type", ["application/x-python-serialize", "application/json", "pickle", "application/x-yaml"]
)
def test_a_payload_is_never_executed_when_it_is_read_or_shown(plane: Plane, content_type: str) -> None:
    owned = Path("/tmp/dlq-owned")  # noqa: S108
    owned.unlink(missing_ok=True)
    content = json.loads(payload())
    content["body"] = base64.b64encode(pickle.dumps(_Bomb())).decode()
    content["content-type"] = content_type
    row = plane.fail(json.dumps(content), Failure.of("invalid", "I", "m"))
    with plane.session() as session:
        details = store.show(session, row)
    assert details.message.problem
    assert editable(details.message, reveal=True)["args"] is None
    assert not owned.exists()


def test_an_args_that_looks_like_a_template_stays_text() -> None:
    message = read(payload(args=["{{ 7*7 }}", "${jndi:ldap://x}", "[bold]x[/bold]", {"__reduce__": "x"}]))
    assert editable(message, reveal=True)["args"][:2] == ["{{ 7*7 }}", "${jndi:ldap://x}"]


# What would act on a terminal


@pytest.mark.parametrize(
    "evil",
    ["\x1b[2J\x1b[H", "\x1b]0;owned\x07", "\x1b]52;c;cm0gLXJm\x07", "\x9b2J", "\r\x1b[K", "\x08\x08",
     "\u202egpj.exe", "\u2066x\u2069",      "\u200b", "\x7f", "\x00", "\u2028", "\x1bP1$r\x1b\\", "\ue000"],
)  # fmt: skip
def test_terminal_escapes_are_made_visible(evil: str) -> None:
    shown = printable(f"a{evil}b")
    out = io.StringIO()
    Console(file=out, markup=False, emoji=False, force_terminal=False).print(shown)
    assert shown.isprintable()
    assert "a" in out.getvalue()
    assert "\x1b" not in out.getvalue()


# Secrets


@pytest.mark.parametrize(
    "text",
    [
        "could not connect to postgresql://app_user:hunter2@db/skeldir",
        "password=hunter2 is wrong", 'PGPASSWORD="hunter2"', "{'api_key': 'hunter2'}",
        '{"access_token":"hunter2"}',
        "Authorization: Bearer hunter2hunter2", "x-api-key: hunter2", "secret => hunter2", "DSN=hunter2",
        "eyJhbGciOiJIUzI1NiJ9.hunter2hunter2.hunter2", "sk-hunter2hunter2hunter2",
        "-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_secrets_in_an_error_are_not_kept(text: str) -> None:
    assert "hunter2" not in without_secrets(text)
    failure = Failure.of("permanent", "E", text, f"Traceback\n  {text}")
    assert "hunter2" not in failure.error_message + (failure.traceback or "")


def test_arguments_are_redacted_by_name_at_any_depth() -> None:
    value = {
        "user": {"email": "a@b", "Card_Number": 4111, "items": [{"password": "x", "n": 1}]},
        "phone": None,
        "name": "x",
    }
    assert redacted(value) == {
        "user": {"email": "[hidden]", "Card_Number": "[hidden]", "items": [{"password": "[hidden]", "n": 1}]},
        "phone": None,
        "name": "[hidden]",
    }


# An import is seen to be one


@pytest.mark.parametrize(
    "line",
    ["", "{}", "[]", "not json", '{"format": 2}', '{"format": 1, "payloads": 3}',
     '{"format": 1, "failure": {}, "payloads": [{}]}', "[" * 100_000,
     '{"format": 1, "failure": {"state": "resolved; DROP"}, "payloads": [{"version": 1, "payload": "x"}]}'],
)  # fmt: skip
def test_an_import_that_is_none_is_refused(plane: Plane, line: str) -> None:
    before = plane.scalar(f"SELECT count(*) FROM {F}")
    with plane.session() as session:
        if line:
            with pytest.raises(DeadLetterError, match="line 1"):
                archive.restore(session, [line], actor="m", reason="r")
        else:
            archive.restore(session, [line], actor="m", reason="r")
    assert plane.scalar(f"SELECT count(*) FROM {F}") == before


def test_an_import_never_replaces_what_is_here(plane: Plane) -> None:
    row = plane.fail(payload(args=["original"]))
    out = io.StringIO()
    with plane.session() as session:
        archive.export(session, Filter(ids=(row,)), out, actor="m", reason="r")
        forged = json.loads(out.getvalue())
        forged["payloads"][0]["payload"] = payload(args=["forged"])
        assert archive.restore(session, [json.dumps(forged)], actor="m", reason="r").here_already == 1
        assert store.show(session, row).message.args == ["original"]


def test_a_role_that_is_refused_is_told_so_by_the_database(plane: Plane) -> None:
    plane.fail()
    with plane.session("app_ro") as session, pytest.raises(DBAPIError):
        store.find(session, Filter())
