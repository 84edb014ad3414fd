"""Why a message failed for good: its class, the words for a person, what equal failures have in common."""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal, get_args

from celery.exceptions import (
    InvalidTaskError,
    MaxRetriesExceededError,
    NotRegistered,
    SoftTimeLimitExceeded,
    TimeLimitExceeded,
    WorkerLostError,
)
from kombu.exceptions import ContentDisallowed, DecodeError

from app.db.session import TenantRequired
from app.dlq.text import ERROR_MESSAGE_LIMIT, TRACEBACK_LIMIT, kept

FailureClass = Literal["permanent", "transient", "timeout", "poison", "unknown_task", "invalid", "expired"]
FAILURE_CLASSES: tuple[FailureClass, ...] = get_args(FailureClass)


@dataclass(frozen=True)
class Failure:
    """How a job failed for good; texts are fit to be stored."""

    failure_class: FailureClass
    error_type: str
    error_message: str
    traceback: str | None = None
    worker: str | None = None
    attempts: int | None = None

    @classmethod
    def of(
        cls,
        failure_class: FailureClass,
        error_type: str,
        message: str,
        traceback: str | None = None,
        *,
        worker: str | None = None,
        attempts: int | None = None,
    ) -> "Failure":
        """A failure with its texts cut and freed of secrets."""
        return cls(
            failure_class,
            kept(error_type, 200),
            kept(message, ERROR_MESSAGE_LIMIT),
            kept(traceback, TRACEBACK_LIMIT) if traceback else None,
            worker,
            attempts,
        )


_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line \d+, in (?P<function>.*)$', re.M)
_LIBRARY = re.compile(r".*/(?:site-packages|dist-packages|lib/python[\d.]+)/")
_VARIABLE = re.compile(
    r"[0-9a-fA-F]{8}-[0-9a-fA-F-]{27}"  # uuid
    r"|0x[0-9a-fA-F]+|\b[0-9a-fA-F]{16,}\b|\d+(?:\.\d+)*"
    r"|'[^']*'|\"[^\"]*\""
)


def fingerprint(failure: Failure, task: str | None) -> str:
    """16 hexadecimal digits that equal failures share: of one class, task and type of error, in any queue.

    The way through the code tells failures apart where there is a traceback; otherwise the message does,
    without
    its numbers, ids and quoted words. A time limit strikes anywhere, so it counts by task alone.
    """
    where: list[str] = []
    if failure.failure_class not in ("timeout", "poison", "expired"):
        frames = [
            (_LIBRARY.sub("", match["file"]), match["function"])
            for match in _FRAME.finditer(failure.traceback or "")
        ]
        where = [f"{file}:{function}" for file, function in frames[-5:]]
        if not where:
            where = [_VARIABLE.sub("#", failure.error_message)[:300]]
    parts = [failure.failure_class, task or "", failure.error_type, *where]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


_GAVE_UP = re.compile(r'celery/app/task\.py", line \d+, in retry$', re.M)


def failure_of(
    error: BaseException,
    traceback: str | None,
    *,
    transient: tuple[type[BaseException], ...] = (),
    worker: str | None = None,
) -> Failure:
    """What an exception that ended a job says about it.

    Args:
        error: as the worker's main process sees it.
        traceback: the job's own.
        transient: what the policy of its task retries.
        worker: where it ran.
    """
    name = getattr(error, "exc_cls_name", None)  # what stands for an exception that can't be pickled
    kind = type(error)
    if not isinstance(name, str):
        name = (
            kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        )
    try:
        message = str(error)
    except Exception:
        message = f"(its message can't be had: {name}.__str__ fails)"
    return Failure.of(_class_of(error, traceback, transient), name, message, traceback, worker=worker)


def _class_of(
    error: BaseException, traceback: str | None, transient: tuple[type[BaseException], ...]
) -> FailureClass:
    match error:
        case TimeLimitExceeded() | SoftTimeLimitExceeded():
            return "timeout"
        case WorkerLostError() | SystemExit() | KeyboardInterrupt():  # told before or after the process ended
            return "poison"
        case NotRegistered():
            return "unknown_task"
        case TenantRequired() | InvalidTaskError() | DecodeError() | ContentDisallowed():
            return "invalid"
        case MaxRetriesExceededError():
            return "transient"
    # `Task.retry` raises the task's own exception when it gives up, so its frame is all that tells.
    gave_up = bool(traceback and _GAVE_UP.search(traceback))
    return "transient" if gave_up or isinstance(error, transient) else "permanent"
