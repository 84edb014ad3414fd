"""Where Prometheus and Grafana look for what listens on the monitoring host: where it was told to listen."""

import json
from pathlib import Path

import pytest

from tests.lab import ROOT, ansible

EVERYWHERE = "0.0.0.0"  # noqa: S104 - nothing listens here
CASES = [
    {"name": "default", "prometheus": "127.0.0.1", "alertmanager": "127.0.0.1"},
    {"name": "everywhere", "prometheus": EVERYWHERE, "alertmanager": "::"},
    {"name": "own", "prometheus": "198.51.100.30", "alertmanager": "fd00::30"},
]
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


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what was found in each case."""
    folder = tmp_path_factory.mktemp("addresses")
    (folder / "tasks.yml").write_text(TASKS)
    (folder / "playbook.yml").write_text(PLAYBOOK)
    run = ansible(
        "ansible-playbook",
        f"--inventory={ROOT / 'inventory/production'}",
        folder / "playbook.yml",
        f"--extra-vars={json.dumps({'cases': CASES})}",
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
