"""The project's own promises: one fact in one place, every role described, locks that any mirror serves."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from alembic.config import Config
from alembic.script import ScriptDirectory

from app.core.topology import Queue, load_topology
from tests.checkout import project_files

ROOT = Path(__file__).parents[2]
ROLES = sorted(path.parent for path in ROOT.glob("roles/*/tasks"))
SHEET = load_topology()

# Where a person reads about the shipped sheet, or a test needs the names that users know. Nothing of it makes
# the plane run.
SPEAKS_OF_THE_SHEET = re.compile(
    r"^(tests|molecule|requirements|prometheus/tests|compose/generated)/|\.(md|svg)$"
    r"|^app/(topology|schedule)\.yml$|^app/tasks/"
)
MADE_FROM_THE_SHEET = re.compile(r"^# BEGIN made from.*^# END made from", re.MULTILINE | re.DOTALL)


def written_by_hand(path: Path) -> str:
    return MADE_FROM_THE_SHEET.sub("", path.read_text(errors="ignore"))


def options_of(role: Path) -> dict[str, Any]:
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text())
    options: dict[str, Any] = specs["argument_specs"]["main"].get("options") or {}
    return options


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
class TestRole:
    def test_is_described_on_one_screen(self, role: Path) -> None:
        lines = (role / "README.md").read_text().splitlines()
        assert 5 <= len(lines) <= 60

    def test_spec_types_and_describes_every_option_under_the_roles_prefix(self, role: Path) -> None:
        for name, option in options_of(role).items():
            assert "type" in option, name
            assert "description" in option, name
            assert name.startswith(f"{role.name}_"), name

    def test_spec_and_defaults_agree(self, role: Path) -> None:
        options = options_of(role)
        file = role / "defaults/main.yml"
        defaults = yaml.safe_load(file.read_text()) if file.exists() else {}
        optional = {name for name, option in options.items() if not option.get("required")}
        assert optional <= set(defaults) <= set(options)
        for name, option in options.items():
            if "default" in option:
                assert option["default"] == defaults[name], name


def test_every_play_stops_at_its_first_failure() -> None:
    assert re.search(r"^any_errors_fatal *= *true$", (ROOT / "ansible.cfg").read_text(), re.MULTILINE)


def test_a_contract_migration_is_told_by_its_name_and_is_in_nobodys_way() -> None:
    """A release from before one doesn't know it, and still must be able to say that there is no way back."""
    scripts = ScriptDirectory.from_config(Config(ROOT / "alembic.ini"))
    for script in scripts.walk_revisions():
        contract = "contract" in script.branch_labels
        assert contract == script.revision.startswith("contract_"), script.revision
        if not contract:
            assert not [name for name in script.dependencies or () if name.startswith("contract_")]


def test_no_lock_file_names_an_index() -> None:
    for lock in (ROOT / "requirements").glob("*.txt"):
        text = lock.read_text()
        assert "--hash=sha256:" in text
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", text), lock.name


@pytest.mark.parametrize("queue", SHEET.queues.values(), ids=lambda queue: queue.name)
def test_only_the_sheet_knows_a_queues_port_and_tasks(queue: Queue) -> None:
    facts = re.compile(
        "|".join([rf"\b{queue.metrics_port}\b", *(rf"\b{re.escape(task)}\b" for task in queue.tasks)])
    )
    for path in project_files():
        name = path.relative_to(ROOT).as_posix()
        if not SPEAKS_OF_THE_SHEET.search(name):
            found = facts.search(written_by_hand(path))
            assert not found, f"{name} repeats {found.group() if found else ''} of app/topology.yml"


def test_only_the_sheet_knows_the_ports_of_exporter_and_scheduler() -> None:
    assert SHEET.exporter
    assert SHEET.beat
    port = re.compile(rf"\b({SHEET.exporter.port}|{SHEET.beat.port})\b")
    for path in project_files():
        name = path.relative_to(ROOT).as_posix()
        if not SPEAKS_OF_THE_SHEET.search(name):
            assert not port.search(written_by_hand(path)), name


def test_the_readme_shows_the_sheet() -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    for queue in SHEET.queues.values():
        (row,) = (row for row in rows if row.startswith(f"| `{queue.name}` |"))
        assert row.endswith(f"| {queue.metrics_port} |")
        for task in queue.tasks:
            assert f"`{task}`" in row or f"`.{task.rpartition('.')[2]}`" in row
