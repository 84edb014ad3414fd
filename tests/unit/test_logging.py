"""A log line is one JSON object, and holds no payload and no secret."""

import json
import logging
from typing import Any
from uuid import uuid4

import pytest
from celery.app.trace import LOG_SUCCESS
from celery.worker.consumer.consumer import (
    INVALID_TASK_ERROR,
    MESSAGE_DECODE_ERROR,
    UNKNOWN_FORMAT,
    UNKNOWN_TASK_ERROR,
)

from app.observability.context import Context, correlation, current_context, set_context
from app.observability.logging import JsonLines


def _line(message: str, *args: Any, name: str = "app.test", **more: Any) -> dict[str, Any]:
    record = logging.LogRecord(name, logging.INFO, __file__, 1, message, args, None)
    record.__dict__.update(more)
    text = JsonLines().format(record)
    assert "\n" not in text
    return dict(json.loads(text))


def test_a_line_says_when_how_bad_what_and_who() -> None:
    line = _line("two\nlines %s", "here")
    assert set(line) == {"time", "level", "message", "logger"}
    assert line["message"] == "two\nlines here"
    assert line["time"].endswith("+00:00")


def test_a_line_carries_the_ids_of_its_work() -> None:
    tenant = uuid4()
    before = set_context(Context("correlated", tenant))
    try:
        line = _line("work")
    finally:
        set_context(before)
    assert (line["correlation_id"], line["tenant_id"]) == ("correlated", str(tenant))
    assert not set(_line("later")) & {"correlation_id", "tenant_id"}


def test_an_exception_is_a_field() -> None:
    error = ValueError("no")
    line = _line("it failed", exc_info=(ValueError, error, None))
    assert line["message"] == "it failed"
    assert "ValueError: no" in line["exception"]


def test_unknown_extras_are_left_out() -> None:
    assert "geheim" not in json.dumps(_line("received", data={"args": "geheim"}))


def test_a_password_in_a_url_is_masked() -> None:
    line = _line("can't reach %s", "postgresql://u:geheim@h/d")
    assert line["message"] == "can't reach postgresql://u:***@h/d"


@pytest.mark.parametrize(
    ("message", "args", "kept"),
    [
        (LOG_SUCCESS, ({"name": "a.b", "id": "1", "runtime": 2, "return_value": "geheim"},), "a.b"),
        (UNKNOWN_TASK_ERROR, ("'a.b'", "geheim", {"argsrepr": "geheim"}, "geheim"), "a.b"),
        (INVALID_TASK_ERROR, ("reason", "geheim"), "reason"),
        (UNKNOWN_FORMAT, ("geheim",), "unknown message"),
        (MESSAGE_DECODE_ERROR, ("geheim", "type", "utf-8", "geheim", "geheim"), "decode"),
    ],
)
def test_celerys_lines_lose_what_was_in_the_message(message: str, args: Any, kept: str) -> None:
    line = _line(message, *args, name="celery.worker.consumer.consumer")
    assert kept in line["message"]
    assert "geheim" not in json.dumps(line)


def test_a_correlation_block_ends() -> None:
    with correlation("one") as outer:
        with correlation() as inner:
            assert current_context().correlation_id == inner != outer
        assert current_context().correlation_id == "one"
    assert current_context().correlation_id is None
