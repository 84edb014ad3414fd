"""What the broker's tests share: a database of their own, connections, and real workers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kombu import Connection, Exchange, Queue
from psycopg2.extensions import cursor

import app.broker
from tests.postgres import ROOT, Cluster, Database

JOBS = Queue("jobs", Exchange("jobs", "direct"), "jobs")


def until(true: Callable[[], object], seconds: float = 15.0) -> float:
    """Wait until something holds; returns how long that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it didn't happen in time"
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.fixture(autouse=True)
def _registered() -> None:
    app.broker.register()


@pytest.fixture
def url(database: Database) -> str:
    return f"sqla+{database.dsn()}"


@pytest.fixture
def sql(database: Database) -> Iterator[cursor]:
    session = database.connect()
    yield session.cursor()
    session.close()


@pytest.fixture
def connect(url: str) -> Iterator[Callable[..., Connection]]:
    """Make connections, with their transport options."""
    made: list[Connection] = []

    def _connect(**options: object) -> Connection:
        made.append(Connection(url, transport_options=options))
        return made[-1]

    yield _connect
    for connection in made:
        connection.release()


class Worker:
    """A real Celery worker on the database of a test."""

    def __init__(self, dsn: str, directory: Path, number: int, *arguments: str, **environment: str) -> None:
        self.name = f"w{number}@test"
        self.log = directory / f"worker{number}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "celery", "-A", "tests.broker.app_for_tests", "worker"),
                    *("-Q", "jobs", "-n", self.name, "-l", "INFO", *arguments),
                ],
                cwd=ROOT,
                env=celery_environment(dsn, directory) | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def ready(self) -> "Worker":
        until(lambda: f"{self.name} ready" in self.text, 60)
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [self.process.pid, *map(int, children)]

    def stop(self) -> None:
        for pid in self.pids() if self.process.poll() is None else []:
            os.kill(pid, signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


def celery_environment(dsn: str, directory: Path) -> dict[str, str]:
    return {**os.environ, "DATABASE_URL": dsn, "LEDGER": str(directory / "ledger"), "PYTHONPATH": str(ROOT)}


class Ledger:
    """What jobs noted."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self) -> list[str]:
        text = self._path.read_text() if self._path.exists() else ""
        return [line.rpartition(" ")[0] for line in text.splitlines()]

    def count(self, line: str) -> int:
        return self.lines().count(line)

    def when(self, line: str) -> float:
        """When a line was noted, the last time."""
        noted = (text.rpartition(" ") for text in self._path.read_text().splitlines())
        return max(float(at) for what, _, at in noted if what == line)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


@pytest.fixture
def dsn(database: Database) -> str:
    """Where workers and publishers connect to; a module may put something in between."""
    return database.dsn()


@pytest.fixture
def worker(dsn: str, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Start workers; whatever becomes of them, they are gone after the test."""
    started: list[Worker] = []

    def _worker(*arguments: str, **environment: str) -> Worker:
        started.append(Worker(dsn, tmp_path, len(started) + 1, *arguments, **environment))
        return started[-1]

    yield _worker
    for one in started:
        one.stop()


@pytest.fixture
def publish(dsn: str, tmp_path: Path) -> Callable[..., None]:
    """Run a piece of Python in a process that has the test's Celery application as `tasks`."""

    def _publish(code: str) -> None:
        subprocess.run(
            [sys.executable, "-c", f"import tests.broker.app_for_tests as tasks\n{code}"],
            cwd=ROOT,
            env=celery_environment(dsn, tmp_path),
            check=True,
            timeout=60,
        )

    return _publish


__all__ = ["JOBS", "Cluster", "Database", "Ledger", "Worker", "until"]
