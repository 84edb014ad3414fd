"""Who holds messages: one identity a process, alive as long as one of its sessions is.

A holder is a row of `kombu_holder` and a session-level advisory lock on its number, shared by all sessions of
the process. Postgres frees the lock with the last of them, so death needs no clock. A thread of its own keeps
the identity (a job may block the main thread for hours), settles what the main thread doesn't get to, and
rescues what dead holders held.
"""

import atexit
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Protocol

import psycopg2
import psycopg2.extensions

from app.broker.connection import ConnectionLost, Session

logger = logging.getLogger(__name__)

_TICK = 0.5  # seconds between two looks for the dead and the due
_FLUSH = 0.1  # seconds after which the keeper settles what the main thread has left lying
_RETRY = 0.2  # seconds between two attempts to connect
_GRACE = 1.0  # seconds a holder may be without a session before it counts as dead
_GRACE_AFTER_TROUBLE = 5.0  # the same when the database, or the way to it, was away a moment ago
_TROUBLE = 10.0  # seconds that a moment ago lasts
_SETTLE = 1.0  # seconds after a reconnect in which nothing is taken: others say first what they hold
_REMEMBER = 5.0  # seconds that acknowledgements are repeated after a crash of the server
_DEAD_RETRY = 5.0  # seconds until a dead message that couldn't be disposed of is tried again
_LEASE = "20 s"  # what replaces the session's lock behind a pooler that takes it away


@dataclass(frozen=True)
class DeadMessage:
    """A message that will not be delivered again, for whoever takes it over.

    `payload` is what was published: JSON with body, headers and properties. `reason` is one of poison
    (delivered too often), expired, rejected, invalid (not even JSON), or what `Channel.dead_letter` was told,
    with its `detail`.
    """

    id: int
    queue: str
    payload: str
    priority: int
    published_at: datetime | None
    delivery: int
    returned: int
    reason: str
    detail: Any = None


OnDead = Callable[[psycopg2.extensions.cursor, DeadMessage], None]


class Delivery:
    """A message in this process: which delivery of it, and who would acknowledge it."""

    __slots__ = ("__weakref__", "channel", "delivery", "holder_id", "id", "message", "queue_id", "settled")

    def __init__(self, holder_id: int, id_: int, delivery: int, queue_id: int, channel: "Consuming") -> None:
        self.holder_id = holder_id
        self.id = id_
        self.delivery = delivery
        self.queue_id = queue_id
        self.channel = channel
        self.message: weakref.ref[Any] | None = None
        self.settled = False


class Consuming(Protocol):
    """The channel of a delivery."""

    def consumes(self, queue_id: int) -> bool:
        """Whether the channel still has a consumer for that queue."""


class Transport(Protocol):
    """Who takes messages under this identity."""

    def wake(self) -> None:
        """Look for messages; from any thread."""

    def share(self) -> None:
        """Give back what was taken ahead and is not being done so soon after all; from any thread."""

    def let_go(self) -> None:
        """End the session that shares the identity; from the transport's own thread."""


