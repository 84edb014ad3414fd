"""Chaos with a seed: kill, freeze and cut off real workers, crash Postgres, then read the ledger.

    python -m bench.chaos --seed 7 --jobs 2000 --seconds 60 DATABASE_URL [--restart COMMAND]

DATABASE_URL is an empty database migrated to `celery_foundation@head`. COMMAND crashes and starts Postgres;
without it that kind of trouble is left out. Jobs are immediate, delayed, retried and chained; one always
kills its process. The ledger ends with what was published, ran, was given up at the delivery limit (and
is kept), was lost, ran twice, and ran twice without having been in flight in a worker that got into
trouble; the status is 0 when nothing was lost, the killer stopped at its limit, and none was of the last
kind.
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg2

Worker = subprocess.Popen[bytes]
ROOT = Path(__file__).resolve().parent.parent
SLACK = 1.0
"""Seconds around a worker's trouble in which a job counts as in flight: it may have ended, but its
acknowledgement was on its way, or not yet on the disk of a server that crashed."""
_JOBS = ("-Q", "jobs", "-P")
POOLS = [(*_JOBS, "prefork", "-c", "2"), (*_JOBS, "solo"), (*_JOBS, "threads", "-c", "2")]
PUBLISH = """
import sys, time
from kombu.exceptions import OperationalError
import tests.broker.app_for_tests as tasks
def publish(i):
    kind = i % 5
    if kind == 0: tasks.job.apply_async([f'j{i}'], countdown=1 + i % 7)
    elif kind == 1: tasks.retrying.delay(f'j{i}')
    elif kind == 2: tasks.parent.delay(f'j{i}')
    elif kind == 3: (tasks.job.si(f'j{i}', 0.02) | tasks.job.si(f'k{i}')).delay()
    else: tasks.job.delay(f'j{i}', 0.05)
    tasks.note(f'sent j{i}')
def insist(function, *arguments):
    while True:
        try: return function(*arguments)
        except OperationalError: time.sleep(0.2)  # Postgres was just crashed: whether it has it isn't known
