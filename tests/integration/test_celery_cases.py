"""What Celery's users expect of a broker and of a result backend, with real workers on a real Postgres.

The cases are those of Celery's own integration tests and of its user guide, in our words; Celery's own suite
runs by `python -m tests.upstream celery`. docs/celery-compatibility.md says what is different here, and why.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from celery import chain, chord, group, states
from celery.exceptions import (
    ChordError,
    Reject,
    SoftTimeLimitExceeded,
    TaskRevokedError,
    TimeLimitExceeded,
    TimeoutError,
    WorkerLostError,
)
from celery.result import AsyncResult, GroupResult, ResultSet
from celery.utils.serialization import UnpickleableExceptionWrapper

from tests.postgres import ROOT

POOLS = {
    "prefork": ("-P", "prefork", "-c", "2"),
    "solo": ("-P", "solo"),
    "threads": ("-P", "threads", "-c", "2"),
}
SOON = 20  # seconds that a crowded machine may take for what takes milliseconds
PREFORK_ONLY = pytest.mark.parametrize("worker", ["prefork"], indirect=True)


def until(true, seconds=SOON):
    """Wait until something is so, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.02)
    return found


class Worker:
    """A worker by hand, its log, and what remote control says to it and to nobody else."""

    def __init__(self, tasks, name, *options):
        self.name, self._control = f"{name}@cases", tasks.celery.control
        self.pool = name
        self.log = Path(f"{tasks.LEDGER}.{name}.log")
        command = [sys.executable, "-m", "celery", "-A", "tests.integration.cases_app", "worker"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "-n", self.name, "-l", "INFO", *options],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def inspect(self, method, *arguments, timeout=5.0):
        """The answer of this worker; it is there as soon as it has answered."""
        answers = getattr(self._control.inspect([self.name], timeout=timeout), method)(*arguments)
        return answers and answers[self.name]

    def tell(self, method, *arguments, **options):
        """A command; returns what the worker says to it."""
        command = getattr(self._control, method)
        [answer] = command(*arguments, destination=[self.name], reply=True, timeout=5.0, **options)
        return answer[self.name]

    def ready(self):
        until(lambda: " ready." in self.log.read_text(), 40)
        return self

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)


@pytest.fixture(scope="module")
def database(postgres):
    yield postgres.copy_database("skeldir", "celery_cases")
    postgres.drop_database("celery_cases")


@pytest.fixture(scope="module")
def tasks(database, tmp_path_factory):
    """The tasks' module, imported here as the workers import it."""
    os.environ["CASES_DSN"] = database.dsn()
    os.environ["CASES_LEDGER"] = str(tmp_path_factory.mktemp("cases") / "ledger")
    from tests.integration import cases_app  # noqa: PLC0415 - reads the environment

    cases_app.celery.set_default()
    yield cases_app
    cases_app.celery.close()


@contextmanager
def started(tasks, name, *options):
    worker = Worker(tasks, name, *options)
    try:
        yield worker.ready()
    finally:
        worker.stop()


@pytest.fixture(scope="module", params=POOLS)
def worker(request, tasks):
    """One worker of each pool for all that can share it."""
    with started(tasks, request.param, *POOLS[request.param]) as worker:
        yield worker
        assert worker.process.poll() is None, "the worker ended"


@pytest.fixture
def query(database):
    def run(statement, *parameters):
        with closing(database.connect("postgres")) as connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    return run


def noted(tasks):
    return tasks.LEDGER.read_text().splitlines() if tasks.LEDGER.exists() else []


# Tasks and their results


def test_calling(tasks, worker):
    result = tasks.add.delay(1, b=2)
    assert (result.get(timeout=SOON), result.state, result.successful()) == (3, states.SUCCESS, True)
    assert (
        tasks.same.delay("héllo 世界 \u0001 \U0001f40d").get(timeout=SOON) == "héllo 世界 \u0001 \U0001f40d"
    )
    assert tasks.same.delay({"n": [None, 1.5]}).get(timeout=SOON) == {"n": [None, 1.5]}
    # by name alone, and what `result_extended` tells
    sent = tasks.celery.send_task("tests.integration.cases_app.add", (3,), {"b": 4})
    assert sent.get(timeout=SOON) == 7
    assert (sent.name, sent.args, sent.kwargs, sent.worker) == (tasks.add.name, [3], {"b": 4}, worker.name)
    assert (sent.retries, sent.queue) == (0, "cases")


