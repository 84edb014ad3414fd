"""The one connection a process has to the results, and the batches that it allows.

All threads of a process share the connection. Whoever gets its lock writes every row that waits by then, its
own and those of the others, in one statement: under a threads pool one wait for the disk serves all of them.
"""

import atexit
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import psycopg2
from celery import signals, states
from psycopg2.extensions import connection as Connection  # noqa: N812 - a class, though psycopg2 writes it small

logger = logging.getLogger(__name__)

WRITE_BEHIND_DELAY = 0.02
"""Seconds that a row nobody waits for stays in memory, so that what follows it meanwhile replaces it."""

_PAUSE_AFTER_ERROR = 1.0


class Row(NamedTuple):
    """One task's state; `values` are its parameters in the statement that stores it."""

    task_id: str
    status: str
    values: tuple[Any, ...]


@dataclass
class _Waiter:
    row: Row
    done: bool = False
    error: Exception | None = None


def passes(error: BaseException) -> bool:
    """Whether an error of Postgres ends by itself, so that the same statement is worth another try.

    That is: connections lost or refused, a server that stops, starts or has nothing left (memory, slots),
    a deadlock, and a primary that a failover made read-only (SQLSTATE classes 08, 40, 53 and 57P, and 25006).
    """
    if not isinstance(error, psycopg2.Error):
        return False
    if error.pgcode is None:  # no answer from the server
        return isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError)
    return error.pgcode.startswith(("08", "40", "53", "57P", "25006"))


