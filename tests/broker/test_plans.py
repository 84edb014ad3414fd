"""How a queue is searched: by its index, with a large backlog, and while nothing can be vacuumed."""

import re

import pytest
from psycopg2.extensions import connection, cursor

from app.broker.place import Places
from tests.broker.conftest import Database

BACKLOG = 100_000
PASSED = 20_000
TAKE = "kombu_take(1, '{}', '{}', ARRAY[%s], '{0}', '{0}', ARRAY[%s], '{NULL}', 4, false, false)"


def plans(session: connection, statement: str) -> str:
    """The plans of a statement and of all statements inside it."""
    with session.cursor() as explain:
        explain.execute(
            "LOAD 'auto_explain'; SET auto_explain.log_min_duration = 0; SET client_min_messages = log"
        )
        explain.execute("SET auto_explain.log_nested_statements = on; SET auto_explain.log_analyze = on")
        session.notices.clear()
        explain.execute(statement)
        explain.execute("RESET ALL")
    return "\n".join(session.notices)


def blocks(sql: cursor, statement: str) -> int:
    """Blocks that a statement looks at."""
    sql.execute(f"EXPLAIN (ANALYZE, BUFFERS, TIMING off) {statement}")
    found = re.search(r"shared hit=(\d+)(?: read=(\d+))?", " ".join(str(row[0]) for row in sql.fetchall()))
    assert found
    return int(found[1]) + int(found[2] or 0)


@pytest.mark.timeout(240)
def test_a_queue_costs_the_same_however_much_waits_or_has_passed(database: Database) -> None:
    admin = database.connect("postgres")
    sql = admin.cursor()
    sql.execute("INSERT INTO kombu_holder (id, name) VALUES (1, 'test')")
    sql.execute("SELECT kombu_declare('q', NULL, NULL)")
    queue = sql.fetchone()[0]  # type: ignore[index]
    fill = (
        "INSERT INTO kombu_message (queue_id, payload)"
        " SELECT %s, repeat('x', 500) FROM generate_series(1, %s)"
    )
    sql.execute(fill, (queue, 10))
    sql.execute("ANALYZE kombu_message")
    for _ in range(2):  # the first call plans
        little = blocks(sql, f"SELECT * FROM {TAKE % (queue, 0)}")
    sql.execute(fill, (queue, BACKLOG))
    assert blocks(sql, f"SELECT * FROM {TAKE % (queue, 0)}") < 3 * little

    report = database.connect("postgres")  # holds back the xmin horizon, as a backup does
    report.autocommit = False
    with report.cursor() as reading:
        reading.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM kombu_queue")
    places = Places()
    places.add(queue)
    for _ in range(PASSED // 500):
        sql.execute(f"SELECT * FROM {TAKE.replace('4, false', '500, false') % (queue, 0)}")
        rows = sql.fetchall()
        places.went_on(rows, 500, 0.0)
        ids, deliveries = [row[0] for row in rows], [row[3] for row in rows]
        sql.execute("SELECT kombu_ack(1, %s::bigint[], %s::integer[])", (ids, deliveries))
    last = max(ids)
    from_front, from_place = (blocks(sql, f"SELECT * FROM {TAKE % (queue, start)}") for start in (0, last))
    assert from_place < 3 * little
    assert from_front > 10 * from_place  # what going on where one was is for
    said = plans(admin, f"SELECT * FROM {TAKE % (queue, last)}")
    assert "Index Scan using kombu_message_ready" in said
    assert "Seq Scan on kombu_message" not in said
    assert "JIT:" not in said
    said = plans(admin, "SELECT * FROM kombu_tick(1, NULL)")
    assert "kombu_message_due" in said
    assert "Seq Scan on kombu_message" not in said
    assert "JIT:" not in said
    report.close()
    admin.close()


def test_a_taker_goes_on_where_it_was_and_looks_back_when_told() -> None:
    places = Places()
    places.add(7)
    assert places.segments() == ([7], [0], [9], [0])
    places.went_on([(1, 7, 0), (2, 7, 0)], 2, 0.0)
    assert places.segments() == ([7, 7], [1, 0], [9, 0], [0, 0])
    places._marks[7][0].start = 2
    assert places.segments()[3] == [0, 2]
    places.went_on([(3, 7, 5)], 2, 0.0)
    assert places.segments()[:3] == ([7] * 4, [6, 5, 1, 0], [9, 5, 4, 0])
    places.start_over()
    assert places.segments()[3] == [0, 0, 0, 0]
    places.went_on([(1, 7, 0), (2, 7, 0)], 2, 0.0)  # old ones, and perhaps more of them
    assert places.segments()[3] == [0, 0, 0, 0]
    places.went_on([], 2, 0.0)
    assert places.segments()[3] == [0, 0, 0, 2]
