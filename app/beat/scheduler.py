"""The scheduler itself: wait for the lock, enqueue what is due, know how it is."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.beat.schedule import Entry
from app.broker import in_transaction
from app.broker.connection import VANISHED_AT_SERVER
from app.celery_app import celery_app
from app.observability.health import DatabaseProbe

logger = logging.getLogger(__name__)

ENTRY_HEADER, DUE_HEADER = "schedule_entry", "schedule_due"
"""Headers of an enqueued job: whose run it is, and when that was due (ISO 8601)."""

_PAUSE = 1.0  # seconds between two looks, at most
_STALE = 15.0  # seconds without a look after which it counts neither as active nor as ready
_AHEAD = timedelta(minutes=1)  # by which a last run lies in the future only where a clock was wrong
_LOCK = 7_365_126_942  # the advisory lock's key: any number that nobody else uses
_LATENESS = (0.1, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 300, 3600)  # seconds

# A process that stops moving, and a host that vanishes, must lose the lock: the server ends a session from
# which it hears nothing for longer than a living scheduler ever pauses.
SESSION = f"""{VANISHED_AT_SERVER};
    SET idle_session_timeout = '8s'; SET idle_in_transaction_session_timeout = '8s';
    SET statement_timeout = '5s'; SET lock_timeout = '5s'; SET jit = off"""
"""What `connect` has to do with a new connection, outside of any transaction."""

_NOW = text("SELECT clock_timestamp()")
# Asked for again and again: who waits for a lock inside Postgres keeps vacuum from removing rows meanwhile.
_TAKE_LOCK = text("SELECT pg_try_advisory_lock(:key)")
_READ = text("SELECT name, rhythm, last_due FROM celery_schedule")
_BEGIN = text(
    "INSERT INTO celery_schedule AS s (name, rhythm, last_due) VALUES (:name, :rhythm, :now)"
    " ON CONFLICT (name) DO UPDATE SET rhythm = :rhythm, last_due = :now"
    " WHERE s.rhythm <> :rhythm OR s.last_due > :latest"
)
# Locks the row until the commit, and compares: whoever else takes itself for active waits here, and finds it
# changed.
_ADVANCE = text(
    "UPDATE celery_schedule SET last_due = :due, enqueued_at = clock_timestamp(), task_id = :task_id"
    " WHERE name = :name AND rhythm = :rhythm AND last_due = :last_due RETURNING true"
)

Publish = Callable[[Entry, datetime], str]


def publish(entry: Entry, due: datetime) -> str:
    """Publish a run of an entry, to the queue of its task; answers the job's id."""
    headers = {ENTRY_HEADER: entry.name, DUE_HEADER: due.isoformat()}
    return str(celery_app.send_task(entry.task, kwargs=entry.kwargs, headers=headers).id)


