"""The result backend against a real Postgres, beside Celery's own on the same tables."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from types import SimpleNamespace
from uuid import uuid4

import psycopg2
import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import BackendStoreError
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult, GroupResult

from app import results
from app.core.topology import load_topology
from app.results.backend import _CLEANUP_SECONDS, PostgresBackend


@pytest.fixture(scope="module")
def database(postgres):
    yield postgres.copy_database("skeldir", "results_backend")
    postgres.drop_database("results_backend")


@pytest.fixture
def dsn(database):
    return database.dsn("app_user")


@pytest.fixture
def make_app(dsn):
    """Make an app with our backend (`ours`) or Celery's own on the same database."""
    apps = []

    def make(ours=True, **conf):
        driver = "postgresql" if ours else "postgresql+psycopg2"
        app = Celery(
            broker="memory://", backend=f"db+{dsn.replace('postgresql', driver, 1)}", set_as_current=False
        )
        app.conf.update({"database_create_tables_at_setup": False, **conf})
        if ours:
            results.register(app)
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.close()


@pytest.fixture
def backend(make_app):
    return make_app().backend


@pytest.fixture
def query(database):
    with closing(database.connect("postgres")) as connection:

        def run(statement, *parameters):
            with connection.cursor() as cursor:
                cursor.execute(statement, parameters)
                return cursor.fetchall() if cursor.description else None

        yield run


def test_stands_behind_the_alias_of_its_app_alone(make_app):
    assert isinstance(make_app().backend, PostgresBackend)
    assert not isinstance(make_app(ours=False).backend, PostgresBackend)


STAMPED = {"stamped_headers": ["tenant"], "stamps": {"tenant": ["t1"]}}
REQUEST = {
    "task": "some.task",
    "args": [1, {"a": "ä"}],
    "kwargs": {"b": None},
    "hostname": "w1@here",
    "retries": 2,
    "delivery_info": {"routing_key": "llm"},
    "group": "g",
    "parent_id": "p",
}


