"""Metering, health, HTTP server and watchdog of a Celery worker: `install` puts them onto an application."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from celery import Celery, signals
from celery.worker import state

from app.core.config import get_settings
from app.core.dsn import sqlalchemy_url
from app.core.topology import Topology
from app.observability.consumer import WatchedConsumer
from app.observability.context import PUBLISHED_HEADER
from app.observability.health import DatabaseProbe, Health, Pulse
from app.observability.metering import MeteredRequest, count_starts
from app.observability.metrics import TaskMetrics
from app.observability.server import Server, listen
from app.observability.systemd import notify, watchdog_seconds
from app.observability.vitals import Vitals

logger = logging.getLogger(__name__)

LOOP_BOUND = 60.0
"""Seconds the consumer's loop may stand still before the worker no longer counts as live."""

_STATUS_SECONDS = 5.0


def _nothing_rescued() -> int:
    return 0


def install(
    app: Celery,
    sheet: Callable[[], Topology],
    loop_bound: float = LOOP_BOUND,
    rescued: Callable[[], int] = _nothing_rescued,
) -> None:
    """Let every worker of `app` be metered and watched, and messages say when they were published.

    A worker that can't listen on its address for `/health` and `/metrics` ends at once.

    Args:
        app: the Celery application.
        sheet: called when a worker starts, for the queues whose series begin at 0.
        loop_bound: see `LOOP_BOUND`.
        rescued: how many messages of dead workers this one has given back.
    """

    @signals.before_task_publish.connect(weak=False)
    def say_when(headers: dict[str, Any], **_: Any) -> None:
        # A retry brings along the header of the run before.
        headers.pop(PUBLISHED_HEADER, None)
        if not headers.get("eta"):
            headers[PUBLISHED_HEADER] = round(time.time(), 3)

    @signals.celeryd_init.connect(weak=False)
    def watch(instance: Any, conf: Any, options: dict[str, Any], **_: Any) -> None:
        if instance.app is app:
            health, metrics, server = _prepare(sheet(), _queues(options, sheet()), loop_bound, rescued)
            _watch(app, conf, health, metrics, server)


def _watch(app: Celery, conf: Any, health: Health, metrics: TaskMetrics, server: Server) -> None:

    # In the worker's main process, before the pool exists.
    app.Task.Request = type("Request", (MeteredRequest,), {"metrics": metrics})
    metrics.count_starts = count_starts
    conf.worker_consumer = type("Consumer", (WatchedConsumer,), {"health": health})

    server.start()
    health.probe.start()
    _keep_systemd_informed(health)


def stand_by(sheet: Topology, queue: str, reason: str) -> NoReturn:
    """Be the worker of a drained queue: take nothing, and say so, until the process is ended.

    A unit's process, so that a drained unit is one that runs and answers, also after a reboot.

    Args:
        sheet: for the series that begin at 0.
        queue: of the sheet.
        reason: why it is drained, for `/health/ready`.
    """
    health, _, server = _prepare(sheet, [queue], LOOP_BOUND, _nothing_rescued)
    health.drained = reason
    health.probe.start()
    notify("READY=1", _status(health))
    _tell_systemd_status(health)
    logger.info("Drained (%(reason)s): nothing is taken", {"reason": reason})
    server.serve_forever()
    sys.exit()


def _prepare(
    sheet: Topology, queues: list[str], loop_bound: float, rescued: Callable[[], int]
) -> tuple[Health, TaskMetrics, Server]:
    settings = get_settings()
    metrics = TaskMetrics(sheet)
    metrics.begin_at_zero(queues)
    probe = DatabaseProbe(sqlalchemy_url(settings.database_url.get_secret_value()))
    health = Health(Pulse(loop_bound), probe)
    metrics.registry.register(Vitals(health, metrics.queues, rescued))
    server = listen(
        settings.celery_metrics_addr,
        settings.celery_metrics_port,
        health,
        metrics.registry,
        remedy="Set CELERY_METRICS_ADDR and CELERY_METRICS_PORT to an address of this host and a free port.",
    )
    return health, metrics, server


def _queues(options: dict[str, Any], sheet: Topology) -> list[str]:
    chosen = options.get("queues") or list(sheet.queues)
    return chosen.split(",") if isinstance(chosen, str) else list(chosen)


def _keep_systemd_informed(health: Health) -> None:
    main_process = os.getpid()

    @signals.worker_ready.connect(weak=False)
    def ready(**_: Any) -> None:
        notify("READY=1", _status(health))

    @signals.worker_shutting_down.connect(weak=False)
    def stopping(**_: Any) -> None:
        if os.getpid() == main_process:
            health.draining = True
            notify("STOPPING=1", _status(health))

    _tell_systemd_status(health)


def _tell_systemd_status(health: Health) -> None:
    def run() -> None:
        asked = watchdog_seconds()
        # Twice as often as systemd asks for, and at least as often as the status is worth looking at.
        pause = min(asked / 2, _STATUS_SECONDS) if asked else _STATUS_SECONDS
        while True:
            try:
                notify(_status(health), *(["WATCHDOG=1"] if asked and health.live else []))
            except Exception:  # without this thread systemd would end a worker that is well
                logger.exception("systemd could not be told how this worker is")
            time.sleep(pause)

    threading.Thread(target=run, name="systemd-notify", daemon=True).start()


def _status(health: Health) -> str:
    running = len(state.active_requests)
    if health.ready:
        return f"STATUS=consuming {', '.join(health.queues)}; {running} running"
    if health.drained:
        return f"STATUS=drained: {health.drained.splitlines()[0]}"
    return f"STATUS=broker {health.broker}, database {health.database}; {running} running"
