"""Connections to Postgres: how a DSN becomes one, when it counts as lost, and that no child inherits it."""

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import psycopg2.errors
import psycopg2.extensions
from sqlalchemy import make_url
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2


class ConnectionLost(psycopg2.OperationalError):
    """The connection is gone, or leads to a server that may not write (any more)."""


# Both ends notice in 6 s that the other one vanished without a word: 3 s of silence, then a probe a second.
# What is sent into that silence (a notification) has 6 s of its own to be confirmed, and no probe goes out
# meanwhile: 12 s at worst. With the grace and a look for the dead, its messages are given back within 15 s.
_VANISHED = {
    "keepalives": "1",
    "keepalives_idle": "3",
    "keepalives_interval": "1",
    "keepalives_count": "3",
    "tcp_user_timeout": "6000",
}
VANISHED_AT_SERVER = (
    "SET tcp_keepalives_idle = 3; SET tcp_keepalives_interval = 1; SET tcp_keepalives_count = 3;"
    "SET tcp_user_timeout = 6000"
)
# What a demoted primary answers; any other lost connection psycopg2 marks as closed.
_LOST = (psycopg2.InterfaceError, psycopg2.errors.ReadOnlySqlTransaction)


def connect_args(url: str) -> dict[str, Any]:
    """Turn a broker URL (what follows `sqla+`) into arguments of libpq.

    Several hosts may be named in libpq's form (`//a:5432,b:5432/db`) or in SQLAlchemy's
    (`?host=a:5432&host=b:5432`); then only one that accepts writes will do.
    """
    scheme, rest = url.split("://", 1)
    plain = f"{scheme.split('+')[0]}://{rest}"
    args: dict[str, Any]
    if "," in urlsplit(plain).netloc:
        args = psycopg2.extensions.parse_dsn(plain)
    else:
        args = PGDialect_psycopg2().create_connect_args(make_url(plain))[1]
    if "," in str(args.get("host", "")):
        args.setdefault("target_session_attrs", "read-write")
    return {"connect_timeout": "3", **_VANISHED, **{key: str(value) for key, value in args.items()}}


class Session:
    """One connection, used by one thread, opened when it is first needed and again when it was lost.

    Every statement is its own transaction (autocommit) unless `transaction` is used.

    Args:
        args: of libpq.
        role: for the connection's application_name.
        on_notify: called when a notification came with the answer to a statement.
    """

    def __init__(self, args: dict[str, Any], role: str, on_notify: Callable[[], None] | None = None) -> None:
        self._on_notify = on_notify
        self._args = args | {"application_name": f"broker {role} {os.getpid()}"}
        self._connection: psycopg2.extensions.connection | None = None
        self._fd = -1
        self.generation = 0
        """Number of connections opened so far: LISTEN and locks end with their connection."""
        _sessions.add(self)

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known without asking."""
        return self._connection is not None and not self._connection.closed

    def connect(self) -> psycopg2.extensions.connection:
        """The connection, opened if there is none.

        Raises:
            ConnectionLost: when the server can't be reached.
        """
        if self._connection is not None and not self._connection.closed:
            return self._connection
        self.close()
        try:
            with _connecting:
                connection: psycopg2.extensions.connection = psycopg2.connect(**self._args)
                self._connection, self._fd = connection, connection.fileno()
                self.generation += 1
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(VANISHED_AT_SERVER)
        except psycopg2.OperationalError as error:
            self.close()
            raise ConnectionLost(str(error).strip()) from error
        return connection

    def run(self, statement: str, arguments: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Execute one statement and return its rows.

        Raises:
            ConnectionLost: when the connection broke; whether the statement was executed is then unknown.
            psycopg2.Error: when the server refused the statement.
        """
        connection = self.connect()
        try:
            with connection.cursor() as cursor:
                cursor.execute(statement, arguments)
                rows = cursor.fetchall() if cursor.description else []
        except psycopg2.Error as error:
            raise self._checked(connection, error) from error
        if connection.notifies and self._on_notify is not None:
            self._on_notify()  # came with the answer: who waits for the socket to be readable would miss it
        return rows

    @contextmanager
    def transaction(self) -> Iterator[psycopg2.extensions.cursor]:
        """Several statements in one transaction, undone by an exception.

        Raises:
            ConnectionLost: when the connection broke; whether the transaction was committed is then unknown.
        """
        connection = self.connect()
        try:
            connection.autocommit = False
            with connection, connection.cursor() as cursor:
                yield cursor
        except psycopg2.Error as error:
            raise self._checked(connection, error) from error
        finally:
            if not connection.closed:
                connection.autocommit = True

    def twin(self) -> "Session":
        """Another session to the same server."""
        return Session(self._args, "probe")

    def notifications(self) -> list[tuple[str, str]]:
        """Channel and payload of what was notified since the last call, without waiting.

        Raises:
            ConnectionLost: when the connection broke.
        """
        connection = self.connect()
        try:
            connection.poll()
        except psycopg2.Error as error:
            raise self._checked(connection, error) from error
        received = [(notify.channel, notify.payload) for notify in connection.notifies]
        connection.notifies.clear()
        return received

    def fileno(self) -> int:
        """The socket, to wait on for notifications; -1 without a connection."""
        return self._fd if self.connected else -1

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        connection, self._connection, self._fd = self._connection, None, -1
        if connection is not None:
            connection.close()

    def _checked(self, connection: psycopg2.extensions.connection, error: psycopg2.Error) -> psycopg2.Error:
        # What libpq says by itself has no code: that the server went away, most of all.
        by_libpq = type(error) is psycopg2.DatabaseError and error.pgcode is None
        if connection.closed or by_libpq or isinstance(error, _LOST):
            self.close()
            return ConnectionLost(str(error).strip() or "the connection was lost")
        return error

    def _let_go(self) -> None:
        # In a forked child: the socket is the parent's, and so is the session behind it, which lives (and
        # holds what the parent holds) until the last copy of the socket is closed. A word on it would confuse
        # the parent.
        if self._connection is not None:
            _inherited.append(self._connection)
            with open(os.devnull) as null:
                os.dup2(null.fileno(), self._fd, inheritable=False)
        self._connection, self._fd = None, -1


_sessions: "weakref.WeakSet[Session]" = weakref.WeakSet()
_inherited: list[psycopg2.extensions.connection] = []
_connecting = threading.Lock()  # no fork between the opening of a socket and its entry in the books


def _after_fork_in_child() -> None:
    _connecting.release()
    for session in list(_sessions):
        session._let_go()


os.register_at_fork(
    before=_connecting.acquire, after_in_parent=_connecting.release, after_in_child=_after_fork_in_child
)
