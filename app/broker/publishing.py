"""Publishing other than one message at a time: many at once, or in the caller's own transaction."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import NamedTuple, Protocol

from sqlalchemy import event, text
from sqlalchemy.orm import Session

_PUT = text(
    "SELECT kombu_put(CAST(:queue AS text), CAST(:priority AS integer), CAST(:due AS timestamptz),"
    " CAST(:expires AS timestamptz), CAST(:payload AS text))"
)


_TO_WAKE = "broker: queues to wake"


class Publication(NamedTuple):
    """A message on its way into a queue; `payload` is JSON, times are aware."""

    queue: str
    priority: int
    due: datetime | None
    expires: datetime | None
    payload: str
    transient: bool


class Publisher(Protocol):
    """What stores publications: a channel."""

    def store(self, publications: list[Publication]) -> None:
        """Store them in one transaction."""

    def wake(self, queue_ids: list[int]) -> None:
        """Notify who sleeps on these queues."""


class Sink(Protocol):
    """Where publications go instead of straight into the database."""

    def put(self, publisher: Publisher, publication: Publication) -> None:
        """Take a publication over from a channel."""


sink: ContextVar[Sink | None] = ContextVar("broker_sink", default=None)


class _Batch:
    def __init__(self) -> None:
        self.publications: list[Publication] = []
        self.publisher: Publisher | None = None

    def put(self, publisher: Publisher, publication: Publication) -> None:
        self.publisher = publisher
        self.publications.append(publication)


class _CallersTransaction:
    def __init__(self, session: Session) -> None:
        self._session = session

    def put(self, publisher: Publisher, publication: Publication) -> None:
        queue_id = self._session.scalar(_PUT, publication._asdict())
        if _TO_WAKE not in self._session.info:
            self._session.info[_TO_WAKE] = {}
            event.listen(self._session, "after_commit", _wake)
        self._session.info[_TO_WAKE][queue_id] = publisher


def _wake(session: Session) -> None:
    if session.in_nested_transaction():
        return  # a savepoint was released: nobody else sees yet what it holds
    publishers = dict(session.info[_TO_WAKE])
    session.info[_TO_WAKE].clear()
    for publisher in list(publishers.values())[:1]:
        publisher.wake(list(publishers))


@contextmanager
def _publishing_into(target: Sink) -> Iterator[None]:
    token = sink.set(target)
    try:
        yield
    finally:
        sink.reset(token)


@contextmanager
def in_transaction(session: Session) -> Iterator[None]:
    """Publish what is published in this block in the transaction of `session`.

    The messages exist exactly if the caller commits. Everything that publishes through this transport is
    meant: `task.delay()`, `apply_async` with its routing, ETA, priority and headers, chains, groups. Messages
    to fanout and topic exchanges are not: nobody waits for those.

    Example:
        >>> with in_transaction(session):
        ...     session.add(order)
        ...     send_receipt.apply_async([order.id], countdown=60)
        >>> session.commit()

    Raises:
        sqlalchemy.exc.DBAPIError: from the publishing call; the transaction can then only be rolled back.
    """
    with _publishing_into(_CallersTransaction(session)):
        yield


@contextmanager
def batch() -> Iterator[None]:
    """Publish what is published in this block at its end, in order and in one transaction.

    Many times faster than one by one, because the disk is waited for once.

    Example:
        >>> with batch():
        ...     for row in rows:
        ...         import_row.delay(row)
    """
    collected = _Batch()
    with _publishing_into(collected):
        yield
    if collected.publisher is not None:
        collected.publisher.store(collected.publications)
