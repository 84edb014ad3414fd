"""The plane of compose.yaml: it serves every queue, is hardened, comes back, and loses nothing."""

import json
import os
import re
import signal
import subprocess
import urllib.request
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import yaml

from app.core.topology import load_topology
from tests.compose.conftest import PROJECT, ROOT, Compose, out, wait_until

pytestmark = pytest.mark.timeout(900)

SHEET = load_topology()
WORKERS = [f"worker-{queue}" for queue in SHEET.queues]
RUNNING = ["postgres", *WORKERS, "exporter", "beat", "prometheus", "alertmanager"]
ONCE = ["database", "migrate"]
SECRETS = {
    "postgres": {"postgres_password"},
    "database": {"postgres_password", "app_owner_url", "app_user_url", "app_rw_url", "app_ro_url"},
    "exporter": {"database_url"},
    "beat": {"database_url"},
    "migrate": {"database_url"},
    **{worker: {"database_url"} for worker in WORKERS},
}


def pings(plane: Compose) -> dict[str, str]:
    return {row["queue"]: row["result"] for row in json.loads(plane.skeldir("ping", "--json"))}


ALL_OK = dict.fromkeys(SHEET.queues, "ok")


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own address
        return json.load(answer)


def test_serves_every_queue(plane: Compose) -> None:
    assert pings(plane) == ALL_OK


