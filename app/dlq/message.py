"""A stored message: what can be read of it without running any of it, and the form it is replayed in."""

import base64
import binascii
import difflib
import json
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from app.core.topology import Queue
from app.dlq.text import redacted
from app.observability.context import CORRELATION_HEADER, PUBLISHED_HEADER

REPLAY_HEADER = "skeldir_replay_of"
"""The header that leads a replay's outcome back to its row; Celery carries it on into retries of the task."""

_DEPTH = 100  # of nested JSON; Python's own limit is the interpreter's stack


class InvalidMessageError(ValueError):
    """The message can't be run: what is wrong with it, in a few words."""


@dataclass(frozen=True)
class Message:
    """What could be read of a message; `problem` says what couldn't."""

    envelope: dict[str, Any]
    task: str | None = None
    task_id: str | None = None
    args: list[Any] | None = None
    kwargs: dict[str, Any] | None = None
    embed: dict[str, Any] | None = None
    problem: str | None = None

    @property
    def headers(self) -> dict[str, Any]:
        """The message's headers, empty when they can't be read."""
        headers = self.envelope.get("headers")
        return headers if isinstance(headers, dict) else {}

    @property
    def properties(self) -> dict[str, Any]:
        """The message's properties, empty when they can't be read."""
        properties = self.envelope.get("properties")
        return properties if isinstance(properties, dict) else {}

    @property
    def delivery_info(self) -> dict[str, Any]:
        """Exchange and routing key, as far as they are there."""
        info = self.properties.get("delivery_info")
        return info if isinstance(info, dict) else {}

    @property
    def retries(self) -> int:
        """How often Celery has retried it."""
        retries = self.headers.get("retries")
        return retries if isinstance(retries, int) and 0 <= retries < 10**6 else 0

    @property
    def correlation_id(self) -> str | None:
        """The correlation id of the work it belongs to."""
        return _word(self.headers.get(CORRELATION_HEADER)) or _word(self.properties.get("correlation_id"))

    @property
    def replay_of(self) -> int | None:
        """The row this message replays."""
        row = self.headers.get(REPLAY_HEADER)
        return row if isinstance(row, int) and not isinstance(row, bool) and 0 < row < 2**63 else None


def read(payload: str) -> Message:
    """Read a stored message as far as it goes; never raises, never unpickles or calls anything."""
    try:
        envelope = _loads(payload)
    except ValueError as error:
        return Message({}, problem=f"the message is not JSON: {error}")
    if not isinstance(envelope, dict):
        return Message({}, problem="the message is not an object")
    message = Message(envelope)
    task, task_id = _word(message.headers.get("task")), _word(message.headers.get("id"))
    try:
        body = _body(message)
        check(envelope.get("headers"), body)
    except InvalidMessageError as error:
        return Message(envelope, task, task_id, problem=str(error))
    if isinstance(body, dict):  # Celery's protocol 1
        return Message(envelope, body["task"], body["id"], body.get("args", []), body.get("kwargs", {}), {})
    return Message(envelope, task, task_id, *body)


def tenant_of(
    message: Message, bind: Callable[[str, list[Any], dict[str, Any]], Any] | None = None
) -> str | None:
    """The tenant a message is for, by its header or its argument `tenant_id`; None unless it is a UUID.

    Args:
        message: what was read.
        bind: finds the value of `tenant_id` when it was passed by position, by task name, args and kwargs.
    """
    candidates = [message.headers.get("tenant_id"), (message.kwargs or {}).get("tenant_id")]
    if bind and message.task and message.args is not None:
        candidates.append(bind(message.task, message.args, message.kwargs or {}))
    for candidate in candidates:
        if isinstance(candidate, str):
            try:
                return str(uuid.UUID(candidate))
            except ValueError:
                continue
    return None


def replay_form(message: Message, failure_id: int, target: Queue | None) -> str:
    """The message as it is published again: same task id, body untouched, a fresh life.

    Deadline, ETA and the count of retries belong to the life that is over, so they go.

    Args:
        message: what was read of the stored payload; without a problem.
        failure_id: the row it comes from.
        target: another queue than the one it came from.
    """
    headers = {key: value for key, value in message.headers.items() if key not in ("expires", "eta")}
    headers |= {"retries": 0, REPLAY_HEADER: failure_id, PUBLISHED_HEADER: time.time()}
    properties = {key: value for key, value in message.properties.items() if key != "expiration"}
    properties["delivery_tag"] = str(uuid.uuid4())
    if target:
        properties["delivery_info"] = {"exchange": target.exchange, "routing_key": target.routing_key}
    return json.dumps(message.envelope | {"headers": headers, "properties": properties})


def priority_of(message: Message) -> int:
    """The priority it is to be delivered with, 0 to 9."""
    priority = message.properties.get("priority")
    return min(max(priority, 0), 9) if isinstance(priority, int) else 0