class TestLikeCelerysOwn:
    """Each backend reads what the other wrote as the other reads it."""

    @pytest.mark.parametrize("extended", [False, True])
    @pytest.mark.parametrize("serializer", ["json", "pickle"])
    @pytest.mark.parametrize(
        ("state", "result", "traceback", "more"),
        [
            ("SUCCESS", {"n": [1, "ü", None]}, None, {}),
            ("SUCCESS", None, None, {"children": [AsyncResult("child")]}),
            ("SUCCESS", 1, None, STAMPED),
            ("FAILURE", ValueError("no", 3), "Traceback: …", {}),
            ("RETRY", ConnectionError("later"), "Traceback: …", STAMPED),
            ("REVOKED", KeyError("k"), None, {}),
            ("STARTED", {"pid": 1, "hostname": "w"}, None, {}),
            ("PROGRESS", {"done": 0.5}, None, {}),
        ],
    )
    def test_reads_and_writes(self, make_app, query, extended, serializer, state, result, traceback, more):
        conf = {
            "result_extended": extended,
            "result_serializer": serializer,
            "accept_content": ["json", "pickle"],
        }
        ours, theirs = make_app(**conf).backend, make_app(ours=False, **conf).backend
        stored, metas = [], []
        for writer in (ours, theirs):
            task_id = str(uuid4())
            request = Context({**REQUEST, **more, "id": task_id})
            writer.store_result(task_id, result, state, traceback=traceback, request=request)
            ours._store.flush()
            read = [reader.get_task_meta(task_id) for reader in (ours, theirs)]
            for meta in read:
                assert meta.pop("task_id") == task_id
                meta["result"] = repr(meta["result"])
            assert read[0] == read[1]
            metas += read
            columns = (
                "status, result, traceback, children, name, args, kwargs, worker, retries, queue, stamps"
            )
            [row] = query(
                f"SELECT {columns}, date_done IS NULL FROM celery_taskmeta WHERE task_id = %s", task_id
            )
            stored.append([bytes(value) if isinstance(value, memoryview) else value for value in row])
        assert stored[0] == stored[1]
        for meta in metas:
            meta.pop("date_done")
        assert metas[0] == metas[2]

    def test_unknown_task(self, make_app):
        for extended in (False, True):
            ours, theirs = (make_app(ours, result_extended=extended).backend for ours in (True, False))
            assert ours.get_task_meta("unknown") == theirs.get_task_meta("unknown")
            assert not ours.task_result_exists("unknown")

    def test_groups(self, make_app):
        ours, theirs = make_app(), make_app(ours=False)
        for writer, reader in ((ours, theirs), (theirs, ours)):
            group = GroupResult(
                str(uuid4()), [AsyncResult(str(uuid4()), app=writer) for _ in range(3)], app=writer
            )
            group.save()
            restored = GroupResult.restore(group.id, app=reader)
            assert [member.id for member in restored.results] == [member.id for member in group.results]
            assert ours.backend._restore_group(group.id) == theirs.backend._restore_group(group.id)
            restored.delete()
            assert GroupResult.restore(group.id, app=writer) is None

    def test_a_later_run_may_replace_anything_but_success(self, make_app):
        for backend in (make_app().backend, make_app(ours=False).backend):
            task_id = str(uuid4())
            for state in ("FAILURE", "STARTED", "RETRY", "FAILURE", "SUCCESS"):
                result = ValueError() if state in {"FAILURE", "RETRY"} else state
                backend.store_result(task_id, result, state)
                assert backend.get_task_meta(task_id, cache=False)["status"] == state
            backend.store_result(task_id, ValueError(), "FAILURE")
            backend.store_result(task_id, {}, "STARTED")
            assert backend.get_task_meta(task_id, cache=False)["result"] == "SUCCESS"

    def test_other_table_names_and_schemas(self, make_app, query):
        query('CREATE SCHEMA "Other"')
        query('CREATE TABLE "Other"."Done" (LIKE celery_taskmeta INCLUDING ALL)')
        query('CREATE SEQUENCE "Other".task_id_sequence')
        query('GRANT ALL ON SCHEMA "Other" TO app_user')
        query('GRANT ALL ON ALL TABLES IN SCHEMA "Other" TO app_user')
        query('GRANT ALL ON ALL SEQUENCES IN SCHEMA "Other" TO app_user')
        try:
            backend = make_app(
                database_table_schemas={"task": "Other"}, database_table_names={"task": "Done"}
            ).backend
            backend.store_result("elsewhere", 1, "SUCCESS")
            assert query('SELECT count(*) FROM "Other"."Done"') == [(1,)]
            assert backend.get_task_meta("elsewhere")["result"] == 1
        finally:
            query('DROP SCHEMA "Other" CASCADE')
            assert make_app().backend._tasks == "celery_taskmeta"  # Celery kept the names in its models


