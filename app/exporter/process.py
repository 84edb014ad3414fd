"""The exporter's process: a thread that asks, a cache, and the HTTP server that answers from it."""

import logging
import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg2
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from psycopg2.extensions import connection
from sqlalchemy.engine import URL

from app.core.config import get_settings
from app.core.dsn import sqlalchemy_url
from app.core.topology import Topology
from app.exporter.collectors import Collected, collectors, gauge
from app.observability.health import DatabaseProbe
from app.observability.logging import configure_logging
from app.observability.server import listen
from app.observability.systemd import notify

logger = logging.getLogger(__name__)

_REST = 5.0  # seconds between two looks of a collector; a Prometheus asks more seldom
_SHARE = 20  # a collector rests at least so many times as long as it took
_KEPT = 60.0  # seconds that numbers are shown after the last look that succeeded
_SESSION = """
    SET statement_timeout = '20s';
    SET lock_timeout = '2s';
    SET default_transaction_read_only = on;
    SET jit = off;
    SET max_parallel_workers_per_gather = 0; -- the workers' processors are theirs
"""


@dataclass
class Part:
    """A collector and what came of it; times of the monotonic clock, but for `succeeded_at`."""

    collector: Collected
    families: list[Metric] = field(default_factory=list)
    succeeded: bool = False
    succeeded_at: float = 0.0
    duration: float = 0.0
    due: float = -math.inf
    holds_until: float = -math.inf

    def rest(self) -> float:
        """Seconds until its next look."""
        return max(_REST, _SHARE * self.duration, self.collector.every if self.succeeded else 0.0)


class Exporter(Collector):
    """Asks in one thread, over one connection, one collector after the other."""

    def __init__(self, url: URL, parts: Sequence[Collected]) -> None:
        arguments = url.get_dialect()().create_connect_args(url)[1]
        network = {
            "connect_timeout": 5,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
        }
        self._arguments = {**network, **arguments, "application_name": "skeldir-exporter"}
        self._session: connection | None = None
        self._looked_at = time.monotonic()
        self.parts = [Part(collector) for collector in parts]
        self.probe = DatabaseProbe(url)

    def start(self) -> None:
        """Begin to ask."""
        self.probe.start()
        threading.Thread(target=self._run, name="collector", daemon=True).start()

    def _run(self) -> None:
        while True:
            part = min(self.parts, key=lambda part: part.due)
            time.sleep(max(0.0, min(part.due - time.monotonic(), _REST)))
            self._looked_at = time.monotonic()
            if part.due <= time.monotonic():
                self.look(part)

    def look(self, part: Part) -> None:
        """Let one collector ask; what goes wrong is logged once and shown until it goes right again."""
        began = time.monotonic()
        try:
            session = self._session = self._session or self._connect()
            with session.cursor() as cursor:
                families = part.collector.collect(cursor)
        except Exception as error:
            # A failed statement leaves the session usable; a lost connection must be made again.
            if self._session and (self._session.closed or isinstance(error, psycopg2.OperationalError)):
                self._session.close()
                self._session = None
            if part.succeeded or not part.succeeded_at:
                logger.warning(
                    "The collector %(collector)s failed: %(error)s",
                    {"collector": part.collector.name, "error": _reason(error)},
                )
            part.succeeded = False
        else:
            part.families = families
            part.succeeded = True
            part.succeeded_at = time.time()
        part.duration = time.monotonic() - began
        part.due = time.monotonic() + part.rest()
        if part.succeeded:
            part.holds_until = part.due + _KEPT

    def _connect(self) -> connection:
        session: connection = psycopg2.connect(**self._arguments)
        session.autocommit = True
        with session.cursor() as cursor:
            cursor.execute(_SESSION)
        return session

    def collect(self) -> Iterator[Metric]:
        """What is known, and how well."""
        yield gauge(
            "skeldir_exporter_database_up",
            "1 while the database answers.",
            value=self.probe.reachable,
        )
        success, duration, last = (
            GaugeMetricFamily(f"skeldir_exporter_collector_{name}", documentation, labels=["collector"])
            for name, documentation in (
                ("success", "1 when its last look succeeded and its numbers are not too old."),
                ("duration_seconds", "Time its last look took."),
                ("last_success_timestamp_seconds", "When its numbers were true; 0 when they never were."),
            )
        )
        now = time.monotonic()
        for part in self.parts:
            labels = [part.collector.name]
            success.add_metric(labels, float(part.succeeded and now < part.holds_until))
            duration.add_metric(labels, part.duration)
            last.add_metric(labels, part.succeeded_at)
        yield from (success, duration, last)
        # Numbers that are too old to be true are not shown.
        for part in self.parts:
            if now < part.holds_until:
                yield from part.families

    # What the server's /health says

    @property
    def live(self) -> bool:
        """Whether the thread moves; a database that does not answer may hold it."""
        return not self.probe.reachable or time.monotonic() - self._looked_at < 10 * _KEPT

    @property
    def ready(self) -> bool:
        """Whether all numbers are known."""
        now = time.monotonic()
        return all(part.succeeded and now < part.holds_until for part in self.parts)

    @property
    def reason(self) -> str:
        """Why it isn't ready."""
        return f"no numbers of {', '.join(part.collector.name for part in self.parts if not part.succeeded)}"

    def report(self) -> dict[str, Any]:
        """The detail."""
        return {
            "status": "ok" if self.ready else "unhealthy",
            "database": "ok" if self.probe.reachable else "unreachable",
            "failing": [part.collector.name for part in self.parts if not part.succeeded],
        }


def _reason(error: Exception) -> str:
    # Of a connection that can't be made the message names host and user; the class alone says enough.
    said = getattr(getattr(error, "diag", None), "message_primary", None)
    return str(said or type(error).__name__)


def run(sheet: Topology) -> None:
    """Serve until the process ends; an address that it can't listen on ends it at once."""
    configure_logging("INFO")
    settings = get_settings()
    if sheet.exporter is None:
        sys.exit("There is no exporter in app/topology.yml, so it has no port; add `exporter: {port: …}`.")
    url = sqlalchemy_url(settings.database_url.get_secret_value())
    exporter = Exporter(url, collectors(sheet, settings.skeldir_connection_budget))
    registry = CollectorRegistry()
    registry.register(exporter)
    server = listen(
        settings.celery_metrics_addr,
        sheet.exporter.port,
        exporter,
        registry,
        remedy="Set CELERY_METRICS_ADDR to an address of this host; the port stands in app/topology.yml.",
    )
    exporter.start()
    notify("READY=1")
    server.serve_forever()
