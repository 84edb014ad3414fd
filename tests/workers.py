"""Real workers for tests: processes as a person starts them, with their logs at hand."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.postgres import ROOT, free_port

Environment = dict[str, str]


def environment(dsn: str, **more: str) -> Environment:
    """What a process of the plane is given: nothing of this process but the PATH."""
    return {"PATH": os.environ["PATH"], "DATABASE_URL": dsn, **more}


@dataclass
class Worker:
    """A worker process; `stdout` and `stderr` are files that it writes."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    def lines(self) -> list[dict[str, Any]]:
        """The log so far; ValueError where a line isn't one JSON object."""
        return [json.loads(line) for line in self.stdout.read_text().splitlines()]

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], seconds: float = 30) -> dict[str, Any]:
        """The first log line that meets a condition."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            # The last line may not be complete yet.
            for line in self.stdout.read_text().split("\n")[:-1]:
                if condition(json.loads(line)):
                    return dict(json.loads(line))
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(
            f"the line did not come (exit status {self.process.poll()}):\n"
            f"{self.stdout.read_text()[-4000:]}\n{self.stderr.read_text()[-4000:]}"
        )

    def stop(self) -> int:
        """Ask the worker to finish and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=10)
            raise


def exporter_command(port: int) -> list[str]:
    """What starts the exporter on a port that is not the sheet's."""
    code = (
        "from app.core.topology import Exporter, load_topology\nfrom app.exporter.process import run\n"
        f"run(load_topology().model_copy(update={{'exporter': Exporter(port={port})}}))"
    )
    return [sys.executable, "-c", code]


@contextmanager
def started_worker(
    dsn: str, queue: str, directory: Path, *arguments: str, cwd: Path = ROOT, **variables: str
) -> Iterator[Worker]:
    """`celery -A app.celery_app worker -Q QUEUE`, started by hand; it may not be ready yet."""
    words = [
        "--queues",
        queue,
        "--hostname",
        f"{queue}@test",
        "--concurrency",
        "1",
        "--loglevel",
        "INFO",
        *arguments,
    ]
    command = [sys.executable, "-m", "celery", "-A", "app.celery_app", "worker", *words]
    variables.setdefault("CELERY_METRICS_PORT", str(free_port()))
    with started(command, directory / queue, environment(dsn, **variables), cwd) as worker:
        yield worker


@contextmanager
def started(command: Sequence[str | Path], log: Path, env: Environment, cwd: Path = ROOT) -> Iterator[Worker]:
    """Any worker command; the process is gone when the block ends."""
    stdout, stderr = log.with_suffix(".stdout"), log.with_suffix(".stderr")
    with stdout.open("wb") as out, stderr.open("wb") as err:
        # A session of its own, so that what it leaves behind can be ended without touching anything else.
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=err, start_new_session=True)
    worker = Worker(process, stdout, stderr)
    try:
        yield worker
    finally:
        worker.stop()


@contextmanager
def ready_worker(dsn: str, queue: str, directory: Path, *arguments: str, **more: Any) -> Iterator[Worker]:
    """A worker by hand that consumes."""
    with started_worker(dsn, queue, directory, *arguments, **more) as worker:
        worker.wait_for(lambda line: line["message"].endswith(" ready."))
        yield worker


def publish(dsn: str, code: str) -> Any:
    """Run a publisher's code in a process of its own; what it assigns to `answer` comes back through JSON.

    `app` is the Celery application, `housekeeping`, `maintenance` and `llm` are the task modules.
    """
    script = (
        "import json\n"
        "from app.celery_app import celery_app as app\n"
        "from app.observability.context import correlation\n"
        "from app.tasks import housekeeping, llm, maintenance\n"
        f"{code}\nprint(json.dumps(answer))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(dsn),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    if done.returncode:
        raise AssertionError(done.stderr)
    return json.loads(done.stdout)
