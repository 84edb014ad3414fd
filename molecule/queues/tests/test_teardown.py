"""The last thing done to these hosts: the plane goes, by parts, and each host is left as it was before."""

import re
import subprocess

import pytest
from testinfra.host import Host

from tests.lab import Run, container, http, playbook, sql

pytestmark = pytest.mark.timeout(300)

PLACES = ("/etc/", "/opt/", "/srv/", "/usr/local/", "/var/lib/", "/var/log/")
MACHINERY = re.compile(
    "/var/lib/(apt|dpkg|systemd|ucf|pam|private)(/|$)"
    "|/var/log/(journal|apt|wtmp|btmp|lastlog|private|dpkg.log|alternatives.log)(/|$)"
    "|/etc/(passwd|group|shadow|gshadow|subuid|subgid)-$"
    "|/etc/(resolv.conf|machine-id|hostname|mtab|.pwd.lock|.updated)$"
    # What adduser, dbus, locales and perl leave when they go again.
    "|/etc/(adduser|deluser|locale)[.](conf|alias|gen)$|/var/lib/dbus/machine-id$|/etc/perl(/|$)"
)
"""What systemd, APT, Debian's packages and the container's runtime leave whatever is installed."""


def teardown(parts: str, *arguments: str) -> Run:
    return playbook("playbooks/teardown.yml", f"--extra-vars=teardown_parts={parts}", *arguments)


def left_behind(name: str) -> list[str]:
    """Files of a lab host that its image hasn't."""
    listed = subprocess.run(["docker", "diff", container(name)], capture_output=True, text=True, check=True)
    added = [line[2:] for line in listed.stdout.splitlines() if line.startswith("A ")]
    return [path for path in added if path.startswith(PLACES) and not MACHINERY.search(path)]


def accounts(name: str) -> set[str]:
    """Users and groups that a lab host has and its image hasn't."""
    image = subprocess.run(
        ["docker", "inspect", "--format={{.Image}}", container(name)],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    ask = ["sh", "-c", "getent passwd; getent group"]
    run = [["docker", "exec", container(name), *ask], ["docker", "run", "--rm", image, *ask]]
    here, there = (
        {line.partition(":")[0] for line in subprocess.check_output(command, text=True).splitlines()}
        for command in run
    )
    return here - there


def packages(host: Host) -> set[str]:
    return set(host.check_output("dpkg-query --show --showformat '${Package}\\n'").split())


def test_nothing_goes_that_was_not_named(worker: Host, database: Host) -> None:
    for parts in ("", "everything"):
        run = teardown(parts)
        assert run.status != 0
        assert "teardown_parts" in run.sentences[0]
    assert worker.service("skeldir-workers.target").is_running
    assert sql(database, "SELECT count(*) > 0 FROM alembic_version") == "t"


def test_a_server_that_somebody_else_uses_stays(database: Host) -> None:
    sql(database, "CREATE DATABASE others_books")
    run = teardown("database", "--extra-vars=teardown_data_of=db1")
    assert run.status != 0
    assert "others_books" in run.sentences[0]
    assert sql(database, "SELECT count(*) > 0 FROM alembic_version") == "t"
    sql(database, "DROP DATABASE others_books")


def test_a_dry_run_says_what_would_go_and_takes_nothing(worker: Host, database: Host) -> None:
    everything = ("all", "--extra-vars=teardown_data_of=db1,worker1", "--extra-vars=teardown_packages=true")
    run = teardown(*everything, "--check", "--diff")
    assert run.status == 0, run.output[-3000:]
    assert run.changed > 10
    assert worker.service("skeldir-workers.target").is_running
    assert worker.user("skeldir").exists
    assert http(worker, 9090, "/-/ready")[0] == 200
    assert sql(database, "SELECT count(*) > 0 FROM alembic_version") == "t"


def test_data_that_nobody_named_stays(worker: Host, database: Host) -> None:
    run = teardown("all")
    assert run.status == 0, run.output[-3000:]
    assert sql(database, "SELECT count(*) > 0 FROM alembic_version") == "t"
    assert worker.file("/var/lib/prometheus/metrics2").exists
    assert worker.run("systemctl list-units --plain --no-legend 'skeldir-*' | grep .").rc == 1
    for gone in ("/etc/skeldir", "/opt/skeldir", "/usr/local/bin/skeldir", "/usr/local/lib/skeldir"):
        assert not worker.file(gone).exists, gone
    assert http(worker, 9090, "/-/ready")[0] == 0


def test_nothing_is_left_behind(worker: Host, database: Host) -> None:
    everything = ("all", "--extra-vars=teardown_data_of=db1,worker1", "--extra-vars=teardown_packages=true")
    run = teardown(*everything)
    assert run.status == 0, run.output[-3000:]
    for name, host in (("db1", database), ("worker1", worker)):
        assert left_behind(name) == []
        assert accounts(name) <= {"ssl-cert"}  # which Debian's package of that name leaves
        assert host.run("systemctl list-unit-files --no-legend 'skeldir-*' '*prometheus*' | grep .").rc == 1
        assert not [name for name in packages(host) if re.match("prometheus|grafana|postgresql-", name)]
    again = teardown(*everything)
    assert (again.status, again.changed) == (0, 0), again.output[-3000:]
