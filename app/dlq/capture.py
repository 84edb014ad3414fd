"""What becomes of a message that will not be delivered again: the broker's seam, filled.

The broker deletes the message and calls this in the same transaction, so the row exists exactly if the
message is gone. When the row can't be written the message stays with the broker, which tries again; that is
counted here.
"""

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from app.broker import DeadMessage
from app.dlq import store
from app.dlq.answer import Answer
from app.dlq.classify import Failure
from app.dlq.message import Message, read, tenant_of

logger = logging.getLogger(__name__)

FAILED = "failed"
"""The broker's reason for a message whose job failed in a worker; the detail is a `Failure`."""
SUCCEEDED = "succeeded"
"""The broker's reason for the message of a replay that succeeded."""


class DeadLetters:
    """Writes the rows, and knows how that goes.

    Args:
        knows: whether workers know a task's name.
        bind: finds `tenant_id` among arguments passed by position (`app.dlq.message.tenant_of`).
        answer: tells who waits for the result of a job that killed its workers (`app.dlq.answer`).
    """

    def __init__(
        self,
        knows: Callable[[str], bool],
        bind: Callable[[str, list[Any], dict[str, Any]], Any] | None = None,
        answer: Answer | None = None,
    ) -> None:
        self._knows = knows
        self._bind = bind
        self._answer = answer
        self.errors_by_queue: Counter[str] = Counter()
        self.failing_since: float | None = None

    @property
    def errors(self) -> int:
        """Attempts to write a row that failed."""
        return self.errors_by_queue.total()

    def health(self) -> str:
        """`ok`, or that rows can't be written: what failed is held by the broker, and tried again."""
        return "can't be written" if self.failing_since else "ok"

    def __call__(self, cursor: Any, dead: DeadMessage) -> None:
        """Take a message over, in the transaction of `cursor` that deletes it."""
        try:
            self._keep(cursor, dead)
        except Exception:
            self.errors_by_queue[dead.queue] += 1
            self.failing_since = self.failing_since or time.time()
            raise
        self.failing_since = None

    def _keep(self, cursor: Any, dead: DeadMessage) -> None:
        message = read(dead.payload)
        if dead.reason == SUCCEEDED:
            cursor.execute("SELECT celery_task_failure_resolve(%s, %s)", (message.replay_of, message.task_id))
            return
        failure = dead.detail if dead.reason == FAILED else self._failure(dead, message)
        row = store.insert(
            cursor,
            message_id=dead.id,
            queue=dead.queue,
            payload=dead.payload,
            message=message,
            failure=failure,
            deliveries=dead.delivery,
            tenant=tenant_of(message, self._bind),
            host=socket.gethostname(),
        )
        if self._answer and failure.failure_class == "poison":
            self._answer(cursor, message, failure)
        logger.warning(
            "Message %(message)s of queue %(queue)s became dead letter %(row)s (%(class)s)",
            {"message": dead.id, "queue": dead.queue, "row": row, "class": failure.failure_class},
        )

    def _failure(self, dead: DeadMessage, message: Message) -> Failure:
        """Why the broker gave a message up."""
        if dead.reason == "poison":
            return Failure.of(
                "poison",
                "WorkerLost",
                f"{dead.returned} deliveries ended with the death of the worker that had it",
                attempts=dead.returned,
            )
        if dead.reason == "expired":
            return Failure.of("expired", "Expired", "its time was over before it was run", attempts=0)
        if message.problem:
            return Failure.of("invalid", "InvalidMessage", message.problem, attempts=0)
        if not self._knows(message.task or ""):
            return Failure.of(
                "unknown_task", "NotRegistered", f"no worker knows the task {message.task}", attempts=0
            )
        return Failure.of("permanent", "Reject", "its worker rejected it")
