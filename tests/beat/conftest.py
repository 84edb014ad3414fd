"""Schedulers as processes, and the ledger that compares due times with messages."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import yaml

from app.beat.schedule import Entry, load_schedule
from app.core.topology import load_topology
from tests.postgres import ROOT, Database, free_port
from tests.workers import environment

PING = "app.tasks.housekeeping.ping"
BOUND = 15.0
"""Seconds within which another scheduler must have taken over."""


def until(true: Callable[[], object], seconds: float = 40.0) -> float:
    """Wait until something holds; returns how long that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it didn't happen in time"
        time.sleep(0.02)
    return time.monotonic() - began


class Scheduler:
    """A scheduler's process."""

    def __init__(
        self,
        dsn: str,
        schedule: Path,
        log: Path,
        dawdle: float = 0,
        inside: tuple[str, ...] = (),
        **variables: str,
    ) -> None:
        self.port, self.log, self._inside = free_port(), log, inside
        self.amid = schedule.with_suffix(f".{self.port}")
        """A file that is there while a dawdling one has published and not committed."""
        words = (str(self.port), str(schedule), str(dawdle))
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*inside, sys.executable, "-m", "tests.beat.scheduler", *words],
                cwd=ROOT,
                env=environment(dsn, **variables),
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def get(self, path: str) -> str:
        """What it answers, healthy or not; nothing when nobody answers."""
        url = f"http://127.0.0.1:{self.port}{path}"
        if self._inside:
            words = [*self._inside, "curl", "-s", "-m", "2", url]
            return subprocess.run(words, capture_output=True, text=True, check=False).stdout
        try:
            with urlopen(url, timeout=2) as answer:
                return str(answer.read().decode())
        except HTTPError as error:
            return error.read().decode()
        except OSError:
            return ""

    def metric(self, series: str) -> float:
        """The value of one series, written as a scrape does."""
        (line,) = (line for line in self.get("/metrics").splitlines() if line.startswith(f"{series} "))
        return float(line.rpartition(" ")[2])

    @property
    def health(self) -> dict[str, Any]:
        """What /health says; nothing when nobody answers."""
        assert self.process.poll() is None, self.log.read_text()
        return dict(json.loads(self.get("/health") or "{}"))

    @property
    def role(self) -> str | None:
        return self.health.get("role")

    def send(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait(timeout=10)

    def stop(self) -> float:
        """End it as systemd does; returns how long that took."""
        began = time.monotonic()
        self.process.terminate()
        assert self.process.wait(timeout=10) == 0, self.log.read_text()
        return time.monotonic() - began


class Plan:
    """A schedule, and what has become of it in a database.

    Its entries begin in the moment they are written, as if a scheduler had seen them then.
    """

    def __init__(self, database: Database, path: Path, content: dict[str, Any]) -> None:
        self.database, self.path = database, path
        path.write_text(yaml.safe_dump(content))
        self.entries = load_schedule(load_topology(), path)

    def begin(self, entry: Entry, at: datetime | None = None) -> None:
        """Note that everything was enqueued until a moment, or now."""
        session = self.database.connect("app_user")
        session.cursor().execute(
            "INSERT INTO celery_schedule (name, rhythm, last_due) VALUES (%s, %s, coalesce(%s, now()))"
            " ON CONFLICT (name) DO UPDATE SET last_due = excluded.last_due",
            (entry.name, entry.rhythm, at),
        )
        session.close()

    def last_due(self) -> dict[str, datetime]:
        rows = self.database.rows("SELECT name, last_due FROM celery_schedule")
        return {str(name): moment for name, moment in rows if isinstance(moment, datetime)}

    def runs(self) -> dict[str, Counter[datetime]]:
        """By entry, how many messages there are for each due time; none is ever taken here."""
        found: dict[str, Counter[datetime]] = {name: Counter() for name in self.entries}
        for (payload,) in self.database.rows("SELECT payload FROM kombu_message"):
            headers = json.loads(str(payload))["headers"]
            found[headers["schedule_entry"]][datetime.fromisoformat(headers["schedule_due"])] += 1
        return found

    def settle(self, begun: dict[str, datetime]) -> tuple[int, int, int]:
        """Numbers of runs that were due since `begun`, that have no message, and that have more than one."""
        due = lost = doubled = 0
        runs = self.runs()
        for name, last in self.last_due().items():
            expected = list(self.entries[name]._due(begun[name], last))
            due += len(expected)
            lost += sum(moment not in runs[name] for moment in expected)
            doubled += sum(count - 1 for count in runs[name].values())
            # A message of a time that was not due, or is not noted, would be another kind of double.
            doubled += sum(moment not in expected for moment in runs[name])
        return due, lost, doubled


@pytest.fixture
def plan(database: Database, tmp_path: Path) -> Plan:
    """Three jobs, each of which is due every second or two."""
    made = Plan(
        database,
        tmp_path / "schedule.yml",
        {
            "first": {"task": PING, "every": 1},
            "second": {"task": PING, "every": 1, "kwargs": {"fail": True}},
            "third": {"task": "app.tasks.maintenance.refresh_all_materialized_views", "every": 2},
        },
    )
    for entry in made.entries.values():
        made.begin(entry)
    return made


@pytest.fixture
def scheduler(database: Database, plan: Plan, tmp_path: Path) -> Iterator[Callable[..., Scheduler]]:
    """Start schedulers; whatever becomes of them, they are gone after the test."""
    started: list[Scheduler] = []

    def start(dsn: str | None = None, **options: Any) -> Scheduler:
        log = tmp_path / f"scheduler{len(started)}.log"
        started.append(Scheduler(dsn or database.dsn(), plan.path, log, **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()


def now() -> datetime:
    return datetime.now(UTC)