class TestForgetting:
    def test_forget(self, make_app, backend):
        task_id = str(uuid4())
        backend.store_result(task_id, 1, "SUCCESS")
        AsyncResult(task_id, app=backend.app).forget()
        assert not backend.task_result_exists(task_id)

    def test_cleanup_deletes_what_is_older_than_result_expires(self, make_app, query):
        app = make_app(result_expires=timedelta(hours=1))
        ids = {age: str(uuid4()) for age in (None, 30, 90)}
        for age, task_id in ids.items():
            app.backend.store_result(task_id, 1, "STARTED" if age is None else "SUCCESS")
            GroupResult(task_id, [], app=app).save()
            app.backend._store.flush()
            if age:
                for table, column in (("celery_taskmeta", "task_id"), ("celery_tasksetmeta", "taskset_id")):
                    query(
                        f"UPDATE {table} SET date_done = now() - %s * interval '60 s' WHERE {column} = %s",
                        age,
                        task_id,
                    )
        app.tasks["celery.backend_cleanup"]()
        kept = {age for age, task_id in ids.items() if app.backend.task_result_exists(task_id)}
        assert kept == {None, 30}
        assert {age for age, group in ids.items() if GroupResult.restore(group, app=app) is not None} == {
            None,
            30,
        }

    def test_cleanup_deletes_many_in_batches(self, make_app, query, monkeypatch):
        monkeypatch.setattr("app.results.backend._CLEANUP_BATCH", 10)
        query(
            "INSERT INTO celery_taskmeta (id, task_id, status, date_done)"
            " SELECT nextval('task_id_sequence'), gen_random_uuid(), 'SUCCESS', '2001-01-01'"
            " FROM generate_series(1, 35)"
        )
        make_app(result_expires=3600).backend.cleanup()
        assert query("SELECT count(*) FROM celery_taskmeta WHERE date_done < '2002-01-01'") == [(0,)]

    def test_cleanup_ends_in_time_and_the_next_one_goes_on(self, make_app, query, monkeypatch):
        monkeypatch.setattr("app.results.backend._CLEANUP_BATCH", 10)
        for table, column, sequence in (
            ("celery_taskmeta", "task_id", "task_id_sequence"),
            ("celery_tasksetmeta", "taskset_id", "taskset_id_sequence"),
        ):
            query(
                f"INSERT INTO {table} (id, {column}, date_done)"
                f" SELECT nextval('{sequence}'), gen_random_uuid(),"
                " timestamp '2001-01-01' + n * interval '1 s' FROM generate_series(1, 35) n"
            )
        left = (
            "SELECT (SELECT count(*) FROM celery_taskmeta WHERE date_done < '2002-01-01'),"
            " (SELECT count(*) FROM celery_tasksetmeta WHERE date_done < '2002-01-01')"
        )
        backend = make_app(result_expires=3600).backend
        monkeypatch.setattr("app.results.backend._CLEANUP_SECONDS", 0)
        for kept in (25, 15):  # a batch of each, so that neither keeps the other from going
            backend.cleanup()
            assert query(left) == [(kept, kept)]
        monkeypatch.undo()
        backend.cleanup()
        assert query(left) == [(0, 0)]

    def test_cleanup_ends_before_its_time_limit(self):
        queue = load_topology().queue_by_task["celery.backend_cleanup"]
        assert queue.soft_time_limit - 10 >= _CLEANUP_SECONDS

    @pytest.mark.parametrize("never", [None, 0])
    def test_results_that_never_expire(self, make_app, query, never):
        app = make_app(result_expires=never)
        task_id = str(uuid4())
        app.backend.store_result(task_id, 1, "SUCCESS")
        query("UPDATE celery_taskmeta SET date_done = '2001-01-01' WHERE task_id = %s", task_id)
        app.backend.cleanup()
        assert app.backend.task_result_exists(task_id)
        app.backend.forget(task_id)


