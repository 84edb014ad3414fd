"""Out as JSON lines, back in, and away; and what housekeeping deletes."""

import io
import json
from datetime import timedelta

import pytest

from app.dlq import archive, replay, store
from app.dlq.classify import Failure
from app.dlq.store import STATES, DeadLetterError, Filter
from tests.dlq.plane import TENANT_A, Plane, payload

EVERYTHING = Filter(states=STATES)
KEPT = (
    "uid, state, class, task, task_id, tenant_id, error_message, fingerprint, failures, first_failed_at, note"
)


def rows(plane: Plane, columns: str = KEPT) -> list[tuple[object, ...]]:
    return plane.database.rows(f"SELECT {columns} FROM celery_task_failures ORDER BY uid")


def close(plane: Plane, row: int) -> None:
    with plane.session() as session:
        store.ignore(session, Filter(ids=(row,)), actor="m", reason="r")


def age(plane: Plane, days: int) -> None:
    plane.database.rows(
        "ALTER TABLE celery_task_failures DISABLE TRIGGER USER;"
        f"UPDATE celery_task_failures SET changed_at = changed_at - interval '{days} days',"
        f" exported_at = exported_at - interval '{days} days';"
        "ALTER TABLE celery_task_failures ENABLE TRIGGER USER; SELECT 1"
    )


def tend(plane: Plane) -> tuple[int, int]:
    with plane.session("app_user") as session:
        done = archive.tend(
            session,
            resolved_after=timedelta(days=30),
            ignored_after=timedelta(days=90),
            stuck_after=timedelta(hours=1),
        )
    return done["purged"], done["not_exported"]


def test_an_export_that_was_purged_comes_back_and_can_be_replayed(plane: Plane) -> None:
    odd = payload(tenant_id=TENANT_A, args=["ü\u2028", 10**30, 1.0, "\\u0000"])
    ids = [plane.fail(odd), plane.fail("garbage", Failure.of("invalid", "I", "m")), plane.fail()]
    with plane.session() as session:
        store.note(session, Filter(ids=(ids[0],)), "first\nsecond", actor="m")
    close(plane, ids[2])
    before, out = rows(plane), io.StringIO()
    with plane.session() as session:
        assert archive.purge(session, EVERYTHING, out, actor="m", reason="full", open_too=True) == 3
        assert rows(plane) == []
        lines = out.getvalue().splitlines()
        assert archive.restore(session, lines, actor="m", reason="back").added == 3
        assert archive.restore(session, lines, actor="m", reason="again").here_already == 3
    assert rows(plane) == before
    kept = plane.scalar(
        "SELECT payload FROM celery_task_failure_payloads p JOIN celery_task_failures f ON f.id = failure_id"
        f" WHERE tenant_id = '{TENANT_A}'"
    )
    assert kept == odd
    assert [action for (action,) in plane.database.rows(
        "SELECT action FROM celery_task_failure_audit WHERE action IN ('purged', 'imported') ORDER BY id")
    ] == ["purged"] * 3 + ["imported"] * 3  # fmt: skip
    with plane.session() as session:
        number = replay.start(session, Filter(), plane.sheet, actor="m", reason="r", everything=True)
    assert replay.run(plane.engine(), number, plane.sheet).sent == 1


def test_what_was_under_way_is_pending_after_an_import(plane: Plane) -> None:
    row, out = plane.fail(), io.StringIO()
    with plane.session() as session:
        number = replay.start(session, Filter(ids=(row,)), plane.sheet, actor="m", reason="r")
    replay.run(plane.engine(), number, plane.sheet)
    with plane.session() as session:
        archive.purge(session, Filter(ids=(row,)), out, actor="m", reason="r", open_too=True)
        archive.restore(session, [out.getvalue()], actor="m", reason="r")
    assert rows(plane, "state") == [("pending",)]


def test_a_line_that_is_broken_stops_the_import_and_says_which(plane: Plane) -> None:
    plane.fail()
    out = io.StringIO()
    with plane.session() as session:
        archive.purge(session, EVERYTHING, out, actor="m", reason="r", open_too=True)
        with pytest.raises(DeadLetterError, match=r"line 2 .* the 1 before it were read"):
            archive.restore(session, [out.getvalue(), "{"], actor="m", reason="r")
    assert len(rows(plane)) == 1


def test_when_the_file_cannot_be_written_nothing_is_purged(plane: Plane) -> None:
    close(plane, plane.fail())

    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

    with plane.session() as session, pytest.raises(OSError, match="No space"):
        archive.purge(session, Filter(states=("ignored",)), Full(), actor="m", reason="r")
    assert rows(plane, "state, exported_at") == [("ignored", None)]


def test_retention_deletes_what_is_over_and_was_exported(plane: Plane) -> None:
    exported, unexported, young, waiting = (plane.fail() for _ in range(4))
    for row in (exported, unexported):
        close(plane, row)
    with plane.session() as session:
        archive.export(
            session, Filter(ids=(exported, waiting), states=STATES), io.StringIO(), actor="m", reason="r"
        )
    age(plane, 100)
    close(plane, young)
    assert tend(plane) == (1, 1)
    assert sorted(id_ for (id_,) in rows(plane, "id")) == [unexported, young, waiting]
    assert tend(plane) == (0, 1)


def test_what_changed_after_its_export_is_exported_again_first(plane: Plane) -> None:
    row = plane.fail()
    close(plane, row)
    with plane.session() as session:
        archive.export(session, Filter(ids=(row,), states=STATES), io.StringIO(), actor="m", reason="r")
    with plane.session() as session:
        store.note(session, Filter(ids=(row,), states=STATES), "wait", actor="m")
    age(plane, 100)
    assert tend(plane) == (0, 1)


def test_every_line_is_json_with_all_that_belongs_to_a_row(plane: Plane) -> None:
    plane.fail()
    out = io.StringIO()
    with plane.session() as session:
        assert archive.export(session, EVERYTHING, out, actor="m", reason="r") == 1
    line = json.loads(out.getvalue())
    assert line["failure"]["class"] == "permanent"
    assert line["payloads"][0]["version"] == 1
    assert line["errors"][0]["traceback"]
