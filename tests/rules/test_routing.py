"""Who is called for what, by amtool and by a real Alertmanager; receivers are those the role has, by name."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml

from monitoring import check
from tests.postgres import free_port

ROUTING = check.ROOT / "prometheus/routing.yml"
RECEIVERS = ("page", "ticket", "watchdog", "nobody")
ALERTS = [(rule["alert"], rule["labels"]["severity"]) for rule in check.rules() if "alert" in rule]
EVERYWHERE = {"queue": "llm", "task_name": "t", "instance": "w:1", "device": "/dev/vda"}


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alertmanager") / "alertmanager.yml"
    receivers = yaml.safe_dump({"receivers": [{"name": name} for name in RECEIVERS]})
    path.write_text(ROUTING.read_text() + receivers)
    return path


@pytest.mark.parametrize(("alert", "severity"), ALERTS)
def test_severity_decides_who_is_called(configuration: Path, alert: str, severity: str) -> None:
    wanted = {"critical": "page", "warning": "ticket", "none": "watchdog"}[severity]
    done = subprocess.run(
        [
            *("amtool", "config", "routes", "test", f"--config.file={configuration}"),
            *(f"--verify.receivers={wanted}", f"alertname={alert}", f"severity={severity}", "queue=llm"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Alertmanager:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/api/v2"

    def fire(self, *alerts: dict[str, str]) -> None:
        body = json.dumps([{"labels": labels} for labels in alerts]).encode()
        request = Request(f"{self.url}/alerts", body, {"Content-Type": "application/json"})
        urlopen(request, timeout=5).close()

    def ask(self) -> list[dict[str, Any]]:
        with urlopen(f"{self.url}/alerts", timeout=5) as answer:
            found: list[dict[str, Any]] = json.load(answer)
            return found

    def calling(self, number: int) -> set[str]:
        """The alerts that call somebody, once that many have arrived."""
        deadline = time.monotonic() + 10
        while len(found := self.ask()) < number:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return {
            f"{alert['labels']['alertname']} {alert['labels']['severity']}"
            for alert in found
            if not alert["status"]["inhibitedBy"]
        }


@pytest.fixture
def alertmanager(configuration: Path, tmp_path: Path) -> Iterator[Alertmanager]:
    port = free_port()
    command = [
        "prometheus-alertmanager",
        f"--config.file={configuration}",
        f"--storage.path={tmp_path}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        found = Alertmanager(port)
        deadline = time.monotonic() + 20
        while True:
            try:
                found.ask()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield found
        process.terminate()


def test_a_dead_database_is_one_page(alertmanager: Alertmanager) -> None:
    alertmanager.fire(*({"alertname": name, "severity": severity} | EVERYWHERE for name, severity in ALERTS))
    calling = alertmanager.calling(len(ALERTS))
    told = ("Celery", "Postgres", "SkeldirExporterCollector", "SkeldirBeat")
    # Without a free connection or a certificate no probe gets through; only these pages say how to end that.
    causes = {"PostgresConnectionsHigh critical", "PostgresCertificateEnding critical"}
    assert {one for one in calling if one.startswith(told)} == {"PostgresDown critical"} | causes
    assert "HostDiskFilling critical" in calling  # it may be the cause, too
    assert "Watchdog none" in calling


def test_a_queue_without_worker_is_one_page_and_hides_no_other_queue(alertmanager: Alertmanager) -> None:
    alertmanager.fire(
        {"alertname": "CeleryQueueNoConsumer", "severity": "critical", "queue": "llm"},
        {"alertname": "CeleryWorkerDown", "severity": "warning", "queue": "llm", "instance": "w:1"},
        {"alertname": "CeleryQueueOldestAge", "severity": "critical", "queue": "llm"},
        {"alertname": "CeleryQueueOldestAge", "severity": "warning", "queue": "maintenance"},
        {"alertname": "CeleryWorkerLoopStalled", "severity": "critical", "queue": "llm", "instance": "w:1"},
    )
    # Of a unit that is there and frozen only its own page says what to do.
    assert alertmanager.calling(5) == {
        "CeleryQueueNoConsumer critical",
        "CeleryQueueOldestAge warning",
        "CeleryWorkerLoopStalled critical",
    }


def test_what_pages_needs_no_ticket(alertmanager: Alertmanager) -> None:
    alertmanager.fire(
        {"alertname": "CelerySuccessBudgetBurn", "severity": "critical", "queue": "llm"},
        {"alertname": "CelerySuccessBudgetBurn", "severity": "warning", "queue": "llm"},
        {"alertname": "CelerySuccessBudgetBurn", "severity": "warning", "queue": "maintenance"},
    )
    assert alertmanager.calling(3) == {
        "CelerySuccessBudgetBurn critical",
        "CelerySuccessBudgetBurn warning",
    }
    assert sum(bool(alert["status"]["inhibitedBy"]) for alert in alertmanager.ask()) == 1