class TestWaiting:
    def store_later(self, backend, task_id, seconds=0.3):
        threading.Timer(seconds, backend.store_result, (task_id, task_id, "SUCCESS")).start()

    def test_a_result_is_seen_long_before_the_interval_has_passed(self, make_app):
        app, task_id = make_app(), str(uuid4())
        self.store_later(app.backend, task_id)
        start = time.monotonic()
        assert AsyncResult(task_id, app=app).get(timeout=10, interval=5) == task_id
        assert time.monotonic() - start < 0.6

    def test_a_group_is_joined_in_one_statement_a_look(self, make_app, monkeypatch):
        app = make_app()
        ids = [str(uuid4()) for _ in range(50)]
        statements = []
        fetch = app.backend._store.fetch
        monkeypatch.setattr(app.backend._store, "fetch", lambda *a: statements.append(a) or fetch(*a))
        for task_id in ids:
            app.backend.store_result(task_id, task_id, "SUCCESS")
        assert GroupResult("g", [AsyncResult(i, app=app) for i in ids], app=app).get(timeout=5) == ids
        assert len(statements) == 1

    def test_members_that_come_late_or_fail(self, make_app):
        app = make_app()
        ids = [str(uuid4()) for _ in range(2)]
        app.backend.store_result(ids[0], 0, "SUCCESS")
        group = GroupResult("g", [AsyncResult(i, app=app) for i in ids], app=app)
        start = time.monotonic()
        with pytest.raises(ResultTimeout):
            group.get(timeout=0.2)
        assert 0.2 <= time.monotonic() - start < 0.6
        threading.Timer(0.2, app.backend.store_result, (ids[1], KeyError("k"), "FAILURE")).start()
        with pytest.raises(KeyError):
            group.get(timeout=10, interval=5)

    def test_timeouts(self, make_app):
        unknown = AsyncResult("never", app=make_app())
        for timeout in (0, 0.2):
            start = time.monotonic()
            with pytest.raises(ResultTimeout):
                unknown.get(timeout=timeout)
            assert timeout <= time.monotonic() - start < timeout + 0.4


