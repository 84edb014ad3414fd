"""The units of a deployed worker host: one a queue, each as the sheet and the unit file say."""

import json
import re

import pytest
from testinfra.host import Host

from app.core.topology import Queue
from tests.lab import SHEET, http, processes, unit

FAMILIES = ("started_total", "success_total", "failure_total", "duration_seconds")

pytestmark = pytest.mark.usefixtures("pings")
each_queue = pytest.mark.parametrize("queue", SHEET.queues.values(), ids=lambda queue: queue.name)


@pytest.fixture(scope="session")
def pings(worker: Host) -> dict[str, dict[str, object]]:
    """Answers by queue to a job through each of them."""
    return {row["queue"]: row for row in json.loads(worker.check_output("skeldir ping --json"))}


@each_queue
class TestQueue:
    def test_unit_is_enabled_and_active(self, worker: Host, queue: Queue) -> None:
        service = worker.service(unit(queue.name))
        assert service.is_enabled
        assert service.is_running

    def test_every_process_runs_as_skeldir(self, worker: Host, queue: Queue) -> None:
        pids = ",".join(processes(worker, queue.name))
        users = worker.check_output(f"ps -o user= -p {pids}").split()
        assert set(users) == {"skeldir"}
        assert len(users) == 1 + queue.concurrency

    def test_is_hardened(self, worker: Host, queue: Queue) -> None:
        said = worker.check_output(f"systemd-analyze security --no-pager {unit(queue.name)}")
        score = re.search(r"exposure level for \S+: ([0-9.]+)", said)
        assert score
        assert float(score[1]) <= 2.0

    def test_stopping_waits_for_the_longest_task(self, worker: Host, queue: Queue) -> None:
        shown = worker.check_output(f"systemctl show --value --property=TimeoutStopUSec {unit(queue.name)}")
        units = {"h": 3600, "min": 60, "s": 1}
        seconds = sum(int(number) * units[name] for number, name in re.findall(r"(\d+)(h|min|s)", shown))
        assert seconds > queue.time_limit

    def test_port_is_open_to_this_host_alone(self, worker: Host, queue: Queue) -> None:
        listening = worker.check_output("ss --listening --tcp --numeric --no-header").splitlines()
        (address,) = {
            line.split()[3] for line in listening if line.split()[3].endswith(f":{queue.metrics_port}")
        }
        assert address == f"127.0.0.1:{queue.metrics_port}"

    def test_answers_a_job(self, pings: dict[str, dict[str, object]], queue: Queue) -> None:
        assert pings[queue.name]["result"] == "ok"
        assert str(pings[queue.name]["worker"]).startswith(f"{queue.name}@")

    def test_is_healthy(self, worker: Host, queue: Queue) -> None:
        status, body = http(worker, queue.metrics_port, "/health")
        assert status == 200
        health = json.loads(body)
        assert health["status"] == "ok"
        assert queue.name in health["queues"]

    @pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
    def test_is_live_and_ready(self, worker: Host, queue: Queue, path: str) -> None:
        assert http(worker, queue.metrics_port, path)[0] == 200

    def test_metrics_have_the_families_of_its_tasks(self, worker: Host, queue: Queue) -> None:
        status, body = http(worker, queue.metrics_port, "/metrics")
        assert status == 200
        for family in FAMILIES:
            assert f"# TYPE celery_task_{family}" in body
        for task in queue.tasks:
            assert f'task_name="{task}"' in body

    def test_journal_is_one_json_object_a_line(self, worker: Host, queue: Queue) -> None:
        lines = worker.check_output(
            "journalctl --no-pager --output=cat _TRANSPORT=stdout _SYSTEMD_UNIT=%s", unit(queue.name)
        ).splitlines()
        entries = [json.loads(line) for line in lines if line]
        assert entries
        assert all({"time", "level", "message"} <= set(entry) for entry in entries)
        jobs = [entry for entry in entries if entry.get("task_id")]
        assert any(
            entry["task_name"] == "app.tasks.housekeeping.ping" and entry["correlation_id"] for entry in jobs
        )

    def test_unit_file_passes_systemds_own_check(self, worker: Host, queue: Queue) -> None:
        said = worker.run(f"systemd-analyze verify {unit(queue.name)}")
        assert (said.rc, said.stderr) == (0, "")


