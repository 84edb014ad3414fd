"""Bad input to `site.yml` on bare hosts: one sentence that names what to change, and nothing half-applied."""

import json
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex

import pytest
from testinfra.host import Host

from tests.checkout import copy_tree
from tests.lab import SHEET, Run, site

pytestmark = pytest.mark.timeout(300)

STATE = r"""
find /etc /opt /usr/local /srv /var/lib -xdev \
  '(' -path /var/lib/apt -o -path /var/lib/systemd -o -path /var/lib/dpkg ')' -prune \
  -o -type f -printf '%p %m %u %g %s %T@\n' -o -printf '%p %y %m %u %g %l\n' | sort | sha256sum
dpkg-query --show --showformat '${Package} ${Version} ${db:Status-Status}\n' | sha256sum
systemctl list-unit-files --no-legend | sha256sum
getent passwd | sha256sum
"""
"""What a deployment would change of a host: files, packages, units and users."""


@pytest.fixture
def untouched(worker: Host, database: Host) -> Iterator[None]:
    """The files, packages, units and users of both hosts are the same after the test."""
    hosts = (worker, database)
    before = [host.check_output(STATE) for host in hosts]
    yield
    assert [host.check_output(STATE) for host in hosts] == before


def with_variables(**variables: object) -> Run:
    return site(f"--extra-vars={json.dumps(variables)}")


def refused(run: Run, *words: str) -> None:
    """The run failed in one sentence, said on each host at most, that holds these words."""
    assert run.status != 0
    assert "Traceback" not in run.output
    assert len(set(run.sentences)) == 1, run.output[-3000:]
    for word in words:
        assert word in run.sentences[0]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_tree(tmp_path)


@pytest.mark.usefixtures("untouched")
class TestRefused:
    def test_two_queues_on_one_port(self, tree: Path) -> None:
        first, second, *_ = SHEET.queues.values()
        sheet = tree / "app/topology.yml"
        sheet.write_text(sheet.read_text().replace(str(second.metrics_port), str(first.metrics_port)))
        refused(site(tree=tree), first.name, second.name, str(first.metrics_port))

    def test_a_schedule_with_a_task_that_does_not_exist(self, tree: Path) -> None:
        schedule = tree / "app/schedule.yml"
        schedule.write_text("tidy-up: {task: app.tasks.nowhere.at_all, every: 60}\n")
        refused(site(tree=tree), "tidy-up", "app.tasks.nowhere.at_all")

    def test_a_scheduler_on_a_host_without_the_release(self, tmp_path: Path) -> None:
        (tmp_path / "beat.ini").write_text("[beat]\ndb1\n")
        refused(site(f"--inventory={tmp_path / 'beat.ini'}"), "beat", "db1")

    def test_an_address_that_depends_on_who_asks(self, tmp_path: Path) -> None:
        written = tmp_path / "written.ini"
        written.write_text("[workers]\nworker1 ansible_host='{{ skeldir_lab }}-{{ inventory_hostname }}'\n")
        refused(site(f"--inventory={written}"), "worker1", "inventory_hostname")

    def test_an_override_for_a_queue_that_does_not_exist(self) -> None:
        refused(with_variables(skeldir_queue_overrides={"nosuch": {"concurrency": 2}}), "nosuch")

    def test_an_override_of_a_name(self) -> None:
        first = next(iter(SHEET.queues))
        refused(with_variables(skeldir_queue_overrides={first: {"exchange": "other"}}), first, "exchange")

    @pytest.mark.parametrize("value", [None, "", "changeme-changeme-changeme", "short"])
    def test_a_missing_or_poor_secret(self, value: str | None) -> None:
        given = {name: token_hex(16) for name in ("app_owner", "app_user", "app_rw", "app_ro")}
        given["app_user"] = value or ""
        if value is None:
            del given["app_user"]
        refused(with_variables(skeldir_secrets=given), "app_user")

    def test_a_port_that_the_database_has(self) -> None:
        port = next(iter(SHEET.queues.values())).metrics_port
        refused(with_variables(skeldir_database_port=port), str(port))

    def test_a_queue_that_no_host_serves(self) -> None:
        first, *others = SHEET.queues
        refused(with_variables(skeldir_queues=[first]), *others)

    def test_a_host_that_serves_a_queue_that_does_not_exist(self) -> None:
        refused(with_variables(skeldir_queues=[*SHEET.queues, "nosuch"]), "worker1", "nosuch")

    @pytest.mark.parametrize(
        "given",
        [
            {"worker_memory_max": "1 GB"},
            {"worker_queue_limits": {next(iter(SHEET.queues)): {"memory_max": "much"}}},
        ],
    )
    def test_a_limit_of_memory_that_systemd_would_ignore(self, given: dict[str, object]) -> None:
        refused(with_variables(**given), "worker1", "4G")

    def test_a_name_where_an_address_must_be(self) -> None:
        refused(
            site("--extra-vars=skeldir_address=db.example.net", "--limit=db1"), "db.example.net", "IP address"
        )

    def test_narrowing_the_schema_under_hosts_left_out(self) -> None:
        refused(site("--extra-vars=contract=true", "--limit=db1"), "worker1", "--limit")

    def test_more_connections_than_the_server_has(self) -> None:
        refused(with_variables(postgres_max_connections=20), "connections", "worker host")

    def test_an_unreachable_index_of_python_packages(self, tree: Path) -> None:
        nowhere = {
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
            "PIP_FIND_LINKS": "",
        }
        refused(site(tree=tree, env=nowhere), "locked dependencies")


def test_a_host_that_is_not_debian(worker: Host) -> None:
    worker.check_output(r"""
        mkdir /tmp/kept && mv /etc/os-release /etc/debian_version /tmp/kept &&
        printf 'ID=fedora\nNAME=Fedora\nVERSION_ID=43\n' > /etc/os-release
    """)
    before = worker.check_output(STATE)
    try:
        refused(site(), "worker1", "Debian")
        assert worker.check_output(STATE) == before
    finally:
        worker.check_output("mv /tmp/kept/* /etc/ && rmdir /tmp/kept")


@pytest.mark.parametrize("settings", ["16/main/conf.d/skeldir.conf", "15/main/postgresql.conf"])
def test_a_server_that_is_there_already(database: Host, settings: str) -> None:
    path = f"/etc/postgresql/{settings}"
    database.check_output(f"mkdir -p $(dirname {path}) && touch {path}")
    before = database.check_output(STATE)
    try:
        refused(site(), "db1", settings.split("/", maxsplit=1)[0])
        assert database.check_output(STATE) == before
    finally:
        database.check_output("rm -r /etc/postgresql")


def test_an_unreachable_package_source(database: Host) -> None:
    database.check_output(r"""
        cp -a /etc/apt /tmp/apt && find /etc/apt -name '*.list' -o -name '*.sources' |
        xargs sed -i 's,https\?://[^ /]*,http://127.0.0.1:9,'
    """)
    before = database.check_output(STATE)
    try:
        refused(site(), "db1", "127.0.0.1")
        assert database.check_output(STATE) == before
    finally:
        database.check_output("rm -r /etc/apt && mv /tmp/apt /etc/apt")