def test_failing(tasks, worker):
    failed, odd = tasks.fail.delay(), tasks.odd.delay()
    wrong = tasks.celery.send_task(tasks.add.name)  # `delay` would notice it here
    with pytest.raises(ValueError, match="no"):
        failed.get(timeout=SOON)
    assert failed.failed()
    assert "in fail" in failed.traceback
    with pytest.raises(TypeError):
        wrong.get(timeout=SOON)
    error = odd.get(timeout=SOON, propagate=False)
    assert type(error).__name__ in ("OddError", UnpickleableExceptionWrapper.__name__), error
    assert worker.inspect("ping") == {"ok": "pong"}


def test_ignored_results(tasks, worker, query):
    before = noted(tasks).count("silent")
    result, explicit = tasks.silent.delay(), tasks.add.apply_async((1,), ignore_result=True)
    assert (result.ignored, result.get()) == (True, None)
    until(lambda: noted(tasks).count("silent") == before + 1)
    tasks.add.delay(1).get(timeout=SOON)
    assert (
        query("SELECT task_id FROM celery_taskmeta WHERE task_id IN (%s, %s)", result.id, explicit.id) == []
    )


def test_forgetting(tasks, worker, query):
    result = tasks.add.delay(1)
    assert result.get(timeout=SOON) == 1
    result.forget()
    assert AsyncResult(result.id).state == states.PENDING
    assert query("SELECT 1 FROM celery_taskmeta WHERE task_id = %s", result.id) == []
    with pytest.raises(TimeoutError):
        AsyncResult(result.id).get(timeout=0.1)


def test_retrying(tasks, worker):
    retried = tasks.retry_once.apply_async(priority=3, headers={"x-mine": "kept"}, expires=60)
    vain, stubborn = tasks.retry_in_vain.delay(), tasks.stubborn.delay()
    assert retried.get(timeout=SOON) == {"retries": 1, "priority": 3, "header": "kept"}
    with pytest.raises(KeyError, match="gone"):
        vain.get(timeout=SOON)
    assert stubborn.get(timeout=SOON) == 1
    slow = tasks.retry_once.delay(countdown=1)
    until(lambda: slow.state == states.RETRY)
    assert slow.get(timeout=SOON)["retries"] == 1


def test_the_end_of_a_retry_outlasts_its_beginning(tasks, worker):
    """The retry is published before its RETRY is stored, so another thread may end the job in between."""
    backend, ended = tasks.celery.backend, str(uuid4())
    for state in (states.RETRY, states.FAILURE, states.RETRY):
        backend.store_result(ended, KeyError("gone"), state)
    assert AsyncResult(ended).state == states.FAILURE


def test_rejecting(tasks, worker):
    assert tasks.reject.delay(requeue=True).get(timeout=SOON) == "again"
    with pytest.raises(Reject):
        tasks.reject.delay(requeue=False).get(timeout=SOON)


def test_when_it_is_due_and_when_it_is_too_late(tasks, worker):
    began = time.monotonic()
    late, too_late = tasks.nap.apply_async((0, "x"), countdown=1.0), tasks.add.apply_async((1,), expires=-1)
    in_time = tasks.add.apply_async((1,), expires=60)
    with pytest.raises(TaskRevokedError):
        too_late.get(timeout=SOON)
    assert in_time.get(timeout=SOON) == 1
    assert late.state == states.PENDING
    assert late.get(timeout=SOON) == "x"
    assert 1.0 <= time.monotonic() - began < 4


def test_following_a_task(tasks, worker):
    result = tasks.nap.delay(0.4, "done")
    until(lambda: result.state == states.STARTED)
    with pytest.raises(TimeoutError):
        result.get(timeout=0.05)
    assert result.get(timeout=SOON) == "done"


