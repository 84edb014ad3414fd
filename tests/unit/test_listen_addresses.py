"""Addresses that roles put together: who listens where, who asks there, and where the database is."""

import json
from pathlib import Path

import pytest

from app.core.dsn import sqlalchemy_url
from tests.lab import ROOT, ansible

EVERYWHERE = "0.0.0.0"  # noqa: S104 - nothing listens here
CASES = [
    {"name": "default", "prometheus": "127.0.0.1", "alertmanager": "127.0.0.1"},
    {"name": "everywhere", "prometheus": EVERYWHERE, "alertmanager": "::"},
    {"name": "own", "prometheus": "198.51.100.30", "alertmanager": "fd00::30"},
]
HOSTS = [{"name": "host4", "address": "198.51.100.21"}, {"name": "host6", "address": "fd00::21"}]
SECRETS = dict.fromkeys(("app_owner", "app_user", "app_rw", "app_ro", "grafana_admin"), "not-a-password")
PLAYBOOK = """
- hosts: monitoring
  gather_facts: false
  connection: local
  tasks:
    - ansible.builtin.include_tasks: tasks.yml
      vars:
        prometheus_listen_address: "{{ item.prometheus }}"
        alertmanager_listen_address: "{{ item.alertmanager }}"
      loop: "{{ cases }}"

- hosts: database
  gather_facts: false
  connection: local
  tasks:
    - ansible.builtin.include_tasks: host.yml
      vars:
        skeldir_address: "{{ item.address }}"
        skeldir_database_host: "{{ item.address }}"
      loop: "{{ on_hosts }}"
"""
TASKS = """
- ansible.builtin.import_role: {name: prometheus}
  when: false
- ansible.builtin.import_role: {name: grafana}
  when: false
- ansible.builtin.copy:
    content: |
      {{ {'notified': __prometheus_alertmanager, 'asked': __prometheus_url, 'grafana': grafana_prometheus_url,
          'targets': __prometheus_targets | selectattr(0, 'in', ['prometheus', 'alertmanager'])
                     | map(attribute=2)} | to_json }}
    dest: "{{ playbook_dir }}/{{ item.name }}.json"
    mode: "0600"
"""
ROLES = ["node_exporter", "postgres_exporter", "worker", "schema", "exporter"]
HOST = (
    "".join(f"- ansible.builtin.import_role: {{name: {role}}}\n  when: false\n" for role in ROLES)
    + """
- ansible.builtin.copy:
    content: |
      {{ {'listens': [__node_exporter_listens, __postgres_exporter_listens],
          'worker': __worker_loopback,
          'dsns': __worker_dsns.values() | list + [__schema_dsn, __exporter_dsn]} | to_json }}
    dest: "{{ playbook_dir }}/{{ item.name }}.json"
    mode: "0600"
"""
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what was found in each case."""
    folder = tmp_path_factory.mktemp("addresses")
    (folder / "tasks.yml").write_text(TASKS)
    (folder / "host.yml").write_text(HOST)
    (folder / "playbook.yml").write_text(PLAYBOOK)
    run = ansible(
        "ansible-playbook",
        f"--inventory={ROOT / 'inventory/production'}",
        folder / "playbook.yml",
        f"--extra-vars={json.dumps({'cases': CASES, 'on_hosts': HOSTS, 'skeldir_secrets': SECRETS})}",
    )
    assert run.status == 0, run.output
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("case", "prometheus", "alertmanager"),
    [
        ("default", "127.0.0.1", "127.0.0.1"),
        ("everywhere", "127.0.0.1", "[::1]"),
        ("own", "198.51.100.30", "[fd00::30]"),
    ],
)
def test_what_listens_is_asked_where_it_listens(
    found: Path, case: str, prometheus: str, alertmanager: str
) -> None:
    answer = json.loads((found / f"{case}.json").read_text())
    assert answer["notified"] == f"{alertmanager}:9093"
    assert answer["asked"] == answer["grafana"] == f"http://{prometheus}:9090"
    assert answer["targets"] == [prometheus, alertmanager.strip("[]")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("case", "address"), [("host4", "198.51.100.21"), ("host6", "[fd00::21]")])
def test_an_address_before_a_port_is_in_brackets_where_it_has_colons(
    found: Path, case: str, address: str
) -> None:
    answer = json.loads((found / f"{case}.json").read_text())
    assert answer["listens"] == [f"{address}:9100", f"{address}:9187"]
    assert answer["worker"] == address
    assert len(answer["dsns"]) == 4
    for dsn in answer["dsns"]:
        assert f"@{address}:5432/skeldir?" in dsn
        assert sqlalchemy_url(dsn).host == address.strip("[]")