def exit_status(child, seconds=5):
    """Of a child process; one that hangs is killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


class TestOneConnection:
    @pytest.fixture
    def sessions(self, query, dsn):
        """Backend process ids of the sessions that results use."""
        mark = f"results-{uuid4()}"
        return SimpleNamespace(
            conf={"database_engine_options": {"connect_args": {"application_name": mark}}},
            pids=lambda: [
                pid for (pid,) in query("SELECT pid FROM pg_stat_activity WHERE application_name = %s", mark)
            ],
            end=lambda: query(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = %s",
                mark,
            ),
        )

    def test_for_all_threads(self, make_app, sessions):
        app = make_app(**sessions.conf)
        assert app.backend.thread_safe  # made here: Celery itself lets two threads make one each at first
        ids = [str(uuid4()) for _ in range(200)]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda task_id: app.backend.store_result(task_id, task_id, "SUCCESS"), ids))
            assert list(threads.map(lambda i: AsyncResult(i, app=app).get(timeout=10), ids)) == ids
        assert len(sessions.pids()) == 1

    def test_of_its_own_after_a_fork(self, make_app, sessions):
        app = make_app(**sessions.conf)
        app.backend.store_result("before the fork", 1, "SUCCESS")
        [parents] = sessions.pids()
        release, held = os.pipe()
        task_id = str(uuid4())
        child = os.fork()
        if child == 0:
            try:
                app.backend.store_result(task_id, 2, "SUCCESS")
                os.close(held)
                os.read(release, 1)
                os._exit(0)
            finally:
                os._exit(1)
        os.close(release)
        assert AsyncResult(task_id, app=app).get(timeout=5) == 2
        assert len(sessions.pids()) == 2
        os.close(held)
        assert exit_status(child) == 0
        app.backend.store_result("after the fork", 3, "SUCCESS")
        assert parents in sessions.pids()

    def test_a_fork_while_another_thread_writes(self, make_app):
        """The child must not inherit a lock that nobody in it will ever give back."""
        app = make_app()
        app.backend.store_result("x", 1, "SUCCESS")
        stop = threading.Event()

        def write():
            while not stop.is_set():
                app.backend.store_result(str(uuid4()), 1, "SUCCESS")

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(10):
                child = os.fork()
                if child == 0:
                    try:
                        app.backend.store_result(str(uuid4()), 1, "SUCCESS")
                        os._exit(0)
                    finally:
                        os._exit(1)
                assert exit_status(child) == 0
        finally:
            stop.set()
            writer.join()

    def test_a_new_one_when_it_was_terminated(self, make_app, sessions):
        app = make_app(**sessions.conf)
        for attempt in range(3):
            app.backend.store_result(f"terminated {attempt}", attempt, "SUCCESS")
            sessions.end()
            assert app.backend.get_task_meta(f"terminated {attempt}")["result"] == attempt
            sessions.end()

    def test_what_will_never_work_is_not_tried_again(self, make_app, query):
        backend = make_app(database_table_names={"task": "there_is_no_such_table"}).backend
        start = time.monotonic()
        with pytest.raises(psycopg2.errors.UndefinedTable):
            backend.store_result("x", 1, "SUCCESS")
        assert time.monotonic() - start < 1
        assert query("SELECT to_regclass('there_is_no_such_table')") == [(None,)]
        assert make_app().backend._tasks == "celery_taskmeta"  # Celery kept the name in its models

    def test_who_runs_no_task_gives_up_in_the_end(self, make_app):
        app = make_app(result_backend_max_retries=2)
        app.conf.result_backend = "db+postgresql://127.0.0.1:1/nowhere"
        with pytest.raises(BackendStoreError):
            app.backend.store_result("x", 1, "SUCCESS")


class TestWriting:
    def test_a_state_nobody_waits_for_is_replaced_by_the_next(self, backend, query):
        task_id = str(uuid4())
        [(before,)] = query("SELECT nextval('task_id_sequence')")
        backend.store_result(task_id, {}, "STARTED")
        backend.store_result(task_id, 1, "SUCCESS")
        time.sleep(0.1)
        assert query("SELECT nextval('task_id_sequence')") == [(before + 2,)]  # one insert
        assert query("SELECT status FROM celery_taskmeta WHERE task_id = %s", task_id) == [("SUCCESS",)]

    def test_a_state_nobody_waits_for_appears_all_the_same(self, backend, query):
        task_id = str(uuid4())
        backend.store_result(task_id, {}, "STARTED")
        assert backend.get_state(task_id) == "STARTED"  # read your own writes
        other = str(uuid4())
        backend.store_result(other, {}, "PROGRESS")
        time.sleep(0.5)
        assert query("SELECT status FROM celery_taskmeta WHERE task_id = %s", other) == [("PROGRESS",)]

    def test_final_states_wait_for_the_disk_and_others_do_not(self, backend, monkeypatch):
        statements = []
        run = backend._store._run
        monkeypatch.setattr(backend._store, "_run", lambda *a: statements.append(a[0]) or run(*a))
        for state in ("SUCCESS", "STARTED"):
            backend.store_result(str(uuid4()), 1, state)
            backend._store.flush()
        assert ["synchronous_commit = off" in statement for statement in statements] == [False, True]

    def test_one_row_that_cannot_be_stored_harms_no_other(self, backend, query):
        """Threads that wait together are written together."""
        good = [str(uuid4()) for _ in range(20)]
        with ThreadPoolExecutor(21) as threads:
            with backend._store._lock:
                futures = [threads.submit(backend.store_result, i, 1, "SUCCESS") for i in [*good, "x" * 156]]
                time.sleep(0.3)
            failed = [future.exception() for future in futures]
        assert [type(error) for error in failed if error] == [psycopg2.errors.StringDataRightTruncation]
        assert query("SELECT count(*) FROM celery_taskmeta WHERE task_id = ANY(%s)", good) == [(20,)]

    def test_the_main_process_of_a_worker_never_waits(self, make_app, postgres, monkeypatch):
        """It stores what befell its children, and has to serve the others while Postgres is away."""
        monkeypatch.setattr("app.results.store._worker_pid", os.getpid())
        app, task_id = make_app(), str(uuid4())
        with postgres.away("immediate"):
            start = time.monotonic()
            app.backend.mark_as_failure(task_id, ValueError())
            assert time.monotonic() - start < 0.2
            time.sleep(0.3)
        with pytest.raises(ValueError, match=r"^$"):
            AsyncResult(task_id, app=app).get(timeout=10)

    def test_text_that_postgres_refuses(self, backend):
        backend.store_result("odd text", ValueError("\0\ud800"), "FAILURE", traceback="a\0b\ud800c")
        assert "a" in backend.get_traceback("odd text")
