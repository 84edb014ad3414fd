"""What is kept of a failure, how it is found again, and what people do to it short of a replay."""

import json
import uuid
from datetime import UTC, datetime, timedelta

import psycopg2
import pytest
from sqlalchemy import text

from app.dlq import store
from app.dlq.classify import FAILURE_CLASSES, Failure
from app.dlq.store import STATES, DeadLetterError, Filter
from tests.dlq.plane import TASK, TENANT_A, TENANT_B, Plane, payload


def test_a_row_keeps_the_message_to_the_byte_and_what_a_person_needs(plane: Plane) -> None:
    odd = payload(
        args=["ü\u2028", 10**30, 1.0], headers={"skeldir_correlation_id": "c-1"}, tenant_id=TENANT_A
    )
    odd = odd.replace('"lang": "py"', '"lang" :\t"py"')  # not as json.dumps would write it again
    row_id = plane.fail(
        odd, Failure.of("transient", "OSError", "reset by peer", "Traceback…", worker="llm@h", attempts=4)
    )
    with plane.session() as session:
        details = store.show(session, row_id)
    row = details.row
    assert details.payload == odd
    assert (row.state, row.failure_class, row.task, row.queue) == (
        "pending",
        "transient",
        TASK,
        "housekeeping",
    )
    assert (row.exchange, row.routing_key, row.correlation_id) == ("housekeeping", "housekeeping", "c-1")
    assert (row.error_type, row.error_message, row.worker, row.attempts) == (
        "OSError",
        "reset by peer",
        "llm@h",
        4,
    )
    assert (str(row.tenant_id), row.deliveries, row.failures, row.replays) == (TENANT_A, 1, 1, 0)
    assert row.first_failed_at == row.last_failed_at
    assert [error["traceback"] for error in details.errors] == ["Traceback…"]
    assert plane.messages() == []


def test_a_message_ends_as_one_row(plane: Plane) -> None:
    message_id = plane.publish()
    plane.capture(message_id)
    connection = plane.database.connect("app_user")
    with pytest.raises(psycopg2.errors.UniqueViolation):
        connection.cursor().execute(
            "SELECT celery_task_failure_capture(%s, NULL, 'x', 'permanent', 't', 'i', NULL, NULL, 'q', NULL,"
            " NULL, 'e', 'm', NULL, '0123456789abcdef', 'w', 'h', 1, 1, true)",
            (message_id,),
        )
    connection.close()


def test_a_capture_that_is_rolled_back_leaves_the_message_and_no_row(plane: Plane) -> None:
    message_id = plane.publish()
    connection = plane.database.connect("app_user")
    connection.autocommit = False
    cursor = connection.cursor()
    cursor.execute("DELETE FROM kombu_message WHERE id = %s", (message_id,))
    cursor.execute(
        "SELECT celery_task_failure_capture(%s, NULL, 'x', 'permanent', 't', 'i', NULL, NULL, 'q', NULL,"
        " NULL, 'e', 'm', NULL, '0123456789abcdef', 'w', 'h', 1, 1, true)",
        (message_id,),
    )
    connection.close()  # without a commit, as when the process dies here
    assert [id_ for id_, _ in plane.messages()] == [message_id]
    assert plane.scalar("SELECT count(*) FROM celery_task_failures") == 0


def test_texts_are_cut_where_it_is_said_and_never_in_silence(plane: Plane) -> None:
    row = plane.fail(failure=Failure.of("permanent", "ValueError", "x" * 10_000, "y" * 100_000))
    with plane.session() as session:
        details = store.show(session, row)
    assert len(details.row.error_message) <= 2000
    assert "10,000 characters cut" in details.row.error_message
    assert "characters cut" in details.errors[0]["traceback"]


@pytest.mark.parametrize(
    "text", ["a\0b", "\ud800", "\x1b]0;owned\x07", "'); DROP TABLE celery_task_failures; --"]
)
def test_any_text_can_be_kept(plane: Plane, text: str) -> None:
    row = plane.fail(failure=Failure.of("permanent", "ValueError", text, text))
    assert plane.state(row) == "pending"


