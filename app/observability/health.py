"""What a worker's health is, and when each answer is no.

`/health/live` (`Health.live`): restart the worker when this is no. No only when the consumer's loop has not
moved for `Pulse.bound` seconds although the database answers. The loop is not expected to move while the
worker drains (its stop timeout bounds that), while a task runs inside of it (`solo`; that task's hard limit
bounds it), nor while the database is away: a restart would mend none of these.

`/health/ready` (`Health.ready`): jobs are being taken. No while starting, connecting, draining or drained,
when no queue is consumed, when the loop has stalled, and when the database is away.

`/health` (`Health.report`): the same as a detail for people; `unhealthy` exactly when not ready.
"""

import logging
import math
import select
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_READ, connection
from sqlalchemy.engine import URL

logger = logging.getLogger(__name__)

# The sum stays below the 5 s within which health must tell the truth, whichever way the database goes away.
_EVERY = 1.5
_WITHIN = 2.0
_STALE = _EVERY + _WITHIN + 0.5

# Signing in costs a worker more than a thousand questions do, and whether others may is known soon enough.
_SESSION_SECONDS = 15.0


class Pulse:
    """The life signs of the consumer's loop, in seconds of the monotonic clock."""

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.ticked_at = time.monotonic()
        """When the loop last moved."""
        self.held: Callable[[], float] = lambda: 0.0
        """For how long what runs inside of the loop now may hold it; `math.inf` when nobody knows."""

    def tick(self) -> None:
        """The loop moved."""
        self.ticked_at = time.monotonic()

    @property
    def last(self) -> float:
        """When the loop last moved; in the future while a task may hold it."""
        return self.ticked_at + self.held()


class Consuming(Protocol):
    """What health wants to know of the consumer."""

    hostname: str
    in_loop: bool
    connection: Any
    task_consumer: Any


class DatabaseProbe:
    """Asks the database again and again, in a thread of its own, over a connection that is never old.

    Readers get the last answer and never wait. An answer too old to be true counts as none.
    """

    def __init__(self, url: URL) -> None:
        arguments = url.get_dialect()().create_connect_args(url)[1]
        self._arguments = {**arguments, "application_name": "skeldir-health"}
        self._session: connection | None = None
        self._renew_at = -math.inf
        self._answered_at = -math.inf
        self._reachable = False
        self.away_at = -math.inf
        """When the database was last found away, in seconds of the monotonic clock."""

    def start(self) -> None:
        """Begin to ask."""
        threading.Thread(target=self._run, name="database-probe", daemon=True).start()

    @property
    def reachable(self) -> bool:
        """Whether the database answered, no longer than a few seconds ago."""
        return self._reachable and time.monotonic() - self._answered_at < _STALE

    def _run(self) -> None:
        while True:
            self._look()
            time.sleep(_EVERY)

    def _look(self) -> None:
        try:
            self._ask()
            reachable = True
        except Exception as error:
            reachable = False
            if self._reachable:
                logger.warning("The database does not answer: %s", type(error).__name__)
        self._answered_at = time.monotonic()
        if not reachable:
            self.away_at = self._answered_at
        self._reachable = reachable

    def _ask(self) -> None:
        deadline = time.monotonic() + _WITHIN
        try:
            if self._session is not None and time.monotonic() < self._renew_at:
                try:
                    return _select(self._session, deadline)
                except psycopg2.Error:
                    pass  # it may be only this session that was ended
            self._close()
            # Not blocking, so that a server that is frozen, or a network that drops packets, can't hold it.
            self._session = psycopg2.connect(**self._arguments, async_=True)
            _wait(self._session, deadline)
            _select(self._session, deadline)
            self._renew_at = time.monotonic() + _SESSION_SECONDS
        except Exception:
            self._close()
            raise

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


def _select(session: connection, deadline: float) -> None:
    cursor = session.cursor()  # psycopg2 wants it alive until the answer is there
    cursor.execute("SELECT 1")
    _wait(session, deadline)


def _wait(session: connection, deadline: float) -> None:
    while (state := session.poll()) != POLL_OK:
        remaining = deadline - time.monotonic()
        ready = select.poll()  # not select(), which fails beyond 1024 file descriptors
        ready.register(session.fileno(), select.POLLIN if state == POLL_READ else select.POLLOUT)
        if remaining <= 0 or not ready.poll(remaining * 1000):
            raise TimeoutError


class Health:
    """The answers, from what the consumer, its pulse and the probe say."""

    def __init__(self, pulse: Pulse, probe: DatabaseProbe) -> None:
        self.pulse = pulse
        self.probe = probe
        self.consumer: Consuming | None = None
        self.draining = False
        self.drained = ""
        """Why an operator wants nothing taken here; empty when jobs are taken."""
        self.dead_letters: Callable[[], str] = lambda: "ok"
        """Whether failures can be put away: `ok`, or what is wrong."""

    @property
    def live(self) -> bool:
        """Whether the worker moves, or stands still for a good reason."""
        if self.draining or self.drained or not self.probe.reachable:
            return True
        # Back from an outage, the loop gets the whole time again.
        return time.monotonic() - max(self.pulse.last, self.probe.away_at) < self.pulse.bound

    @property
    def queues(self) -> list[str]:
        """The queues that are being consumed now."""
        consumer = self.consumer
        if self.draining or consumer is None or not consumer.in_loop:
            return []
        # Read once: Celery takes it away, in a thread that isn't this one, when a connection is lost.
        task_consumer = consumer.task_consumer
        return [] if task_consumer is None else sorted(queue.name for queue in task_consumer.queues)

    @property
    def broker(self) -> str:
        """`ok` when the consumer's connection is there and it consumes; otherwise what it does instead."""
        if self.drained:
            return "drained"
        if self.draining:
            return "draining"
        if self.consumer is None:
            return "starting"
        connection = self.consumer.connection if self.consumer.in_loop else None
        # app/broker mends a lost connection by itself, and the consumer's loop never hears of it.
        if connection is None or not getattr(connection.transport, "online", True):
            return "connecting"
        if not self.queues:
            return "no queue is consumed"
        return "ok" if self.live else "stalled"

    @property
    def database(self) -> str:
        """`ok`, or `unreachable`; never more, because errors can hold parts of a DSN."""
        return "ok" if self.probe.reachable else "unreachable"

    @property
    def ready(self) -> bool:
        """Whether jobs are taken and can be done."""
        return self.broker == "ok" and self.database == "ok"

    @property
    def reason(self) -> str:
        """Why it isn't ready."""
        if self.drained:
            return f"drained: {self.drained}"
        return f"broker {self.broker}, database {self.database}"

    def report(self) -> dict[str, Any]:
        """The detail that `/health` shows."""
        broker, database, dead_letters = self.broker, self.database, self.dead_letters()
        age = max(0.0, time.monotonic() - self.pulse.last)
        return {
            "status": "ok" if broker == database == dead_letters == "ok" else "unhealthy",
            "broker": broker,
            "database": database,
            "dead_letters": dead_letters,
            "queues": self.queues,
            "drained": self.drained or None,
            "worker": self.consumer.hostname if self.consumer else None,
            "live": self.live,
            "loop_age_seconds": round(age, 1),
        }
