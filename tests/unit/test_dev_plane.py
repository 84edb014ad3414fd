"""Planes of `skeldir dev` without a server: tests/integration/test_dev.py has whole ones."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.core.topology import load_topology
from dev.plane import Plane, Process

SHEET = load_topology()
QUEUE = next(iter(SHEET.queues.values()))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the guard was told."""
    told: list[tuple[str, int]] = []
    monkeypatch.setattr(Plane, "_tell_guard", lambda _, *what: told.append(what))
    return told


@pytest.fixture
def plane(
    told: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Plane, Process]]:
    """A plane with one worker, which only sleeps."""
    assert not told
    loopback = ".".join(["127", *(str(1 + byte % 254) for byte in os.urandom(3))])
    monkeypatch.setenv("CELERY_METRICS_ADDR", loopback)
    monkeypatch.setattr(Plane, "migrate", lambda _: None)
    made = Plane(tmp_path, print, secrets={"port": 1, "passwords": {"app_user": "none"}})
    worker = Process(QUEUE.name, ["sleep", "60"], QUEUE.metrics_port, tmp_path / "log")
    worker.started = made._spawn(worker.command, worker.log, os.environ)
    made.processes[worker.name] = worker
    yield made, worker
    for child in made._children:
        child.kill()
        child.wait()


def test_nothing_is_stopped_when_a_port_of_the_new_sheet_is_taken(plane: tuple[Plane, Process]) -> None:
    made, worker = plane
    port = list(SHEET.queues.values())[-1].metrics_port
    with socket.create_server((os.environ["CELERY_METRICS_ADDR"], port)):
        assert f"Port {port}" in made.reload()
    assert worker.started
    assert worker.started.poll() is None
    assert list(made.processes) == [worker.name]


def test_an_interrupt_waits_until_the_guard_knows_what_was_started(
    plane: tuple[Plane, Process],
    told: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, _ = plane

    class Interrupted(subprocess.Popen[Any]):
        def __init__(self, *command: Any, **options: Any) -> None:
            super().__init__(*command, **options)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    # As in a terminal: whoever runs the tests in the background may ignore interrupts.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            made._spawn(["sleep", "60"], tmp_path / "other", os.environ)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert ("group", made._children[-1].pid) in told
    assert len(made._children) == 2
