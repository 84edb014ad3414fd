"""Drills on this machine: `python -m tests.rules.drill [ALERT…]`, all of them in about 15 minutes.

Each makes a trouble on a real plane that a real Prometheus scrapes, with the project's rules as they are, and
waits until the page or ticket arrives at a real receiver of a real Alertmanager; then mends it and waits for
the message that it is over. Runbooks' own commands need systemd: Molecule pastes those.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import yaml

from monitoring.check import ROOT, RULES
from monitoring.proofs import sheet_of_the_recording
from tests.postgres import Cluster, free_port, provisioned_cluster
from tests.rules.record import BUSY, SETTINGS, SHEET, Plane, Targets

Message = tuple[str, str, str]
"""Status (firing or resolved), alert and receiver."""


class Receiver:
    """A webhook that remembers what it is told."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        messages = self.messages

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                for alert in said["alerts"]:
                    messages.append((alert["status"], alert["labels"]["alertname"], said["receiver"]))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def wait(self, status: str, alert: str, receiver: str, seconds: float) -> float:
        """Seconds until that message came."""
        began = time.monotonic()
        while (status, alert, receiver) not in self.messages:
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"{alert} was not {status} within {seconds:.0f} s; came: {self.messages}")
            time.sleep(0.5)
        return time.monotonic() - began


@contextmanager
def watched(plane: Plane, folder: Path, receiver: Receiver) -> Iterator[None]:
    """Prometheus and Alertmanager on the plane; messages come at once instead of in bundles."""
    alertmanager = free_port()
    (folder / "sheet.yml").write_text(sheet_of_the_recording())
    routing = yaml.safe_load((ROOT / "prometheus/routing.yml").read_text())
    for route in (routing["route"], *routing["route"]["routes"]):
        route |= {"group_wait": "0s", "group_interval": "2s"}
    url = f"http://127.0.0.1:{receiver.server.server_port}/"
    hook = {"webhook_configs": [{"url": url, "send_resolved": True}]}
    names = {route["receiver"] for route in routing["route"]["routes"]}
    routing["receivers"] = [{"name": name, **hook} for name in names]
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(routing))
    jobs = {job for job, _ in plane.targets.ports}
    scrapes = [
        {
            "job_name": job,
            "static_configs": [
                {"targets": [f"127.0.0.1:{port}"], "labels": {"instance": instance}}
                for (of, instance), port in plane.targets.ports.items()
                if of == job
            ],
        }
        for job in sorted(jobs)
    ]
    configuration = {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "2s"},
        "rule_files": [f"{RULES}/*.yml", f"{folder}/sheet.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}]},
        "scrape_configs": scrapes,
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    with (folder / "watching.log").open("wb") as log, ExitStack() as stack:
        for command in (
            [
                "prometheus-alertmanager",
                f"--config.file={folder}/alertmanager.yml",
                f"--storage.path={folder}/alertmanager",
                f"--web.listen-address=127.0.0.1:{alertmanager}",
                "--cluster.listen-address=",
            ],
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/prometheus",
                f"--web.listen-address=127.0.0.1:{free_port()}",
                "--rules.alert.resend-delay=5s",
            ],
        ):
            process = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)
        yield


def unit_killed(plane: Plane) -> Callable[[], None]:
    plane.kill(BUSY)
    return lambda: plane.start_worker(BUSY)


def unit_frozen(plane: Plane) -> Callable[[], None]:
    process = plane.workers[BUSY].process.pid
    os.kill(process, signal.SIGSTOP)
    return lambda: os.kill(process, signal.SIGCONT)


def postgres_stopped(plane: Plane) -> Callable[[], None]:
    plane.cluster.stop()
    return lambda: plane.cluster.start() and None


def failures(plane: Plane) -> Callable[[], None]:
    plane.send("fails", 60)
    return lambda: None  # it is over when no more arrive


def exporter_dead(plane: Plane) -> Callable[[], None]:
    plane.kill("exporter")
    return plane.start_exporter


DRILLS: dict[str, tuple[Callable[[Plane], Callable[[], None]], str]] = {
    "CeleryQueueNoConsumer": (unit_killed, "page"),
    "CeleryWorkerDown": (unit_frozen, "ticket"),
    "PostgresDown": (postgres_stopped, "page"),
    "SkeldirExporterDown": (exporter_dead, "page"),
    "CeleryDlqBurst": (failures, "page"),
}


def main() -> None:
    """Run the drills that are named, or all, and say how long each took."""
    wanted = sys.argv[1:] or list(DRILLS)
    cluster = Cluster(settings=SETTINGS)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skeldir-drill-")))
        provisioned = provisioned_cluster(cluster)
        stack.enter_context(contextmanager(lambda: provisioned)())
        plane = Plane(cluster, folder, Targets(folder / "not-kept"))
        stack.callback(lambda: [each.close() for each in plane.stacks.values()])
        for queue in SHEET.queues:
            plane.start_worker(queue)
        plane.start_exporter()
        receiver = Receiver()
        stack.enter_context(watched(plane, folder, receiver))
        receiver.wait("firing", "Watchdog", "watchdog", 60)
        for alert in wanted:
            make, receiver_name = DRILLS[alert]
            receiver.messages.clear()
            mend = make(plane)
            # A frozen unit's ticket is hidden behind the page that its queue has no worker.
            shown, by = ("CeleryQueueNoConsumer", "page") if make is unit_frozen else (alert, receiver_name)
            fired = receiver.wait("firing", shown, by, 600)
            told = {name for status, name, _ in receiver.messages if status == "firing"} - {"Watchdog"}
            mend()
            ended = receiver.wait("resolved", shown, by, 900)
            print(
                f"{alert}: {by} after {fired:.0f} s, over {ended:.0f} s after it was mended; told {told}",
                flush=True,
            )


if __name__ == "__main__":
    main()
