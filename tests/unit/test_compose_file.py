"""compose.yaml: what is made agrees with the sheet; what is written by hand keeps its promises."""

import re
from typing import Any

import pytest
import yaml

from tests.lab import ROOT, ansible

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.mark.timeout(100)
def test_generated_parts_are_what_the_sheet_and_the_roles_give() -> None:
    playbook = ("ansible-playbook", "--inventory=inventory/single", "playbooks/compose.yml")
    run = ansible(*playbook, "--check", "--diff")
    assert re.search(r"changed=0 .*failed=0 ", run.recap), f"run `{' '.join(playbook)}`:\n{run.output}"


@pytest.mark.parametrize("service", SERVICES)
def test_images_are_variables_and_foreign_ones_have_a_digest(service: str) -> None:
    image = re.fullmatch(r"\$\{([A-Z_]+_IMAGE):-(.+)\}", SERVICES[service]["image"])
    assert image, SERVICES[service]["image"]
    if not image[1].startswith("SKELDIR_"):
        assert re.fullmatch(r"docker\.io/[a-z/]+:[\w.-]+@sha256:[0-9a-f]{64}", image[2])


@pytest.mark.parametrize("service", SERVICES)
def test_no_secret_comes_by_environment(service: str) -> None:
    given = SERVICES[service].get("environment", {})
    assert not [
        name
        for name in given
        if re.search(r"PASSWORD|_URL|SECRET|TOKEN", name) and not name.endswith("_FILE")
    ]
