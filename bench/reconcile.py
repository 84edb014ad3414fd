"""Do the metrics say what happened? Chaos with a ledger, reconciled to the last run.

    python -m bench.reconcile [--seed 7] [--jobs 400] [--seconds 20]

Workers with a pool of processes, of threads, and solo run jobs that end in every way, while children are
killed and workers are frozen, cut off and left without Postgres; their main processes live, because what one
counted dies with it. Meanwhile the tasks themselves write a ledger. In the end every worker's counters must
equal its part of the ledger, and the dead letters what the ledger says of each message; on the way so must
runs in flight and readiness. What differs is printed with both numbers, and the status is 1.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.request import urlopen

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from bench.chaos import ROOT, Chaos
from tests.postgres import Database, free_port, provisioned_cluster
from tests.workers import environment, started

WORKERS = (
    *[("-Q", "books,children", "-P", "prefork", "-c", "2")] * 2,
    ("-Q", "books", "-P", "solo"),
    ("-Q", "books", "-P", "threads", "-c", "2"),
)
POSSIBLE = 7
"""Runs they can have in flight."""
INVALID = ("\x01 not json", '{"headers": {"task": "books.job", "id": "x"}}')
EXPORTER = """
from app.exporter.process import run
from bench.reconciled_app import SHEET, Topology
run(Topology.model_validate(SHEET.model_dump() | {"exporter": {"port": PORT}}))
"""
CLIENT = """
import sys, time
from kombu.exceptions import OperationalError
from bench.reconciled_app import *
for line in sys.stdin:
    for attempt in range(20):
        try:
            exec(line)
            break
        except (OSError, OperationalError):  # Postgres is away
            time.sleep(0.5)
    print(flush=True)
"""
# Labels of exceptions that have none of their own
LABELS = {"KeyError": "LookupError", "SystemExit": "WorkerLostError"}
CLASSES = {
    "ConnectionError": "transient",
    "OperationalError": "transient",  # the retry could not be published
    "KeyError": "transient",  # what `given_up` raises in the end
    "SoftTimeLimitExceeded": "timeout",
    "TimeLimitExceeded": "timeout",
    "WorkerLostError": "poison",
    "SystemExit": "poison",
}
Line = dict[str, Any]
Counts = Counter[tuple[str, ...]]


class Ledger:
    """What happened, from what the tasks and Celery's own signals wrote down."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self.runs: dict[str, Line] = {}
        self.revoked: list[Line] = []
        self.unknown = 0
        """Messages published of a task that nobody knows."""
        stored: set[str] = set()
        for line in lines:
            match line["event"]:
                case "began":
                    self.runs[line["run"]] = {**line, "by": None, "stored_before": False}
                case "ended":
                    run = self.runs[line["run"]]
                    run |= {"by": line["by"], "at": line["at"]}
                    if line["by"] == "success" and run["task"] not in ("quick", "died_unstored"):
                        stored.add(run["id"])
                case "killed":
                    run = self.runs[line["run"]]
                    run["stored_before"] = run["id"] in stored
                case "died":
                    run = self.runs[line["run"]]
                    run["by"] = "success" if run["id"] in stored else None
                case "broken":
                    last = [run for run in self.runs.values() if run["id"] == line["id"]][-1]
                    last["by"] = line["by"]
                case "revoked":
                    self.revoked.append(line)
                case "unknown":
                    self.unknown += 1

    def open(self, *tasks: str) -> list[Line]:
        """Runs of these tasks, or of all, that have not said that they ended."""
        return [
            run for run in self.runs.values() if run["by"] is None and (not tasks or run["task"] in tasks)
        ]

    def outcome(self, run: Line) -> str:
        """How a run ended: `success`, `retry`, `terminated`, or the name of an exception."""
        if run["by"] in ("Retry", "Ignore"):
            return {"Retry": "retry", "Ignore": "success"}[run["by"]]
        if run["task"] == "requeued_once" and run["by"] == "Reject":
            return "retry"
        if run["task"] == "hard":  # asked by SIGTERM at first, which raises SystemExit in it
            return "TimeLimitExceeded"
        if run["by"] is not None:
            return str(run["by"])
        if any(
            (line["id"], line["worker"], line["by"]) == (run["id"], run["worker"], "terminated")
            for line in self.revoked
        ):
            return "terminated"
        # Celery looks whether the job had succeeded before, in a run whose acknowledgement was lost.
        return "success" if run["stored_before"] else "WorkerLostError"

    def counters(self) -> dict[int, Counts]:
        """What each worker's counters must say."""
        wanted: dict[int, Counts] = defaultdict(Counter)
        for run in self.runs.values():
            counts, task, outcome = wanted[run["worker"]], run["task"], self.outcome(run)
            counts["started", task] += 1
            counts["duration_count", task] += 1
            if outcome in ("success", "retry"):
                counts[outcome, task] += 1
            elif outcome != "terminated":
                counts["failure", task, LABELS.get(outcome, outcome)] += 1
            if LABELS.get(outcome, outcome) == "WorkerLostError":
                counts["worker_lost", task] += 1
            if run["task"] in ("soft", "soft_caught") and run["by"]:
                counts["timeout", task, "soft"] += 1
            if outcome == "TimeLimitExceeded":
                counts["timeout", task, "hard"] += 1
        for line in self.revoked:
            wanted[line["worker"]]["revoked", line["task"], line["by"]] += 1
        return wanted

    def dead_letters(self) -> Counts:
        """How many messages must have become dead letters, by task and class, of those that were run."""
        last: dict[str, Line] = {}
        for run in sorted(self.runs.values(), key=lambda run: run["at"]):
            last[run["message"]] = run
        found: Counts = Counter()
        for run in last.values():
            outcome = self.outcome(run)
            if outcome not in ("success", "retry", "terminated"):
                found[run["task"], CLASSES.get(outcome, "permanent")] += 1
        expired = {line["message"]: line["task"] for line in self.revoked if line["by"] == "expired"}
        for task in expired.values():
            found[task, "expired"] += 1
        return found


def samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """A scrape by sample name."""
    found = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name].append((sample.labels, sample.value))
    return found


def counters(text: str) -> Counts:
    """A worker's scrape in the ledger's words; what is 0 is left out."""
    seen: Counts = Counter()
    for name, of in samples(text).items():
        short = name.removeprefix("celery_task_").removesuffix("_total")
        if name == "celery_task_duration_seconds_count":
            short = "duration_count"
        elif not (name.startswith("celery_task_") and name.endswith("_total")):
            continue
        for labels, value in of:
            more = [labels[label] for label in ("exception", "reason", "kind") if label in labels]
            seen[(short, labels["task_name"].removeprefix("books."), *more)] += int(value)
    return +seen


class Reconciliation(Chaos):
    """Chaos that leaves main processes alive, and its books."""

    application = "bench.reconciled_app"
    pools = WORKERS

    def __init__(self, database: Database, seed: int) -> None:
        super().__init__(database.dsn(), seed, lambda: database.cluster.restart("immediate"))
        self.database = database
        self.ports = [free_port() for _ in self.pools]
        self.exporter_port = free_port()
        self.environment = {
            **environment(database.dsn(), LEDGER_FOLDER=str(self.directory)),
            "PYTHONPATH": str(ROOT),
        }
        self.differences: list[tuple[str, object, object]] = []
        self.compared = 0
        self._client: subprocess.Popen[str] | None = None
        self._told: dict[str, float] = {}
        self._over = threading.Event()

    def mend(self) -> None:
        """Thaw the frozen; start what never was."""
        if ended := [worker.pid for worker in self.workers if worker.poll() is not None]:
            raise RuntimeError(f"main processes ended by themselves: {ended}; see {self.directory}")
        super().mend()

    def of_worker(self, number: int) -> dict[str, str]:
        """Its port."""
        return {"CELERY_METRICS_PORT": str(self.ports[number - 1])}

    # what goes on

    def balance(self, jobs: int, seconds: float) -> bool:
        """All of it; whether the books balance."""
        code = EXPORTER.replace("PORT", str(self.exporter_port))
        exporter_environment = self.environment | {"DATABASE_URL": self.database.dsn("app_ro")}
        with started(
            [sys.executable, "-c", code], self.directory / "exporter", exporter_environment
        ) as exporter:
            try:
                self.mend()
                self._until("the workers are ready", lambda: self._gauges("ready") == {1})
                self._until(
                    "the exporter has looked",
                    lambda: "celery_dlq_arrivals_total" in self._get(self.exporter_port),
                )
                watch = threading.Thread(target=self._watch, daemon=True)
                watch.start()
                self._calm()
                self._chaos(jobs, seconds)
                self._outage()
                self._counted()
                self._dead_letters()
                self._over.set()
                watch.join()
                self._held()
            finally:
                self._over.set()
                exporter.process.send_signal(signal.SIGKILL)
        return not self.differences

    def _send(self, code: str) -> None:
        """Let a client of the application run a line of code."""
        if self._client is None:
            self._client = subprocess.Popen(
                [sys.executable, "-c", CLIENT],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        into, out = self._client.stdin, self._client.stdout
        if into and out:
            print(code, file=into, flush=True)
            out.readline()

    def _calm(self) -> None:
        """What a child may do that dies after its job, or with nothing to do."""
        self._send("for _ in range(3): died_stored.delay(); died_unstored.delay()")
        self._until("all died after their jobs", lambda: self._left() == 0 and len(self._ledger().runs) == 9)
        for worker in self.workers:
            for pid in self._children(worker):
                self._signal(pid, signal.SIGKILL)
        self._send("for _ in range(4): job.delay(0.1)")
        self._until("new children work", lambda: self._left() == 0 and len(self._ledger().runs) == 13)

    def _chaos(self, jobs: int, seconds: float) -> None:
        """Jobs that end in every way, in trouble."""
        with closing(self.database.connect()) as session, session.cursor() as cursor:
            for payload in INVALID:
                cursor.execute(
                    "INSERT INTO kombu_message (queue_id, payload)"
                    " SELECT id, %s FROM kombu_queue WHERE name = 'books'",
                    (payload,),
                )
        self._send(f"publish({jobs}, {seconds})")
        self._send(f"app.control.revoke([f'revoked-{{number}}' for number in range({jobs})])")
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            time.sleep(self.random.uniform(0.3, 1.0))
            self.trouble()
            self.mend()
            self._terminate_jobs()
        self._until("all jobs are done", self._settled, 120)

    def _settled(self) -> bool:
        self.mend()
        # A run can outlive its message: its worker was away when it was told, and another one was not.
        return not self._terminate_jobs() and self._left() == 0 and not self.frozen

    def _terminate_jobs(self) -> bool:
        """Whether one of them still runs."""
        ledger = self._ledger()
        going = [
            run
            for run in ledger.open("terminated")
            if ledger.outcome(run) != "terminated" and Path(f"/proc/{run['pid']}").exists()
        ]
        for run in going:
            if self._told.get(run["run"], 0) <= time.monotonic() - 5:
                self._told[run["run"]] = time.monotonic()
                self._send(f"app.control.revoke({run['id']!r}, terminate=True, signal='SIGKILL')")
        return bool(going)

    def trouble(self) -> None:
        """Something bad that leaves main processes alive, drawn by the seed."""
        kinds = [self.freeze, self.freeze, self.cut_off, self.cut_off, self.crash_postgres]
        kind = self.random.choice(kinds + [self.kill_child] * 5)
        kind()
        self.done[kind.__name__] += 1

    def kill_child(self) -> None:
        """SIGKILL a pool process in the middle of a job; stopped first, so that the ledger is right."""
        pids = [pid for worker in self.workers for pid in self._children(worker)]
        frozen = {pid for _, stopped in self.frozen for pid in stopped}
        pid = self.random.choice(pids or [0])
        if not pid or pid in frozen:
            return
        self._signal(pid, signal.SIGSTOP)
        time.sleep(0.02)
        held = [run for run in self._ledger().open() if run["pid"] == pid]
        # Of these nobody could say afterwards whether a limit, an operator or this ended them.
        if held and held[-1]["task"] not in ("soft", "soft_caught", "hard", "terminated"):
            with (self.directory / "ledger").open("a") as ledger:
                ledger.write(json.dumps({"event": "killed", "run": held[-1]["run"]}) + "\n")
            self._signal(pid, signal.SIGKILL)
        else:
            self._signal(pid, signal.SIGCONT)

    def _outage(self) -> None:
        """Workers and exporter must say that they can't work, and that they can again."""
        self.database.cluster.stop("immediate")
        try:
            self._until("no worker is ready", lambda: self._gauges("ready") == {0}, 20)
            self._until("no worker sees the database", lambda: self._gauges("database_connected") == {0}, 20)
            self._until(
                "the exporter sees no database",
                lambda: "skeldir_exporter_database_up 0.0" in self._get(self.exporter_port),
                20,
            )
        finally:
            self.database.cluster.start()
        self._until("the workers are ready again", lambda: self._gauges("ready") == {1})
        # A crash takes back what was acknowledged just before, which is run once more.
        time.sleep(2)
        self._until("all jobs are done again", self._settled, 60)

    # the books

    def _counted(self) -> None:
        """Every counter of every worker, and every line of the ledger."""
        wanted = self._ledger().counters()
        self._same("workers that were in the ledger", {worker.pid for worker in self.workers}, {*wanted})
        for worker, text in self._scrapes().items():
            seen = counters(text)
            for key in sorted({*wanted[worker], *seen}):
                self._same(f"worker {worker}: {' '.join(key)}", wanted[worker][key], seen[key])
            running = sum(value for _, value in samples(text)["celery_task_in_flight"])
            self._same(f"worker {worker}: in flight in the end", 0, running)

    def _dead_letters(self) -> None:
        """Each failure class: the table, the exporter's gauges and counters, and the ledger."""
        wanted = self._ledger().dead_letters()
        with closing(self.database.connect("postgres")) as session, session.cursor() as cursor:
            cursor.execute("SELECT task, class, count(*) FROM celery_task_failures GROUP BY 1, 2")
            table = Counter({(task or "", kind): number for task, kind, number in cursor.fetchall()})
        known = Counter(
            {(task.removeprefix("books."), kind): number for (task, kind), number in table.items()}
        )
        for key in sorted({*wanted, *known}):
            if key[1] in ("unknown_task", "invalid"):  # which never ran
                continue
            self._same(f"dead letters: {' '.join(key)}", wanted[key], known[key])
        by_class: Counter[str] = Counter()
        for (_, kind), number in table.items():
            by_class[kind] += number
        self._same("dead letters: unknown_task", self._ledger().unknown, by_class["unknown_task"])
        self._same("dead letters: invalid", len(INVALID), by_class["invalid"])

        def shown(sample: str) -> Counter[str]:
            found: Counter[str] = Counter()
            for labels, value in samples(self._get(self.exporter_port))[sample]:
                found[labels["failure_class"]] += int(value)
            return found

        for sample in ("celery_dlq_open", "celery_dlq_arrivals_total"):
            with suppress(TimeoutError):  # it looks every five seconds
                self._until(sample, lambda name=sample: +shown(name) == +by_class, 12)
            for kind in sorted(by_class):
                self._same(f"exporter: {sample} {kind}", by_class[kind], shown(sample)[kind])

    def _held(self) -> None:
        """While jobs hold on, each worker must show exactly those it runs; also when it is told to stop."""
        published = 60  # so many that each worker has enough
        self._send(f"for _ in range({published}): hold.delay()")
        self._until("all hold on", lambda: len(self._ledger().open("hold")) == POSSIBLE)
        by_worker = Counter(run["worker"] for run in self._ledger().open("hold"))
        self._in_flight(by_worker)

        def messages() -> float:
            found = samples(self._get(self.exporter_port))["celery_queue_messages"]
            return sum(value for labels, value in found if labels["queue"] == "books")

        self._until("the exporter sees what there is", lambda: messages() == published)
        for worker in self.workers:
            worker.terminate()
        self._until("the workers drain", lambda: self._gauges("draining") == {1})
        self._same("ready while they drain", {0}, self._gauges("ready"))
        self._in_flight(by_worker)
        (self.directory / "go").touch()
        self._same("exit statuses", {0}, {worker.wait(30) for worker in self.workers})

    def _in_flight(self, wanted: Counter[int]) -> None:
        for worker, text in self._scrapes().items():
            found = sum(value for _, value in samples(text)["celery_task_in_flight"])
            self._same(f"worker {worker}: in flight", wanted[worker], found)

    # how it is known

    def _ledger(self) -> Ledger:
        path = self.directory / "ledger"
        lines = path.read_text().splitlines() if path.exists() else []
        return Ledger(map(json.loads, lines))

    def _get(self, port: int) -> str:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    def _scrapes(self) -> dict[int, str]:
        return {worker.pid: self._get(port) for worker, port in zip(self.workers, self.ports, strict=True)}

    def _gauges(self, name: str) -> set[float]:
        """What all workers say, of all their queues."""
        return {
            value for text in self._scrapes().values() for _, value in samples(text)[f"celery_worker_{name}"]
        }

    def _watch(self) -> None:
        """Scrape all the time; a counter that goes backwards is a difference."""
        highest: dict[int, Counts] = defaultdict(Counter)
        while not self._over.wait(0.2):
            for worker, port in zip(list(self.workers), self.ports, strict=False):
                with suppress(OSError):  # it is frozen
                    seen = counters(self._get(port))
                    for key, value in highest[port].items():
                        if seen[key] < value:
                            self._same(f"worker {worker.pid}: {' '.join(key)} went back", value, seen[key])
                    highest[port] = seen

    def _until(self, what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with suppress(OSError, IndexError):  # not there yet
                if condition():
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}, within {seconds} s")
            time.sleep(0.1)

    def _same(self, what: str, ledger: object, metrics: object) -> None:
        self.compared += 1
        if ledger != metrics:
            self.differences.append((what, ledger, metrics))

    def stop(self) -> None:
        """End every worker, and the client."""
        super().stop()
        if self._client:
            self._client.kill()
            self._client.wait()

    def report(self, *_: object) -> dict[str, object]:
        """Print what was compared; what differs."""
        console = Console(width=110)
        wanted = self._ledger().counters()
        for worker, pool in zip(self.workers, self.pools, strict=False):
            ended: Counter[str] = Counter()
            for key, number in wanted[worker.pid].items():
                if key[0] in ("success", "retry", "revoked", "failure", "timeout"):
                    ended[" ".join((key[0], *key[2:]))] += number
            words = ", ".join(f"{number} {outcome}" for outcome, number in sorted(ended.items()))
            console.print(f"{pool[3]} {worker.pid}: {words}")
        console.print(", ".join(f"{number} {kind}" for kind, number in sorted(self.done.items())))
        if self.differences:
            table = Table("what", "the ledger says", "the metrics say")
            for row in self.differences:
                table.add_row(*map(str, row))
            console.print(table)
        console.print(f"{self.compared} numbers compared, {len(self.differences)} differ ({self.directory})")
        return {"differences": self.differences} if self.differences else {}


def reconcile(database: Database, seed: int, jobs: int, seconds: float) -> bool:
    """Make chaos on a database; whether the books balance."""
    reconciliation = Reconciliation(database, seed)
    try:
        reconciliation.balance(jobs, seconds)
    except TimeoutError as error:
        reconciliation.differences.append((str(error), "it was to be so", "it never was"))
    finally:
        reconciliation.stop()
    return not reconciliation.report()


def main(
    *,
    seed: Annotated[int, typer.Option(help="Of the trouble.")] = 7,
    jobs: Annotated[int, typer.Option(min=60)] = 400,
    seconds: Annotated[float, typer.Option(help="Of trouble.")] = 20,
) -> None:
    """Reconcile the metrics of a chaos with its ledger."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and server are ended, too
    for postgres in provisioned_cluster():
        if not reconcile(postgres.copy_database("skeldir", "books"), seed, jobs, seconds):
            raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
