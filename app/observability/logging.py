"""Logs for journald: one JSON object a line on stdout, with the ids of the work it is about.

Arguments, results and message bodies are never logged, whoever logs: they hold personal data.
"""

import json
import logging
import os
import re
import sys
from datetime import UTC, datetime
from typing import Any

import celery.apps.worker
from billiard.util import get_logger as get_billiard_logger
from celery import current_task
from celery.utils.log import get_multiprocessing_logger
from pythonjsonlogger.json import JsonFormatter

from app.observability.context import current_context

_PASSWORD_IN_URL = re.compile(r"(://[^:/@\s\"]*:)[^@/\s\"]+@")

# Celery appends bodies, headers or results to these of its messages; what is left of each here is harmless.
_SUCCEEDED = "Task %(name)s[%(id)s] succeeded in %(runtime)ss"
_UNDECODABLE = "Can't decode message body"


class JsonLines(JsonFormatter):
    """A log record as one line of JSON with a fixed set of fields; fields without a value are left out."""

    def format(self, record: logging.LogRecord) -> str:
        """Serialise the record."""
        return _PASSWORD_IN_URL.sub(r"\1***@", super().format(_without_payload(record)))

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        """Fill in the line's fields (called by `JsonFormatter.format`)."""
        context = current_context()
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
            "logger": record.name,
            **_task_fields(record),
            "correlation_id": getattr(record, "correlation_id", context.correlation_id),
            "tenant_id": context.tenant_id and str(context.tenant_id),
            "exception": message_dict.get("exc_info"),
        }
        log_data.clear()
        log_data.update({name: value for name, value in fields.items() if value is not None})


def configure_logging(level: int | str = logging.INFO) -> None:
    """Send every logger of this process to stdout as JSON lines; called again, it changes the level."""
    handler = logging.StreamHandler(sys.__stdout__)  # sys.stdout itself becomes a logger in a worker
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for apart in (get_billiard_logger(), get_multiprocessing_logger()):  # they don't propagate
        apart.handlers[:] = [handler]
        apart.setLevel(logging.WARNING)
    # Its line about a received task comes without the correlation id; `app.celery_app` logs a better one.
    logging.getLogger("celery.worker.strategy").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    # Celery announces a shutdown in plain text, past all loggers.
    celery.apps.worker.safe_say = _say


def _say(message: str, _stream: object = None) -> None:
    # Called in signal handlers, where the logging module could wait for a lock of the code it interrupted.
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": "INFO",
        "message": message,
        "logger": "celery.apps.worker",
    }
    os.write(1, f"{json.dumps(line)}\n".encode())


def _task_fields(record: logging.LogRecord) -> dict[str, str | None]:
    if current_task:
        request = current_task.request
        return {
            "task_name": current_task.name,
            "task_id": request.id,
            "queue": (request.delivery_info or {}).get("routing_key"),
        }
    if isinstance(record.args, dict):  # Celery's lines about a task from outside of it
        return {"task_name": record.args.get("name"), "task_id": record.args.get("id")}
    return {}


def _without_payload(record: logging.LogRecord) -> logging.LogRecord:
    if not isinstance(record.msg, str) or not record.name.startswith("celery."):
        return record
    safe = logging.makeLogRecord(record.__dict__)
    if isinstance(record.args, dict) and "return_value" in record.args:
        safe.msg = _SUCCEEDED
    elif record.msg.startswith(_UNDECODABLE):
        safe.msg, safe.args = _UNDECODABLE, ()
    elif record.msg.startswith("Received ") and isinstance(record.args, tuple):
        safe.msg = record.msg.partition("\n")[0]
        safe.args = record.args[: safe.msg.count("%")]
    return safe