for i in range(int(sys.argv[1]), int(sys.argv[2])): insist(publish, i)
if sys.argv[1] == '0': insist(tasks.poison.delay)
"""


@dataclass
class Stay:
    """A job in the hands of a worker, from its reception to the last that was heard of it there."""

    worker: str
    began: float
    ended: float


@dataclass
class Hit:
    """Trouble: from when to when, in seconds of the clock, and for which workers (None: all)."""

    began: float
    ended: float
    workers: set[str] | None

    def explains(self, stay: Stay) -> bool:
        """Whether what this worker did meanwhile can have been lost to it."""
        touched = self.workers is None or stay.worker in self.workers
        return touched and self.began - SLACK <= stay.ended and stay.began <= self.ended + SLACK


class Chaos:
    """Workers on one database, and the trouble they get into."""

    application = "tests.broker.app_for_tests"
    pools: Sequence[tuple[str, ...]] = POOLS
    """What the workers are started with, in turns; so many of them run."""

    def __init__(self, dsn: str, seed: int, restart: Callable[[], object] | None) -> None:
        self.random = random.Random(seed)  # noqa: S311 - it must repeat, not surprise
        self.dsn = dsn
        self.restart = restart
        self.directory = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.environment = {
            **os.environ,
            "DATABASE_URL": dsn,
            "LEDGER": str(self.directory / "ledger"),
            "PYTHONPATH": str(ROOT),
        }
        self.workers: list[Worker] = []
        self.numbers: dict[int, str] = {}
        self.frozen: list[tuple[float, list[int]]] = []
        self.hits: list[Hit] = []
        self.done: Counter[str] = Counter()
        self.started = 0

    def start_worker(self) -> None:
        """One more worker, of the next kind of pool."""
        pool = self.pools[self.started % len(self.pools)]
        self.started += 1
        command = [sys.executable, "-m", "celery", "-A", self.application, "worker"]
        with (self.directory / f"worker{self.started}.log").open("wb") as log:
            self.workers.append(
                subprocess.Popen(
                    [*command, "-n", f"w{self.started}@chaos", "-l", "WARNING", *pool],
                    cwd=ROOT,
                    env=self.environment | self.of_worker(self.started),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        self.numbers[self.workers[-1].pid] = str(self.started)

    def of_worker(self, number: int) -> dict[str, str]:
        """What only one worker's environment has."""
        return {"WORKER": str(number)}

    def publish(self, first: int, last: int) -> subprocess.Popen[bytes]:
        """Publish jobs of all kinds in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-c", PUBLISH, str(first), str(last)],
            cwd=ROOT,
            env=self.environment | {"WORKER": "publisher"},
        )

    def trouble(self) -> None:
        """Something bad, drawn by the seed."""
        kinds = [self.kill_child, self.kill_child, self.kill_main, self.kill_main, self.freeze, self.cut_off]
        if self.restart is not None:
            kinds.append(self.crash_postgres)
        if self.random.random() < 0.05:
            kinds = [self.kill_all]
        kind = self.random.choice(kinds)
        began = time.time()
        hit = kind()
        touched = None if hit is None else {self.numbers[worker.pid] for worker in hit}
        self.hits.append(Hit(began, time.time(), touched))
        self.done[kind.__name__] += 1

    def kill_child(self) -> list[Worker]:
        """SIGKILL one pool process."""
        pids = [(pid, worker) for worker in self.workers for pid in self._children(worker)]
        if not pids:
            return []
        pid, worker = self.random.choice(pids)
        self._signal(pid, signal.SIGKILL)
        return [worker]

    def kill_main(self) -> list[Worker]:
        """SIGKILL one worker; another takes its place."""
        worker = self.random.choice(self.workers)
        worker.kill()
        return [worker]

    def kill_all(self) -> None:
        """SIGKILL every worker at once."""
        for worker in self.workers:
            worker.kill()

    def freeze(self) -> list[Worker]:
        """SIGSTOP one worker with its children, cut its sessions; it goes on when it counts as dead."""
        worker = self.random.choice(self.workers)
        pids = [worker.pid, *self._children(worker)]
        for pid in pids:
            self._signal(pid, signal.SIGSTOP)
        self._terminate(f"application_name LIKE 'broker% {worker.pid}'")
        self.frozen.append((time.monotonic() + self.random.uniform(2, 8), pids))
        return [worker]

    def cut_off(self) -> None:
        """Terminate some backends."""
        self._terminate(f"random() < {self.random.random():.2f}")

    def crash_postgres(self) -> None:
        """What `pg_ctl -m immediate restart` does."""
        if self.restart is not None:
            self.restart()

    def mend(self) -> None:
        """Replace the dead, thaw the frozen."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < len(self.pools):
            self.start_worker()
        due = [entry for entry in self.frozen if entry[0] <= time.monotonic()]
        self.frozen = [entry for entry in self.frozen if entry not in due]
        for _, pids in due:
            self._thaw(pids)

    def run(self, jobs: int, seconds: float) -> dict[str, object]:
        """Publish, make trouble for so long, wait for the end; what is wrong with the ledger, by name."""
        self.mend()
        began = time.monotonic()
        parts = 10
        publishers = []
        while time.monotonic() - began < seconds:
            if (
                len(publishers) < parts
                and time.monotonic() - began >= len(publishers) * seconds / parts / 1.5
            ):
                part = len(publishers)
                publishers.append(self.publish(part * jobs // parts, (part + 1) * jobs // parts))
            time.sleep(self.random.uniform(0.3, 1.5))
            self.trouble()
            self.mend()
        published = [publisher.wait(120) for publisher in publishers]
        deadline = time.monotonic() + 180 + jobs / 100
        while self._left() and time.monotonic() < deadline:
            self.mend()
            time.sleep(0.5)
        self.stop()
        return self.report(jobs * len(publishers) // parts, published)

    def report(self, jobs: int, published: list[int]) -> dict[str, object]:
        """Print the ledger; what is wrong with it."""
        ledger = [line.split() for line in (self.directory / "ledger").read_text().splitlines()]
        ended = Counter(line[1] for line in ledger if line[0] == "ended")
        wanted = [f"j{i}" for i in range(jobs)] + [f"k{i}" for i in range(jobs) if i % 5 == 3]
        given_up = self._given_up()
        lost = [name for name in wanted if not ended[name] and name not in given_up]
        poison = sum(line[:2] == ["began", "poison"] for line in ledger)
        twice = [name for name in wanted if ended[name] > 1]
        unexplained = self._unexplained(twice, ledger)
        result = {
            "published": len(wanted),
            "ran": sum(1 for name in wanted if ended[name]),
            "lost": len(lost),
            "given up": sum(1 for name in wanted if not ended[name] and name in given_up),
            "ran twice": len(twice),
            "of them not in flight at any trouble": len(unexplained),
            "deliveries of the killer": poison,
            "publishers that failed": sum(map(bool, published)),
            "trouble": dict(self.done),
            "left in the table": self._left(),
            "directory": str(self.directory),
        }
        print(json.dumps(result, indent=1))
        wrong = {
            "lost": lost,
            "ran twice, and not in flight at any trouble": {
                name: [str(stay) for stay in stays] for name, stays in unexplained.items()
            },
            "publishers that failed": [status for status in published if status],
            "deliveries of the killer": poison if poison > 3 + self.done.total() else 0,
        }
        return {what: found for what, found in wrong.items() if found}

    def stop(self) -> None:
        """End every worker."""
        for _, pids in self.frozen:
            self._thaw(pids)
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            with suppress(subprocess.TimeoutExpired):
                worker.wait(20)
            worker.kill()

    def _thaw(self, pids: list[int]) -> None:
        for pid in pids:
            self._signal(pid, signal.SIGCONT)
        # What it held was taken from it meanwhile, and it goes on with it.
        now = time.time()
        self.hits.append(Hit(now, now, {self.numbers[pids[0]]}))

    def _unexplained(self, names: list[str], ledger: list[list[str]]) -> dict[str, list[Stay]]:
        """Jobs that were in no worker's hands while it got into trouble, and in whose hands they were.

        The one that published it counts as well: where that was repeated, so is what it published; so does
        the moment it was sent: who had no answer from a server that crashed has sent it again.
        """
        stays: dict[str, list[Stay]] = {name[1:]: [] for name in names}
        hits = list(self.hits)
        for event, name, *_, worker, moment in ledger:
            # It ends its process, and that of `solo` is the worker's.
            if event == "began" and name == "poison":
                hits.append(Hit(float(moment), float(moment), {worker}))
            if (known := stays.get(name[1:])) is None:
                continue
            now = float(moment)
            stay = next((stay for stay in reversed(known) if stay.worker == worker), None)
            if stay is None or event == "got":
                known.append(Stay(worker, now, now))
            else:
                stay.ended = now
        return {
            name: stays[name[1:]]
            for name in names
            if not any(hit.explains(stay) for stay in stays[name[1:]] for hit in hits)
        }

    def _given_up(self) -> set[str]:
        """Jobs whose message is kept as dead: at its delivery limit, the last death being its own.

        Chance can do that too: whoever kills worker after worker meets some job three times.
        """
        session = psycopg2.connect(self.dsn)
        with session, session.cursor() as cursor:
            cursor.execute("SELECT payload::jsonb ->> 'body' FROM kombu_message WHERE dead IS NOT NULL")
            names = {str((json.loads(body)[0] or [""])[0]) for (body,) in cursor.fetchall()}
        session.close()
        # What a chain would have published next is given up with it.
        return names | {f"k{name[1:]}" for name in names if name.startswith("j")}

    def _left(self) -> int:
        while True:
            try:
                session = psycopg2.connect(self.dsn)
                with session, session.cursor() as cursor:
                    cursor.execute("SELECT count(*) FROM kombu_message WHERE dead IS NULL")
                    row = cursor.fetchone()
                session.close()
                return int(row[0]) if row else 0
            except psycopg2.OperationalError:
                time.sleep(0.2)

    def _terminate(self, which: str) -> None:
        with suppress(psycopg2.Error):
            session = psycopg2.connect(self.dsn)
            session.autocommit = True
            session.cursor().execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() AND " + which
            )
            session.close()

    @staticmethod
    def _children(worker: Worker) -> list[int]:
        with suppress(OSError):
            return [
                int(pid) for pid in Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
            ]
        return []

    @staticmethod
    def _signal(pid: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def main() -> int:
    """Read the arguments, make chaos."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dsn")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--restart", help="command that crashes Postgres and starts it again")
    arguments = parser.parse_args()
    restart = None
    if arguments.restart:
        command = shlex.split(arguments.restart)
        restart = lambda: subprocess.run(command, check=True)  # noqa: E731 - the caller's own command
    wrong = Chaos(arguments.dsn, arguments.seed, restart).run(arguments.jobs, arguments.seconds)
    if wrong:
        print(json.dumps(wrong, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
