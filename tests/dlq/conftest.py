"""What the tests of the dead letters share: a database with queues, and workers whose jobs fail."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.dlq.plane import Plane
from tests.postgres import ROOT, Cluster, Database


@pytest.fixture
def plane(database: Database) -> Iterator[Plane]:
    """A database for one test alone."""
    made = Plane(database)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared_plane(postgres: Cluster) -> Iterator[Plane]:
    """One database for all tests of a module."""
    name = f"dlq_shared_{time.monotonic_ns()}"
    made = Plane(postgres.copy_database("skeldir", name))
    yield made
    made.close()
    postgres.drop_database(name)


class Worker:
    """A real worker of `tests.dlq.app_for_tests`."""

    def __init__(
        self,
        dsn: str,
        directory: Path,
        number: int,
        *arguments: str,
        queue: str = "housekeeping",
        inside: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.log = directory / f"worker{number}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *inside,
                    *(sys.executable, "-m", "celery", "-A", "tests.dlq.app_for_tests", "worker"),
                    *("-Q", queue, "-n", f"w{number}@test", "-l", "WARNING", *arguments),
                ],
                cwd=ROOT,
                env={**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": str(ROOT)} | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, *, everything: bool = True) -> None:
        """End the worker: all of it, as a host that loses its power, or its main process alone."""
        (os.killpg if everything else os.kill)(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


@pytest.fixture
def worker(plane: Plane, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Start workers; they are gone after the test."""
    started: list[Worker] = []

    def start(*arguments: str, **options: Any) -> Worker:
        started.append(Worker(plane.database.dsn(), tmp_path, len(started) + 1, *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def until(true: Callable[[], object], seconds: float = 30.0, log: Path | None = None) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, log.read_text()[-6000:] if log else "it didn't happen in time"
        time.sleep(0.1)
