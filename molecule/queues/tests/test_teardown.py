"""The last thing done to these hosts: the plane goes, part by part, and leaves them as their image was."""

import re
import subprocess

import pytest
from testinfra.host import Host

from tests.lab import Run, container, http, playbook, sql

pytestmark = pytest.mark.timeout(300)

PLACES = re.compile("/(etc|opt|srv|usr/local|var/lib|var/log|home|root)/")
MACHINERY = re.compile(
    "/var/lib/(apt|dpkg|systemd|ucf|pam|private)(/|$)"
    "|/var/log/(journal|apt|wtmp|wtmp[.]db|btmp|lastlog|private|dpkg.log|alternatives.log)(/|$)"
    "|/etc/(passwd|group|shadow|gshadow|subuid|subgid)-$"
    "|/etc/(resolv.conf|machine-id|hostname|mtab|.pwd.lock|.updated)$|/root/.ansible(/|$)"
    # Who may sign in on a lab host.
    "|/root/[.]ssh/authorized_keys$"
    # What adduser, dbus, locales and perl leave when they go again.
    "|/etc/(adduser|deluser|locale)[.](conf|alias|gen)$|/var/lib/dbus/machine-id$|/etc/perl(/|$)"
)
"""What systemd, APT, Ansible, Debian's packages and the container's runtime leave whatever is installed."""

SUGGESTED = re.compile("(adduser|locales|libc-l10n|perl|lib(perl|gdbm|gcrypt|gpg-error)|sensible-utils)")
"""Packages that came along and that APT keeps from then on, because others suggest them or may use them."""


def teardown(parts: str, *arguments: str) -> Run:
    return playbook("playbooks/teardown.yml", f"--extra-vars=teardown_parts={parts}", *arguments)


def new_files(name: str) -> list[str]:
    """Files of a lab host that its image hasn't."""
    listed = subprocess.run(["docker", "diff", container(name)], capture_output=True, text=True, check=True)
    added = [line[2:] for line in listed.stdout.splitlines() if line.startswith("A ")]
    return [path for path in added if PLACES.match(path) and not MACHINERY.search(path)]


def new_words(name: str, command: str) -> set[str]:
    """First words of the lines that a command prints on a lab host and not in its image."""
    image = subprocess.check_output(["docker", "inspect", "--format={{.Image}}", container(name)], text=True)
    run = [
        ["docker", "exec", container(name), "sh", "-c", command],
        ["docker", "run", "--rm", image.strip(), "sh", "-c", command],
    ]
    here, bare = (
        {re.split("[: ]", line)[0] for line in subprocess.check_output(each, text=True).splitlines()}
        for each in run
    )
    return here - bare


def holds_the_data(database: Host) -> bool:
    return sql(database, "SELECT count(*) > 0 FROM alembic_version") == "t"


def test_nothing_is_touched_until_somebody_says_what_becomes_of_the_data(
    worker: Host, database: Host
) -> None:
    assert "teardown_parts" in teardown("").sentences[0]
    run = teardown("all")
    assert run.status != 0
    assert run.changed == 0
    assert "teardown_data_of=db1,worker1" in run.sentences[0]
    assert worker.service("skeldir-workers.target").is_running
    assert holds_the_data(database)


def test_a_server_that_somebody_else_uses_stays(worker: Host, database: Host) -> None:
    sql(database, "CREATE DATABASE others_books")
    run = teardown("all", "--extra-vars=teardown_data_of=db1,worker1")
    sql(database, "DROP DATABASE others_books")
    assert run.status != 0
    assert run.changed == 0
    assert "others_books" in run.sentences[0]
    assert worker.service("skeldir-workers.target").is_running


def test_a_server_beside_the_planes_stays(database: Host) -> None:
    [version] = database.check_output("ls /usr/lib/postgresql").split()
    database.check_output(f"pg_createcluster {version} others")
    run = teardown("database", "--limit=db1", "--extra-vars=teardown_data_of=db1")
    database.check_output(f"pg_dropcluster {version} others")
    assert run.status != 0
    assert run.changed == 0
    assert f"{version}/others" in run.sentences[0]
    assert holds_the_data(database)


def test_a_dry_run_takes_nothing(database: Host) -> None:
    run = teardown("database", "--limit=db1", "--extra-vars=teardown_data_of=db1", "--check", "--diff")
    assert run.status == 0, run.output[-3000:]
    assert "changed: [db1] => (item=/var/lib/postgresql)" in run.output
    assert holds_the_data(database)


def test_what_watches_and_the_database_serve_on_without_workers(worker: Host, database: Host) -> None:
    worker.check_output("touch /etc/skeldir/drained/llm")
    run = teardown("workers", "--limit=worker1")
    assert run.status == 0, run.output[-3000:]
    assert worker.run("systemctl list-units --plain --no-legend 'skeldir-*' | grep -v receiver").rc == 1
    for gone in ("/etc/skeldir", "/opt/skeldir", "/usr/local/bin/skeldir"):
        assert not worker.file(gone).exists, gone
    assert http(worker, 9090, "/-/ready")[0] == 200
    assert http(worker, 9093, "/-/ready")[0] == 200
    assert holds_the_data(database)


def test_nothing_is_left_behind() -> None:
    everything = ("all", "--extra-vars=teardown_data_of=db1,worker1")
    run = teardown(*everything)
    assert run.status == 0, run.output[-3000:]
    for name in ("db1", "worker1"):
        assert new_files(name) == []
        # A group that Debian's package of that name leaves.
        assert new_words(name, "getent passwd; getent group") <= {"ssl-cert"}
        packages = new_words(name, "dpkg-query --show --showformat '${Package} ${Status}\\n'")
        assert [each for each in packages if not SUGGESTED.match(each)] == []
        # Which systemd makes at boot where there is an sshd.
        local = {"sshd-unix-local.socket", "sshd-unix-local@.service"}
        assert new_words(name, "systemctl list-unit-files --no-legend") <= local
    again = teardown(*everything)
    assert (again.status, again.changed) == (0, 0), again.output[-3000:]
