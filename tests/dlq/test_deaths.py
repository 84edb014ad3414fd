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
        names.append(f"skeldir-test-{os.getpid()}-{name}")
        seen = {"/usr", "/etc", sys.base_prefix, sys.prefix, str(ROOT)}
        return [
            *("docker", "run", "--rm", "--network=host", "--memory=300m", "--memory-swap=300m"),
            *(f"--name={names[-1]}", f"--workdir={ROOT}", "--tmpfs=/tmp"),
            *(f"--volume={path}:{path}:ro" for path in sorted(seen)),
            *("--env=DATABASE_URL", "--env=PYTHONPATH", "--env=DELIVERY_LIMIT", image),
        ]

    yield words
    subprocess.run(["docker", "rm", "--force", *names], capture_output=True, check=False)


def one_a_pool(
    worker: Callable[..., Worker], host: Callable[[str], list[str]] | None = None
) -> dict[str, Worker]:
    return {
        pool: worker(*arguments, queue=queue, inside=host(pool) if host else (), DELIVERY_LIMIT="1")
        for pool, (queue, arguments) in POOLS.items()
    }


def the_next(worker: Callable[..., Worker]) -> Worker:
    """The worker that finds what the dead ones held."""
    queues = ",".join(queue for queue, _ in POOLS.values())
    return worker("-P", "solo", queue=queues, DELIVERY_LIMIT="1")


def poison_in_each_queue(plane: Plane) -> bool:
    """Whether each queue has one open row, and no message is left."""
    rows = plane.database.rows("SELECT queue, class, error_type, state FROM celery_task_failures ORDER BY 1")
    expected = [(queue, "poison", "WorkerLost", "pending") for queue, _ in sorted(POOLS.values())]
    return rows == expected and plane.scalar("SELECT count(*) FROM kombu_message") == 0


def held(plane: Plane) -> int:
    return int(plane.scalar("SELECT count(*) FROM kombu_message WHERE holder IS NOT NULL"))


def test_a_job_that_kills_the_workers_main_process(plane: Plane, worker: Callable[..., Worker]) -> None:
    for pool, (queue, _) in POOLS.items():
        plane.publish(payload(task="t.kill_main", args=[pool]), queue)
    for one in one_a_pool(worker).values():
        assert one.process.wait(40) == -9, one.log.read_text()
    until(lambda: poison_in_each_queue(plane), 40, the_next(worker).log)


def test_a_host_that_is_gone(
    plane: Plane, worker: Callable[..., Worker], host: Callable[[str], list[str]]
) -> None:
    for queue, _ in POOLS.values():
        plane.publish(payload(task="t.slow", args=[300]), queue)
    workers = one_a_pool(worker, host)
    until(lambda: held(plane) == len(POOLS), 40, workers["prefork"].log)
    time.sleep(1)  # until the jobs run
    names = [word for one in workers.values() for word in one.process.args if word.startswith("--name=")]  # type: ignore[union-attr]
    subprocess.run(
        ["docker", "kill", *(n.removeprefix("--name=") for n in names)], capture_output=True, check=True
    )
    for one in workers.values():
        assert one.process.wait(20) == 128 + 9
    until(lambda: poison_in_each_queue(plane), 40, the_next(worker).log)


def test_no_memory_left_on_a_host(
    plane: Plane, worker: Callable[..., Worker], host: Callable[[str], list[str]]
) -> None:
    for queue, _ in POOLS.values():
        plane.publish(payload(task="t.eat"), queue)
    workers = one_a_pool(worker, host)
    for pool in ("solo", "threads"):  # there the job and its worker are one process
        assert workers[pool].process.wait(60) == 128 + 9, workers[pool].log.read_text()
    until(lambda: poison_in_each_queue(plane), 40, the_next(worker).log)
    assert workers["prefork"].process.poll() is None  # only its child was killed
