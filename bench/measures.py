"""The measures: each returns one figure of one contender."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench.records import records
from tests.postgres import Database, free_port

ROOT = Path(__file__).resolve().parent.parent
TOO_LONG = 30.0
"""Seconds after which a job of a killed worker counts as never run again."""


@dataclass(frozen=True)
class Contender:
    """A broker and a place for results."""

    name: str
    broker: str
    results: str
    database: Database | None = None
    """Where its transactions can be counted."""
    metered: bool = False
    """Whether its workers are metered and watched, as those of the plane are."""
    slow: bool = False
    """Gets a tenth of the messages, so that the others don't have to wait for it."""


@dataclass(frozen=True)
class Run:
    """What one contender's processes share during one measure."""

    contender: Contender
    log: Path
    prefetch: int

    @property
    def environment(self) -> dict[str, str]:
        """The environment that `bench.app` reads."""
        return {
            **os.environ,
            "BENCH_CONTENDER": self.contender.name,
            "BENCH_BROKER": self.contender.broker,
            "BENCH_RESULTS": self.contender.results,
            "BENCH_PREFETCH": str(self.prefetch),
            "BENCH_LOG": str(self.log),
            **(self._metered() if self.contender.metered else {}),
        }

    def _metered(self) -> dict[str, str]:
        url = self.contender.broker.removeprefix("sqla+")
        return {"BENCH_METERED": "1", "DATABASE_URL": url, "CELERY_METRICS_PORT": str(free_port())}

    def client(self, command: str, *arguments: object) -> Any:
        """Run a command of `bench.client` to its end."""
        done = subprocess.run(
            [sys.executable, "-m", "bench.client", command, *map(json.dumps, arguments)],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            check=True,
        )
        return json.loads(done.stdout)

    @contextmanager
    def worker(self, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """A Celery worker until the block ends."""
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "bench.app",
            "worker",
            "--loglevel",
            "ERROR",
        ]
        quiet = [
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            "--hostname",
            f"w{time.time_ns()}",
        ]
        with _ended(self._start([*command, *quiet, *options])) as process:
            yield process

    @contextmanager
    def consumers(self, count: int) -> Iterator[None]:
        """Processes that consume on raw channels, all from the same moment, until the block ends."""
        start = self.log.with_name("start")
        command = [sys.executable, "-m", "bench.client", "consume", "10", json.dumps(str(start))]
        processes = [self._start(command) for _ in range(count)]
        try:
            deadline = time.monotonic() + 60
            while len(list(start.parent.glob(f"{start.name}.*"))) < count:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.contender.name}: not all {count} consumers connected in 60 s")
                time.sleep(0.05)
            start.touch()
            yield
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def started(self, count: int, seconds: float) -> list[tuple[float, int]]:
        """The records as soon as there are so many of them."""
        deadline = time.monotonic() + seconds
        while len(found := records(self.log)) < count:
            if time.monotonic() > deadline:
                said = Path(f"{self.log}.output").read_text()[-1500:]
                raise TimeoutError(
                    f"{self.contender.name}: {len(found)} of {count} jobs ran in {seconds:.0f} s\n{said}"
                )
            time.sleep(0.05)
        return found

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with Path(f"{self.log}.output").open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)  # a warm shutdown: what is acknowledged stays so
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a worker and all its children at once, as a lost host would."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def run(contender: Contender, prefetch: int = 4) -> Iterator[Run]:
    """A measure's frame: a log of its own."""
    with tempfile.TemporaryDirectory(prefix="skeldir-bench-") as directory:
        yield Run(contender, Path(directory) / "log", prefetch)


def rate(found: list[tuple[float, int]]) -> float:
    """Jobs a second, without the first twentieth, in which a worker warms up."""
    moments = sorted(moment for moment, _ in found)
    warm = moments[len(moments) // 20 :]
    return (len(warm) - 1) / (warm[-1] - warm[0])


def publish(contender: Contender, count: int, many: bool = False) -> float:
    """Messages a second of one publisher; they are removed by a worker afterwards."""
    with run(contender, prefetch=50) as r:
        rate = r.client("publish_many" if many else "publish", count)
        with r.worker("--pool", "solo"):
            r.started(count, seconds=30 + count / 50)
        return rate


def drain(
    contender: Contender, count: int, pool: list[str], with_results: bool = False, prefetch: int = 4
) -> float:
    """Jobs a second of one worker that finds them waiting; `prefetch` is Celery's multiplier."""
    with run(contender, prefetch) as r:
        r.client("publish_many", count, with_results)
        with r.worker(*pool):
            return rate(r.started(count, seconds=30 + count / 20))


def cpu_seconds(session: int) -> float:
    """What the processes of a session have used so far, in ticks of a hundredth (proc_pid_stat(5))."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def pickup(contender: Contender, count: int) -> tuple[float, float]:
    """Seconds (p50, p99) from publishing to an idle worker until the job starts."""
    warm = 2
    with run(contender) as r, r.worker("--pool", "solo"):
        r.client("trickle", 0, warm)
        r.started(warm, seconds=30)
        published = r.client("trickle", warm, count)
        began = {number: moment for moment, number in r.started(warm + count, seconds=30)}
        waits = [began[number] - moment for number, moment in enumerate(published, warm)]
        return median(waits), quantiles(waits, n=100, method="inclusive")[98]


def consumers(contender: Contender, count: int, processes: int) -> float:
    """Messages a second that so many consumers take and acknowledge on raw channels."""
    with run(contender) as r:
        r.client("publish_many", count)
        with r.consumers(processes):
            return rate(r.started(count, seconds=30 + count / 20))


def recovery(contender: Contender, number: int) -> float:
    """Seconds from the kill -9 of a worker until both its jobs run elsewhere."""
    queue = f"hold{number}"
    with run(contender, prefetch=1) as r, r.worker("-Q", queue, "-c", "2") as victim:
        r.client("holding", 0, 2, queue)
        r.started(2, seconds=30)
        with r.worker("-Q", queue, "-c", "3") as heir:
            r.client("holding", 2, 1, queue)
            r.started(3, seconds=30)
            time.sleep(1)
            kill(victim)
            killed = time.monotonic()
            try:
                return max(moment for moment, _ in r.started(5, seconds=TOO_LONG)[3:]) - killed
            except TimeoutError:
                return float("inf")
            finally:
                kill(heir)


def idle_transactions(contender: Contender, seconds: float) -> float:
    """Transactions a second in the database of one worker that has nothing to do."""
    count = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s"
    with run(contender) as r, r.worker("--pool", "solo"):
        r.client("publish", 1)
        r.started(1, seconds=30)
        time.sleep(2)
        # Counted from another database, so that counting isn't counted.
        with closing(contender.database.cluster.connect(database="postgres")) as session:
            cursor = session.cursor()
            counts = []
            for pause in (0, seconds):
                time.sleep(pause)
                cursor.execute(count, [contender.database.name])
                counts.append(cursor.fetchone()[0])
        return (counts[1] - counts[0]) / seconds