def test_what_a_task_knows_of_itself(tasks, worker):
    about = tasks.about_me.apply_async(priority=5, time_limit=40, soft_time_limit=30).get(timeout=SOON)
    assert about["root_id"] == about["id"]
    assert about["parent_id"] is None
    assert about["hostname"] == worker.name
    assert about["timelimit"] == [40, 30]
    assert about["delivery_info"] == {
        "exchange": "",
        "routing_key": "cases",
        "priority": 5,
        "redelivered": False,
    }


def test_publishing_from_many_threads_and_from_tasks(tasks, worker):
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda i: tasks.add.delay(i, i), range(40)))
    assert [result.get(timeout=SOON) for result in results] == [2 * i for i in range(40)]
    parent = tasks.publish_children.delay(3)
    assert parent.get(timeout=SOON) == 3
    assert sorted(child.get(timeout=SOON) for child in parent.children) == [0, 2, 4]


def test_publishing_from_forked_processes(tasks, worker):
    tasks.add.delay(0).get(timeout=SOON)  # so that there are connections to inherit
    script = (
        "import os, sys\n"
        "from tests.integration import cases_app as tasks\n"
        "assert tasks.add.delay(1, 1).get(timeout=20) == 2\n"
        "pids = []\n"
        "for n in range(3):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        got = [tasks.add.delay(n, i).get(timeout=20) for i in range(5)]\n"
        "        os._exit(got != [n + i for i in range(5)])\n"
        "    pids.append(pid)\n"
        "assert tasks.add.delay(1, 1).get(timeout=20) == 2\n"
        "sys.exit(any(os.waitpid(pid, 0)[1] for pid in pids))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, timeout=60, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# Canvas


def test_chains(tasks, worker):
    result = (tasks.add.s(1, 1) | tasks.add.s(2) | tasks.add.s(3)).delay()
    assert result.get(timeout=SOON) == 7
    assert result.parent.parent.get(timeout=SOON) == 2
    assert chain(tasks.add.si(1, 1), tasks.add.si(5, 5)).delay().get(timeout=SOON) == 10
    assert chain(tasks.replace_by_chain.s(4), tasks.add.s(100)).delay().get(timeout=SOON) == 115
    into_group = (tasks.add.s(1, 1) | group(tasks.add.s(1), tasks.add.s(2)) | tasks.total.s()).delay()
    assert into_group.get(timeout=SOON) == 7
    failing = (tasks.add.s(1, 1) | tasks.fail.s() | tasks.add.s(1) | tasks.add.s(1)).delay()
    with pytest.raises(ValueError, match="no"):
        failing.get(timeout=SOON)  # the last one's, though it never ran
    assert failing.parent.parent.parent.get(timeout=SOON) == 2


def test_groups(tasks, worker):
    result = group(tasks.add.s(i, i) for i in range(10)).delay()
    assert result.get(timeout=SOON) == [2 * i for i in range(10)]
    assert (result.ready(), result.successful(), result.completed_count()) == (True, True, 10)
    result.save()
    assert GroupResult.restore(result.id).get(timeout=SOON) == [2 * i for i in range(10)]
    result.delete()
    assert GroupResult.restore(result.id) is None
    nested = group(tasks.add.s(1, 1), group(tasks.add.s(2, 2), tasks.add.s(3, 3) | tasks.add.s(1))).delay()
    assert nested.get(timeout=SOON) == [2, 4, 7]
    mixed = group(tasks.add.s(1, 1), tasks.fail.s()).delay()
    with pytest.raises(ValueError, match="no"):
        mixed.get(timeout=SOON)
    assert mixed.get(timeout=SOON, propagate=False)[0] == 2
    assert group([]).delay().get(timeout=SOON) == []
    collected = ResultSet([tasks.add.delay(1, 1), group(tasks.add.s(2, 2), tasks.add.s(3, 3)).delay()])
    assert collected.get(timeout=SOON) == [2, [4, 6]]
    never = (tasks.add.s(1, 1) | tasks.fail.s() | group(tasks.add.s(1), tasks.add.s(2))).delay()
    with pytest.raises(ValueError, match="no"):
        never.get(timeout=SOON)


def test_maps(tasks, worker):
    pending = [
        tasks.same.map([1, 2, 3]).delay(),
        tasks.add.starmap([(1, 1), (2, 2)]).delay(),
        tasks.add.chunks(zip(range(10), range(10), strict=True), 4).delay(),
    ]
    assert pending[0].get(timeout=SOON) == [1, 2, 3]
    assert pending[1].get(timeout=SOON) == [2, 4]
    assert pending[2].get(timeout=SOON) == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]


