"""Metering, health and watchdog of real workers of every pool, on a real Postgres that goes away."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.postgres import ROOT, Cluster, free_port
from tests.workers import Worker, environment, started

APP = "tests.integration.watched_app"
# What Prometheus 2.42 asks for, and how
AS_PROMETHEUS = {
    "Accept": "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
}
POOLS = ("prefork", "solo", "threads")
MORE_LABELS = ("reason", "le", "exception", "kind")
OUTCOMES = ("started", "success", "failure", "retry")

# What each job must have added beside its outcomes
DETAILS = {
    "fails": ["failure_total.ValueError"],
    "given_up": ["failure_total.ValueError"],
    "rejected": ["failure_total.Reject"],
    "exits": ["failure_total.WorkerLostError", "worker_lost_total"],
    "soft": ["failure_total.SoftTimeLimitExceeded", "timeout_total.soft"],
    "soft_caught": ["timeout_total.soft"],
    "hard": ["failure_total.TimeLimitExceeded", "timeout_total.hard"],
    "killed": ["failure_total.WorkerLostError", "worker_lost_total"],
    "killed_once": ["failure_total.WorkerLostError", "worker_lost_total"],
}
# What a job must have added: started, success, failure, retry
EVERYWHERE = {
    "ok": (1, 1, 0, 0),
    "fails": (1, 0, 1, 0),
    "retried": (3, 1, 0, 2),
    "given_up": (3, 0, 1, 2),
    "rejected": (1, 0, 1, 0),
    "requeued_once": (2, 1, 0, 1),
    "ignored": (1, 1, 0, 0),
    "exits": (1, 0, 1, 0),
}
# Only processes can be interrupted or killed.
IN_PROCESSES = {
    "soft": (1, 0, 1, 0),
    "soft_caught": (1, 1, 0, 0),
    "hard": (1, 0, 1, 0),
    "killed": (1, 0, 1, 0),
    "killed_once": (2, 1, 1, 0),
}


@dataclass
class Watched:
    """A worker and its port."""

    pool: str
    dsn: str
    port: int
    folder: Path
    worker: Worker
    variables: dict[str, str]

    def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        request = Request(f"http://127.0.0.1:{self.port}{path}", method=method, headers=AS_PROMETHEUS)
        try:
            with urlopen(request, timeout=2) as answer:  # noqa: S310 - our own http address
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def status(self, path: str) -> int:
        return self.get(path)[0]

    def health(self) -> dict[str, Any]:
        return json.loads(self.get("/health")[1])

    def samples(self) -> dict[tuple[str, str], float]:
        """Value by (sample, task), such as (success_total, ok); a further label's value is appended.

        Failures also without their exception.
        """
        found: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples if family.name.startswith("celery_task_") else ():
                assert sample.labels["queue"] == "watched", sample
                task = sample.labels["task_name"].removeprefix(f"{APP}.")
                more = [sample.labels[label] for label in MORE_LABELS if label in sample.labels]
                name = sample.name.removeprefix("celery_task_")
                found[".".join([name, *more]), task] = sample.value
                if "exception" in sample.labels:
                    found[name, task] = found.get((name, task), 0) + sample.value
        return found

    def send(self, code: str) -> None:
        subprocess.run(
            [sys.executable, "-c", f"from {APP} import *\n{code}"],
            env=_environment(self.dsn, self.folder, **self.variables),
            cwd=ROOT,
            check=True,
            timeout=30,
        )


def _environment(dsn: str, folder: Path, **more: str) -> dict[str, str]:
    return environment(dsn, WATCHED_FOLDER=str(folder), **more)


def _wait(condition: Callable[[], Any], seconds: float) -> float:
    """Wait until something is so; returns how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.1)
    return time.monotonic() - began


def _command(pool: str) -> list[str]:
    options = ["--pool", pool, "--concurrency", "2", "--loglevel", "INFO"]
    return [sys.executable, "-m", "celery", "-A", APP, "worker", *options]