class Store:
    """Statements over one connection, opened at the first of them and again after a fork or an error.

    Args:
        connect: opens a connection in autocommit mode.
        upsert: makes the statement that stores a number of rows; it must leave a row with SUCCESS alone.
    """

    def __init__(self, connect: Callable[[], Connection], upsert: Callable[[int], str]) -> None:
        self._connect = connect
        self._upsert = upsert
        self.start_anew()
        _stores.add(self)

    def start_anew(self) -> None:
        """Leave connection, locks and rows to the parent of a forked process.

        psycopg2 doesn't touch the socket of a connection that another process opened.
        """
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._waiters: deque[_Waiter] = deque()
        self._behind: dict[str, Row] = {}
        self._behind_lock = threading.Lock()
        self._behind_thread: threading.Thread | None = None

    def fetch(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement in a transaction of its own and return its rows; it sees what this process wrote.

        Raises:
            psycopg2.Error: the next call opens a new connection.
        """
        with self._lock:
            self._write_behind()
            return self._run(statement, parameters)

    def write(self, row: Row) -> None:
        """Store a row and return when it is committed.

        Raises:
            psycopg2.Error: whether the row is stored isn't known; storing it again does no harm.
        """
        waiter = _Waiter(row)
        self._waiters.append(waiter)
        with self._lock:
            if not waiter.done:
                self._write_waiting()
        if waiter.error is not None:
            raise waiter.error

    def write_behind(self, row: Row) -> None:
        """Store a row soon, without waiting for it and however often it must be tried."""
        with self._behind_lock:
            _keep_last(self._behind, row)
            if self._behind_thread is None:
                self._behind_thread = threading.Thread(target=self._follow, name="results", daemon=True)
                self._behind_thread.start()

    def flush(self) -> None:
        """Write now what was to be written behind.

        Raises:
            psycopg2.Error: the rows are kept for another try.
        """
        with self._lock:
            self._write_behind()

    def _follow(self) -> None:
        """Write behind until nothing is left."""
        while True:
            time.sleep(WRITE_BEHIND_DELAY)
            try:
                self.flush()
            except psycopg2.Error as error:
                logger.warning("Results wait in memory for Postgres: %s", error)
                time.sleep(_PAUSE_AFTER_ERROR)
            with self._behind_lock:
                if not self._behind:
                    self._behind_thread = None
                    return

    def _write_waiting(self) -> None:
        waiters = []
        while self._waiters:
            waiters.append(self._waiters.popleft())
        rows: dict[str, Row] = {}
        for waiter in waiters:
            _keep_last(rows, waiter.row)
            self._behind.pop(waiter.row.task_id, None)  # an earlier state of the same task
        errors: dict[str, Exception] = dict.fromkeys(rows, psycopg2.InterfaceError("interrupted"))
        try:
            errors = self._store(rows)
        finally:
            for waiter in waiters:
                waiter.error = errors.get(waiter.row.task_id)
                waiter.done = True

    def _write_behind(self) -> None:
        if not self._behind:
            return
        with self._behind_lock:
            rows, self._behind = self._behind, {}
        for task_id, error in self._store(rows).items():
            if not passes(error):
                logger.error(
                    "The state %s of task %s can't be stored: %s", rows[task_id].status, task_id, error
                )
                continue
            with self._behind_lock:
                self._behind = rows | self._behind
            raise error

    def _store(self, rows: dict[str, Row]) -> dict[str, Exception]:
        """Store rows in one statement; return the error of each that isn't stored."""
        # Sorted, so that two processes never lock the same rows in opposite order.
        ordered = sorted(rows.values())
        statement = self._upsert(len(ordered))
        if not any(row.status in states.READY_STATES for row in ordered):
            # Two statements in one message are one transaction. A progress that a crash of the server takes
            # back isn't worth a wait for the disk. A final state is: its message is acknowledged next, and
            # a worker that outlives the crash would acknowledge a job whose result the server has forgotten.
            statement = f"SET LOCAL synchronous_commit = off; {statement}"
        try:
            self._run(statement, [value for row in ordered for value in row.values])
        except Exception as error:
            if len(rows) == 1 or passes(error):
                return dict.fromkeys(rows, error)
        else:
            return {}
        # One of them can't be stored: let it fail alone.
        errors: dict[str, Exception] = {}
        for task_id, row in rows.items():
            errors |= self._store({task_id: row})
        return errors

    def _run(self, statement: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        if self._connection is None:
            self._connection = self._connect()
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(statement, parameters)
                return cursor.fetchall() if cursor.description else []
        except BaseException:  # also a time limit's, in the middle of an answer
            connection, self._connection = self._connection, None
            with contextlib.suppress(psycopg2.Error):
                connection.close()
            raise


class InTransaction:
    """What `Store` does, on a cursor whose transaction is somebody else's.

    Args:
        cursor: of psycopg2.
        upsert: see `Store`.
    """

    def __init__(self, cursor: Any, upsert: Callable[[int], str]) -> None:
        self._cursor = cursor
        self._upsert = upsert

    def fetch(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement and return its rows."""
        self._cursor.execute(statement, parameters)
        return self._cursor.fetchall() if self._cursor.description else []

    def write(self, row: Row) -> None:
        """Store a row; it is there when the caller commits."""
        self._cursor.execute(self._upsert(1), row.values)

    write_behind = write


def _keep_last(rows: dict[str, Row], row: Row) -> None:
    """A later state of a task replaces an earlier one, but nothing replaces SUCCESS."""
    earlier = rows.get(row.task_id)
    if earlier is None or earlier.status != states.SUCCESS:
        rows[row.task_id] = row


_stores: WeakSet[Store] = WeakSet()


def _start_all_anew() -> None:
    for store in list(_stores):
        store.start_anew()


def _flush_all() -> None:
    for store in list(_stores):
        with contextlib.suppress(psycopg2.Error):
            store.flush()


_worker_pid: int | None = None


@signals.worker_init.connect(weak=False)
def _remember_worker(**_: object) -> None:
    global _worker_pid  # noqa: PLW0603 - a fact of the process
    _worker_pid = os.getpid()


def is_worker_main() -> bool:
    """Whether this is the main process of a Celery worker, not a child of its pool and not a client."""
    return _worker_pid == os.getpid()


os.register_at_fork(after_in_child=_start_all_anew)
atexit.register(_flush_all)