def test_chords(tasks, worker):
    pending = {
        20: chord([tasks.add.s(i, i) for i in range(5)], tasks.total.s()).delay(),
        30: chord([tasks.add.s(1, 1) | tasks.add.s(8), tasks.add.s(10, 10)], tasks.total.s()).delay(),
        7: chord([tasks.add.s(3, 3)], tasks.total.s() | tasks.add.s(1)).delay(),
        0: chord([], tasks.total.s()).delay(),
        24: chord(
            [chord([tasks.add.s(1, 1), tasks.add.s(2, 2)], tasks.total.s()) for _ in range(4)],
            tasks.total.s(),
        ).delay(),
        16: chord(
            group(tasks.add.s(2, 2), group(tasks.add.s(4, 4), tasks.add.s(2, 2))), tasks.total.s()
        ).delay(),
        9: (
            chord([tasks.add.s(1, 1), tasks.add.s(2, 2)], tasks.total.s())
            | group(tasks.add.s(1), tasks.add.s(-4))
            | tasks.total.s()
        ).delay(),
        190: chord((tasks.same.s(i) for i in range(20)), tasks.total.s()).delay(),
        # its header takes several tries of the unlocking task
        3: chord([tasks.nap.s(0.5, 1), tasks.nap.s(0.1, 2)], tasks.total.s()).delay(),
    }
    assert {value: result.get(timeout=SOON) for value, result in pending.items()} == {v: v for v in pending}


def test_chords_that_fail(tasks, worker):
    told = tasks.on_error_by_id.s().set(task_id=str(uuid4()))
    body = tasks.total.s().on_error(tasks.on_error.s()).on_error(told)
    header = chord([tasks.add.s(1, 1), tasks.fail.s()], body).delay()
    inner = chord([chord([tasks.fail.s()], tasks.total.s()), tasks.add.s(1, 1)], tasks.total.s()).delay()
    in_body = chord([tasks.add.s(1, 1)], tasks.fail.s()).delay()
    assert isinstance(header.get(timeout=SOON, propagate=False), ChordError)
    assert isinstance(inner.get(timeout=SOON, propagate=False), ChordError)
    with pytest.raises(ValueError, match="no"):
        in_body.get(timeout=SOON)
    AsyncResult(told.options["task_id"]).get(timeout=SOON)
    until(lambda: f"failed {header.id} ChordError" in noted(tasks))


def test_callbacks(tasks, worker):
    follow, sorry = (
        tasks.add.s(10).set(task_id=str(uuid4())),
        tasks.on_error_by_id.s().set(task_id=str(uuid4())),
    )
    tasks.add.apply_async((1, 1), link=follow)
    failed = tasks.fail.apply_async(link_error=[sorry, tasks.on_error.s()])
    assert AsyncResult(follow.options["task_id"]).get(timeout=SOON) == 12
    AsyncResult(sorry.options["task_id"]).get(timeout=SOON)
    until(lambda: {f"told {failed.id}", f"failed {failed.id} ValueError"} <= set(noted(tasks)))
    later = (tasks.add.s(1, 1) | tasks.fail.s()).apply_async(link_error=tasks.on_error.s(), countdown=0.3)
    until(lambda: f"failed {later.id} ValueError" in noted(tasks))
    in_group = group(tasks.fail.s(), tasks.add.s(1, 1))
    in_group.link_error(tasks.on_error.s())
    children = in_group.delay().children
    until(lambda: f"failed {children[0].id} ValueError" in noted(tasks))


# Remote control


