"""Malformed messages: whatever somebody can put straight into `kombu_message`."""

import base64
import json
import random
import string
from typing import Any

from tests.dlq.plane import payload

_ODD: list[Any] = [
    None, True, -1, 0, 1.5, 10**30, "", "x", "t.gone", [], {}, [1], {"a": 1}, [[[]]], "2020-99-99T00:00:00",
    "9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00", "é" * 300, "\\ud800", "NaN", ["t.ok"],
    {"task": "t.ok"}, [None, None], [1, 2, 3], ["a", "b"],
]  # fmt: skip
_HEADERS = ["task", "id", "args", "eta", "expires", "timelimit", "retries", "group", "stamps", "chord",
            "stamped_headers", "shadow", "delivery_info", "priority"]  # fmt: skip


def message(rng: random.Random) -> str:
    """One that no worker can run: it is broken, or its task is unknown."""
    kind = rng.random()
    if kind < 0.1:
        return "".join(rng.choice(string.printable) for _ in range(rng.randrange(80)))
    if kind < 0.15:
        return json.dumps(rng.choice(_ODD))
    content = json.loads(payload(task=rng.choice(["t.gone", "t.nowhere", "x"])))
    content["body"] = _body(rng)
    for _ in range(rng.randrange(4)):
        content = _broken(content, rng)
    text = json.dumps(content)
    if rng.random() < 0.05:
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice(string.printable) + text[place + 1 :]
    return text[: rng.randrange(len(text))] if rng.random() < 0.03 else text


def _body(rng: random.Random) -> str:
    if rng.random() < 0.1:
        return base64.b64encode(rng.randbytes(rng.randrange(60))).decode()
    body: Any = [[], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    if rng.random() < 0.3:
        body = _broken(body, rng)
    return base64.b64encode(json.dumps(body).encode()).decode()


def _broken(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.8:
        value = dict(value)
        key, how = rng.choice(list(value)), rng.random()
        if how < 0.25:
            del value[key]
        else:
            value[key] = rng.choice(_ODD) if how < 0.6 else _broken(value[key], rng)
        if rng.random() < 0.1:
            value[rng.choice(_HEADERS)] = rng.choice(_ODD)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        value = list(value)
        value[rng.randrange(len(value))] = rng.choice(_ODD)
        return value
    return rng.choice(_ODD)