class Beat(Collector):
    """The scheduler, in one thread over one session of Postgres: the lock's, and that of all it writes.

    Args:
        schedule: entries by name.
        connect: opens a connection to the broker's database, with the settings of `SESSION`.
        probe: tells whether the database answers.
        publish: publishes one run.
    """

    def __init__(
        self,
        schedule: Mapping[str, Entry],
        connect: Callable[[], Any],
        probe: DatabaseProbe,
        publish: Publish = publish,
    ) -> None:
        self._schedule = schedule
        self._publish = publish
        self._engine = create_engine(
            "postgresql+psycopg2://", creator=connect, poolclass=NullPool, hide_parameters=True
        )
        self._session: Connection | None = None
        self._holds_lock = False
        self._next: dict[str, datetime] = {}
        self._failing: set[str] = set()
        self._trouble = ""
        self._looked_at = -math.inf
        self._moved_at = time.monotonic()
        self.probe = probe
        disable_created_metrics()
        self.registry = CollectorRegistry()
        counters: dict[str, Any] = {"labelnames": ["entry"], "registry": self.registry}
        self._enqueued = Counter("skeldir_beat_enqueued", "Runs that were enqueued.", **counters)
        self._errors = Counter("skeldir_beat_errors", "Attempts to enqueue a run that failed.", **counters)
        self._gaps = Counter(
            "skeldir_beat_gaps",
            "Times that no scheduler was there for more than a minute, and one run stands for all it missed.",
            **counters,
        )
        for name in schedule:
            for counter in (self._enqueued, self._errors, self._gaps):
                counter.labels(name)
        self._lateness = Histogram(
            "skeldir_beat_lateness_seconds",
            "Time from when a run was due until it was enqueued.",
            buckets=_LATENESS,
            registry=self.registry,
        )
        self.registry.register(self)

    def run(self, stopping: threading.Event) -> None:
        """Work until told to stop; the lock is then free at once."""
        while not stopping.is_set():
            stopping.wait(self.step())
        self._leave()

    def step(self) -> float:
        """Take the lock, or enqueue what is due; answers the seconds to wait before the next step."""
        try:
            session = self._session = self._session or self._engine.connect()
            pause = self._active_step(session) if self._lock(session) else _PAUSE
        except DBAPIError as error:
            if (reason := _reason(error)) != self._trouble:
                logger.warning("The scheduler can't use the database: %s", reason)
            self._trouble = reason
            self._leave()
            pause = _PAUSE
        else:
            self._trouble = ""
            self._looked_at = time.monotonic()
        self._moved_at = time.monotonic()
        return pause

    def _lock(self, session: Connection) -> bool:
        if not self._holds_lock:
            with session.begin():
                self._holds_lock = bool(session.scalar(_TAKE_LOCK, {"key": _LOCK}))
            if self._holds_lock:
                logger.info("This scheduler is active now.")
        return self._holds_lock

    def _leave(self) -> None:
        """End the session, and with it the lock."""
        session, self._session, self._holds_lock = self._session, None, False
        self._next.clear()
        if session:
            session.invalidate()  # closes it; a rollback could wait for a server that is gone
            session.close()

    def _active_step(self, session: Connection) -> float:
        with session.begin():
            now: datetime = session.scalar(_NOW)
            last = {name: (rhythm, due) for name, rhythm, due in session.execute(_READ)}
            for entry in self._schedule.values():
                rhythm, last_due = last.get(entry.name, ("", now))
                if rhythm == entry.rhythm and last_due <= now + _AHEAD:
                    continue
                if rhythm == entry.rhythm:
                    # As a resumed machine's may be until it is corrected; nothing would run until then.
                    logger.warning(
                        "The database's clock was ahead: the last run of %s is of %s, and it is %s now;"
                        " what comes due from now on is run, again if it was already.",
                        *(entry.name, last_due.isoformat(), now.isoformat()),
                    )
                values = {"name": entry.name, "rhythm": entry.rhythm, "now": now, "latest": now + _AHEAD}
                session.execute(_BEGIN, values)
                last[entry.name] = (entry.rhythm, now)
        for entry in self._schedule.values():
            last_due = last[entry.name][1]
            self._next[entry.name] = entry.next_after(last_due)
            if self._next[entry.name] <= now:
                self._make_up(session, entry, last_due, now)
        until_next = min(self._next.values(), default=now + timedelta(days=1)) - now
        return min(_PAUSE, max(0.0, until_next.total_seconds()) + 0.001) if not self._failing else _PAUSE

    def _make_up(self, session: Connection, entry: Entry, last_due: datetime, now: datetime) -> None:
        runs, one_for_all = entry.missed(last_due, now)
        begun = last_due
        for due in runs:
            if not self._enqueue(session, entry, last_due, due):
                return
            last_due = due
            self._next[entry.name] = entry.next_after(due)
            self._enqueued.labels(entry.name).inc()
            self._lateness.observe(max(0.0, (now - due).total_seconds()))
        if one_for_all:
            self._gaps.labels(entry.name).inc()
            logger.warning(
                "No scheduler was there from %s to %s: %s runs once for all that it missed.",
                *(begun.isoformat(), now.isoformat(), entry.name),
            )

    def _enqueue(self, session: Connection, entry: Entry, last_due: datetime, due: datetime) -> bool:
        """Publish a run and note it, or neither; answers whether this was done, and by this scheduler."""
        known = {"name": entry.name, "rhythm": entry.rhythm, "last_due": last_due}
        try:
            with Session(session) as transaction, in_transaction(transaction):
                task_id = self._publish(entry, due)
                if not transaction.scalar(_ADVANCE, known | {"due": due, "task_id": task_id}):
                    return False  # another one did; what was published here goes with the transaction
                transaction.commit()
        except Exception as error:
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                raise
            self._errors.labels(entry.name).inc()
            if entry.name not in self._failing:
                logger.exception("A run of %s could not be enqueued; it is tried again.", entry.name)
            self._failing.add(entry.name)
            return False
        self._failing.discard(entry.name)
        return True

    # What the server's /health says

    @property
    def age(self) -> float:
        """Seconds since it last looked at the database and came to an end with it."""
        return time.monotonic() - self._looked_at

    @property
    def active(self) -> bool:
        """Whether it is the one that enqueues."""
        return self._holds_lock and self.age < _STALE

    @property
    def live(self) -> bool:
        """Whether it moves; a database that does not answer may hold it."""
        return not self.probe.reachable or time.monotonic() - self._moved_at < 2 * _STALE

    @property
    def ready(self) -> bool:
        """Whether it enqueues, or would at once in another's place."""
        return self.age < _STALE

    @property
    def reason(self) -> str:
        """Why it isn't ready."""
        return f"it stands still, database {'ok' if self.probe.reachable else 'unreachable'}"

    def report(self) -> dict[str, Any]:
        """The detail."""
        return {
            "status": "ok" if self.ready and not self._failing else "unhealthy",
            "role": ("active" if self._holds_lock else "standby") if self.ready else "unknown",
            "database": "ok" if self.probe.reachable else "unreachable",
            "failing": sorted(self._failing),
            "tick_age_seconds": round(self.age, 1) if self.age < math.inf else None,
        }

    def collect(self) -> Iterator[Metric]:
        """How it is, for Prometheus."""
        active = GaugeMetricFamily(
            "skeldir_beat_active", "1 while this scheduler enqueues, 0 while it stands by."
        )
        active.add_metric([], float(self.active))
        looked = GaugeMetricFamily(
            "skeldir_beat_last_tick_timestamp_seconds", "When it last looked at the database; 0 for never."
        )
        looked.add_metric([], time.time() - self.age if self.age < math.inf else 0.0)
        due = GaugeMetricFamily(
            "skeldir_beat_next_due_timestamp_seconds",
            "When the entry's next run is due; 0 on a scheduler that isn't active.",
            labels=["entry"],
        )
        known = dict(self._next) if self.active else {}
        for name in self._schedule:
            due.add_metric([name], known[name].timestamp() if name in known else 0.0)
        yield from (active, looked, due)


def _reason(error: DBAPIError) -> str:
    # Of a connection that can't be made the message names host and user; the class alone says enough.
    said = getattr(getattr(error.orig, "diag", None), "message_primary", None)
    return str(said or type(error.orig).__name__)