def test_inspecting(tasks, worker):
    assert worker.inspect("ping") == {"ok": "pong"}
    naps = [tasks.nap.delay(1.2, i) for i in range(3)]
    if worker.pool == "solo":  # which answers nothing while it runs a task, with any broker
        assert [nap.get(timeout=SOON) for nap in naps] == [0, 1, 2]
    else:
        until(lambda: naps[1].state == states.STARTED)
        active, reserved = worker.inspect("active"), worker.inspect("reserved")
        assert {job["id"] for job in active} == {nap.id for nap in naps[:2]}
        assert {job["id"] for job in active if job["args"] == [1.2, 0]} == {naps[0].id}
        assert [job["id"] for job in reserved] == [naps[2].id]
        assert worker.inspect("query_task", naps[0].id)[naps[0].id][0] == "active"
    assert worker.inspect("scheduled") == []
    assert tasks.add.name in worker.inspect("registered")
    [queue] = worker.inspect("active_queues")
    assert (queue["name"], queue["durable"], queue["exchange"]["type"]) == ("cases", True, "direct")
    stats = worker.inspect("stats")
    assert stats["broker"]["transport"] == "sqla"
    assert tasks.celery.main in worker.inspect("report")["ok"] or "celery" in worker.inspect("report")["ok"]
    assert worker.inspect("conf")["task_default_queue"] == "cases"
    assert isinstance(worker.inspect("clock")["clock"], int)
    for nap in naps:
        nap.get(timeout=SOON)
    assert stats["total"][tasks.add.name] > 0


def test_revoking(tasks, worker):
    delayed = tasks.add.apply_async((1,), countdown=1)
    assert "ok" in worker.tell("revoke", delayed.id)
    waiting = tasks.add.apply_async((2,), countdown=1, headers={"batch": "b7"})
    assert "ok" in worker.tell("revoke_by_stamped_headers", {"batch": ["b8", "b9"]})
    stamped = tasks.add.s(3)
    stamped.stamp(batch="b9")
    with pytest.raises(TaskRevokedError):
        stamped.delay().get(timeout=SOON)
    assert delayed.id in worker.inspect("revoked")
    with pytest.raises(TaskRevokedError):
        delayed.get(timeout=SOON)
    assert delayed.state == states.REVOKED
    assert waiting.get(timeout=SOON) == 2
    children = group(tasks.nap.s(0.1).set(countdown=1), tasks.add.s(1).set(countdown=1)).delay()
    assert "ok" in worker.tell("revoke", [child.id for child in children])
    for child in children:
        with pytest.raises(TaskRevokedError):
            child.get(timeout=SOON)


@PREFORK_ONLY
def test_terminating(tasks, worker):
    running = tasks.nap.delay(30)
    until(lambda: running.state == states.STARTED)
    running.revoke(terminate=True, signal="SIGKILL")
    with pytest.raises(TaskRevokedError):
        running.get(timeout=SOON)
    assert tasks.add.delay(1).get(timeout=SOON) == 1


@PREFORK_ONLY
def test_time_limits(tasks, worker):
    soft, hard = tasks.soft_limit.delay(), tasks.hard_limit.delay()
    with pytest.raises(SoftTimeLimitExceeded):
        soft.get(timeout=SOON)
    with pytest.raises(TimeLimitExceeded):
        hard.get(timeout=SOON)
    with pytest.raises(TimeLimitExceeded):
        tasks.nap.apply_async((20,), time_limit=1).get(timeout=SOON)


def test_limiting_the_rate(tasks, worker):
    assert "ok" in worker.tell("rate_limit", tasks.same.name, "4/s")
    began = time.monotonic()
    results = [tasks.same.delay(i) for i in range(5)]
    assert [result.get(timeout=SOON) for result in results] == list(range(5))
    assert time.monotonic() - began > 0.6
    assert "ok" in worker.tell("rate_limit", tasks.same.name, "0")


def test_consumers_come_and_go(tasks, worker):
    waiting = tasks.same.apply_async(("extra",), queue="extra")
    with pytest.raises(TimeoutError):
        waiting.get(timeout=0.3)
    assert "ok" in worker.tell("add_consumer", "extra")
    assert waiting.get(timeout=SOON) == "extra"
    assert {queue["name"] for queue in worker.inspect("active_queues")} == {"cases", "extra"}
    assert "ok" in worker.tell("cancel_consumer", "extra")
    after = tasks.same.apply_async(("after",), queue="extra")
    with pytest.raises(TimeoutError):
        after.get(timeout=0.3)
    with tasks.celery.connection() as connection:
        assert connection.default_channel.queue_purge("extra") == 1