def test_prometheus_watches_all_of_it(plane: Compose) -> None:
    address = plane.address("prometheus", 9090)

    def health() -> dict[str, str]:
        targets = get(f"{address}/api/v1/targets")["data"]["activeTargets"]
        return {target["labels"]["instance"]: target["health"] for target in targets}

    wait_until(lambda: set(health().values()) == {"up"}, 45, "every target is up")
    for queue in SHEET.queues.values():
        assert f"worker-{queue.name}:{queue.metrics_port}" in health()
    rules = {
        rule["name"] for group in get(f"{address}/api/v1/rules")["data"]["groups"] for rule in group["rules"]
    }
    assert {"CeleryQueueNoConsumer", "celery_queue:metrics_port:info"} <= rules
    managers = get(f"{address}/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
    assert [manager["url"] for manager in managers] == ["http://alertmanager:9093/api/v2/alerts"]


def test_a_second_up_restarts_nothing(plane: Compose) -> None:
    started = {service: plane.inspect(service)["State"]["StartedAt"] for service in RUNNING}
    plane("up", "--detach", "--wait", "--wait-timeout", "120", timeout=150)
    assert {service: plane.inspect(service)["State"]["StartedAt"] for service in RUNNING} == started
    log = plane("logs", "--no-log-prefix", "database")
    assert re.findall(r"changed=(\d+)", log)[-1] == "0"


@pytest.mark.parametrize("service", [*RUNNING, *ONCE])
def test_is_hardened(plane: Compose, service: str) -> None:
    container = plane.inspect(service)
    settings = container["HostConfig"]
    assert container["Config"]["User"].partition(":")[0].isdecimal()
    assert not container["Config"]["User"].startswith("0")
    assert settings["ReadonlyRootfs"] is True
    assert settings["CapDrop"] == ["ALL"]
    assert not settings["CapAdd"]
    assert settings["Privileged"] is False
    assert any(option.startswith("no-new-privileges") for option in settings["SecurityOpt"])
    assert not any("unconfined" in option for option in settings["SecurityOpt"])
    assert settings["Memory"] > 0
    assert settings["PidsLimit"] > 0
    assert settings["CpuQuota"] > 0
    assert settings["NetworkMode"] == f"{PROJECT}_default"
    assert settings["RestartPolicy"]["Name"] == ("no" if service in ONCE else "unless-stopped")
    for ports in (settings["PortBindings"] or {}).values():
        assert {port["HostIp"] for port in ports} == {"127.0.0.1"}
    # Of the machine it sees read-only files alone, and no engine's socket.
    for mount in container["Mounts"]:
        assert mount["Type"] in {"volume", "bind"}
        assert mount["Type"] == "volume" or not mount["RW"], mount
        assert "docker.sock" not in mount["Source"]


@pytest.mark.parametrize("service", RUNNING)
def test_its_processes_have_no_rights(plane: Compose, service: str) -> None:
    for status in processes(plane, service).values():
        assert set(status["Uid"].split()) == {plane.inspect(service)["Config"]["User"].partition(":")[0]}
        for kind in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
            assert int(status[kind], 16) == 0, kind
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"


def processes(plane: Compose, service: str) -> dict[int, dict[str, str]]:
    """What the machine's kernel says of each process of a container, by its id on the machine."""
    found = {}
    for line in out("docker", "top", plane.inspect(service)["Id"], "-eo", "pid").splitlines()[1:]:
        try:
            lines = Path(f"/proc/{int(line)}/status").read_text().splitlines()
        except FileNotFoundError:  # a health check, which is over
            continue
        found[int(line)] = dict((part.strip() for part in text.split(":", 1)) for text in lines)
    return found


@pytest.mark.parametrize("service", [*RUNNING, *ONCE])
def test_is_given_its_own_secrets_and_none_is_shown(plane: Compose, service: str) -> None:
    container = plane.inspect(service)
    mounted = {
        mount["Destination"]
        for mount in container["Mounts"]
        if mount["Destination"].startswith("/run/secrets/")
    }
    assert mounted == {f"/run/secrets/{name}" for name in SECRETS.get(service, set())}
    passwords = [
        re.sub(r".*:(.*)@.*", r"\1", file.read_text()) for file in plane.secrets.iterdir() if file.is_file()
    ]
    assert len(set(passwords)) == 6
    seen = json.dumps(container) + plane("logs", service)
    if container["State"]["Running"]:
        seen += Path(f"/proc/{container['State']['Pid']}/environ").read_text()
    assert not [password for password in passwords if password in seen]


@pytest.mark.parametrize("queue", SHEET.queues.values(), ids=lambda queue: queue.name)
def test_limits_follow_the_sheet(plane: Compose, queue: Any) -> None:
    container = plane.inspect(f"worker-{queue.name}")
    assert container["Config"]["StopTimeout"] > queue.time_limit
    assert container["HostConfig"]["CpuQuota"] == (queue.concurrency + 1) * 100_000
    role = yaml.safe_load((ROOT / "roles/worker/defaults/main.yml").read_text())
    assert container["HostConfig"]["PidsLimit"] == role["worker_tasks_max"]


def kill_main_process(plane: Compose, service: str) -> None:
    """SIGKILL from the machine: `docker kill` counts as somebody's wish, and nothing is restarted."""
    os.kill(plane.inspect(service)["State"]["Pid"], signal.SIGKILL)


def child(plane: Compose, service: str) -> int:
    """The process that does the work below a container's init."""
    init = plane.inspect(service)["State"]["Pid"]
    return next(pid for pid, status in processes(plane, service).items() if status["PPid"] == str(init))


def test_comes_back_when_killed_or_frozen(plane: Compose) -> None:
    frozen, killed = WORKERS[-1], WORKERS[0]
    before = {service: plane.inspect(service)["State"]["StartedAt"] for service in RUNNING}
    began = monotonic()
    os.kill(child(plane, frozen), signal.SIGSTOP)
    took = {}
    for service in (name for name in RUNNING if name != frozen):
        if service == killed:  # below the init, as the kernel does when memory is short
            os.kill(child(plane, service), signal.SIGKILL)
        else:
            kill_main_process(plane, service)
        took[service] = wait_until(
            lambda name=service: (
                plane.inspect(name)["State"]["StartedAt"] != before[name]  # type: ignore[misc]
                and plane.health(name) == "healthy"
            ),
            45,
            f"{service} is healthy again",
        )
    wait_until(
        lambda: (
            plane.inspect(frozen)["State"]["StartedAt"] != before[frozen]
            and plane.health(frozen) == "healthy"
        ),
        120,
        f"{frozen} was ended and is healthy again",
    )
    took[frozen] = monotonic() - began
    print({service: round(seconds, 1) for service, seconds in took.items()})
    assert pings(plane) == ALL_OK


def test_nothing_is_lost_when_postgres_dies_and_is_away(plane: Compose) -> None:
    ledger = (Path(__file__).parent / "ledger.py").read_text()
    once = ("run", "--rm", "--no-TTY", "--no-deps", "--entrypoint=python", "skeldir", "-c", ledger, "25")
    with subprocess.Popen(
        plane.command(*once), cwd=ROOT, env=plane.env, stdout=subprocess.PIPE, text=True
    ) as sender:
        try:
            assert sender.stdout
            assert sender.stdout.readline() == "sending\n"
            sleep(2)
            kill_main_process(plane, "postgres")
            sleep(4)
            plane("stop", "postgres")
            wait_until(
                lambda: {plane.health(name) for name in WORKERS} == {"unhealthy"},
                40,
                "workers say that it's away",
            )
            plane("start", "postgres")
            counted = json.loads(sender.communicate(timeout=150)[0])
        finally:
            sender.kill()
    print(counted)
    assert counted["accepted"] > 100
    assert counted["refused"] > 0  # so it was really away
    assert counted["lost"] == 0
    assert json.loads(plane.skeldir("dlq", "list", "--json")) == []
    wait_until(lambda: {plane.health(name) for name in WORKERS} == {"healthy"}, 30, "workers are healthy")


def test_grafana_is_there_for_who_has_its_image(plane: Compose) -> None:
    services = yaml.safe_load(plane("--profile", "grafana", "config"))["services"]
    assert services["grafana"]["read_only"]
    assert "grafana" not in yaml.safe_load(plane("config"))["services"]


def test_down_leaves_nothing(plane: Compose) -> None:
    plane("down", "--volumes", "--timeout=20", timeout=120)
    label = f"--filter=label=com.docker.compose.project={PROJECT}"
    assert not out("docker", "ps", "--all", "--quiet", label)
    assert not out("docker", "volume", "ls", "--quiet", label)
    assert not out("docker", "network", "ls", "--quiet", label)