@contextmanager
def _watched(postgres: Cluster, pool: str, name: str, folder: Path, **more: str) -> Iterator[Watched]:
    database = postgres.copy_database("skeldir", name)
    port = free_port()
    env = _environment(database.dsn(), folder, CELERY_METRICS_PORT=str(port), **more)
    with started(_command(pool), folder / "worker", env) as worker:
        watched = Watched(pool, database.dsn(), port, folder, worker, more)
        try:
            _wait(lambda: _listens(port) or worker.process.poll() is not None, 20)
            _wait(lambda: watched.status("/health/ready") == 200, 20)
        except (AssertionError, OSError):
            print(worker.stdout.read_text()[-3000:], worker.stderr.read_text()[-3000:])
            raise
        yield watched


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module", params=POOLS)
def watched(
    request: pytest.FixtureRequest, postgres: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    pool = request.param
    with _watched(postgres, pool, f"watched_{pool}", tmp_path_factory.mktemp(pool)) as watched:
        yield watched


def test_series_are_born_at_zero(watched: Watched) -> None:
    samples = watched.samples()
    assert set(samples.values()) == {0}
    for task in EVERYWHERE | IN_PROCESSES:
        for name in ("started_total", "success_total", "failure_total", "duration_seconds_count"):
            assert (name, task) in samples
    assert not [name for name, _ in samples if "created" in name]
    bounds = {name.partition(".")[2] for name, task in samples if name.startswith("duration_seconds_bucket")}
    assert bounds == {"0.01", "0.05", "0.1", "0.25", "0.5", "1.0", "2.0", "5.0", "10.0", "+Inf"}


def test_every_outcome_is_counted_once(watched: Watched) -> None:
    jobs = EVERYWHERE | (IN_PROCESSES if watched.pool == "prefork" else {})
    named = {"killed_once", "requeued_once"}
    code = "".join(f"{task}.delay({task!r})\n" if task in named else f"{task}.delay()\n" for task in jobs)
    watched.send(
        code + "ok.apply_async(expires=-10)\n"
        "app.send_task('nobody.knows.this', queue='watched')\n"
        "ok.apply_async(shadow='a name from a message')\n"
    )
    expected = Counter(
        {
            (f"{outcome}_total", task): number
            for task, numbers in jobs.items()
            for outcome, number in zip(OUTCOMES, numbers, strict=True)
        }
    )
    expected["started_total", "ok"] += 1
    expected["success_total", "ok"] += 1
    expected["revoked_total.expired", "ok"] += 1
    # Whatever isn't in the ledger must not be in the metrics either: all families, all labels, all tasks.
    for key in watched.samples():
        if key[0].startswith(("failure_total.", "timeout_total.", "worker_lost_total", "in_flight")):
            expected[key] = 0
    for task in jobs:
        for detail in DETAILS.get(task, ()):
            expected[detail, task] = 1
        # Runs again by retry or requeue without a countdown wait anew; a second delivery doesn't.
        expected["queue_wait_seconds_count", task] = jobs[task][0] - (task in named)
    expected["queue_wait_seconds_count", "ok"] += 1

    def differences() -> dict[Any, Any]:
        seen = watched.samples()
        return {key: (seen[key], number) for key, number in expected.items() if seen[key] != number}

    deadline = time.monotonic() + 25
    while differences() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert differences() == {}
    time.sleep(0.5)  # nothing may be counted twice either
    assert differences() == {}
    seen = watched.samples()
    for task in jobs:
        ended = sum(seen[f"{outcome}_total", task] for outcome in OUTCOMES[1:])
        assert seen["started_total", task] == ended == seen["duration_seconds_count", task]
    assert not [task for _, task in seen if task.startswith(("nobody", "a name"))]
    if watched.pool == "prefork":
        assert seen["duration_seconds_bucket.0.5", "hard"] == 0
        assert seen["duration_seconds_bucket.5.0", "hard"] == 1


def test_jobs_are_counted_though_nobody_looks_for_long(watched: Watched) -> None:
    jobs = 1300
    names = ("started_total", "success_total", "duration_seconds_count", "queue_wait_seconds_count")
    before = watched.samples()
    watched.send(f"[ok.delay() for _ in range({jobs})][-1].get(timeout=25)")

    def counted() -> dict[str, float]:
        after = watched.samples()
        return {name: after[name, "ok"] - before[name, "ok"] for name in names}

    with suppress(AssertionError):  # one before the last may still run
        _wait(lambda: counted()["success_total"] == jobs, 5)
    assert counted() == dict.fromkeys(names, jobs)


def test_a_message_that_was_handed_back_waited_all_the_time(watched: Watched, postgres: Cluster) -> None:
    before = watched.samples()
    watched.worker.process.send_signal(signal.SIGSTOP)
    try:
        watched.send("ok.delay()")
        # As after a worker that took it and had to stop before it began.
        with postgres.connect(database=f"watched_{watched.pool}") as session, session.cursor() as cursor:
            cursor.execute("UPDATE kombu_message SET delivery = 1 WHERE visible AND payload LIKE '%%.ok\"%%'")
            assert cursor.rowcount == 1
    finally:
        watched.worker.process.send_signal(signal.SIGCONT)
    _wait(lambda: watched.samples()["success_total", "ok"] == before["success_total", "ok"] + 1, 20)
    counted = "queue_wait_seconds_count", "ok"
    assert watched.samples()[counted] == before[counted] + 1


def test_vitals(watched: Watched) -> None:
    def gauges() -> dict[str, float]:
        families = text_string_to_metric_families(watched.get("/metrics")[1])
        samples = [sample for family in families for sample in family.samples]
        return {
            sample.name.removeprefix("celery_worker_"): sample.value
            for sample in samples
            if sample.name.startswith("celery_worker_") and sample.labels.get("queue", "watched") == "watched"
        }

    seen = gauges()
    tick = seen.pop("loop_last_tick_timestamp_seconds")
    assert abs(time.time() - tick) < 3
    assert seen == {
        "prefetched": 0,
        "pool_size": 1 if watched.pool == "solo" else 2,
        "ready": 1,
        "draining": 0,
        "drained": 0,
        "rescued_messages_total": 0,
        "database_connected": 1,
        "build_info": 1,
    }
    before = watched.samples()["started_total", "slow"]
    if watched.pool != "solo":  # whose one thread takes no second message while it runs the first
        watched.send("for _ in range(5): slow.delay(2)")
        _wait(lambda: watched.samples()["in_flight", "slow"] == 2, 10)
        _wait(lambda: gauges()["prefetched"] == 3, 2)
        assert watched.samples()["started_total", "slow"] == before + 2
        _wait(lambda: watched.samples()["success_total", "slow"] == before + 5, 15)
        assert (gauges()["prefetched"], watched.samples()["in_flight", "slow"]) == (0, 0)


def test_a_scrape_is_well_formed_and_cheap(watched: Watched) -> None:
    text = watched.get("/metrics")[1]
    # The rules are tested with recorded scrapes: `python -m tests.monitoring.record` when this fails.
    recorded = (ROOT / "tests/monitoring/scrapes/worker-healthy.txt").read_text()
    mine = {
        line
        for line in recorded.splitlines()
        if line.startswith("# TYPE celery_") and " celery_d" not in line
    }
    assert {line for line in text.splitlines() if line.startswith("# TYPE")} == {
        line
        for line in mine
        if "celery_worker_dlq" not in line  # this application has no dead letters
    }
    if promtool := shutil.which("promtool"):
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    took = []
    for _ in range(20):
        began = time.monotonic()
        watched.get("/metrics")
        took.append(time.monotonic() - began)
    print(f"a scrape of {watched.pool} takes {sorted(took)[10] * 1000:.1f} ms ({len(text)} bytes)")
    assert min(took) < 0.02


def test_health_shows_what_is_consumed(watched: Watched) -> None:
    status, body = watched.get("/health")
    health = json.loads(body)
    assert (status, health["status"], health["broker"], health["database"]) == (200, "ok", "ok", "ok")
    assert health["queues"] == ["watched"]
    assert watched.get("/health", "HEAD") == (200, "")
    assert watched.status("/nothing") == 404
    assert watched.get("/health", "POST")[0] == 405


def test_clients_that_dawdle_do_not_block_the_server(watched: Watched) -> None:
    dawdling = [socket.create_connection(("127.0.0.1", watched.port)) for _ in range(60)]
    try:
        for client in dawdling[::2]:
            client.sendall(b"GET /metr")
        began = time.monotonic()
        assert watched.status("/health/live") == 200
        assert time.monotonic() - began < 1
    finally:
        for client in dawdling:
            client.close()


@pytest.mark.parametrize("outage", ["crash", "freeze"])
def test_health_follows_the_database(watched: Watched, postgres: Cluster, outage: str) -> None:
    try:
        if outage == "crash":
            postgres.stop("immediate")
        else:
            postgres.pause()
        _wait(lambda: watched.status("/health") == 503, 5)
        _wait(lambda: watched.health()["database"] == "unreachable", 5)
        if outage == "crash":  # of a frozen server, a connection that asks nothing just now knows nothing
            _wait(lambda: watched.health()["broker"] != "ok", 5)
        assert watched.status("/health/ready") == 503
        away = time.monotonic()
        while time.monotonic() - away < 5:  # longer than the loop may stand still at other times
            assert watched.status("/health/live") == 200
            time.sleep(0.5)
    finally:
        if outage == "crash":
            postgres.start()
        else:
            postgres.resume()
    _wait(lambda: watched.health()["database"] == "ok", 5)
    _wait(lambda: watched.status("/health") == 200, 5)
    assert watched.status("/health/live") == 200
    before = watched.samples()["success_total", "ok"]
    watched.send("ok.delay()")
    _wait(lambda: watched.samples()["success_total", "ok"] > before, 10)


def test_a_task_may_hold_the_loop_up_to_its_limit(watched: Watched) -> None:
    before = watched.samples()
    watched.send("slow.delay(6)")
    _wait(lambda: watched.samples()["started_total", "slow"] == before["started_total", "slow"] + 1, 10)
    while watched.samples()["success_total", "slow"] == before["success_total", "slow"]:
        assert watched.status("/health/live") == 200
        time.sleep(0.3)


def test_messages_of_a_killed_worker_are_counted_by_who_gives_them_back(
    postgres: Cluster, tmp_path: Path
) -> None:
    with _watched(postgres, "prefork", "watched_rescue", tmp_path) as killed:
        killed.send("for _ in range(3): slow.delay(2)")
        _wait(lambda: killed.samples()["in_flight", "slow"] == 2, 10)
        held = "SELECT count(*) FROM kombu_message WHERE holder IS NOT NULL"
        with closing(postgres.connect(database="watched_rescue")) as session, session.cursor() as cursor:

            def one(query: str) -> int:
                cursor.execute(query)
                return int(cursor.fetchall()[0][0])

            assert one(held) == 3
            os.killpg(killed.worker.process.pid, signal.SIGSTOP)
            try:
                port = free_port()
                env = _environment(killed.dsn, tmp_path, CELERY_METRICS_PORT=str(port))
                with started(_command("prefork"), tmp_path / "rescuer", env) as worker:
                    rescuer = Watched("prefork", killed.dsn, port, tmp_path, worker, {})
                    _wait(lambda: _listens(port) and rescuer.status("/health/ready") == 200, 20)
                    assert "\ncelery_worker_rescued_messages_total 0.0\n" in rescuer.get("/metrics")[1]
                    os.killpg(killed.worker.process.pid, signal.SIGKILL)
                    _wait(lambda: rescuer.samples()["success_total", "slow"] == 3, 20)
                    assert "\ncelery_worker_rescued_messages_total 3.0\n" in rescuer.get("/metrics")[1]
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(killed.worker.process.pid, signal.SIGKILL)


def test_the_dsn_is_in_no_answer(watched: Watched) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/metrics", "/nothing"):
        answer = watched.get(path)[1]
        assert "postgresql" not in answer
        assert "app_user" not in answer


def test_a_frozen_loop_is_not_live_and_stops_the_watchdog(postgres: Cluster, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        told: list[str] = []

        def hear() -> list[str]:
            new = []
            while True:
                try:
                    new += systemd.recv(4096).decode().splitlines()
                except BlockingIOError:
                    told.extend(new)
                    return new

        more = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        with _watched(postgres, "prefork", "watched_frozen", tmp_path, **more) as watched:
            _wait(lambda: hear() is not None and "READY=1" in told, 5)
            _wait(lambda: "WATCHDOG=1" in hear(), 5)
            watched.send("freeze.delay()")
            _wait(lambda: watched.status("/health/live") == 503, 10)
            assert watched.health()["broker"] == "stalled"
            time.sleep(0.6)
            hear()
            time.sleep(1.5)
            assert "WATCHDOG=1" not in hear()
            _wait(lambda: watched.status("/health/live") == 200, 10)
            _wait(lambda: "WATCHDOG=1" in hear(), 5)
            assert "STOPPING=1" not in told
            assert watched.worker.stop() == 0
            hear()
            assert "STOPPING=1" in told


@pytest.mark.parametrize("pool", POOLS)
def test_a_message_with_a_nonsensical_route_is_counted_under_other(
    postgres: Cluster, tmp_path: Path, pool: str
) -> None:
    with _watched(postgres, pool, f"nonsense_{pool}", tmp_path) as watched:
        watched.worker.process.send_signal(signal.SIGSTOP)
        watched.send("for _ in range(3): ok.delay()")
        with postgres.connect(database=f"nonsense_{pool}") as session, session.cursor() as cursor:
            cursor.execute(
                "UPDATE kombu_message SET payload = jsonb_set(payload::jsonb,"
                " '{properties,delivery_info,routing_key}', '[\"watched\"]')::text"
                " WHERE id = (SELECT min(id) FROM kombu_message WHERE visible)"
            )
            assert cursor.rowcount == 1
        watched.worker.process.send_signal(signal.SIGCONT)

        def succeeded(queue: str) -> bool | float:
            name = f'celery_task_success_total{{queue="{queue}",task_name="{APP}.ok"}} '
            line = re.search(re.escape(name) + "(.*)", watched.get("/metrics")[1])
            return line is not None and float(line[1])

        _wait(lambda: (succeeded("watched"), succeeded("other")) == (2, 1), 20)


def test_a_worker_whose_port_is_taken_says_so(postgres: Cluster, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        env = _environment(postgres.dsn("app_user", "skeldir"), tmp_path, CELERY_METRICS_PORT=port)
        done = subprocess.run(
            _command("solo"), env=env, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
    assert done.returncode == os.EX_CONFIG
    assert port in done.stderr
    assert len(done.stderr.splitlines()) == 1