@PREFORK_ONLY
def test_the_pool_grows_and_shrinks(tasks, worker):
    assert "ok" in worker.tell("pool_grow", 1)
    assert worker.inspect("stats")["prefetch_count"] == 6
    assert "ok" in worker.tell("pool_shrink", 1)
    assert worker.inspect("stats")["prefetch_count"] == 4
    assert tasks.add.delay(1).get(timeout=SOON) == 1


def test_events(tasks, worker):
    wanted = ["task-sent", "task-received", "task-started", "task-succeeded", "task-failed", "task-retried"]
    seen, ids = [], []
    with tasks.celery.connection() as connection:

        def see(event):
            seen.append((event["type"], event.get("uuid")))
            receiver.should_stop = {(kind, id_) for kind, id_ in zip(wanted, ids, strict=True)} <= set(seen)

        receiver = tasks.celery.events.Receiver(connection, handlers={"*": see})

        def publish():
            time.sleep(0.5)
            good, bad, again = tasks.add.delay(1), tasks.fail.delay(), tasks.retry_once.delay()
            ids.extend([good.id] * 4 + [bad.id, again.id])

        publisher = threading.Thread(target=publish)
        publisher.start()
        ids_known = publisher.join
        with receiver.consumer_context():
            ids_known()
            receiver.capture(limit=None, timeout=SOON, wakeup=False)
    assert set(zip(wanted, ids, strict=True)) <= set(seen)


# What kills its worker


@PREFORK_ONLY
def test_who_waits_for_a_poisonous_job_gets_an_answer(tasks, worker, query):
    """It is written in the transaction that makes the dead letter; what was to follow fails along."""
    silent = tasks.kill_process_silently.delay()
    alone, in_chain = tasks.kill_process.delay(), (tasks.kill_process.si() | tasks.add.s(1)).delay()
    in_chord = chord([tasks.kill_process.si(), tasks.add.s(1, 1)], tasks.total.s()).delay()
    for result in (alone, in_chain, in_chain.parent):
        with pytest.raises(WorkerLostError):
            result.get(timeout=SOON)
    assert isinstance(in_chord.get(timeout=SOON, propagate=False), ChordError)
    assert "2 deliveries" in str(alone.result)
    dead = "SELECT count(*) FROM celery_task_failures WHERE class = 'poison' AND task_id IN (%s, %s)"
    until(lambda: query(dead, alone.id, silent.id) == [(2,)])
    assert query("SELECT 1 FROM celery_taskmeta WHERE task_id = %s", silent.id) == []


@PREFORK_ONLY
def test_a_result_that_cannot_be_written_stops_no_dead_letter(tasks, worker, query):
    query("ALTER TABLE celery_taskmeta ADD CONSTRAINT away CHECK (status <> 'FAILURE') NOT VALID")
    try:
        lost = tasks.kill_process.delay()
        until(lambda: query("SELECT 1 FROM celery_task_failures WHERE task_id = %s", lost.id))
    finally:
        query("ALTER TABLE celery_taskmeta DROP CONSTRAINT away")


# What Postgres keeps


def test_old_results_are_cleaned_up(tasks, worker, query):
    old, young = tasks.add.delay(1), tasks.add.delay(2)
    assert old.get(timeout=SOON) + young.get(timeout=SOON) == 3
    query("UPDATE celery_taskmeta SET date_done = date_done - interval '3 days' WHERE task_id = %s", old.id)
    tasks.celery.tasks["celery.backend_cleanup"].delay().get(timeout=SOON)
    assert AsyncResult(old.id).state == states.PENDING
    assert AsyncResult(young.id).get(timeout=SOON) == 2


def test_nothing_stays_behind(tasks, worker, query):
    """After all of the above: what was sent is gone, and no queue of an answer or of an event is left."""
    until(lambda: query("SELECT count(*) FROM kombu_message WHERE holder IS NOT NULL") == [(0,)])
    until(
        lambda: (
            query(
                "SELECT count(*) FROM kombu_message m JOIN kombu_queue q ON q.id = m.queue_id"
                " WHERE q.name IN ('cases', 'extra')"
            )
            == [(0,)]
        )
    )
