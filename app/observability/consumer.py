"""Celery's consumer with a pulse.

The tick comes from the loop that takes messages, never from a timer beside it: under Celery's blocking loop
timers have a thread of their own, and go on ticking while the loop stands still.
"""

import logging
import math
import time
from typing import Any, ClassVar

from celery.concurrency.solo import TaskPool as SoloPool
from celery.worker import loops, state
from celery.worker.consumer import Consumer

from app.observability.health import Health
from app.observability.metering import running

logger = logging.getLogger(__name__)

_TICK_SECONDS = 1.0


class WatchedConsumer(Consumer):
    """A consumer that tells `Health` that it moves, and whether it consumes."""

    health: ClassVar[Health]

    in_loop = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._pulse = self.health.pulse
        if isinstance(self.pool, SoloPool):
            self._pulse.held = _held
        self.health.consumer = self

    def loop(self, *args: Any) -> None:
        """Celery's own event loop; it comes back, or raises, when the connection or the worker ends."""
        try:
            (loops.asynloop if self.hub else loops.synloop)(*args)
        finally:
            self.in_loop = False

    def on_ready(self) -> None:
        """Called by both loops whenever they begin to consume, after a lost connection too."""
        self.in_loop = True
        self.health.pulse.tick()
        super().on_ready()

    def perform_pending_operations(self) -> None:
        """Called by the blocking loop in each of its cycles: after each message, and every two seconds."""
        self._pulse.ticked_at = time.monotonic()
        if self._pending_operations:  # there hardly ever are any, and every job would pay for the look
            super().perform_pending_operations()

    def register_with_event_loop(self, hub: Any) -> None:
        """Called by the event loop when it begins; it cancels the timer itself when the connection ends."""
        super().register_with_event_loop(hub)
        hub.call_repeatedly(_TICK_SECONDS, self.health.pulse.tick)

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, trying again for as long as it takes, and tick meanwhile."""
        ensure_connection = conn.ensure_connection

        def ensure_and_tick(errback: Any, max_retries: Any, callback: Any) -> Any:
            def tick() -> None:  # called about once a second while it waits
                self.health.pulse.tick()
                callback()

            return ensure_connection(errback, max_retries, callback=tick)

        conn.ensure_connection = ensure_and_tick
        return super().ensure_connected(conn)

    def on_close(self) -> None:
        """Called when a connection was lost and before it is made again."""
        self.health.pulse.tick()
        super().on_close()

    def stop(self) -> None:
        """Take nothing more; also called when an operator stops the worker by remote control."""
        running = len(state.active_requests)
        # Reserved are those that run, too, until they end.
        fetched = max(0, len(state.reserved_requests) - running)
        logger.info(
            "Draining: %(running)d running jobs go on to their end, %(fetched)d fetched ones are handed back",
            {"running": running, "fetched": fetched},
        )
        self.health.draining = True
        super().stop()


def _held() -> float:
    limits = [request.time_limits[0] or request.task.time_limit or math.inf for request in running()]
    return max(limits, default=0.0)
