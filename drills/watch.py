"""What Prometheus, Alertmanager and the receiver say, looked at every two seconds for all drills at once."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from drills.plane import Plane

Labels = dict[str, str]
_EVERY = 2.0
_LOOK = """
curl -sSf -m 10 http://{prometheus}/api/v1/alerts && echo
curl -sSf -m 10 http://{alertmanager}/api/v2/alerts && echo
curl -sSf -m 10 http://{receiver}/{after}
"""


class Stopped(Exception):  # noqa: N818 - what happened
    """Somebody wants no more of it."""


@dataclass(frozen=True)
class Message:
    """What the receiver was told of one alert."""

    number: int
    receiver: str
    status: str
    labels: Labels


@dataclass(frozen=True)
class Look:
    """What was seen at one moment."""

    firing: list[Labels] = field(default_factory=list)
    inhibited: list[tuple[Labels, list[Labels]]] = field(default_factory=list)
    """Alerts that nobody is told of, each with those that explain it."""
    messages: list[Message] = field(default_factory=list)


def has(labels: Labels, wanted: Labels) -> bool:
    """Whether an alert is the one that is meant."""
    return wanted.items() <= labels.items()


class Watch:
    """Looks until it is stopped; `wait` is for as many threads as like."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._now = Look()
        self._looked = threading.Condition()
        self._stopped = threading.Event()
        self._trouble = "nobody has looked yet"
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> Look:
        """What was seen last."""
        return self._now

    def stop(self) -> None:
        """Let everybody who waits, and who will wait, get `Stopped`."""
        self._stopped.set()

    def wait(self, true: Callable[[Look], Any], seconds: float, what: str) -> Any:
        """Wait until something was seen.

        Raises:
            TimeoutError: it wasn't.
            Stopped: it was no longer wanted.
        """
        deadline = time.monotonic() + seconds
        with self._looked:
            while True:
                if self._stopped.is_set():
                    raise Stopped
                if found := true(self._now):
                    return found
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{what}: not within {seconds:.0f} s{self._trouble and f' ({self._trouble})'}"
                    )
                self._looked.wait(1)

    def _watch(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                look = self._look()
            except (RuntimeError, ValueError, KeyError) as error:  # Prometheus may be what the drill stopped
                self._trouble = str(error)
            else:
                self._trouble = ""
                with self._looked:
                    self._now = look
                    self._looked.notify_all()
            self._stopped.wait(_EVERY - (time.monotonic() - began))

    def _look(self) -> Look:
        known = self._now.messages
        script = _LOOK.format(**self._plane.facts, after=known[-1].number if known else 0)
        lines = self._plane.do("monitoring", f"set -e{script}").splitlines()
        prometheus, alertmanager, receiver = (json.loads(line) for line in lines if line.strip())
        labels = {each["fingerprint"]: each["labels"] for each in alertmanager}
        return Look(
            [each["labels"] for each in prometheus["data"]["alerts"] if each["state"] == "firing"],
            [
                (each["labels"], [labels[key] for key in each["status"]["inhibitedBy"] if key in labels])
                for each in alertmanager
                if each["status"]["inhibitedBy"]
            ],
            [*known, *(Message(**each) for each in receiver)],
        )
