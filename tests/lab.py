"""Lab hosts, and `site.yml` as a person starts it, for the tests of every Molecule scenario."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import testinfra
from testinfra.host import Host

from app.core.topology import load_topology

ROOT = Path(__file__).parents[1]
SHEET = load_topology()
SCENARIO = os.environ.get("MOLECULE_SCENARIO_NAME", "")
INVENTORY = ROOT / "inventory/lab"
SECRETS = INVENTORY / ".secrets" / SCENARIO
INVENTORIES = (
    [ROOT / "inventory/production", ROOT / "molecule/fleet/inventory"] if SCENARIO == "fleet" else [INVENTORY]
)
"""The example inventory of several hosts, with what makes lab hosts of them; or the lab's own."""
DOMAIN = ".example.net" if SCENARIO == "fleet" else ""


def lab_host(name: str) -> Host:
    """The container of this checkout, this scenario and that inventory name."""
    return testinfra.get_host(f"docker://{container(name)}")


def container(name: str) -> str:
    """Its name for Docker."""
    labels = {"skeldir_checkout": ROOT, "skeldir_scenario": SCENARIO, "skeldir_host": name + DOMAIN}
    filters = [f"--filter=label={label}={value}" for label, value in labels.items()]
    listed = subprocess.run(
        ["docker", "ps", "--all", *filters, "--format={{.Names}}"], capture_output=True, text=True, check=True
    )
    return listed.stdout.strip()


def unit(queue: str) -> str:
    return f"skeldir-worker@{queue}.service"


def invocations(worker: Host) -> dict[str, str]:
    """Each running unit's InvocationID, which every start renews."""
    shown = worker.check_output("systemctl show --property=Id,InvocationID 'skeldir-worker@*.service'")
    blocks = [dict(line.split("=", 1) for line in block.splitlines()) for block in shown.split("\n\n")]
    return {block["Id"]: block["InvocationID"] for block in blocks if block.get("InvocationID")}


def processes(worker: Host, queue: str) -> list[str]:
    """The ids of a unit's main process and of its children."""
    main = worker.check_output(f"systemctl show --value --property=MainPID {unit(queue)}")
    return [main, *worker.check_output(f"pgrep --parent {main}").split()]


def http(host: Host, port: int, path: str) -> tuple[int, str]:
    """Status and body of a unit's own endpoint, asked on its host; 0 when nobody answers within 5 s."""
    answer = host.run(f"curl -s -m 5 -w '\\n%{{http_code}}' http://127.0.0.1:{port}{path}")
    body, _, status = answer.stdout.rpartition("\n")
    return int(status or 0), body


def wait_until(true: Callable[[], bool], seconds: float) -> float:
    """Seconds until something became true; fails when that takes too long."""
    began = monotonic()
    while not true():
        assert monotonic() - began < seconds, f"not true within {seconds} s"
        sleep(0.1)
    return monotonic() - began


def python(worker: Host, code: str) -> Any:
    """Run code on the worker host in the installed release, as the operator; its last line is the answer."""
    answer = worker.run(
        "CREDENTIALS_DIRECTORY=/etc/skeldir/operator /opt/skeldir/current/venv/bin/python -c %s", code
    )
    assert answer.rc == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


def sql(database: Host, statement: str) -> str:
    """A statement's answer from the plane's database, asked as the administrator."""
    command = "runuser --user=postgres -- psql --quiet --tuples-only --no-align --dbname=skeldir --command=%s"
    return str(database.check_output(command, statement))


@contextmanager
def scheduler_paused(worker: Host, database: Host) -> Iterator[None]:
    """Without the schedule's jobs, the last of which has ended: they come at times that no test chooses."""
    worker.check_output("systemctl stop skeldir-beat.service")
    try:
        held = "SELECT count(*) FROM kombu_message WHERE holder IS NOT NULL"
        wait_until(lambda: sql(database, held) == "0", 30)
        yield
    finally:
        # Systemd would take one start a test for a service that fails again and again.
        worker.check_output("systemctl reset-failed skeldir-beat.service")
        worker.check_output("systemctl start skeldir-beat.service")


def task_state(database: Host, task_id: str) -> str:
    return sql(database, f"SELECT status FROM celery_taskmeta WHERE task_id = '{task_id}'")


def samples(text: str) -> dict[tuple[str, str], float]:
    """Prometheus's text as `{(family, task_name): value}`, summed over all other labels."""
    found: Counter[tuple[str, str]] = Counter()
    for line in re.finditer(r'^(\w+)\{[^}]*task_name="([^"]+)"[^}]*\} (\S+)$', text, re.MULTILINE):
        name, task, value = line.groups()
        found[name, task] += float(value)  # type: ignore[assignment]
    return dict(found)


@dataclass
class Ledger:
    """What became of the jobs of a load, filled when it has ended."""

    published: int = 0
    done: int = 0
    failed: int = 0
    longest_gap: dict[str, float] | None = None
    seconds: int = 0


@dataclass
class Run:
    """How one of Ansible's commands ended."""

    status: int
    output: str
    seconds: float = 0.0

    @property
    def changed(self) -> int:
        return sum(map(int, re.findall(r"changed=(\d+)", self.recap)))

    @property
    def recap(self) -> str:
        return self.output.partition("PLAY RECAP")[2]

    @property
    def sentences(self) -> list[str]:
        """What the tasks that failed had to say."""
        return [
            " ".join(text.split())
            for text in re.findall(r"\[ERROR\]: Task failed: (.*?)\nOrigin:", self.output, re.DOTALL)
        ]


WITHOUT_MONITORING = {"default", "refusals"}
"""Scenarios that leave out what watches the plane (their molecule.yml says so, too)."""


def site(*arguments: str, tree: Path = ROOT, env: dict[str, str] | None = None) -> Run:
    """Run a tree's `site.yml` on this scenario's lab hosts."""
    return playbook("site.yml", *arguments, tree=tree, env=env)


def playbook(name: str, *arguments: str, tree: Path = ROOT, env: dict[str, str] | None = None) -> Run:
    """Run a tree's playbook on this scenario's lab hosts."""
    if SCENARIO in WITHOUT_MONITORING:
        arguments = ("--skip-tags=monitoring", *arguments)
    inventories = [f"--inventory={inventory}" for inventory in INVENTORIES]
    return ansible("ansible-playbook", *inventories, name, *arguments, tree=tree, env=env)


def ansible(tool: str, *arguments: str | Path, tree: Path = ROOT, env: dict[str, str] | None = None) -> Run:
    """Run one of Ansible's commands in a tree, with that tree's configuration."""
    began = monotonic()
    done = subprocess.run(
        [Path(sys.executable).with_name(tool), *arguments],
        cwd=tree,
        env=os.environ | {"ANSIBLE_CONFIG": str(tree / "ansible.cfg"), "NO_COLOR": "1"} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=800,
        check=False,
    )
    return Run(done.returncode, done.stdout, monotonic() - began)
