"""The pages: a test runs their commands or they say why not, links lead somewhere, what is made is current.

The pages of alerts are held to more than that, by `tests.rules.runbooks`.
"""

import re
from pathlib import Path

import pytest

from dev.inventory import SHARED, page
from tests.postgres import ROOT
from tests.runbooks import pages, read_docs

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("roles/*/README.md"), *pages("[!A-Z]*.md")]
)
_ALL_RUN_BY = re.compile(r"^<!-- Run by (?P<test>[\w./-]+),", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?://|#)(?P<path>[^)#]+)(?:#[^)]*)?\)")
_RUNBOOKS = {
    "dlq": ROOT / "tests/dlq/test_runbooks.py",
    "postgres": ROOT / "molecule/default/tests/test_restore.py",
}
"""Who pastes the runbooks that are of no alert, by the first word of their names."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_are_run_by_a_test_or_say_why_not(path: Path) -> None:
    blocks = read_docs(path)
    if path.parent.name == "runbooks":
        assert f'"{path.name}"' in _RUNBOOKS[path.stem.partition("-")[0]].read_text()
        return
    for block in blocks:
        assert not block.run_by or (ROOT / block.run_by).is_file(), block.run_by
    left = [block.text for block in blocks if not block.not_run and not block.run_by]
    if left:
        all_of_it = _ALL_RUN_BY.search(path.read_text())
        assert all_of_it, (
            f"{name(path)}: above these say `<!-- Run by FILE -->` or `<!-- Not run: WHY -->`,"
            f" or of the whole page `<!-- Run by FILE, … -->`: {left}"
        )
        test = ROOT / all_of_it["test"]
        assert test.is_file(), test
        assert name(path) in test.read_text(), f"{all_of_it['test']} knows nothing of {name(path)}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in _LINK.finditer(path.read_text()):
        assert (path.parent / link["path"]).exists(), link["path"]


def test_the_inventorys_page_is_what_the_argument_specs_say() -> None:
    current = (ROOT / "docs/inventory.md").read_text()
    assert current == page(), "run: python -m dev.inventory > docs/inventory.md"


def test_the_inventorys_page_knows_every_variable_that_roles_share() -> None:
    text = "".join(
        file.read_text() for folder in ("roles", "playbooks") for file in (ROOT / folder).rglob("*.yml")
    )
    used = set(re.findall(r"(?:\{\{ ?|hostvars\[\w+\]\['|when: )(skeldir_\w+)", text))
    assert used <= SHARED.keys()
