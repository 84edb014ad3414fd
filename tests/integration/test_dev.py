"""`skeldir dev`: docs/developing.md as it stands, in a copy of the checkout; then whatever may happen to it.

The tests go on with what the one before left: a plane takes seconds to start.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import pytest

from app.core.topology import load_topology
from tests.checkout import copy_tree
from tests.postgres import ROOT
from tests.runbooks import bash, read_docs

pytestmark = pytest.mark.timeout(300)
SKELDIR = Path(sys.prefix) / "bin" / "skeldir"
READY = re.compile(r"Ready after ([\d.]+) s")


@dataclass
class Developer:
    """Somebody with a checkout, and `skeldir dev` in a terminal whose output is a file."""

    home: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: int = field(default=0)

    @property
    def output(self) -> Path:
        return self.home.parent / f"output-{self.started}"

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def start(self) -> None:
        self.started += 1
        with self.output.open("wb") as output:
            self._start(output.fileno())

    def start_in_a_terminal(self) -> None:
        """What is drawn there becomes the output."""
        self.started += 1
        self.output.touch()
        here, there = os.openpty()
        self._start(there, TERM="xterm", COLUMNS="160", LINES="50")
        os.close(there)
        Thread(target=self._read, args=[here, self.output], daemon=True).start()

    def _start(self, output: int, **more: str) -> None:
        self.process = subprocess.Popen(
            [SKELDIR, "dev"],
            cwd=self.home,
            env=self.environment | more,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    @staticmethod
    def _read(terminal: int, file: Path) -> None:
        with file.open("ab", buffering=0) as output, suppress(OSError):  # nobody holds the other end any more
            while drawn := os.read(terminal, 65536):
                output.write(drawn)
        os.close(terminal)

    def wait(self, condition: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process is None or self.process.poll() is None, self.said()[-3000:]
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.1)

    def wait_until_ready(self, times: int = 1) -> float:
        """Seconds it says it took."""
        self.wait(lambda: len(READY.findall(self.said())) >= times)
        return float(READY.findall(self.said())[-1])

    def processes(self) -> dict[int, str]:
        """The command lines of all that runs of this plane, whoever it belongs to, by process id."""
        found = {}
        mine = f"CELERY_METRICS_ADDR={self.environment['CELERY_METRICS_ADDR']}\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                command = (process / "cmdline").read_bytes()
                given = (process / "environ").read_bytes()
                if command and (mine in given or str(self.home).encode() in command):
                    found[int(process.name)] = command.replace(b"\0", b" ").decode()
        return found

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SKELDIR, *words],
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def ping(self) -> str:
        """What a job through every queue says."""
        script = "set -a && . .skeldir/env && set +a && skeldir ping"
        status, said = bash(self.environment, self.home)(script)
        assert status == 0, said + self.said()
        return said


@pytest.fixture(scope="module")
def developer() -> Iterator[Developer]:
    place = Path(tempfile.mkdtemp(prefix="skeldir-dev-"))
    place.chmod(0o711)  # as root, PostgreSQL runs as somebody else
    home = copy_tree(place / "checkout")
    (home / ".venv/bin").mkdir(parents=True)
    (home / ".venv/bin/activate").write_text("")
    subprocess.run(["git", "init", "--quiet"], cwd=home, check=True)
    loopback = ".".join(["127", *(str(1 + byte % 254) for byte in os.urandom(3))])
    environment = {
        "PATH": f"{SKELDIR.parent}:{os.environ['PATH']}",
        "HOME": str(place),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(home),
        "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache"),
        "CELERY_METRICS_ADDR": loopback,  # the sheet's ports may be taken by other tests
    }
    someone = Developer(home, environment)
    try:
        yield someone
    finally:
        if someone.process and someone.process.poll() is None:
            someone.process.send_signal(signal.SIGTERM)
            someone.process.wait(timeout=30)
        shutil.rmtree(place, ignore_errors=True)


def test_the_page_does_what_it_says(developer: Developer) -> None:
    run = bash(developer.environment, developer.home)
    for block in read_docs(ROOT / "docs/developing.md"):
        if block.not_run:
            continue
        if block.text.strip() == "skeldir dev":
            developer.start()
            developer.wait_until_ready()
            continue
        text = block.text
        if "skeldir" in text or "celery" in text:
            text = "set -a && . .skeldir/env && set +a\n" + text
        if "--queue invoices" in text:  # somebody types that after the plane has seen the queue
            developer.wait(lambda: "invoices," in developer.said())
        status, said = run("set -euo pipefail\n" + text)
        assert status == 0, f"{block.text}\n{said}\n{developer.said()[-3000:]}"
        if "dlq groups" in text:
            assert "PingFailed" in said
    assert "app.tasks.invoices.monthly" in (developer.home / "app/topology.yml").read_text()
    developer.wait(
        lambda: "app.tasks.invoices.monthly" in developer.said() and "succeeded" in developer.said()
    )


def test_a_second_one_in_the_same_folder_is_refused(developer: Developer) -> None:
    done = developer.call("dev")
    assert done.returncode == 1
    assert str(developer.home / ".skeldir") in done.stderr
    assert "Traceback" not in done.stderr


def test_code_that_cannot_be_loaded_disturbs_nothing_and_mended_code_runs(developer: Developer) -> None:
    module = developer.home / "app/tasks/housekeeping.py"
    right, before = module.read_text(), len(READY.findall(developer.said()))
    other = developer.home / "app/tasks/llm.py"
    broken = "\nthis is no Python\n"
    other.write_text(other.read_text() + broken)
    developer.wait(lambda: "SyntaxError" in developer.said())
    assert "ok" in developer.ping()
    other.write_text(other.read_text().removesuffix(broken))
    module.write_text(right.replace("the ping was asked to fail", "it fails in a new way"))
    developer.wait_until_ready(before + 1)
    call = """celery -A app.celery_app call app.tasks.housekeeping.ping --kwargs '{"fail": true}'"""
    assert bash(developer.environment, developer.home)(f"set -a; . .skeldir/env; {call}")[0] == 0
    developer.wait(lambda: "it fails in a new way" in developer.said())


def test_a_killed_worker_starts_again(developer: Developer) -> None:
    (main,) = (
        pid
        for pid, command in developer.processes().items()
        if "llm@%h" in command and os.getpgid(pid) == pid
    )
    os.kill(main, signal.SIGKILL)
    developer.wait(lambda: "llm was ended by signal 9" in developer.said())
    assert "ok" in developer.ping()


def test_killed_it_leaves_nothing_in_the_way_and_ctrl_c_leaves_nothing_at_all(developer: Developer) -> None:
    assert developer.process
    os.kill(developer.process.pid, signal.SIGKILL)
    developer.process.wait()
    developer.start_in_a_terminal()
    developer.wait_until_ready()
    developer.ping()
    for queue in load_topology(developer.home / "app/topology.yml").queues:
        assert re.search(rf"{queue}\W.*\bready\b", developer.said())
    developer.process.send_signal(signal.SIGINT)
    assert developer.process.wait(timeout=40) == 0, developer.said()
    assert developer.processes() == {}
