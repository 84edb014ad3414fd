"""What kills a worker, made for real: the kernel's OOM killer, SIGKILL for its main process, its host gone.

One worker a pool, each with a queue of its own, so that the three are killed side by side. A host is a
container of this machine's own programs, with memory of its own.
"""

import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator

import pytest

from tests.dlq.conftest import Worker, until
from tests.dlq.plane import Plane, payload
from tests.postgres import ROOT

pytestmark = pytest.mark.timeout(240)

POOLS = {
    "prefork": ("housekeeping", ("-P", "prefork", "-c", "1")),
    "solo": ("maintenance", ("-P", "solo")),
    "threads": ("llm", ("-P", "threads", "-c", "1")),
}
IMAGE = "skeldir-test-host"


@pytest.fixture(scope="session")
def image() -> str:
    """An image with nothing in it but the names under which Debian's programs expect each other."""
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker engine answers; ./plane test starts one")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name in ("bin", "sbin", "lib", "lib64"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(link)
    subprocess.run(
        ["docker", "import", "-", IMAGE], input=content.getvalue(), capture_output=True, check=True
    )
    return IMAGE


@pytest.fixture
def host(image: str) -> Iterator[Callable[[str], list[str]]]:
    """The words that start a program on a host of that name; all hosts are gone after the test."""
    names: list[str] = []

    def words(name: str) -> list[str]:
        names.append(f"skeldir-test-{os.getpid()}-{name}{len(names)}")
        seen = {"/usr", sys.base_prefix, sys.prefix, str(ROOT)}
        return [
            *("docker", "run", "--rm", "--network=host", "--memory=300m", "--memory-swap=300m"),
            *(f"--name={names[-1]}", f"--workdir={ROOT}", "--tmpfs=/tmp"),
            *(f"--volume={path}:{path}:ro" for path in sorted(seen)),
            *("--env=DATABASE_URL", "--env=PYTHONPATH", "--env=DELIVERY_LIMIT", image),
        ]

    yield words
    subprocess.run(["docker", "rm", "--force", *names], capture_output=True, check=False)


class Workers:
    """One worker a pool, started again when it has died, as systemd does."""

    def __init__(self, worker: Callable[..., Worker], host: Callable[[str], list[str]] | None = None) -> None:
        self._worker, self._host = worker, host
        self.statuses: dict[str, list[int]] = {pool: [] for pool in POOLS}
        self.running = {pool: self._start(pool) for pool in POOLS}

    def _start(self, pool: str) -> Worker:
        queue, arguments = POOLS[pool]
        inside = self._host(pool) if self._host else ()
        return self._worker(*arguments, queue=queue, inside=inside, DELIVERY_LIMIT="1")

    def restart_the_dead(self) -> None:
        for pool, one in self.running.items():
            if (status := one.process.poll()) is not None:
                self.statuses[pool].append(status)
                self.running[pool] = self._start(pool)


def poison_in_each_queue(plane: Plane) -> bool:
    """Whether each queue has one open row, and no message is left."""
    rows = plane.database.rows("SELECT queue, class, error_type, state FROM celery_task_failures ORDER BY 1")
    expected = [(queue, "poison", "WorkerLost", "pending") for queue, _ in sorted(POOLS.values())]
    return rows == expected and plane.scalar("SELECT count(*) FROM kombu_message") == 0


def until_poison(plane: Plane, workers: Workers) -> None:
    def over() -> bool:
        workers.restart_the_dead()
        return poison_in_each_queue(plane)

    until(over, 80, workers.running["prefork"].log)


# The first death is nobody's for sure; the second, of a worker that ran this message alone, is its own.


def test_a_job_that_kills_the_workers_main_process(plane: Plane, worker: Callable[..., Worker]) -> None:
    for pool, (queue, _) in POOLS.items():
        plane.publish(payload(task="t.kill_main", args=[pool]), queue)
    workers = Workers(worker)
    until_poison(plane, workers)
    assert workers.statuses == {pool: [-9, -9] for pool in POOLS}


def test_a_host_that_is_gone(
    plane: Plane, worker: Callable[..., Worker], host: Callable[[str], list[str]]
) -> None:
    for queue, _ in POOLS.values():
        plane.publish(payload(task="t.slow", args=[300]), queue)
    workers = Workers(worker, host)
    deliveries = "SELECT coalesce(sum(delivery) FILTER (WHERE holder IS NOT NULL), 0) FROM kombu_message"
    for deaths in range(2):
        expected = (deaths + 1) * len(POOLS)
        until(lambda expected=expected: plane.scalar(deliveries) == expected, 40)
        time.sleep(1)  # until the jobs run
        processes = [one.process for one in workers.running.values()]
        names = [word[7:] for one in processes for word in one.args if word.startswith("--name=")]  # type: ignore[union-attr]
        subprocess.run(["docker", "kill", *names], capture_output=True, check=True)
        assert [one.wait(20) for one in processes] == [128 + 9] * len(POOLS)
        workers.restart_the_dead()
    until_poison(plane, workers)


def test_no_memory_left_on_a_host(
    plane: Plane, worker: Callable[..., Worker], host: Callable[[str], list[str]]
) -> None:
    for queue, _ in POOLS.values():
        plane.publish(payload(task="t.eat"), queue)
    workers = Workers(worker, host)
    until_poison(plane, workers)
    # Where the job has no process of its own, the worker is what the kernel kills.
    assert workers.statuses == {"prefork": [], "solo": [137, 137], "threads": [137, 137]}
