"""What watches the plane: targets up, read by nobody who needn't, and no bad configuration in place."""

import json
import re
from typing import Any

import pytest
from testinfra.host import Host

from tests.lab import SHEET, site, wait_until

pytestmark = pytest.mark.timeout(300)
assert SHEET.exporter
EXPORTER = SHEET.exporter.port


def targets(worker: Host) -> dict[tuple[str, str], str]:
    """Health by job and instance, as Prometheus has it."""
    answer = worker.check_output("curl -s 'http://127.0.0.1:9090/api/v1/targets?state=active'")
    found: list[dict[str, Any]] = json.loads(answer)["data"]["activeTargets"]
    return {(target["labels"]["job"], target["labels"]["instance"]): target["health"] for target in found}


def test_every_target_of_the_sheet_and_the_inventory_is_up(worker: Host) -> None:
    expected = {("celery-worker", f"worker1:{queue.metrics_port}") for queue in SHEET.queues.values()}
    assert SHEET.beat
    expected |= {("skeldir-beat", f"worker1:{SHEET.beat.port}")}
    expected |= {("skeldir-exporter", f"worker1:{EXPORTER}"), ("postgres", "db1:9187")}
    expected |= {("node", "db1:9100"), ("node", "worker1:9100")}
    expected |= {("prometheus", "worker1:9090"), ("alertmanager", "worker1:9093")}
    wait_until(lambda: targets(worker) == dict.fromkeys(expected, "up"), 60)


def test_the_exporter_knows_everything(worker: Host) -> None:
    shown = worker.check_output(f"curl -s http://127.0.0.1:{EXPORTER}/metrics")
    states = re.findall(
        r'^skeldir_exporter_collector_success\{collector="(\w+)"\} (\S+)$', shown, re.MULTILINE
    )
    assert len(states) == 6
    assert {state for _, state in states} == {"1.0"}


def test_each_queue_has_its_one_consumer(worker: Host) -> None:
    """One that a drill killed may count for 20 s more, and the exporter answers from its cache."""
    expected = {f'celery_queue_consumers{{queue="{queue}"}} 1.0' for queue in SHEET.queues}
    command = f"curl -s http://127.0.0.1:{EXPORTER}/metrics"
    wait_until(lambda: expected <= set(worker.check_output(command).splitlines()), 60)


def test_postgres_exporter_reaches_postgres(worker: Host) -> None:
    assert "\npg_up 1\n" in worker.check_output("curl -s -m 5 http://db1:9187/metrics")


def test_the_exporter_is_hardened_and_shows_no_secret(worker: Host, secrets: list[str]) -> None:
    said = worker.check_output("systemd-analyze security --no-pager skeldir-exporter.service")
    score = re.search(r"exposure level for \S+: ([0-9.]+)", said)
    assert score
    assert float(score[1]) <= 2.0
    assert worker.run("systemd-analyze verify skeldir-exporter.service").stderr == ""
    for command in (
        "systemctl show 'skeldir-exporter*'",
        "cat /etc/skeldir/exporter.env /etc/prometheus/*.yml /etc/systemd/system/skeldir-exporter.service",
        "journalctl --no-pager --all --unit=skeldir-exporter",
    ):
        assert not [secret for secret in secrets if secret in worker.run(command).stdout]
    assert worker.run("runuser --user=nobody -- cat /etc/skeldir/exporter/database_url").rc != 0


def test_ports_are_for_their_readers_alone(worker: Host, database: Host) -> None:
    for port in (9090, 9093, 9100, EXPORTER):
        assert database.run(f"curl -s -m 2 http://worker1:{port}/metrics").rc != 0
    for port in (9100, 9187):
        assert worker.run(f"curl -s -m 2 -o /dev/null http://db1:{port}/metrics").rc == 0
        # Not even another address of its own host.
        assert database.run(f"curl -s -m 2 -o /dev/null http://db1:{port}/metrics").rc != 0


def test_a_receiver_that_alertmanager_refuses_is_never_put_in_place(worker: Host) -> None:
    before = worker.check_output("sha256sum /etc/prometheus/alertmanager.yml")
    wrong = json.dumps({"alertmanager_receivers": {"page": {"nosuch_configs": []}}})
    run = site("--limit=worker1", "--tags=monitoring", f"--extra-vars={wrong}")
    assert run.status != 0
    assert worker.check_output("sha256sum /etc/prometheus/alertmanager.yml") == before
    assert worker.service("prometheus-alertmanager").is_running
