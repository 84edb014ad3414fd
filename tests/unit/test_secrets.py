"""Passwords that `playbooks/secrets.yml` makes, and what is refused about them, before any host is asked."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.lab import ROOT, Run, ansible

pytestmark = pytest.mark.timeout(600)

ROLES = ("app_owner", "app_user", "app_rw", "app_ro")
NOT_ASKED = "UNREACHABLE"
"""What Ansible says once it asks a host of the example."""


def extra(**variables: object) -> str:
    return f"--extra-vars={json.dumps(variables)}"


class Plane:
    """A copy of the example inventory, and the password of its vault."""

    def __init__(self, folder: Path) -> None:
        self.inventory = folder / "mine"
        shutil.copytree(ROOT / "inventory/production", self.inventory)
        self.password = folder / "password"
        self.password.write_text("the vault's own\n")
        self.vault = self.inventory / "group_vars/all/vault.yml"
        self.vault_next = self.inventory / "group_vars/all/vault_next.yml"

    def playbook(self, name: str, *arguments: str) -> Run:
        given = [f"--inventory={self.inventory}", f"--vault-password-file={self.password}"]
        return ansible("ansible-playbook", name, *given, *arguments)

    def made(self, *arguments: str) -> Run:
        run = self.playbook("playbooks/secrets.yml", *arguments)
        assert run.status == 0, run.output
        return run

    def holds(self, vault: Path) -> dict[str, str]:
        """What `ansible-vault` reads there."""
        run = ansible("ansible-vault", "view", f"--vault-password-file={self.password}", vault)
        assert run.status == 0, run.output
        found: dict[str, str] = yaml.safe_load(run.output)
        return found

    def refused(self, name: str, *arguments: str) -> str:
        """The one sentence that a playbook ended with, before it asked any host."""
        run = self.playbook(name, *arguments)
        assert run.status != 0
        assert NOT_ASKED not in run.output
        assert len(set(run.sentences)) == 1, run.output
        return run.sentences[0]

    def accepted(self, *arguments: str) -> None:
        """The checks came as far as to ask the hosts, none of which answers."""
        run = self.playbook(
            "playbooks/preflight.yml", *arguments, extra(ansible_host="127.0.0.1", ansible_port=1)
        )
        assert NOT_ASKED in run.output
        assert all("Data could not be sent" in sentence for sentence in run.sentences), run.output


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return Plane(tmp_path)


def test_they_are_made_once_encrypted_and_good_enough_for_the_plane(plane: Plane) -> None:
    run = plane.made()
    passwords = plane.holds(plane.vault)
    assert passwords.keys() == {f"vault_skeldir_{role}" for role in (*ROLES, "grafana_admin")}
    assert len(set(passwords.values())) == 5
    written = [*plane.inventory.rglob("*"), *plane.inventory.parent.iterdir()]
    shown = run.output + "".join(path.read_text() for path in written if path.is_file())
    assert not [password for password in passwords.values() if password in shown]
    assert plane.vault.stat().st_mode & 0o777 == 0o600
    before = plane.vault.read_bytes()
    assert "vault.yml is there already" in plane.refused("playbooks/secrets.yml")
    assert plane.vault.read_bytes() == before
    plane.accepted()


def test_without_the_vaults_password_nothing_is_written(plane: Plane) -> None:
    run = ansible("ansible-playbook", "playbooks/secrets.yml", f"--inventory={plane.inventory}")
    assert "--ask-vault-pass" in run.sentences[0]
    assert not plane.vault.exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plane:
    """A plane whose passwords are in its vault."""
    plane = Plane(tmp_path_factory.mktemp("made"))
    plane.made()
    return plane


def test_a_rotation_needs_new_passwords(made: Plane) -> None:
    assert "secrets.yml -e next=true" in made.refused("playbooks/rotate.yml")


def test_a_password_that_is_in_use_is_not_a_new_one(made: Plane) -> None:
    used = made.holds(made.vault)["vault_skeldir_app_rw"]
    given = {role: f"{role}-brand-new-0123456789" for role in ROLES} | {"app_rw": used}
    sentence = made.refused("playbooks/rotate.yml", extra(skeldir_secrets_next=given))
    assert "app_rw" in sentence
    assert "app_user" not in sentence


def test_after_a_rotation_whose_new_passwords_are_in_place_everything_runs(made: Plane) -> None:
    left = {role: made.holds(made.vault)[f"vault_skeldir_{role}"] for role in ROLES}
    made.accepted(extra(skeldir_secrets_next=left))


def test_new_ones_are_for_the_rotation_alone(plane: Plane, made: Plane) -> None:
    shutil.copy(made.vault, plane.vault)
    plane.made("--extra-vars=next=true")
    new = plane.holds(plane.vault_next)["skeldir_secrets_next"]
    assert isinstance(new, dict)
    assert new.keys() == set(ROLES)
    assert not set(new.values()) & set(plane.holds(plane.vault).values())
    sentence = plane.refused("site.yml")
    assert "playbooks/rotate.yml" in sentence
    assert str(plane.vault_next) in sentence
    sentence = plane.refused("playbooks/rotate.yml", "--limit=db1.example.net,worker1.example.net")
    assert "worker2.example.net" in sentence
    assert "worker1.example.net" not in sentence
    plane.accepted(extra(preflight_rotates=True))


def test_a_rotation_puts_them_into_the_vault_beside_what_else_is_there(plane: Plane, made: Plane) -> None:
    old = made.holds(made.vault)
    lines = [f"{name}: {password}" for name, password in old.items()]
    plane.vault.write_text("\n".join([*lines, "# not the plane's", 'other: "a: b"', ""]))
    encrypted = ansible("ansible-vault", "encrypt", f"--vault-password-file={plane.password}", plane.vault)
    assert encrypted.status == 0
    plane.made("--extra-vars=next=true")
    new = plane.holds(plane.vault_next)["skeldir_secrets_next"]
    # What a host of the example would be asked before and after these tasks nobody answers.
    only = ("--limit=db1.example.net", extra(ansible_host="127.0.0.1", ansible_port=1))
    plane.playbook("playbooks/rotate.yml", *only, "--start-at-task=Put them into the vault*")
    kept = {"vault_skeldir_grafana_admin": old["vault_skeldir_grafana_admin"], "other": "a: b"}
    assert isinstance(new, dict)
    assert plane.holds(plane.vault) == {f"vault_skeldir_{role}": new[role] for role in ROLES} | kept
    assert plane.vault.read_text().startswith("$ANSIBLE_VAULT")
    plane.playbook("playbooks/rotate.yml", *only, "--start-at-task=Say what is left to do")
    assert not plane.vault_next.exists()
