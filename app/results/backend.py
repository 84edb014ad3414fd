"""Celery's database result backend for Postgres alone: its tables and its answers, one statement a state."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import psycopg2
from celery import states
from celery._state import get_current_task
from celery.backends.database import DatabaseBackend
from celery.exceptions import BackendStoreError, ImproperlyConfigured, TimeoutError
from celery.result import ResultSet, result_from_tuple
from psycopg2.extensions import connection as Connection  # noqa: N812 - a class, though psycopg2 writes it small
from sqlalchemy.engine import make_url

from app.results.store import InTransaction, Row, Store, is_worker_main, passes

FIRST_POLL = 0.005
"""Seconds until a waiting client looks again; the pauses then grow up to the interval it asked for."""

_RETRIES = 20  # with Celery's backoff, full jitter and two seconds at most: about a quarter of a minute
_MAX_SLEEP_MS = 2000
_CLEANUP_BATCH = 5000
_CLEANUP_SECONDS = 20.0
"""Seconds after which a clean-up leaves the rest to the next one.

Below its queue's soft time limit by far more than a batch takes: a run that is ended there is a dead letter.
"""

# RETRY too: the job has been published again by then, and late it could replace what the next run stores.
_WAITED_FOR = states.READY_STATES | {states.RETRY}

_COLUMNS = ("task_id", "status", "result", "date_done", "traceback", "children")
_EXTENDED = ("name", "args", "kwargs", "worker", "retries", "queue", "stamps")
_TEXT = {"traceback", "name", "worker", "queue"}

# A server that is gone without a word (a lost host, a cut network) is noticed within seconds.
_CONNECTION = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "celery results",
}


class PostgresBackend(DatabaseBackend):
    """What `DatabaseBackend` stores and returns, over one connection a process; never creates tables.

    It differs where it must. A state is one upsert, in which a row with SUCCESS stays as it is, and RETRY
    replaces no final state. A final state is stored durably before the job can be acknowledged, and a running
    task waits for that as long as it takes. A state nobody waits for is written behind. Who waits for a
    result polls quickly at first, and a group is read in one statement; a failure before it ends the wait for
    it. A `result_expires` of None or 0 keeps results for ever, as Celery's documentation says.

    Of `database_engine_options` only `connect_args` has a meaning here.
    """

    supports_native_join = True

    def __init__(
        self,
        dburi: str | None = None,
        engine_options: dict[str, Any] | None = None,
        url: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dburi, engine_options, url, **kwargs)
        # One instance, and so one connection, serves all threads.
        self.thread_safe = True
        conf = self.app.conf
        if not conf.value_set_for("result_backend_max_retries"):
            self.max_retries = _RETRIES
            self._retries_of_a_task = math.inf
        else:
            self._retries_of_a_task = self.max_retries
        if not conf.value_set_for("result_backend_max_sleep_between_retries_ms"):
            self.max_sleep_between_retries_ms = _MAX_SLEEP_MS
        self._columns = _COLUMNS + _EXTENDED if self.extended_result else _COLUMNS
        url_ = make_url(self.url)
        if url_.get_backend_name() != "postgresql":
            raise ImproperlyConfigured(
                f"This result backend stores in Postgres, not in {url_.get_backend_name()}: use db+postgresql://"
            )
        dialect = url_.set(drivername="postgresql+psycopg2").get_dialect()()
        self._connect_args, self._connect_kwargs = dialect.create_connect_args(url_)
        # `database_table_names` and `database_table_schemas` have been applied to Celery's models by now.
        table, sequence = (
            dialect.identifier_preparer.format_table,
            dialect.identifier_preparer.format_sequence,
        )
        self._tasks, self._task_ids = table(self.task_cls.__table__), sequence(self.task_cls.id.default)
        self._groups, self._group_ids = (
            table(self.taskset_cls.__table__),
            sequence(self.taskset_cls.id.default),
        )
        self._store: Store | InTransaction = Store(self._connect, self._upsert)

    def _create_tables(self) -> None:
        """Migrations do that."""

    def exception_safe_to_retry(self, exc: Exception) -> bool:  # noqa: D102 - Celery's interface
        return passes(exc)

    def on_backend_retryable_error(self, exc: Exception) -> None:
        """The store has already closed the connection."""

    def _connect(self) -> Connection:
        options = {**_CONNECTION, **self._connect_kwargs, **self.engine_options.get("connect_args", {})}
        connection: Connection = psycopg2.connect(*self._connect_args, **options)
        connection.autocommit = True
        return connection

    # writing

    def store_result(  # noqa: D102 - Celery's interface
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **_: Any,
    ) -> Any:
        result = self.encode_result(result, state)
        row = self._row(task_id, result, state, traceback, request)
        running = get_current_task() is not None
        if state not in _WAITED_FOR or (is_worker_main() and not running):
            # Nobody waits for STARTED or a progress. And a worker's main process, which stores what befell
            # a child, has to serve the other children meanwhile, however long Postgres is away.
            self._store.write_behind(row)
            return result
        # A running task that gave up here would be acknowledged without its result. There is nothing else for
        # its process to do without Postgres, and time limits still end it.
        retries = self._retries_of_a_task if running else self.max_retries
        self._ensure_retryable(
            self._store.write,
            row,
            max_retries=retries,
            fallback_exc=partial(BackendStoreError, task_id=task_id, state=state),
            fallback_msg="failed to store result on the backend",
        )
        return result

    def in_transaction(self, cursor: Any) -> "PostgresBackend":
        """The same backend writing and reading in the transaction of a psycopg2 cursor of the caller's.

        What fails there raises at once, and the transaction is the caller's to end.
        """
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _store=InTransaction(cursor, self._upsert), always_retry=False)
        return twin

    def _row(self, task_id: str, result: Any, state: str, traceback: str | None, request: Any) -> Row:
        meta = self._get_result_meta(
            result=self._encoded(result),
            state=state,
            traceback=traceback,
            request=request,
            format_date=False,
            encode=True,
        )
        meta["task_id"] = str(task_id)
        meta["children"] = self._encoded(meta["children"]) if meta.get("children") else None
        if headers := meta.get("stamped_headers"):
            stamps = {header: meta[header] for header in headers if header in meta}
            meta["stamps"] = self._encoded({"stamped_headers": headers, "stamps": stamps})
        for name in _TEXT:
            meta[name] = _storable(meta.get(name))
        return Row(meta["task_id"], state, tuple(meta.get(column) for column in self._columns))

    def _encoded(self, value: Any) -> bytes:
        encoded: str | bytes = self.encode(value)
        return encoded.encode() if isinstance(encoded, str) else encoded

    def _upsert(self, rows: int) -> str:
        columns = self._columns
        values = f"(nextval('{self._task_ids}'), {', '.join(['%s'] * len(columns))})"
        # A run without stamps leaves those of an earlier one.
        changes = ", ".join(
            f"{column} = coalesce(excluded.{column}, stored.{column})"
            if column == "stamps"
            else f"{column} = excluded.{column}"
            for column in columns
            if column != "task_id"
        )
        return (
            f"INSERT INTO {self._tasks} AS stored (id, {', '.join(columns)})"
            f" VALUES {', '.join([values] * rows)}"
            f" ON CONFLICT (task_id) DO UPDATE SET {changes}"
            f" WHERE stored.status IS DISTINCT FROM '{states.SUCCESS}'"
            # A job is published again before its RETRY is stored: the next run may have ended by then.
            f" AND NOT (excluded.status = '{states.RETRY}'"
            f" AND stored.status IN ('{states.FAILURE}', '{states.REVOKED}'))"
        )

    def _forget(self, task_id: str) -> None:
        self._store.fetch(f"DELETE FROM {self._tasks} WHERE task_id = %s", [task_id])

    def _save_group(self, group_id: str, result: Any) -> Any:
        self._store.fetch(
            f"INSERT INTO {self._groups} (id, taskset_id, result, date_done)"
            f" VALUES (nextval('{self._group_ids}'), %s, %s, %s)"
            " ON CONFLICT (taskset_id) DO UPDATE"
            " SET result = excluded.result, date_done = excluded.date_done",
            [group_id, self._encoded(self.prepare_value(result)), datetime.now(UTC)],
        )
        return result

    def _delete_group(self, group_id: str) -> None:
        self._store.fetch(f"DELETE FROM {self._groups} WHERE taskset_id = %s", [group_id])

    def _cleanup(self) -> None:
        """Delete what is older than `result_expires`, a batch at a time, so that no transaction is long.

        It ends after `_CLEANUP_SECONDS`, and whatever is left then is the next run's.
        """
        if not self.expires:
            return
        oldest = datetime.now(UTC) - self.expires
        ends = time.monotonic() + _CLEANUP_SECONDS
        # Taken in turns: where results are never all gone, groups go nevertheless.
        reached: dict[str, Any] = dict.fromkeys((self._tasks, self._groups), "-infinity")
        while reached:
            for table, since in list(reached.items()):
                gone, reached[table] = self._delete_batch(table, since, oldest)
                if gone < _CLEANUP_BATCH:
                    del reached[table]
            if time.monotonic() >= ends:
                return

    def _delete_batch(self, table: str, since: Any, until: datetime) -> tuple[int, Any]:
        """Delete the oldest rows between two moments; answers how many, and the moment of the youngest.

        That is where the next batch begins: an index keeps what was deleted while an old transaction is
        open, and each batch would read through all that went before it.
        """
        [(gone, youngest)] = self._store.fetch(
            f"WITH gone AS (DELETE FROM {table} WHERE id = ANY(ARRAY("
            f"SELECT id FROM {table} WHERE date_done >= %s AND date_done < %s ORDER BY date_done"
            f" LIMIT {_CLEANUP_BATCH} FOR UPDATE SKIP LOCKED)) RETURNING date_done)"
            " SELECT count(*), max(date_done) FROM gone",
            [since, until],
        )
        return gone, youngest

    # reading

    def _select(self, condition: str, parameters: list[Any]) -> dict[str, dict[str, Any]]:
        rows = self._store.fetch(
            f"SELECT {', '.join(self._columns)} FROM {self._tasks} WHERE {condition}", parameters
        )
        return {row[0]: self._meta(dict(zip(self._columns, row, strict=True))) for row in rows}

    def _meta(self, data: dict[str, Any]) -> dict[str, Any]:
        """What Celery's backend makes of a row."""
        data["result"] = self._decode_stored_result(data["result"])
        for column in ("args", "kwargs", "children"):
            if data.get(column) is not None:
                data[column] = self.decode(bytes(data[column]))
        stamps = data.pop("stamps", None)
        if stamps is not None:
            stamps = self.decode(bytes(stamps))
            data["stamped_headers"] = stamps["stamped_headers"]
            data |= stamps["stamps"]
        meta: dict[str, Any] = self.meta_from_decoded(data)
        return meta

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        found = self._select("task_id = %s", [task_id])
        unknown = dict.fromkeys(self._columns) | {"task_id": task_id, "status": states.PENDING}
        return found.get(task_id) or self._meta(unknown)

    def _task_result_exists(self, task_id: str) -> bool:
        return bool(self._store.fetch(f"SELECT 1 FROM {self._tasks} WHERE task_id = %s", [task_id]))

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        rows = self._store.fetch(
            f"SELECT result, date_done FROM {self._groups} WHERE taskset_id = %s", [group_id]
        )
        if not rows:
            return None
        [(stored, date_done)] = rows
        result = self._decode_stored_result(stored)
        if result is not None:
            result = result_from_tuple(result, self.app)
        return {"taskset_id": group_id, "result": result, "date_done": date_done}

    # waiting

    def wait_for(  # noqa: D102 - Celery's interface
        self,
        task_id: str,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_interval: Callable[[], Any] | None = None,
    ) -> dict[str, Any]:
        self._ensure_not_eager()
        for _ in _looks(timeout, interval):
            meta: dict[str, Any] = self.get_task_meta(task_id)
            if meta["status"] in states.READY_STATES:
                return meta
            if on_interval:
                on_interval()
        raise TimeoutError("The operation timed out.")

    def iter_native(self, result: ResultSet, **options: Any) -> Iterator[tuple[str, Any]]:
        """Yield the id and the metadata of each result of a set as it becomes ready."""
        self._ensure_not_eager()
        before: dict[str, set[str]] = {}
        for node in result.results:
            if isinstance(node, ResultSet):
                yield node.id, node.results
            else:
                before[node.id] = _ids_before(node) | _ids_before(result)
        if before:
            yield from self.get_many(before, before=before, **options)

    def get_many(  # noqa: PLR0917 - Celery's interface
        self,
        task_ids: Iterable[str],
        timeout: float | None = None,
        interval: float | None = 0.5,
        no_ack: bool = True,
        on_message: Callable[[dict[str, Any]], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        before: Mapping[str, set[str]] | None = None,
        **_: Any,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the id and the metadata of each task as it becomes ready; every look is one statement.

        `before` has the ids of what must succeed before a task is run at all: when one of these fails, its
        failure stands for the task's, which will never be there.
        """
        waiting, before = set(task_ids), before or {}
        for _look in _looks(timeout, 0.5 if interval is None else interval):
            wanted = waiting.union(*(before.get(task_id, ()) for task_id in waiting))
            found = self._ensure_retryable(
                self._select,
                "task_id = ANY(%s) AND status = ANY(%s)",
                [list(wanted), list(states.READY_STATES)],
            )
            ready = {task_id: found[task_id] for task_id in waiting if task_id in found}
            failed = {id_ for id_, meta in found.items() if meta["status"] in states.PROPAGATE_STATES}
            for task_id in waiting - ready.keys():
                if failures := failed & before.get(task_id, set()):
                    ready[task_id] = found[min(failures)]
            for task_id, meta in ready.items():
                waiting.discard(task_id)
                if meta["status"] == states.SUCCESS:
                    self._cache[task_id] = meta
                if on_message:
                    on_message(meta)
                yield task_id, meta
            if not waiting:
                return
            if on_interval:
                on_interval()
        raise TimeoutError(f"Operation timed out ({timeout})")


def _ids_before(node: Any) -> set[str]:
    """The ids of the tasks that ran before a result's own."""
    ids: set[str] = set()
    while (node := getattr(node, "parent", None)) is not None:
        ids |= {result.id for result in getattr(node, "results", None) or [node]}
    return ids


def _looks(timeout: float | None, interval: float) -> Iterator[None]:
    """Come back at once, then after growing pauses of at most `interval` seconds, until `timeout` is over."""
    start = time.monotonic()
    while True:
        yield
        waited = time.monotonic() - start
        if timeout is not None and waited >= timeout:
            return
        pause = min(interval, max(FIRST_POLL, waited / 4))
        time.sleep(pause if timeout is None else min(pause, timeout - waited))


def _storable(text: str | None) -> str | None:
    """Text without what Postgres refuses in it: NUL and lone surrogates, which a message may carry."""
    return text and str(text).replace("\0", "\ufffd").encode("utf-8", "replace").decode()