class Holder:
    """The identity of this process at one broker, and what it has to settle."""

    rescued: ClassVar[int] = 0
    """How many messages of dead holders this process has given back to their queues."""

    def __init__(self, args: dict[str, str], on_dead: OnDead | None) -> None:
        self.id = 0
        self.pooled = False
        self.online = False
        self.settled_at = 0.0
        self._server = ""
        self.transports: set[Transport] = set()
        self.held: set[Delivery] = set()
        self.on_trial: Delivery | None = None
        self.acks: deque[Delivery] = deque()
        self._backs: deque[tuple[Delivery, bool]] = deque()
        self._dead: deque[tuple[Delivery, str, Any]] = deque()
        self._orphans: deque[Delivery] = deque()
        self._acked: deque[tuple[float, list[int], list[int]]] = deque()
        self._gone: dict[int, float] = {}
        self._on_dead = on_dead
        self._session = Session(args, "keeper")
        self._joined = 0
        self._event = threading.Event()
        self._stopping = False
        self._doubted = False
        self._doubted_until = 0.0
        self._books = threading.Lock()
        self._at_work = 0
        self._trouble_until = 0.0
        self._next_tick = 0.0
        self._retry_dead_at = 0.0
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._keep, name="broker-keeper", daemon=True)

    # For the main thread

    def start(self) -> None:
        """Take an identity; returns when there is one.

        Raises:
            psycopg2.Error: when the database can't be reached or lacks the broker's tables.
        """
        self._connect()
        self._thread.start()
        atexit.register(self.leave)

    def join(self, session: Session) -> int:
        """Let a session share the identity, whose number is returned: while it lives nothing is rescued."""
        holder_id = self.id
        if self.pooled:
            return holder_id
        session.run("SELECT pg_advisory_lock_shared(1802331490, %s)", (holder_id,))
        if not session.run("SELECT 1 FROM kombu_holder WHERE id = %s", (holder_id,)):
            session.close()
            self._joined = 0  # the keeper's turn to take a new identity
            self._event.set()
            raise ConnectionLost("this worker was given up for dead while its connections were broken")
        return holder_id

    def doubt(self) -> None:
        """A session of this identity was lost: nothing is taken until the keeper has looked after its own.

        When the server crashed, it may have forgotten what was taken last. A transport that is back before
        the keeper has repeated what is held would take, and run, that again.
        """
        self.online = False
        self._doubted = True
        self._doubted_until = time.monotonic() + _TROUBLE
        self._event.set()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While a transport takes or settles: what the database says and what is in `held` may differ."""
        with self._books:
            self._at_work += 1
        try:
            yield
        finally:
            with self._books:
                self._at_work -= 1

    def ack(self, delivery: Delivery) -> None:
        """Note that a message is done; from any thread."""
        if self._settle(delivery):
            first = not self.acks
            self.acks.append(delivery)
            self.held.discard(delivery)
            if first:
                self._event.set()

    def give_back(self, delivery: Delivery, *, counted: bool) -> None:
        """Make a message available again; from any thread. Counted: towards its delivery limit."""
        if self._settle(delivery):
            self._backs.append((delivery, counted))
            self.held.discard(delivery)
            self._event.set()

    def bury(self, delivery: Delivery, reason: str, detail: Any = None) -> None:
        """Give a message up for good; from any thread."""
        if self._settle(delivery):
            self._dead.append((delivery, reason, detail))
            self.held.discard(delivery)
            self._event.set()

    def watch(self, delivery: Delivery, message: Any) -> None:
        """Notice when nobody has the message any more: then nobody will acknowledge it."""
        orphans = self._orphans
        delivery.message = weakref.ref(message, lambda _: orphans.append(delivery))

    def try_suspect(self, session: Session, delivery: Delivery) -> bool:
        """Let a message run that others died with, one at a time: if this process dies now, it is to blame.

        Raises:
            ConnectionLost: nobody would know it was tried.
        """
        if self.on_trial and not self.on_trial.settled and self.on_trial.holder_id == self.id:
            return False
        session.run("UPDATE kombu_holder SET suspect = %s WHERE id = %s", (delivery.id, self.id))
        self.on_trial = delivery
        return True

    def pop_acks(self) -> list[Delivery]:
        """What is to be acknowledged now, for the session that does so along with something else."""
        acks = []
        with suppress(IndexError):
            while True:
                acks.append(self.acks.popleft())
        return [ack for ack in acks if ack.holder_id == self.id]

    def acked(self, acks: list[Delivery]) -> None:
        """Remember what was acknowledged, until the disk has it for sure."""
        now = time.monotonic()
        self._acked.append((now, [ack.id for ack in acks], [ack.delivery for ack in acks]))
        while self._acked and self._acked[0][0] < now - _REMEMBER:
            self._acked.popleft()

    def flush(self, session: Session) -> None:
        """Settle on this session all that is to be acknowledged or given back.

        Raises:
            ConnectionLost: nothing is forgotten then.
        """
        acks = self.pop_acks()
        if acks:
            try:
                ids, deliveries = [ack.id for ack in acks], [ack.delivery for ack in acks]
                count = session.run(
                    "SELECT kombu_ack(%s, %s::bigint[], %s::integer[])", (self.id, ids, deliveries)
                )[0][0]
            except psycopg2.Error:
                self.acks.extendleft(reversed(acks))
                raise
            self.acked(acks)
            if count < len(acks):
                logger.warning(
                    "%d acknowledgement(s) came too late: delivered again meanwhile", len(acks) - count
                )
        backs: list[tuple[Delivery, bool]] = []
        with suppress(IndexError):
            while True:
                backs.append(self._backs.popleft())
        backs = [back for back in backs if back[0].holder_id == self.id]
        if backs:
            try:
                session.run(
                    "SELECT kombu_return(%s, %s::bigint[], %s::integer[], %s::boolean[])",
                    (
                        self.id,
                        [delivery.id for delivery, _ in backs],
                        [delivery.delivery for delivery, _ in backs],
                        [counted for _, counted in backs],
                    ),
                )
            except psycopg2.Error:
                self._backs.extendleft(reversed(backs))
                raise

    def leave(self) -> None:
        """Settle everything, give back the rest and end the identity."""
        if os.getpid() != self._pid or self._stopping:
            return
        atexit.unregister(self.leave)
        for transport in list(self.transports):
            transport.let_go()
        self._stopping = True
        self._event.set()
        self._thread.join(10)

    @property
    def stopped(self) -> bool:
        """Whether the identity has ended."""
        return self._stopping

    # The keeper's thread

    def _keep(self) -> None:
        while not self._stopping:
            try:
                self._connect()
                self._work()
                self._event.wait(max(0.0, min(self._next_tick - time.monotonic(), _TICK)))
                if self._event.is_set():
                    self._event.clear()
                    if not self._stopping:
                        time.sleep(_FLUSH)
            except ConnectionLost as error:
                self._lost(error)
                time.sleep(_RETRY)
            except Exception:
                logger.exception("the broker's keeper failed; it goes on in a second")
                time.sleep(1)
        with suppress(psycopg2.Error):
            self._leave()
        self._session.close()

    def _connect(self) -> None:
        if self._session.connected and self._joined == self._session.generation:
            if self._doubted:
                self._doubted = False
                self._session.run("SELECT 1")
                self.online = True
                self._wake()
            return
        first = self.id == 0
        server_age, server = self._session.run(
            "SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())::double precision,"
            " pg_postmaster_start_time()::text"
        )[0]
        now = time.monotonic()
        if first:
            self.pooled = takes_locks_away(self._session)
            if self.pooled:
                logger.warning(
                    "a pooler in transaction mode stands between this worker and Postgres: no wake-up by"
                    " NOTIFY (queues are polled) and no liveness by session (a killed worker's messages wait"
                    " %s);"
                    " connect directly, or through a pool in session mode, to have both",
                    _LEASE,
                )
        if not first or server_age < _TROUBLE:
            self._trouble_until = now + _TROUBLE
        if not first or server_age < _SETTLE:
            self.settled_at = now + _SETTLE
        if first or not self._rejoin():
            self._new_identity()
        self._reassert()
        if not first and server != self._server:
            self._return_forgotten()  # other sessions are gone, too, and take nothing meanwhile
        self._server = server
        self._joined = self._session.generation
        self._gone.clear()
        self._next_tick = 0.0
        self.online = True
        if not first:
            logger.warning("the broker's connection is back")
        self._wake()

    def _lost(self, error: ConnectionLost) -> None:
        if self.online:
            logger.warning("the broker's connection is gone (%s); trying to get it back", error)
        self.online = False

    def _rejoin(self) -> bool:
        if not self.pooled:
            self._session.run("SELECT pg_advisory_lock_shared(1802331490, %s)", (self.id,))
        return bool(self._session.run("SELECT 1 FROM kombu_holder WHERE id = %s", (self.id,)))

    def _new_identity(self) -> None:
        if self.id:
            logger.warning(
                "this worker was given up for dead: %d message(s) it held are delivered elsewhere",
                len(self.held),
            )
        self.held.clear()
        name = f"{socket.gethostname()}:{os.getpid()}"
        while True:
            holder_id = secrets.randbelow(2**31 - 1) + 1
            if not self.pooled:
                self._session.run("SELECT pg_advisory_lock_shared(1802331490, %s)", (holder_id,))
            if self._session.run(
                "INSERT INTO kombu_holder (id, name, beat_at) VALUES (%s, %s, CASE WHEN %s THEN now() END)"
                " ON CONFLICT DO NOTHING RETURNING id",
                (holder_id, name, self.pooled),
            ):
                self.id = holder_id
                return

    def _reassert(self) -> None:
        held = [delivery for delivery in list(self.held) if delivery.holder_id == self.id]
        waiting = [ack for ack in list(self.acks) if ack.holder_id == self.id]
        acked = [*self._acked, (0.0, [ack.id for ack in waiting], [ack.delivery for ack in waiting])]
        if held or waiting or self._acked:
            self._session.run(
                "SELECT kombu_reassert(%s, %s::bigint[], %s::integer[], %s::bigint[], %s::integer[])",
                (
                    self.id,
                    [id_ for _, ids, _ in acked for id_ in ids],
                    [number for _, _, numbers in acked for number in numbers],
                    [delivery.id for delivery in held],
                    [delivery.delivery for delivery in held],
                ),
            )

    def _return_forgotten(self) -> None:
        # What the database shows as held here, and nobody here knows of. Disposals and returns don't wait for
        # the disk, so a server that crashed may have forgotten one. Or a connection broke after messages were
        # taken and before they were told.
        held = list(self.held)  # first: what is settled meanwhile stands below
        settling = [*self.acks, *(back[0] for back in self._backs), *(dead[0] for dead in self._dead)]
        forgotten = self._session.run(
            "SELECT id, delivery FROM kombu_message WHERE holder = %s AND NOT id = ANY (%s::bigint[])",
            (self.id, [delivery.id for delivery in [*held, *settling]]),
        )
        if forgotten:
            self._session.run(
                "SELECT kombu_return(%s, %s::bigint[], %s::integer[], %s::boolean[])",
                (
                    self.id,
                    [id_ for id_, _ in forgotten],
                    [delivery for _, delivery in forgotten],
                    [False] * len(forgotten),
                ),
            )
            logger.warning(
                "%d message(s) were held here without anybody knowing of them; they are delivered again",
                len(forgotten),
            )

    def _work(self) -> None:
        self.flush(self._session)
        self._bury_the_dead()
        now = time.monotonic()
        if now < self._next_tick:
            return
        if self.settled_at and now >= self.settled_at:
            self.settled_at = 0.0
            self._wake()
        for transport in list(self.transports):
            transport.share()
        self._return_orphans()
        # Again for a while: the statement whose answer was lost may still have been going on.
        if now < self._doubted_until:
            with self._books:
                if not self._at_work:
                    self._return_forgotten()
        # Behind a pooler the row alone shows life; others take it away when it was silent for too long.
        if self.pooled and not self._session.run("SELECT 1 FROM kombu_holder WHERE id = %s", (self.id,)):
            self._joined = 0
            raise ConnectionLost("this worker was given up for dead while it could not say that it lives")
        gone, next_due = self._session.run(
            "SELECT gone, next_due FROM kombu_tick(%s, %s)", (self.id, _LEASE if self.pooled else None)
        )[0]
        self._rescue(gone, now)
        self._next_tick = now + max(0.0, min(_TICK, _TICK if next_due is None else next_due))

    def _rescue(self, gone: list[int], now: float) -> None:
        # Only an uninterrupted absence counts, seen by a keeper that was connected all the time.
        grace = _GRACE_AFTER_TROUBLE if now < self._trouble_until else _GRACE
        self._gone = {holder_id: self._gone.get(holder_id, now) for holder_id in gone}
        for holder_id, since in self._gone.items():
            if now - since >= grace:
                count = self._session.run(
                    "SELECT kombu_rescue(%s, %s)", (holder_id, _LEASE if self.pooled else None)
                )
                if count[0][0]:
                    Holder.rescued += count[0][0]
                    logger.warning("a worker died; %d message(s) it held are delivered again", count[0][0])

    def _return_orphans(self) -> None:
        for _ in range(len(self._orphans)):
            delivery = self._orphans.popleft()
            if delivery.settled:
                continue
            if delivery.channel.consumes(delivery.queue_id):
                self._orphans.append(delivery)  # as in AMQP: unacknowledged until its consumer ends
            else:
                self.give_back(delivery, counted=False)
        self.flush(self._session)

    def _bury_the_dead(self) -> None:
        if time.monotonic() < self._retry_dead_at:
            return
        while self._dead:
            delivery, reason, detail = self._dead[0]
            if delivery.holder_id == self.id:
                try:
                    self._bury(delivery, reason, detail)
                except ConnectionLost:
                    raise
                except Exception:
                    logger.exception(
                        "message %d (%s) can't be disposed of; it stays held", delivery.id, reason
                    )
                    self._retry_dead_at = time.monotonic() + _DEAD_RETRY
                    self._dead.rotate(-1)
                    return
            self._dead.popleft()

    def _bury(self, delivery: Delivery, reason: str, detail: Any) -> None:
        fence = (delivery.id, self.id, delivery.delivery)
        if self._on_dead is None and reason != "expired":
            self._session.run(
                "UPDATE kombu_message SET holder = NULL, dead = %s"
                " WHERE id = %s AND holder = %s AND delivery = %s",
                (reason, *fence),
            )
            return
        with self._session.transaction() as cursor:
            cursor.execute(
                "DELETE FROM kombu_message m USING kombu_queue q"
                " WHERE m.id = %s AND m.holder = %s AND m.delivery = %s AND q.id = m.queue_id"
                " RETURNING m.id, q.name, m.payload, m.priority, m.timestamp AT TIME ZONE 'UTC',"
                " m.delivery, m.returned",
                fence,
            )
            row = cursor.fetchone()
            if row is not None and self._on_dead is not None:
                self._on_dead(cursor, DeadMessage(*(*row, reason, detail)))

    def _leave(self) -> None:
        self._connect()
        self.flush(self._session)
        self._bury_the_dead()
        for delivery in list(self.held):
            self.give_back(delivery, counted=False)  # kombu_rescue would count it
        self.flush(self._session)
        if self.pooled:
            self._session.run("UPDATE kombu_holder SET beat_at = '-infinity' WHERE id = %s", (self.id,))
        else:
            self._session.run("SELECT pg_advisory_unlock_shared(1802331490, %s)", (self.id,))
        self._session.run("SELECT kombu_rescue(%s, %s)", (self.id, _LEASE if self.pooled else None))

    def _settle(self, delivery: Delivery) -> bool:
        # Once, whoever comes first; and the death of the message object means nothing any more. It stays in
        # `held` until it is in the queue of what is to be settled: whoever looks at both finds it.
        if delivery.settled:
            return False
        delivery.settled = True
        delivery.message = None
        return True

    def _wake(self) -> None:
        for transport in list(self.transports):
            transport.wake()


def rescued() -> int:
    """How many messages of dead holders this process has given back to their queues."""
    return Holder.rescued


def takes_locks_away(session: Session) -> bool:
    """Whether a pooler gives this session another server connection at each statement."""
    other = session.twin()
    try:
        pids = set()
        other_pids = set()
        for _ in range(5):
            pids.add(session.run("SELECT pg_backend_pid()")[0][0])
            other_pids.add(other.run("SELECT pg_backend_pid()")[0][0])
        return len(pids) > 1 or bool(pids & other_pids)
    finally:
        other.close()


_holders: dict[tuple[int, str], Holder] = {}
_lock = threading.Lock()


def holder_of_process(args: dict[str, str], on_dead: OnDead | None) -> Holder:
    """The identity of this process at the broker that `args` lead to; taken when first asked for."""
    key = (os.getpid(), repr(sorted(args.items())))
    with _lock:
        holder = _holders.get(key)
        if holder is None or holder.stopped:
            holder = Holder(args, on_dead)
            holder.start()
            _holders[key] = holder
        return holder
