"""The transport: one connection to Postgres, its channels, and the loop that feeds them."""

import logging
import os
import select
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any, ClassVar

import psycopg2
from kombu.transport import virtual

from app.broker.channel import Channel
from app.broker.connection import ConnectionLost, Session, connect_args
from app.broker.holder import Holder, holder_of_process
from app.broker.place import Places
from app.core.config import ConfigurationError

logger = logging.getLogger(__name__)

_POLL = 5.0  # seconds between two looks without being told; NOTIFY is what wakes
_POLL_POOLED = 1.0  # the same behind a pooler that takes NOTIFY away
_GATHER = 0.01  # seconds that a free place waits for others
_TIMER = 0.5  # seconds between two looks at the clock in an event loop
_BURST = 10  # messages delivered before the event loop's other business has its turn

_TAKE = (
    "SELECT * FROM kombu_take(%s, %s::bigint[], %s::integer[], %s::integer[], %s::smallint[], %s::smallint[],"
    " %s::bigint[], %s::integer[], %s, %s, %s)"
)


class Transport(virtual.Transport):
    """Kombu's transport for Postgres behind `sqla+postgresql://`.

    Transport options (`broker_transport_options`), beside kombu's own:
        delivery_limits: deliveries by queue after which a message that ends its worker is given up. The last
            of them is a trial: a worker runs one such message at a time, and if it dies, knows (see
            `Holder.try_suspect`) that no other message of its was to blame.
        delivery_limit: the same for queues not named there; without it there is no limit.
        on_dead: what becomes of a message that will not be delivered again (see `DeadMessage`).
        polling_interval: seconds between two looks at a queue without a notification.

    It mends its connection by itself: a worker's event loop sees no error when Postgres restarts, and what
    the worker held before it holds after.
    """

    Channel = Channel
    can_parse_url = True
    default_port = 5432  # type: ignore[assignment] # kombu's own is annotated as None
    driver_type = "postgresql"
    driver_name = "psycopg2"
    implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset(["direct", "topic", "fanout"]), heartbeats=False
    )
    connection_errors: tuple[type[Exception], ...] = (  # type: ignore[assignment] # kombu: of one
        *virtual.Transport.connection_errors,
        psycopg2.OperationalError,
        psycopg2.InterfaceError,
    )
    recoverable_connection_errors = connection_errors
    channel_errors = virtual.Transport.channel_errors
    recoverable_channel_errors: tuple[type[Exception], ...] = ()

    defaults: ClassVar[dict[str, Any]] = {}
    """Options for every transport of this process; see `app.broker.register`."""

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        self._options: Mapping[str, Any] = {**self.defaults, **(client.transport_options or {})}
        self._args = connect_args(client.hostname)
        self.session = Session(self._args, "transport", self.wake)
        self._pid = os.getpid()
        self._holder: Holder | None = None
        self._joined = (0, 0)
        self._asked = 0
        self._subscribed: dict[int, bool] = {}
        self._abandoned = False
        self._said_lost = False
        self._nudged = False
        self._maybe = True
        self._urgent = True
        self._next_poll = 0.0
        self._waker: tuple[socket.socket, socket.socket] | None = None
        self._woken = False
        self._loop: Any = None
        self._watched = -1

    # Connections

    def establish_connection(self) -> "Transport":
        """Connect, or say what is missing."""
        if not self.session.run("SELECT to_regprocedure('kombu_tick(integer, interval)')")[0][0]:
            raise ConfigurationError(
                "The database lacks the broker's tables, or they are older than this release:"
                " run `alembic upgrade celery_foundation@head`."
            )
        super().establish_connection()
        return self

    def verify_connection(self, connection: Any) -> bool:
        """Whether the connection can be used: not a parent's, and, unless it mends itself, not lost."""
        if self._pid != os.getpid() or self._abandoned:
            return False
        return self._holder is not None or self.session.connected

    @property
    def online(self) -> bool:
        """Whether Postgres is there, as far as is known without asking."""
        return self.session.connected and (self._holder is None or self._holder.online)

    def close_connection(self, connection: Any) -> None:
        """Give back what is unacknowledged, settle everything, disconnect."""
        super().close_connection(connection)
        holder, self._holder = self._holder, None
        if holder is not None:
            holder.transports.discard(self)
            self.let_go(holder)
            if not holder.transports:
                holder.leave()
        self.session.close()
        self._unwatch()

    def _collect(self, connection: Any) -> None:
        # kombu and Celery call this on a broken connection, instead of closing it
        for channel in [*self._avail_channels, *self.channels]:
            channel.abandon()
        self._avail_channels.clear()
        self.channels.clear()
        self._abandoned = True
        if self._holder is not None:
            self._holder.transports.discard(self)
        self.session.close()
        self.wake()  # the loop is to see that it lost its connection

    def holder(self) -> Holder:
        """The identity under which this process holds messages."""
        if self._holder is None or (self._holder.stopped and not self._abandoned):
            self._holder = holder_of_process(self._args, self._options.get("on_dead"))
            if not self._abandoned:
                self._holder.transports.add(self)
        return self._holder

    def let_go(self, holder: Holder | None = None) -> None:
        """End the session that shares the identity."""
        if self.session.connected:
            with suppress(psycopg2.Error):
                self.session.run("SELECT pg_advisory_unlock_all()")
        self.session.close()

    def ensure_joined(self) -> None:
        """Make sure that what this session takes is this process's, and that it is woken.

        Raises:
            ConnectionLost: there is no connection now.
        """
        holder = self.holder()
        if self.session.connected and self._joined == (self.session.generation, holder.id):
            return
        if self.session.connected and self._joined[0] == self.session.generation:
            self.session.close()  # another identity: begin anew, without the old one's locks
        self.session.connect()
        if self._joined[0]:  # not the first connection
            if self._asked != self.session.generation:
                self._asked = self.session.generation
                holder.doubt()
            if not holder.online:
                raise ConnectionLost("the server may have forgotten what was taken last")
        holder_id = holder.join(self.session)
        if self._joined[1] not in (0, holder_id) and any(channel.has_transient for channel in self.channels):
            # They ended with the identity that was given up for dead. Who declared and bound them does so
            # again on a new connection.
            self._abandoned = True
            self.wake()
            raise ConnectionLost("the queues of this worker alone ended when it was given up for dead")
        for queue_id, awake in self._subscribed.items():
            self._listen(queue_id, awake=awake)
        self._joined = (self.session.generation, holder_id)
        self._said_lost = False
        self._maybe = self._urgent = True
        for channel in self.channels:
            channel.came_back()
        self._watch()

    def publish(self, statement: str, arguments: Sequence[object]) -> None:
        """Execute a publishing statement; once more when the connection turns out to be lost."""
        try:
            self.session.run(statement, arguments)
        except ConnectionLost:
            self.session.run(statement, arguments)

    def declare(self, statement: str, arguments: Sequence[object]) -> list[tuple[Any, ...]]:
        """Execute a statement that may be repeated; once more when the connection turns out to be lost."""
        try:
            return self.session.run(statement, arguments)
        except ConnectionLost:
            return self.session.run(statement, arguments)

    # Taking

    def take(
        self, holder: Holder, queues: Mapping[int, str], places: Places, want: int, *, sleep: bool
    ) -> list[tuple[Any, ...]]:
        """Take up to `want` messages and acknowledge what is done, in one statement.

        Raises:
            psycopg2.Error: nothing is acknowledged then, nor forgotten.
        """
        queue_ids, low, high, start = places.segments()
        asleep = places.asleep == self.session.generation
        sleep = sleep and not holder.pooled
        acks = holder.pop_acks()
        started = time.monotonic()
        try:
            rows = self.session.run(
                _TAKE,
                (
                    holder.id,
                    [ack.id for ack in acks],
                    [ack.delivery for ack in acks],
                    queue_ids,
                    low,
                    high,
                    start,
                    [self._limit(queues[queue_id]) for queue_id in queue_ids],
                    want,
                    sleep,
                    asleep,
                ),
            )
        except psycopg2.Error as error:
            holder.acks.extendleft(reversed(acks))
            if isinstance(error, ConnectionLost):
                holder.doubt()  # something may have been taken
            raise
        if acks:
            holder.acked(acks)
        places.went_on(rows, want, time.monotonic() - started)
        places.asleep = self.session.generation if not rows and (sleep or asleep) else 0
        return rows

    def trial(self, queue: str) -> float:
        """After how many deliveries that ended a worker a queue's message is on trial."""
        limit = self._limit(queue)
        return float("inf") if limit is None else max(1, limit - 1)

    def _limit(self, queue: str) -> int | None:
        limits: Mapping[str, int] = self._options.get("delivery_limits") or {}
        return limits.get(queue, self._options.get("delivery_limit"))

    def subscribe(self, queue_id: int, *, awake: bool) -> None:
        """Be woken by a queue; `awake`: always, not only when told that we sleep."""
        self._subscribed[queue_id] = awake
        self._urgent = self._maybe = True
        try:
            self.ensure_joined()
            self._listen(queue_id, awake=awake)
        except ConnectionLost as error:
            self._lost(error)
        self.wake()

    def unsubscribe(self, queue_id: int) -> None:
        """Be woken no more."""
        awake = self._subscribed.pop(queue_id, False)
        if self.session.connected and not self.holder().pooled:
            with suppress(psycopg2.Error):
                self.session.run(f"UNLISTEN kombu_{queue_id}")
                if awake:
                    self.session.run("SELECT pg_advisory_unlock_shared(1802331489, %s)", (queue_id,))

    def stay_awake(self, places: Places) -> None:
        """Take back that these queues' taker sleeps."""
        if places.asleep and places.asleep == self.session.generation and self.session.connected:
            with suppress(psycopg2.Error):
                for queue_id in places.queue_ids:
                    self.session.run("SELECT pg_advisory_unlock_shared(1802331489, %s)", (queue_id,))
        places.asleep = 0

    def flush(self) -> None:
        """Settle what is to be settled, if there is a connection; else the keeper does it."""
        if self._holder is not None and self.session.connected:
            with suppress(psycopg2.Error), self._holder.at_work():
                self._holder.flush(self.session)

    def share(self) -> None:
        """Give back what was taken ahead and is not being done so soon after all; from any thread."""
        for channel in list(self.channels):
            channel.share()

    def hurry(self) -> None:
        """Take next time even if it is only one message."""
        self._urgent = True

    def wake(self) -> None:
        """Look for messages soon; from any thread."""
        if self._waker is not None and not self._woken:
            self._woken = True
            with suppress(OSError):
                self._waker[1].send(b"\0")

    def _listen(self, queue_id: int, *, awake: bool) -> None:
        if not self.holder().pooled:
            self.session.run(f"LISTEN kombu_{queue_id}")
            if awake:
                self.session.run("SELECT pg_advisory_lock_shared(1802331489, %s)", (queue_id,))

    def _look(self) -> None:
        """Take for all channels what their windows allow, if there may be something."""
        if self._holder is None:
            return
        now = time.monotonic()
        try:
            if self.session.connected:
                # Also while the keeper has none: the socket of a broken connection is readable for ever.
                self._hear()
            if not self._holder.online:
                return  # the keeper tries all the time, and wakes us
            self.ensure_joined()
            if now >= self._next_poll:
                interval = self._options.get("polling_interval") or (
                    _POLL_POOLED if self._holder.pooled else _POLL
                )
                self._next_poll = now + interval
                self._maybe = self._urgent = True
            for channel in self.channels:
                channel.try_suspects()
            if self._maybe and now >= self._holder.settled_at:
                urgent = self._urgent
                self._urgent = self._maybe = self._nudged = False
                for channel in self.channels:
                    self._maybe = channel.fetch(urgent) or self._maybe
                    channel.try_suspects()
        except ConnectionLost as error:
            self._lost(error)
        except psycopg2.Error:
            logger.exception("messages can't be taken; the next attempt comes with the poll")
            self._next_poll = now + _POLL_POOLED

    def _hear(self) -> None:
        for _, payload in self.session.notifications():
            self._maybe = self._urgent = True
            if payload == "back":
                for channel in self.channels:
                    channel.came_back()

    def _lost(self, error: ConnectionLost) -> None:
        if not self._said_lost:
            logger.warning("the connection to Postgres is gone (%s); it is being restored", error)
        self._said_lost = True
        self._maybe = self._urgent = True
        self._unwatch_session()

    def _deliver_one(self) -> bool:
        return any(channel.deliver() for channel in self.channels)

    @property
    def _busy(self) -> bool:
        """Whether there is something to do without waiting for it."""
        if any(channel.waiting for channel in self.channels):
            return True
        return (
            self._maybe
            and self._holder is not None
            and self.session.connected
            and self._holder.online
            and time.monotonic() >= self._holder.settled_at
            and any(channel.hungry(self._urgent) for channel in self.channels)
        )

    # Blocking loop

    def drain_events(self, connection: Any, timeout: float | None = None, **kwargs: Any) -> None:
        """Wait for one message and deliver it.

        Raises:
            socket.timeout: when none came in `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        waker = self._open_waker()
        while True:
            if self._abandoned:
                raise ConnectionLost("the connection was closed")
            self._look()
            if self._deliver_one():
                return
            if self._busy:
                continue
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError
            polling = self._holder is not None and self.online
            wait = self._next_poll - now if polling else _TIMER
            if self._should_nudge:
                wait, self._urgent = min(wait, _GATHER), True
            if deadline is not None:
                wait = min(wait, deadline - now)
            sockets = [fd for fd in (waker.fileno(), self.session.fileno()) if fd >= 0]
            readable, _, _ = select.select(sockets, [], [], max(0.0, wait))
            if waker.fileno() in readable:
                self._drain_waker()

    # Celery's event loop

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Deliver from a hub, which wakes us by the connection's socket, by our own, and by a timer."""
        self._loop = loop
        loop.add_reader(self._open_waker(), self._on_wake)
        self._watch()
        loop.call_repeatedly(_TIMER, self._on_timer)
        self.wake()

    def _on_wake(self) -> None:
        self._drain_waker()
        self._turn()

    def _on_timer(self) -> None:
        if self._abandoned or not self.session.connected or time.monotonic() >= self._next_poll:
            self.wake()

    def _turn(self) -> None:
        if self._abandoned:
            raise ConnectionLost("the connection was closed")
        self._look()
        try:
            for _ in range(_BURST):
                if not self._deliver_one():
                    break
        finally:
            if busy := self._busy:
                self.wake()
        if not busy and self._should_nudge and not self._nudged:
            self._nudged = True
            self._loop.call_later(_GATHER, self._nudge)

    def _nudge(self) -> None:
        self._urgent = True
        self.wake()

    @property
    def _should_nudge(self) -> bool:
        """Whether there are free places that wait for others, to be filled together."""
        return self._maybe and self.session.connected and any(channel.could_take for channel in self.channels)

    def _watch(self) -> None:
        fd = self.session.fileno()
        if self._loop is not None and fd != self._watched:
            self._unwatch_session()
            self._loop.add_reader(fd, self._turn)
            self._watched = fd

    def _unwatch_session(self) -> None:
        if self._watched >= 0:
            with suppress(Exception):  # the hub may be closed already
                self._loop.remove_reader(self._watched)
            self._watched = -1

    def _unwatch(self) -> None:
        self._unwatch_session()
        if self._waker is not None:
            if self._loop is not None:
                with suppress(Exception):
                    self._loop.remove_reader(self._waker[0])
            for end in self._waker:
                end.close()
            self._waker = None

    def _open_waker(self) -> socket.socket:
        if self._waker is None:
            self._waker = socket.socketpair()
            for end in self._waker:
                end.setblocking(False)
            self._woken = False
        return self._waker[0]

    def _drain_waker(self) -> None:
        if self._waker is not None:
            with suppress(BlockingIOError):
                self._waker[0].recv(64)
        # Not before: who wakes us meanwhile would have its byte taken along, and nobody would send another.
        self._woken = False

    def driver_version(self) -> str:
        """Version of the driver."""
        return version("psycopg2-binary")