def test_nothing_failed_or_ended_by_itself(worker: Host) -> None:
    assert worker.check_output("systemctl --failed --no-legend --plain") == ""
    for queue in SHEET.queues:
        said = worker.check_output(f"journalctl --no-pager --output=cat _PID=1 --unit={unit(queue)}")
        assert f"Started {unit(queue)}" in said
        # Tests kill units (SIGKILL). What else ends one wasn't meant: its own exit, its watchdog, a limit.
        ends = re.findall(r".*(?:exited|timed out|timeout|OOM).*", said)
        killed = [line for line in ends if "status=9/KILL" in line]
        assert ends == killed, said
        assert said.count("Scheduled restart job") <= len(killed), said


@pytest.mark.parametrize(
    ("path", "owner", "group", "mode"),
    [
        ("/etc/skeldir/credentials", "root", "root", 0o700),
        ("/etc/skeldir/credentials/database_url", "root", "root", 0o600),
        ("/etc/skeldir/operator", "root", "skeldir-operators", 0o750),
        ("/etc/skeldir/operator/database_url", "root", "skeldir-operators", 0o640),
        ("/etc/skeldir/worker", "root", "root", 0o755),
        *((f"/etc/skeldir/worker/{queue}.env", "root", "root", 0o644) for queue in SHEET.queues),
        ("/etc/systemd/system/skeldir-worker@.service", "root", "root", 0o644),
        ("/etc/systemd/system/skeldir-workers.target", "root", "root", 0o644),
        ("/usr/local/bin/skeldir", "root", "root", 0o755),
        ("/opt/skeldir/current/venv/bin/skeldir", "root", "root", 0o755),
        ("/opt/skeldir/current/alembic.ini", "root", "root", 0o644),
    ],
)
def test_file(worker: Host, path: str, owner: str, group: str, mode: int) -> None:
    file = worker.file(path)
    assert (file.user, file.group, oct(file.mode)) == (owner, group, oct(mode))


def test_the_workers_user_can_change_nothing_of_its_release(worker: Host) -> None:
    writable = worker.run(
        "runuser --user=skeldir -- find /opt/skeldir /etc/skeldir -writable -not -type l 2>/dev/null"
    )
    assert writable.stdout == ""


def test_no_other_user_reads_a_credential(worker: Host) -> None:
    for path in ("credentials", "operator"):
        assert worker.run(f"runuser --user=nobody -- cat /etc/skeldir/{path}/database_url").rc != 0


@pytest.mark.parametrize(
    "command",
    [
        "cat /etc/systemd/system/skeldir-* /etc/systemd/system/skeldir-*/* /etc/skeldir/worker/*",
        "systemctl show 'skeldir-*'",
        "ps -eww -o args",
        "journalctl --no-pager --all",
        "for pid in $(pgrep -u skeldir); do tr '\\0' '\\n' < /proc/$pid/environ; done",
        "cat /opt/skeldir/current/release.json /usr/local/bin/skeldir",
    ],
)
def test_no_secret_shows_on_the_worker_host(worker: Host, secrets: list[str], command: str) -> None:
    shown = worker.run(command).stdout
    assert shown
    assert not [secret for secret in secrets if secret in shown]


@pytest.mark.parametrize(
    "command",
    [
        "ps -eww -o args",
        "journalctl --no-pager --all",
        "cat /var/log/postgresql/*",
        "cat /etc/postgresql/*/main/*",
    ],
)
def test_no_secret_shows_on_the_database_host(database: Host, secrets: list[str], command: str) -> None:
    shown = database.run(command).stdout
    assert shown
    assert not [secret for secret in secrets if secret in shown]
