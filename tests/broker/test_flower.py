"""Flower from PyPI, unmodified, and Celery's own command line, on the plane as it is deployed."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.broker.conftest import until
from tests.postgres import ROOT, Database, free_port
from tests.workers import environment, publish, ready_worker, started

CELERY = (sys.executable, "-m", "celery", "-A", "app.celery_app")


def celery(dsn: str, *words: str, status: int = 0) -> str:
    """What a command of Celery's prints."""
    done = subprocess.run(
        [*CELERY, *words],
        cwd=ROOT,
        env=environment(dsn),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout


@contextmanager
def flower(dsn: str, directory: Path) -> Iterator[Callable[..., Any]]:
    """Flower, as a function that gets one of its pages; the API's as what their JSON says."""
    port = free_port()
    options = (f"--port={port}", "--address=127.0.0.1")
    env = environment(dsn, FLOWER_UNAUTHENTICATED_API="true")

    def get(page: str, *, status: bool = False) -> Any:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=30) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            if status:
                return error.code
            raise
        if status:
            return 200
        return json.loads(text) if page.startswith("/api") else text

    def answers() -> bool:
        try:
            return bool(get("/healthcheck"))
        except (urllib.error.URLError, ConnectionError):
            return False

    with started([*CELERY, "flower", *options], directory / "flower", env) as process:
        until(answers, 60)
        try:
            yield get
            assert process.process.poll() is None, "Flower ended"
        finally:
            process.process.kill()  # how long it takes to end by itself is its own affair


def test_flower_and_celerys_commands(database: Database, tmp_path: Path) -> None:
    dsn, name = database.dsn(), "housekeeping@test"
    with ready_worker(dsn, "housekeeping", tmp_path) as worker, flower(dsn, tmp_path) as get:
        # Flower asks once, and shows what was answered in time.
        answers = {"stats", "active_queues", "registered", "conf"}
        until(lambda: answers <= set(get("/api/workers?refresh=1").get(name, {})), 60)
        [queue] = get("/api/workers")[name]["active_queues"]
        assert queue["name"] == "housekeeping"
        job = ""

        def is_seen() -> bool:
            # Events flow once the worker has heard Flower's command, so the first job may go unseen.
            nonlocal job
            job = publish(dsn, "answer = housekeeping.ping.delay().id")
            time.sleep(0.5)
            return bool(get("/api/tasks").get(job, {}).get("name"))  # received, and not only ended

        until(is_seen, 60)
        until(lambda: get("/api/tasks")[job]["state"] == "SUCCESS", 20)
        seen = get("/api/tasks")[job]
        assert (seen["name"], seen["worker"]) == ("app.tasks.housekeeping.ping", name)
        pages = ("/workers", f"/worker/{name}", "/tasks", f"/task/{job}", "/metrics")
        assert [(page, status) for page in pages if (status := get(page, status=True)) != 200] == []
        assert get("/broker", status=True) == 404  # it says so of every broker but RabbitMQ and Redis
        assert f"{name}: OK" in celery(dsn, "inspect", "ping")
        assert f"{name}: OK" in celery(dsn, "inspect", "active")
        celery(dsn, "control", "shutdown", status=69)  # a worker that ends answers nobody, with any broker
        assert worker.process.wait(30) == 0