def editable(message: Message, *, reveal: bool) -> dict[str, Any]:
    """What a person sees and may change of a message.

    Args:
        message: what was read.
        reveal: with the values that are hidden by name otherwise.
    """
    form = {"task": message.task, "id": message.task_id, "args": message.args, "kwargs": message.kwargs}
    return form if reveal else redacted(form)


def edited(message: Message, form: Mapping[str, Any]) -> tuple[str, Message]:
    """A message with another task, args or kwargs; the rest stays as it was.

    Returns:
        The new payload and what is read of it.

    Raises:
        InvalidMessageError: the form doesn't make a message.
    """
    unknown = set(form) - {"task", "id", "args", "kwargs"}
    if unknown:
        raise InvalidMessageError(
            f"only task, id, args and kwargs can be edited, not {', '.join(sorted(unknown))}"
        )
    body = [
        form.get("args", message.args) or [],
        form.get("kwargs", message.kwargs) or {},
        message.embed or {},
    ]
    headers = {key: value for key, value in message.headers.items() if key not in ("argsrepr", "kwargsrepr")}
    headers |= {
        "task": form.get("task", message.task),
        "id": form.get("id") or message.task_id or str(uuid.uuid4()),
    }
    headers.setdefault("lang", "py")
    payload = json.dumps(
        message.envelope
        | {
            "body": base64.b64encode(json.dumps(body).encode()).decode(),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": headers,
            "properties": {"delivery_mode": 2} | message.properties | {"body_encoding": "base64"},
        }
    )
    result = read(payload)
    if result.problem:
        raise InvalidMessageError(f"the edited message is refused: {result.problem}")
    return payload, result


def difference(before: Message, after: Message) -> str:
    """What an edit changed, as a unified diff."""

    def lines(message: Message) -> list[str]:
        return json.dumps(editable(message, reveal=True), indent=2, sort_keys=True).splitlines()

    return "\n".join(difflib.unified_diff(lines(before), lines(after), "before", "after", lineterm=""))


def _body(message: Message) -> Any:
    body, envelope = message.envelope.get("body"), message.envelope
    if envelope.get("content-type") != "application/json":
        raise InvalidMessageError(f"its content type is {str(envelope.get('content-type'))[:80]!r}, not JSON")
    if not isinstance(body, str):
        raise InvalidMessageError("it has no body")
    if message.properties.get("body_encoding") == "base64":
        try:
            raw = base64.b64decode(body)  # as lenient as kombu
        except (binascii.Error, ValueError) as error:
            raise InvalidMessageError(f"its body is not base64: {error}") from error
    else:
        raw = body.encode("utf-8", "surrogatepass")
    try:
        return _loads(raw.decode())
    except ValueError as error:
        raise InvalidMessageError(f"its body is not JSON: {error}") from error


def check(headers: Any, content: Any) -> None:
    """Look at what Celery takes on trust of a message; what is wrong with it would end the worker.

    Raises:
        InvalidMessageError: the message can't be run.
    """
    if not isinstance(headers, dict):
        raise InvalidMessageError("it has no headers")
    if "task" not in headers and isinstance(content, dict):  # Celery's protocol 1
        headers = content
        content = [content.get("args", []), content.get("kwargs", {}), {}]
    if _word(headers.get("task")) is None or _word(headers.get("id")) is None:
        raise InvalidMessageError("its headers name no task and id")
    match content:
        case [list(), dict(), dict()]:
            _check_headers(headers)
        case _:
            raise InvalidMessageError("its body is not [args, kwargs, options]")


def _check_headers(headers: dict[str, Any]) -> None:
    """The headers that Celery takes on trust, where a wrong type ends the worker and not the message."""
    if not isinstance(headers.get("retries", 0), int | None):
        raise InvalidMessageError("its header retries is not a number")
    for name in ("eta", "expires", "shadow", "root_id", "parent_id", "group", "argsrepr", "kwargsrepr"):
        if not isinstance(headers.get(name), str | int | float | None):
            raise InvalidMessageError(f"its header {name} is not a text")
    for name in ("eta", "expires"):
        value = headers.get(name)
        if value is not None and not (isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT", value)):
            raise InvalidMessageError(f"its header {name} is not a time")
    match headers.get("timelimit"):
        case None | [int() | float() | None, int() | float() | None]:
            pass
        case _:
            raise InvalidMessageError("its header timelimit is not a pair of numbers")
    for name, kind in (("stamped_headers", list), ("stamps", dict), ("delegate", dict)):
        if not isinstance(headers.get(name), kind | None):
            raise InvalidMessageError(f"its header {name} is not a {kind.__name__}")


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= 255 and "\0" not in value else None


def _loads(text: str) -> Any:
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEPTH):
        level = [
            item
            for container in level
            for item in (
                container.values()
                if isinstance(container, dict)
                else container
                if isinstance(container, list)
                else ()
            )
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_DEPTH} levels")
