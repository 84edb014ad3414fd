"""The scheduler's process: its connection, its HTTP server, and what systemd is told."""

import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psycopg2

from app.beat.schedule import Entry
from app.beat.scheduler import SESSION, Beat, Publish, publish
from app.broker.connection import Session, connect_args
from app.broker.holder import takes_locks_away
from app.core import dsn
from app.core.config import ConfigurationError, Settings, get_settings
from app.core.topology import Topology
from app.observability.health import DatabaseProbe
from app.observability.logging import configure_logging
from app.observability.server import listen
from app.observability.systemd import notify, watchdog_seconds


def _connector(settings: Settings) -> Callable[[], Any]:
    """What opens connections to the database that the broker is in."""
    if not dsn.is_postgres(settings.broker_url):
        raise ConfigurationError(
            "CELERY_BROKER_URL does not name PostgreSQL; a run and the note of it must be one transaction."
        )
    arguments = connect_args(settings.broker_url.partition("+")[2]) | {"application_name": "skeldir-beat"}

    def connect() -> Any:
        connection = psycopg2.connect(**arguments)
        look = Session(arguments, "look")
        try:
            if takes_locks_away(look):
                raise ConfigurationError(
                    "A pooler in transaction mode takes the scheduler's lock away: name the server itself in"
                    " DATABASE_URL, or a pool in session mode."
                )
        finally:
            look.close()
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(SESSION)
        connection.autocommit = False
        return connection

    return connect


def run(sheet: Topology, schedule: Mapping[str, Entry], publish: Publish = publish) -> None:
    """Schedule until SIGTERM; what keeps it from starting ends it at once."""
    configure_logging("INFO")
    settings = get_settings()
    if sheet.beat is None:
        raise ConfigurationError(
            "There is no scheduler in app/topology.yml, so it has no port; add `beat: {port: …}`."
        )
    connect = _connector(settings)
    probe = DatabaseProbe(dsn.sqlalchemy_url(settings.broker_url))
    beat = Beat(schedule, connect, probe, publish)
    server = listen(
        settings.celery_metrics_addr,
        sheet.beat.port,
        beat,
        beat.registry,
        remedy="Set CELERY_METRICS_ADDR to an address of this host; the port stands in app/topology.yml.",
    )
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    server.start()
    probe.start()
    threading.Thread(target=_keep_systemd_informed, args=[beat], name="systemd-notify", daemon=True).start()
    notify("READY=1")
    beat.run(stopping)


def _keep_systemd_informed(beat: Beat) -> None:
    asked = watchdog_seconds()
    while True:
        words = ["WATCHDOG=1"] if asked and beat.live else []
        notify(f"STATUS={beat.report()['role']}", *words)
        time.sleep(min(asked / 2, 5) if asked else 5)
