"""Real workers that die, freeze, stop and lose their database."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from psycopg2.extensions import cursor

from tests.broker.conftest import Database, Ledger, Worker, until

POOLS = [("-P", "solo"), ("-P", "prefork", "-c", "2"), ("-P", "threads", "-c", "2")]


def held(sql: cursor) -> int:
    sql.execute("SELECT count(*) FROM kombu_message WHERE holder IS NOT NULL")
    row = sql.fetchone()
    assert row
    return int(row[0])


def left(sql: cursor) -> int:
    sql.execute("SELECT count(*) FROM kombu_message WHERE dead IS NULL")
    row = sql.fetchone()
    assert row
    return int(row[0])


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: pool[1])
def test_jobs_of_every_kind_are_done_once(
    worker: Callable[..., Worker],
    publish: Callable[[str], None],
    ledger: Ledger,
    sql: cursor,
    pool: tuple[str, ...],
) -> None:
    worker(*pool).ready()
    publish(
        "for i in range(20): tasks.job.delay(f'now{i}')\n"
        "tasks.job.apply_async(['later'], countdown=1)\n"
        "tasks.retrying.delay('retried')\n"
        "tasks.parent.delay('child')\n"
        "(tasks.job.si('first') | tasks.job.si('second')).delay()\n"
    )
    wanted = [*(f"now{i}" for i in range(20)), "later", "retried", "child", "first", "second"]
    until(lambda: all(ledger.count(f"ended {name}") for name in wanted))
    until(lambda: not left(sql))
    assert [name for name in wanted if ledger.count(f"ended {name}") != 1] == []


def test_a_killed_workers_jobs_run_elsewhere_at_once(
    worker: Callable[..., Worker], publish: Callable[[str], None], ledger: Ledger, sql: cursor
) -> None:
    first, _ = worker("-c", "2", PREFETCH="1").ready(), worker("-c", "2", PREFETCH="1").ready()
    publish("for i in range(4): tasks.job.delay(f'j{i}', 5.0)")
    until(lambda: len(ledger.lines()) == 4)
    assert held(sql) == 4
    first.kill()
    assert until(lambda: held(sql) == 2, 5) < 4
    until(lambda: not left(sql))
    assert [ledger.count(f"ended j{i}") for i in range(4)] == [1] * 4


def test_a_job_that_kills_its_process_stops_at_the_limit(
    worker: Callable[..., Worker], publish: Callable[[str], None], ledger: Ledger, sql: cursor
) -> None:
    worker("-c", "1", DELIVERY_LIMIT="3").ready()
    publish("tasks.poison.delay(); tasks.job.delay('innocent')")
    until(lambda: ledger.count("ended innocent") and not left(sql), 30)
    assert [line for line in ledger.lines() if "poison" in line] == [f"began poison {i}" for i in range(3)]
    sql.execute("SELECT dead, returned, holder FROM kombu_message")
    assert sql.fetchall() == [("poison", 3, None)]


@pytest.mark.parametrize("pool", [POOLS[0], POOLS[2]], ids=lambda pool: pool[1])
def test_who_was_taken_along_with_a_killer_does_not_share_its_blame(
    worker: Callable[..., Worker],
    publish: Callable[[str], None],
    ledger: Ledger,
    sql: cursor,
    pool: tuple[str, ...],
) -> None:
    publish(
        "tasks.job.delay('before', 0.3); tasks.poison.delay()\n"
        "for i in range(6): tasks.job.delay(f'j{i}', 0.3)"
    )
    for _ in range(4):
        one = worker(*pool, PREFETCH="8", DELIVERY_LIMIT="2")
        until(lambda one=one: one.process.poll() is not None or not left(sql), 40)
    assert [ledger.count(f"ended j{i}") for i in range(6)] == [1] * 6
    sql.execute("SELECT dead, payload::jsonb #>> '{headers,task}' FROM kombu_message")
    assert sql.fetchall() == [("poison", "tests.broker.app_for_tests.poison")]
    assert sum("began poison" in line for line in ledger.lines()) == 2


def test_a_warm_stop_hands_back_at_once_what_was_not_started(
    worker: Callable[..., Worker], publish: Callable[[str], None], ledger: Ledger, sql: cursor
) -> None:
    one = worker("-c", "1").ready()
    publish("for i in range(4): tasks.job.delay(f'j{i}', 9.0)")
    until(lambda: held(sql) == 4 and ledger.count("began j0"))
    one.process.terminate()
    until(lambda: held(sql) == 1, 4)
    assert ledger.count("ended j0") == 0
    assert one.process.wait(20) == 0
    sql.execute("SELECT visible, returned FROM kombu_message")
    assert sql.fetchall() == [(True, 0)] * 3
    assert ledger.lines() == ["began j0", "ended j0"]


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: pool[1])
def test_a_crash_of_the_server_costs_a_delay_and_nothing_is_done_twice(
    worker: Callable[..., Worker],
    publish: Callable[[str], None],
    ledger: Ledger,
    database: Database,
    pool: tuple[str, ...],
) -> None:
    one = worker(*pool).ready()
    other = worker(*pool).ready()
    publish("for i in range(40): tasks.job.delay(f'j{i}', 0.2)")
    until(lambda: len(ledger.lines()) > 8)
    database.cluster.restart("immediate")
    publish("tasks.job.delay('after')")
    until(lambda: ledger.count("ended after") and all(ledger.count(f"ended j{i}") for i in range(40)), 40)
    assert [i for i in range(40) if ledger.count(f"began j{i}") != 1] == []
    until(lambda: database.rows("SELECT count(*) FROM kombu_message") == [(0,)])
    assert one.process.poll() is None
    assert other.process.poll() is None


@pytest.mark.parametrize("pool", POOLS[1:], ids=lambda pool: pool[1])
def test_a_worker_whose_window_is_full_sleeps(
    worker: Callable[..., Worker],
    publish: Callable[[str], None],
    ledger: Ledger,
    sql: cursor,
    pool: tuple[str, ...],
) -> None:
    one = worker(*pool).ready()
    publish("for i in range(20): tasks.job.delay(f'j{i}', 4.0)")
    until(lambda: len(ledger.lines()) == 2)

    def cpu_seconds() -> float:
        fields = Path(f"/proc/{one.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = cpu_seconds()
    time.sleep(2)
    assert cpu_seconds() - before < 0.5
    sql.execute("DELETE FROM kombu_message WHERE visible")


def test_terminated_backends_cost_nothing(
    worker: Callable[..., Worker], publish: Callable[[str], None], ledger: Ledger, sql: cursor
) -> None:
    worker("-c", "2").ready()
    worker("-c", "2").ready()
    publish("for i in range(30): tasks.job.delay(f'j{i}', 0.2)")
    for _ in range(3):
        time.sleep(0.6)
        sql.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    until(lambda: all(ledger.count(f"ended j{i}") for i in range(30)), 30)
    until(lambda: not left(sql))
    assert [i for i in range(30) if ledger.count(f"began j{i}") != 1] == []


def test_who_was_given_up_for_dead_changes_nothing_when_it_wakes(
    worker: Callable[..., Worker], publish: Callable[[str], None], ledger: Ledger, sql: cursor
) -> None:
    frozen = worker("-c", "1").ready()
    publish("tasks.job.delay('j', 1.0)")
    until(lambda: ledger.count("began j"))
    for pid in frozen.pids():
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2.5)
    assert held(sql) == 1  # frozen, but its sessions live
    sql.execute(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    worker("-c", "1").ready()
    until(lambda: ledger.count("began j") == 2, 10)
    for pid in frozen.pids():
        os.kill(pid, signal.SIGCONT)
    until(lambda: ledger.count("ended j") == 1)
    until(lambda: ledger.count("ended j") == 2 and not left(sql))
    publish("for i in range(8): tasks.job.delay(f'again{i}', 0.3)")
    until(lambda: all(ledger.count(f"ended again{i}") == 1 for i in range(8)))
    assert "given up for dead" in frozen.text
    # Its queue for remote control ended with its old identity.
    publish(
        f"inspect = tasks.celery.control.inspect(destination=['{frozen.name}'], timeout=2)\n"
        f"assert any(inspect.ping() for _ in range(5)), 'it does not hear'\n"
    )


def test_a_replaced_child_leaves_the_connection_alone(
    worker: Callable[..., Worker], publish: Callable[[str], None], ledger: Ledger, sql: cursor
) -> None:
    one = worker("-c", "2", "--max-tasks-per-child", "2").ready()
    publish("for i in range(30): tasks.parent.delay(f'c{i}')")
    until(lambda: all(ledger.count(f"ended c{i}") for i in range(30)), 60)
    until(lambda: not left(sql))
    assert [i for i in range(30) if ledger.count(f"ended c{i}") != 1] == []
    assert one.process.poll() is None


def test_a_delayed_job_is_in_no_workers_memory(
    worker: Callable[..., Worker], publish: Callable[[str], None], ledger: Ledger, sql: cursor
) -> None:
    worker("-c", "1").ready()
    publish("tasks.job.apply_async(['later'], countdown=3); tasks.job.delay('now')")
    began = time.time()
    until(lambda: ledger.count("ended now") == 1)
    assert held(sql) == 0
    until(lambda: ledger.count("ended later") == 1)
    assert 1.5 < time.time() - began < 4.5


def test_remote_control_answers_and_leaves_nothing_behind(
    worker: Callable[..., Worker], publish: Callable[[str], None], ledger: Ledger, sql: cursor
) -> None:
    one = worker("-c", "1", "-E").ready()
    publish("tasks.job.delay('long', 6.0)")
    until(lambda: ledger.count("began long"))
    publish(
        "from threading import Thread\n"
        "inspect = tasks.celery.control.inspect(timeout=1.5)\n"
        f"assert [job['args'] for job in inspect.active()['{one.name}']] == [['long', 6.0]]\n"
        f"assert inspect.ping() == {{'{one.name}': {{'ok': 'pong'}}}}\n"
        "wanted = {'task-received', 'task-started', 'task-succeeded', 'worker-heartbeat'}\n"
        "seen = []\n"
        "with tasks.celery.connection() as connection:\n"
        "    def note(event):\n"
        "        seen.append(event['type'])\n"
        "        receiver.should_stop = wanted <= set(seen)\n"
        "    receiver = tasks.celery.events.Receiver(connection, handlers={'*': note})\n"
        "    Thread(target=lambda: (__import__('time').sleep(1), tasks.job.delay('seen'))).start()\n"
        "    receiver.capture(limit=100, timeout=20, wakeup=True)\n"
        "assert wanted <= set(seen), seen\n"
        "tasks.celery.control.shutdown()\n"
    )
    assert one.process.wait(20) == 0
    sql.execute("SELECT name FROM kombu_queue")
    assert sql.fetchall() == [("jobs",)]
    sql.execute("SELECT (SELECT count(*) FROM kombu_binding), (SELECT count(*) FROM kombu_holder)")
    assert sql.fetchall() == [(0, 0)]