@pytest.mark.parametrize(
    "content",
    [
        "", "\x7f", "[]", "null", "{}", '{"headers": 3}', '{"body": 1}',
        "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000,
        payload(task=""), payload(headers={"id": None}), payload(headers={"task": ["a"]}),
        payload(headers={"retries": "x"}), payload().replace('"body": "', '"body": "x'),
        payload().replace("application/json", "application/x-python-serialize"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_kept_too_and_said_to_be_unreplayable(plane: Plane, content: str) -> None:
    row_id = plane.fail(content, Failure.of("invalid", "InvalidMessage", "no"))
    with plane.session() as session:
        details = store.show(session, row_id)
    assert details.payload == content
    assert details.message.problem
    assert not details.row.decodable


def test_every_filter_finds_its_rows_and_no_other(plane: Plane) -> None:
    a = plane.fail(payload(tenant_id=TENANT_A), Failure.of("timeout", "TimeLimitExceeded", "took 100% of_it"))
    b = plane.fail(payload(task="app.tasks.llm.route", tenant_id=TENANT_B), queue="llm")
    c = plane.fail()
    with plane.session() as session:
        store.assign(session, Filter(ids=(b,)), "maria", actor="t")
        fingerprint = store.show(session, b).row.fingerprint
        now = datetime.now(UTC)
        cases: list[tuple[Filter, set[int]]] = [
            (Filter(), {a, b, c}),
            (Filter(ids=(a, c)), {a, c}),
            (Filter(queue="llm"), {b}),
            (Filter(task=TASK), {a, c}),
            (Filter(failure_class="timeout"), {a}),
            (Filter(error_type="ValueError"), {b, c}),
            (Filter(fingerprint=fingerprint), {b}),
            (Filter(tenant=uuid.UUID(TENANT_B)), {b}),
            (Filter(without_tenant=True), {c}),
            (Filter(text="100% of_"), {a}),
            (Filter(text="1%t"), set()),
            (Filter(text="TOOK"), {a}),
            (Filter(assignee="maria"), {b}),
            (Filter(since=now - timedelta(hours=1)), {a, b, c}),
            (Filter(until=now - timedelta(hours=1)), set()),
            (Filter(states=("resolved",)), set()),
            (Filter(task=TASK, failure_class="timeout", tenant=uuid.UUID(TENANT_B)), set()),
        ]
        for which, expected in cases:
            assert {row.id for row in store.find(session, which)} == expected, which
            assert store.count(session, which) == len(expected)


WORDS = [
    "connection reset by peer", "CONNECTION", "connection res", "reset by", "eset", "peer 4711", "4711", "47",
    "711", "db.example.com", "example", "/srv/x.py", ".py", "100%", "%", "_", "a_b", "[x]", "(", "\\d", "^c",
    "ß", "größe", "\n", "'; --", "\ud800", "\0", "***=x", "zzz", " ", "x" * 3000,
]  # fmt: skip


def test_words_are_found_the_same_with_the_index_and_without(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    for message in (
        "Connection reset by peer 4711", "db.example.com/srv/x.py: 100% of a_b",
        "[x] (y) \\d ^c größe\nß '; --",
        "***=x \0 \ud800", "x" * 3000,
    ):  # fmt: skip
        plane.fail(payload(tenant_id=TENANT_A), Failure.of("permanent", "E", message))
    found: dict[int, list[set[int]]] = {}
    for few in (20_000, -1):
        monkeypatch.setattr(store, "_FEW", few)
        with plane.session() as session:
            found[few] = [{row.id for row in store.find(session, Filter(text=words))} for words in WORDS]
    with plane.session("app_user", TENANT_A) as session:
        nothing = session.execute(text("SELECT celery_task_failure_search('peer', 10)")).scalar_one()
        assert nothing is None  # no ids of others
        tenants = [{row.id for row in store.find(session, Filter(text=words))} for words in WORDS]
    assert found[20_000] == found[-1] == tenants
    first = {words: ids for words, ids in zip(WORDS, tenants, strict=True) if 1 in ids}
    assert first.keys() == {
        *(
            "connection reset by peer",
            "CONNECTION",
            "connection res",
            "reset by",
            "peer 4711",
            "4711",
            "47",
            " ",
        )
    }


def test_the_few_are_grouped_as_the_many(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        plane.fail(
            payload(tenant_id=TENANT_A if number % 2 else None),
            Failure.of("permanent", f"E{number % 3}", f"no {number}"),
        )
    with plane.session() as session:
        store.assign(session, Filter(task=TASK), "maria", actor="t")
    seen = []
    for few in (20_000, -1):
        monkeypatch.setattr(store, "_FEW", few)
        with plane.session() as session:
            seen.append(store.groups(session, Filter(assignee="maria", text="no"), limit=2))
    assert seen[0] == seen[1]
    assert [group.count for group in seen[0]] == [3, 3]


def test_pages_join_without_a_gap_or_a_row_twice(plane: Plane) -> None:
    ids = [plane.fail() for _ in range(7)]
    seen: list[int] = []
    with plane.session() as session:
        page = store.find(session, Filter(), limit=3)
        while page:
            seen += [row.id for row in page]
            page = store.find(session, Filter(), limit=3, before=(page[-1].last_failed_at, page[-1].id))
    assert seen == ids[::-1]


def test_equal_failures_are_one_group_whatever_their_numbers(plane: Plane) -> None:
    for number in range(3):
        plane.fail(
            payload(tenant_id=TENANT_A if number else TENANT_B),
            Failure.of("permanent", "KeyError", f"no user {number} in {uuid.uuid4()}"),
        )
    plane.fail(failure=Failure.of("permanent", "KeyError", "another thing entirely"))
    with plane.session() as session:
        found = store.groups(session, Filter())
    assert [(group.count, group.tenants) for group in found] == [(3, 2), (1, 0)]
    assert found[0].task == TASK
    assert found[0].error_type == "KeyError"


def test_each_class_is_counted_by_the_reader_too(plane: Plane) -> None:
    for failure_class in FAILURE_CLASSES:
        plane.fail(failure=Failure.of(failure_class, "E", "m"))
    with plane.session("app_ro") as session:
        rows = store.stats(session)
    assert {row["failure_class"]: row["count"] for row in rows} == dict.fromkeys(FAILURE_CLASSES, 1)


def test_ignoring_needs_a_reason_and_is_kept_with_who_and_when(plane: Plane) -> None:
    row = plane.fail()
    with plane.session() as session, pytest.raises(DeadLetterError, match="reason"):
        store.ignore(session, Filter(ids=(row,)), actor="maria", reason=" ")
    with plane.session() as session:
        assert store.ignore(session, Filter(ids=(row,)), actor="maria", reason="seen, harmless") == [row]
    with plane.session() as session:
        assert store.reopen(session, Filter(ids=(row,)), actor="juan", reason="not harmless") == [row]
        history = store.show(session, row).history
    assert [(event["action"], event["actor"], event["reason"]) for event in history] == [
        ("ignored", "maria", "seen, harmless"),
        ("reopened", "juan", "not harmless"),
    ]
    assert {event["db_user"] for event in history} == {"app_rw"}


def test_notes_and_assignees_are_recorded(plane: Plane) -> None:
    row = plane.fail()
    with plane.session() as session:
        store.note(session, Filter(ids=(row,)), "ask the bank", actor="maria")
        store.assign(session, Filter(ids=(row,)), "juan", actor="maria")
    with plane.session() as session:
        details = store.show(session, row)
    assert (details.row.note, details.row.assignee) == ("ask the bank", "juan")
    assert [event["action"] for event in details.history] == ["noted", "assigned"]


def test_an_edit_is_a_new_version_with_its_diff_and_the_original_stays(plane: Plane) -> None:
    original = payload(args=[1], card="4111")
    row = plane.fail(original)
    plane.database.rows("GRANT EXECUTE ON FUNCTION celery_task_failure_edit TO app_rw; SELECT 1")
    with plane.session() as session:
        diff = store.edit(session, row, {"args": [2]}, actor="maria", reason="typo")
        details = store.show(session, row)
    assert "-    1" in diff
    assert "+    2" in diff
    assert (details.message.args, details.message.kwargs) == ([2], {"card": "4111"})
    assert details.row.payload_version == 2
    assert plane.scalar("SELECT payload FROM celery_task_failure_payloads WHERE version = 1") == original
    assert [event["action"] for event in details.history] == ["edited"]
    with plane.session() as session:
        for form in ({"args": 3}, {"headers": {}}, {"task": ""}, {}):
            with pytest.raises(DeadLetterError):
                store.edit(session, row, form, actor="m", reason="r")


def test_an_unreadable_message_can_be_edited_into_one_that_runs(plane: Plane) -> None:
    row = plane.fail("garbage", Failure.of("invalid", "InvalidMessage", "no"))
    plane.database.rows("GRANT EXECUTE ON FUNCTION celery_task_failure_edit TO app_rw; SELECT 1")
    with plane.session() as session:
        store.edit(session, row, {"task": TASK, "kwargs": {"fail": False}}, actor="m", reason="r")
        details = store.show(session, row)
    assert details.row.decodable
    assert details.row.task == TASK
    assert json.loads(details.payload)["headers"]["id"] == details.row.task_id


def test_a_row_that_is_not_there_is_said_to_be(plane: Plane) -> None:
    with plane.session() as session, pytest.raises(DeadLetterError, match="no dead letter 99"):
        store.show(session, 99)
    with pytest.raises(DeadLetterError, match="no state"):
        Filter(states=("gone",))  # type: ignore[arg-type]
    assert Filter(states=STATES).empty
