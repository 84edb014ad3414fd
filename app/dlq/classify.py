"""Why a message failed for good: its class, the words for a person and the fingerprint that groups equal failures."""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal, get_args

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


def fingerprint(failure: Failure, task: str | None, queue: str) -> str:
    """16 hexadecimal digits that equal failures share, whatever their arguments and line numbers.

    The way through the code tells failures apart where there is a traceback; otherwise the message does, without
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
    parts = [failure.failure_class, task or "", queue, failure.error_type, *where]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
