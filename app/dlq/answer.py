"""The answer to who waits for the result of a job that no worker will run again."""

import logging
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.app.task import Context, get_actual_ignore_result
from celery.exceptions import WorkerLostError

from app.dlq.classify import Failure
from app.dlq.message import Message
from app.results.backend import PostgresBackend

logger = logging.getLogger(__name__)

Answer = Callable[[Any, Message, Failure], None]


def answer_of(app: Celery) -> Answer:
    """What tells who waits for a job, in the transaction that makes a dead letter of it: a lost worker.

    Celery stores how a job ended in the worker that ran it. Of a job that killed each of its workers nobody
    is left to do so, and `AsyncResult.get` would wait for ever. What was to follow it in a chain fails with
    it, as with any failure; `link_error` is not called. Where results are in another database than messages,
    or no database, it is told there, outside the transaction. A result that can't be written stops no dead
    letter.
    """

    def answer(cursor: Any, message: Message, failure: Failure) -> None:
        if not message.task_id or message.problem:
            return  # nobody can know the job by its id
        headers = {**message.headers, "args": message.args, "kwargs": message.kwargs}
        request = Context({**headers, **(message.embed or {}), "delivery_info": message.delivery_info})
        task = app.tasks.get(message.task)
        if task is not None and get_actual_ignore_result(task, request):
            if not task.store_errors_even_if_ignored:
                return
        elif task is None and request.ignore_result:
            return
        backend, error = app.backend, WorkerLostError(failure.error_message)
        if isinstance(backend, PostgresBackend) and _same_database(app):
            backend = backend.in_transaction(cursor)
        cursor.execute("SAVEPOINT answer")
        try:
            backend.mark_as_failure(message.task_id, error, request=request, call_errbacks=False)
        except Exception:
            if cursor.connection.closed:
                raise
            cursor.execute("ROLLBACK TO SAVEPOINT answer")
            logger.exception("The failure of task %s can't be stored as its result", message.task_id)

    return answer


def _same_database(app: Celery) -> bool:
    broker, results = str(app.conf.broker_url), str(app.conf.result_backend)
    return broker.removeprefix("sqla+") == results.removeprefix("db+")
