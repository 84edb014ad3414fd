"""Which releases a worker host counts as installed: those that its Python can run."""

import json
from pathlib import Path

import pytest

from tests.lab import ansible

PLAYBOOK = """
- hosts: localhost
  gather_facts: false
  connection: local
  tasks:
    - ansible.builtin.include_role: {name: app, tasks_from: look}
    - ansible.builtin.copy:
        content: "{{ app_seen | to_json }}"
        dest: "{{ playbook_dir }}/seen.json"
        mode: "0600"
"""


def _release(home: Path, name: str, packages: str, interpreter: Path) -> Path:
    """What Debian's `python3 -m venv` leaves, and the marker."""
    release = home / "releases" / name
    (release / "venv/bin").mkdir(parents=True)
    (release / "venv/lib" / packages / "site-packages").mkdir(parents=True)
    (release / "venv/bin/python3").symlink_to(interpreter)
    (release / "venv/bin/python").symlink_to("python3")
    (release / ".installed").touch()
    return release


@pytest.mark.timeout(120)
def test_a_release_of_another_python_is_not_installed(tmp_path: Path) -> None:
    system = tmp_path / "bin"
    system.mkdir()
    (system / "python3.13").touch()
    (system / "python3").symlink_to("python3.13")
    home = tmp_path / "skeldir"
    _release(home, "sound", "python3.13", system / "python3")
    _release(home, "of-debian-12", "python3.11", system / "python3")
    _release(home, "its-python-is-gone", "python3.11", system / "python3.11")
    (_release(home, "interrupted", "python3.13", system / "python3") / ".installed").unlink()
    (tmp_path / "playbook.yml").write_text(PLAYBOOK)
    run = ansible(
        "ansible-playbook",
        "--inventory=localhost,",
        tmp_path / "playbook.yml",
        f"--extra-vars={json.dumps({'app_home': str(home)})}",
    )
    assert run.status == 0, run.output
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert [line for line in seen if line.startswith("installed ")] == ["installed sound"]
