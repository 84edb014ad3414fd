"""The channel: publishing, declaring, consuming, in the terms of AMQP that kombu speaks."""

import json
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg2
from amqp.protocol import queue_declare_ok_t  # type: ignore[import-untyped]
from kombu.exceptions import ChannelError
from kombu.transport import virtual
from kombu.transport.base import to_rabbitmq_queue_arguments

from app.broker.holder import Delivery, Holder
from app.broker.place import Places
from app.broker.publishing import Publication, sink

if TYPE_CHECKING:
    from app.broker.transport import Transport

logger = logging.getLogger(__name__)

_UNLIMITED_BATCH = 100  # messages taken at once without a prefetch limit
_AHEAD = 0.05  # seconds of work taken beyond the prefetch limit, by the pace of late
_AHEAD_MOST = 200  # messages
_STALE = 0.3  # seconds after which others may have what was taken ahead


class TakenMessage(virtual.Message):
    """A message of this transport; a class of its own so that weak references to it can be made."""


class Channel(virtual.Channel):
    """A channel; all channels of a kombu connection share one connection to Postgres."""

    Message = TakenMessage
    supports_fanout = True
    connection: "Transport"

    def __init__(self, connection: "Transport", **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self._transport = connection  # survives the channel's end: late acknowledgements still find their way
        self._consumed: dict[str, _Consumer] = {}
        self._unacked: dict[str, Delivery] = {}
        self._ready: deque[tuple[_Consumer, TakenMessage, Delivery | None]] = deque()
        self._suspects: deque[tuple[_Consumer, TakenMessage, Delivery]] = deque()
        self._places = Places()
        self._more_to_pop = False
        self._taken_at = 0.0
        self._done = 0
        self._transient: dict[str, bool] = {}
        self.prefetch_count = 0

    # Publishing

    def basic_publish(self, message: dict[str, Any], exchange: str, routing_key: str, **kwargs: Any) -> None:
        """Publish; returns when Postgres has it on disk (a transient message: when Postgres has it).

        Raises:
            ChannelError: a persistent message to a direct exchange leads to no queue. AMQP would drop it.
        """
        self._inplace_augment_message(message, exchange, routing_key)
        properties = message["properties"]
        publication = Publication(
            queue="",
            priority=self._get_message_priority(message),
            due=_due(message["headers"]),
            expires=_expires(message["headers"], properties),
            payload=json.dumps(message),
            transient=properties.get("delivery_mode") == 1,
        )
        queues, exchange_type = self._destinations(exchange, routing_key)
        for queue in queues:
            target = sink.get()
            if target is None:
                self.store([publication._replace(queue=queue)])
            else:
                target.put(self, publication._replace(queue=queue))
        if not queues and exchange:
            try:
                self._transport.publish(
                    "CALL kombu_broadcast(%s, %s, %s, %s, %s, %s, %s, %s)",
                    (exchange, exchange_type, routing_key, *publication[1:]),
                )
            except psycopg2.errors.NoDataFound:
                raise ChannelError(
                    f"NO_ROUTE - no queue is bound to exchange {exchange!r} with routing key {routing_key!r}:"
                    " the message was not published",
                    (60, 40),
                    "Channel.basic_publish",
                    "312",
                ) from None

    def store(self, publications: list[Publication]) -> None:
        """Store publications in one transaction, in order.

        Raises:
            ChannelError: somebody deletes a queue as often as it is declared; nothing is stored.
        """
        for _ in range(len(publications) + 1):
            try:
                if len(publications) == 1:
                    self._transport.publish("CALL kombu_publish(%s, %s, %s, %s, %s, %s)", publications[0])
                else:
                    columns = [list(column) for column in zip(*publications, strict=True)][:-1]
                    self._transport.publish(
                        "CALL kombu_publish_many("
                        "%s::text[], %s::integer[], %s::timestamptz[], %s::timestamptz[], %s::text[])",
                        columns,
                    )
            except psycopg2.errors.NoDataFound:
                for queue in {publication.queue for publication in publications}:
                    self._declare(queue)  # deleted by somebody since it was declared here
            else:
                return
        names = ", ".join(sorted({publication.queue for publication in publications}))
        raise ChannelError(
            f"NOT_FOUND - one of the queues {names} is deleted again and again: nothing was published",
            (60, 40),
            "Channel.basic_publish",
            "404",
        )

    def wake(self, queue_ids: list[int]) -> None:
        """Notify who sleeps on these queues, after somebody else's commit."""
        with suppress(psycopg2.Error):  # the poll finds it
            self._transport.session.run("SELECT kombu_wake(%s)", (queue_ids,))

    def _destinations(self, exchange: str, routing_key: str) -> tuple[list[str], str]:
        if not exchange:
            return [routing_key], "direct"
        exchange_type = self.typeof(exchange).type
        if exchange_type != "direct" or exchange not in self.state.exchanges:
            return [], exchange_type
        table = self.get_table(exchange)
        return sorted(self.typeof(exchange).lookup(table, exchange, routing_key, None)), exchange_type

    def encode_body(self, body: Any, encoding: str | None = None) -> tuple[Any, str | None]:
        """Text stays text, so that a person can read it in the table."""
        if isinstance(body, str):
            return body, None
        encoded: tuple[Any, str | None] = super().encode_body(body, encoding)
        return encoded

    # Declaring

    def prepare_queue_arguments(self, arguments: Mapping[str, Any], **options: Any) -> Mapping[str, Any]:
        """As AMQP's transports do; of them all this one reads `x-message-ttl`, for transient queues."""
        prepared: Mapping[str, Any] = to_rabbitmq_queue_arguments(arguments or {}, **options)
        return prepared

    def queue_declare(
        self,
        queue: str | None = None,
        passive: bool = False,
        auto_delete: bool = False,
        exclusive: bool = False,
        arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> queue_declare_ok_t:
        """Declare a queue; an exclusive or auto-deleted one lives and dies with this process.

        Only a passive declaration counts the waiting messages: counting a million takes its time, and Celery
        declares the queue at the first publishing over each connection.

        Raises:
            ChannelError: passive, and there is no such queue.
        """
        if passive:
            found = self._transport.session.run("SELECT id FROM kombu_queue WHERE name = %s", (queue,))
            if not found:
                raise ChannelError(
                    f"NOT_FOUND - no queue {queue!r}", (50, 10), "Channel.queue_declare", "404"
                )
            return queue_declare_ok_t(queue, self._size(str(queue)), 0)
        queue = queue or f"amq.gen-{self._next_delivery_tag()}"
        if exclusive or auto_delete:
            ttl = (arguments or {}).get("x-message-ttl")
            self._transient[queue] = auto_delete
            self._declare(queue, self._transport.holder().id, ttl and timedelta(milliseconds=ttl))
        else:
            self._declare(queue)
        return queue_declare_ok_t(queue, 0, 0)

    def _declare(self, queue: str, holder_id: int | None = None, ttl: timedelta | None = None) -> int:
        rows = self._transport.declare("SELECT kombu_declare(%s, %s, %s)", (queue, holder_id, ttl))
        return int(rows[0][0])

    def queue_bind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Any = None,
        **kwargs: Any,
    ) -> None:
        """Bind a queue.

        A durable queue's binding to a direct exchange is known to those who declare it, publishers included;
        others are kept in the table, for publishers that don't know who listens.
        """
        exchange = exchange or "amq.direct"
        exchange_type = self.typeof(exchange)
        if exchange_type.type == "direct" and queue not in self._transient:
            if not self.state.has_binding(queue, exchange, routing_key):
                # In this order: who finds the binding noted publishes by the exchange's table.
                table = self.state.exchanges[exchange].setdefault("table", [])
                table.append(exchange_type.prepare_bind(queue, exchange, routing_key, arguments))
                self.state.binding_declare(queue, exchange, routing_key, arguments)
            return
        pattern = "" if exchange_type.type != "topic" else _topic_pattern(routing_key)
        self._transport.declare(
            "INSERT INTO kombu_binding (exchange, routing_key, queue_id, pattern)"
            " SELECT %s, %s, id, %s FROM kombu_queue WHERE name = %s ON CONFLICT DO NOTHING",
            (exchange, routing_key or "", pattern, queue),
        )

    def queue_unbind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Any = None,
        **kwargs: Any,
    ) -> None:
        """Remove a binding."""
        exchange = exchange or "amq.direct"
        self.state.binding_delete(queue, exchange, routing_key)
        if exchange in self.state.exchanges:
            table = self.state.exchanges[exchange].get("table", [])
            table[:] = [row for row in table if (row[0], row[2]) != (routing_key, queue)]
        self._transport.declare(
            "DELETE FROM kombu_binding b USING kombu_queue q"
            " WHERE q.id = b.queue_id AND q.name = %s AND b.exchange = %s AND b.routing_key = %s",
            (queue, exchange, routing_key),
        )

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any) -> int:
        """Delete a queue with what waits in it; returns how many messages that was."""
        if if_empty and self._size(queue):
            return 0
        count = self._size(queue)
        for _, exchange, routing_key in [key for key in self.state.bindings if key[0] == queue]:
            self.queue_unbind(queue, exchange, routing_key)
        self._transport.declare(
            "WITH gone AS (DELETE FROM kombu_queue WHERE name = %s RETURNING id)"
            " DELETE FROM kombu_message m USING gone WHERE m.queue_id = gone.id",
            (queue,),
        )
        self._transient.pop(queue, None)
        return count

    def _size(self, queue: str) -> int:
        rows = self._transport.session.run(
            "SELECT count(*) FROM kombu_message m JOIN kombu_queue q ON q.id = m.queue_id"
            " WHERE q.name = %s AND m.visible",
            (queue,),
        )
        return int(rows[0][0])

    def _purge(self, queue: str) -> int:
        rows = self._transport.session.run(
            "WITH gone AS (DELETE FROM kombu_message m USING kombu_queue q"
            " WHERE q.id = m.queue_id AND q.name = %s AND m.visible RETURNING 1) SELECT count(*) FROM gone",
            (queue,),
        )
        return int(rows[0][0])

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        return bool(self._transport.session.run("SELECT 1 FROM kombu_queue WHERE name = %s", (queue,)))

    def after_reply_message_received(self, queue: str) -> None:
        """Remove the queue of a reply that was read."""
        self.queue_delete(queue)

    # Consuming

    def basic_consume(
        self,
        queue: str,
        no_ack: bool,
        callback: Callable[[TakenMessage], None],
        consumer_tag: str,
        **kwargs: Any,
    ) -> None:
        """Deliver what is in a queue to a callback; without acknowledgements it is deleted as it is taken."""
        consumer = _Consumer(queue, self._declared(queue), no_ack, callback)
        self._consumed[consumer_tag] = consumer
        self._transport.subscribe(consumer.queue_id, awake=no_ack)
        if not no_ack:
            self._transport.stay_awake(self._places)
            self._places.add(consumer.queue_id)

    def basic_cancel(self, consumer_tag: str) -> None:
        """Stop delivering; what was taken and not delivered, or delivered and forgotten, goes back."""
        consumer = self._consumed.pop(consumer_tag, None)
        if consumer is None:
            return
        for taken in (self._ready, self._suspects):
            for entry in [entry for entry in list(taken) if entry[0] is consumer]:
                with suppress(ValueError):  # given back a moment ago
                    taken.remove(entry)  # type: ignore[arg-type] # it is from there
                    self._give_back(entry[2])
        if not self.consumes(consumer.queue_id):
            self._transport.stay_awake(self._places)
            self._places.remove(consumer.queue_id)
            self._transport.unsubscribe(consumer.queue_id)
            if self._transient.get(consumer.queue):
                with suppress(psycopg2.Error):
                    self.queue_delete(consumer.queue)

    def consumes(self, queue_id: int) -> bool:
        """Whether there is a consumer for that queue."""
        return any(consumer.queue_id == queue_id for consumer in list(self._consumed.values()))

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> TakenMessage | None:
        """Take one message, if there is one."""
        consumer = _Consumer(queue, self._declared(queue), no_ack, lambda message: None)
        places = Places()
        places.add(consumer.queue_id)
        self._transport.ensure_joined()
        self._transport.flush()  # who has just given a message back may get it again
        before = len(self._ready)
        self._fetch([consumer], places, 1, sleep=False)
        if len(self._ready) == before:
            return None
        _, message, delivery = self._ready.pop()
        if delivery is not None and not no_ack:
            self._unacked[message.delivery_tag] = delivery
        return message

    def basic_qos(self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False) -> None:
        """Limit how many messages may be unacknowledged; 0 means no limit."""
        self.prefetch_count = prefetch_count
        self._transport.wake()

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """Acknowledge; from any thread, and also when the channel was closed meanwhile."""
        delivery = self._unacked.pop(delivery_tag, None)
        if delivery is not None:
            self._done += 1
            self._transport.holder().ack(delivery)
            self._transport.wake()

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Give back, counted towards the delivery limit; or, without requeue, give up for good."""
        if not requeue:
            self.dead_letter(delivery_tag, "rejected")
            return
        delivery = self._unacked.pop(delivery_tag, None)
        if delivery is not None:
            self._transport.holder().give_back(delivery, counted=True)
            self._transport.wake()

    def dead_letter(self, delivery_tag: str, reason: str, detail: Any = None) -> None:
        """Give a message up for good: `on_dead` gets it in the transaction that removes it."""
        delivery = self._unacked.pop(delivery_tag, None)
        if delivery is not None:
            self._transport.holder().bury(delivery, reason, detail)
            self._transport.wake()

    def basic_recover(self, requeue: bool = False) -> None:
        """Give back everything unacknowledged."""
        if not requeue:
            raise NotImplementedError("Does not support recover(requeue=False)")
        for delivery_tag in list(self._unacked):
            self._give_back(self._unacked.pop(delivery_tag, None))
        self._give_back_undelivered()

    def close(self) -> None:
        """End all consumers and give back what is unacknowledged."""
        if self.closed:
            return
        self.closed = True
        for consumer_tag in list(self._consumed):
            self.basic_cancel(consumer_tag)
        self.basic_recover(requeue=True)
        self._transport.flush()
        if self.connection is not None:
            self.connection.close_channel(self)

    def abandon(self) -> None:
        """End, but hold on to what runs: the connection broke, and acknowledgements may still come."""
        self.closed = True
        self._consumed.clear()
        self._give_back_undelivered()

    def fetch(self, urgent: bool) -> bool:
        """Take what the window allows; whether there may be more."""
        no_ack = [consumer for consumer in self._consumed.values() if consumer.no_ack]
        acking = [consumer for consumer in self._consumed.values() if not consumer.no_ack]
        more = False
        if no_ack and (urgent or self._more_to_pop):  # of these every arrival is notified
            more = self._more_to_pop = self._pop(no_ack)
        if not acking:
            return more
        if not self.hungry(urgent):
            return True
        want = self._free if no_ack else self._free + self._ahead()
        return self._fetch(acking, self._places, want, sleep=True) or more

    def hungry(self, urgent: bool) -> bool:
        """Whether to take now: half of the window is free, or one place and it is urgent."""
        if not self._places:
            return self._more_to_pop
        return not self._ready and self._free >= (1 if urgent else max(1, self.prefetch_count // 2))

    def _ahead(self) -> int:
        """How many messages beyond the limit will be done in a moment, if things go on as they do."""
        now = time.monotonic()
        seconds, self._taken_at = now - self._taken_at, now
        done, self._done = self._done, 0
        return min(int(done / seconds * _AHEAD), _AHEAD_MOST) if self.prefetch_count else 0

    def share(self) -> None:
        """Give back what was taken ahead and is not being done so soon after all; from any thread."""
        if time.monotonic() - self._taken_at > _STALE:
            with suppress(IndexError):
                while self.prefetch_count and len(self._unacked) + len(self._ready) > self.prefetch_count:
                    self._give_back(self._ready.pop()[2])

    @property
    def has_transient(self) -> bool:
        """Whether a queue of it lives and dies with this process."""
        return bool(self._transient)

    @property
    def could_take(self) -> bool:
        """Whether there is a free place."""
        return bool(self._places) and not self._ready and self._free > 0

    def came_back(self) -> None:
        """Something stands in a queue before the place where taking stopped."""
        self._places.start_over()

    @property
    def _free(self) -> int:
        if self.prefetch_count:
            return self.prefetch_count - len(self._unacked) - len(self._suspects)
        return _UNLIMITED_BATCH - len(self._ready)

    def deliver(self) -> bool:
        """Hand the next taken message to its consumer; whether there was one."""
        while self.waiting:
            try:
                consumer, message, delivery = self._ready.popleft()
            except IndexError:
                return False  # given back a moment ago
            if delivery is not None:
                if delivery.holder_id != self._transport.holder().id:
                    continue  # taken under an identity that was given up for dead
                if not consumer.no_ack:
                    self._unacked[message.delivery_tag] = delivery
            consumer.callback(message)
            return True
        return False

    def try_suspects(self) -> None:
        """Let the next message run that workers died with, unless one is running.

        Raises:
            ConnectionLost: nothing is forgotten then.
        """
        while self._suspects:
            consumer, message, delivery = self._suspects[0]
            holder = self._transport.holder()
            if delivery.holder_id == holder.id and not holder.try_suspect(self._transport.session, delivery):
                return
            self._suspects.popleft()
            self._ready.append((consumer, message, delivery))

    @property
    def waiting(self) -> bool:
        """Whether a taken message waits for its consumer, and may go there."""
        return bool(self._ready) and (not self.prefetch_count or len(self._unacked) < self.prefetch_count)

    def _declared(self, queue: str) -> int:
        rows = self._transport.declare("SELECT id FROM kombu_queue WHERE name = %s", (queue,))
        return int(rows[0][0]) if rows else self._declare(queue)

    def _give_back_undelivered(self) -> None:
        for taken in (self._ready, self._suspects):
            while taken:
                self._give_back(taken.popleft()[2])

    def _give_back(self, delivery: Delivery | None) -> None:
        if delivery is not None:
            self._transport.holder().give_back(delivery, counted=False)

    def _pop(self, consumers: "list[_Consumer]") -> bool:
        by_queue = {consumer.queue_id: consumer for consumer in consumers}
        rows = self._transport.session.run(
            "SELECT * FROM kombu_pop(%s, %s)", (list(by_queue), _UNLIMITED_BATCH)
        )
        for row in sorted(rows, key=_order):
            if row[5] is None:
                message = self._message(row, by_queue[row[1]].queue)
                if message is not None:
                    self._ready.append((by_queue[row[1]], message, None))
        return len(rows) == _UNLIMITED_BATCH

    def _fetch(self, consumers: "list[_Consumer]", places: Places, want: int, *, sleep: bool) -> bool:
        by_queue = {consumer.queue_id: consumer for consumer in consumers}
        holder = self._transport.holder()
        limits = {queue_id: consumer.queue for queue_id, consumer in by_queue.items()}
        with holder.at_work():
            rows = self._transport.take(holder, limits, places, want, sleep=sleep)
            for row in sorted(rows, key=_order):
                consumer = by_queue[row[1]]
                delivery = Delivery(holder.id, row[0], row[3], row[1], self)
                if row[5] is not None:
                    holder.bury(delivery, row[5])
                elif consumer.no_ack:
                    holder.ack(delivery)
                    self._receive(row, consumer, holder, delivery)
                else:
                    self._receive(row, consumer, holder, delivery)
        if 0 < len(rows) < want:
            # The queue is empty now: say that we sleep, or nobody will tell us of the next one.
            self._transport.hurry()
        return bool(rows)

    def _receive(
        self, row: "tuple[Any, ...]", consumer: "_Consumer", holder: Holder, delivery: Delivery
    ) -> None:
        message = self._message(row, consumer.queue)
        if message is None:
            holder.bury(delivery, "invalid")
            return
        if not consumer.no_ack:
            holder.held.add(delivery)
            holder.watch(delivery, message)
            if row[4] >= self._transport.trial(consumer.queue) and self.consumes(row[1]):
                self._suspects.append((consumer, message, delivery))
                return
        self._ready.append((consumer, message, delivery))

    def _message(self, row: "tuple[Any, ...]", queue: str) -> TakenMessage | None:
        id_, _, _, number, returned, _, payload = row
        try:
            content = json.loads(payload)
            properties = content["properties"]
            headers = content["headers"]
            properties["delivery_tag"] = f"{id_}.{number}"
            properties.setdefault("delivery_info", {}).update(
                queue=queue, redelivered=number > 1, delivery_count=returned
            )
            # As RabbitMQ counts and says it: deliveries that failed, of a message that had one.
            headers.pop("x-delivery-count", None)
            if returned:
                headers["x-delivery-count"] = returned
            eta = _time(headers.get("eta"))
            if eta is not None and eta <= datetime.now(UTC) + timedelta(minutes=1):
                headers["eta"] = (
                    None  # kept here until it was due; no worker is to look at its own clock again
                )
            return TakenMessage(content, channel=self)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            logger.exception("message %s of queue %s can't be read", id_, queue)
            return None


class _Consumer:
    def __init__(
        self, queue: str, queue_id: int, no_ack: bool, callback: Callable[[TakenMessage], None]
    ) -> None:
        self.queue = queue
        self.queue_id = queue_id
        self.no_ack = no_ack
        self.callback = callback


def _order(row: tuple[Any, ...]) -> tuple[int, int]:
    return -row[2], row[0]


def _time(value: Any) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        time_ = datetime.fromisoformat(value)
    except ValueError:
        return None  # who runs it can tell better what is wrong with it
    return time_ if time_.tzinfo else time_.replace(tzinfo=UTC)


def _due(headers: Mapping[str, Any]) -> datetime | None:
    return _time(headers.get("eta"))


def _expires(headers: Mapping[str, Any], properties: Mapping[str, Any]) -> datetime | None:
    # A job with an `expires` header goes to its worker, which revokes it and says so in the result. AMQP's
    # expiration alone means that nobody wants to hear of it.
    expiration = properties.get("expiration")
    if not expiration or headers.get("expires"):
        return None
    return datetime.now(UTC) + timedelta(milliseconds=int(expiration))


def _topic_pattern(routing_key: str) -> str:
    # '*' is one word, '#' none or more; matched against the key with a dot before it, so that each word has
    # one
    words = {"*": r"\.[^.]+", "#": r"(\.[^.]+)*"}
    parts = [words.get(word) or r"\." + re.escape(word) for word in routing_key.split(".")]
    return f"^{''.join(parts)}$"
