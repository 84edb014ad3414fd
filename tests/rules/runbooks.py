"""The pages of alerts: which host each is for. Molecule's `default` and `queues` paste every block there."""

from pathlib import Path
from typing import Any

import yaml

from tests.runbooks import SECTIONS, pages, read_page

HOSTS = ("worker", "database", "exporter", "monitoring")
"""What a page's front matter may say where its commands are for."""


def alert_pages() -> list[Path]:
    """One page an alert."""
    return [path for path in pages("[A-Z]*.md") if path.stem != "README"]


def front_matter(path: Path) -> dict[str, Any]:
    """The facts at a page's top."""
    found: dict[str, Any] = yaml.safe_load(path.read_text().split("---\n")[1])
    return found


def unexecuted_blocks() -> list[str]:
    """Pages that the test on lab hosts could not run as they stand, a sentence each."""
    found = []
    for path in alert_pages():
        facts = front_matter(path)
        try:
            page = read_page(path)
        except ValueError as error:
            found.append(str(error))
            continue
        if facts.get("host") not in HOSTS:
            found.append(f"{path.name} is for no host that tests have: {facts.get('host')}")
        if facts.get("alert") != path.stem:
            found.append(f"{path.name} says it is of the alert {facts.get('alert')}")
        if page.sections != SECTIONS:
            found.append(f"{path.name} has the sections {', '.join(page.sections)}")
        for section in ("Diagnosis", "Mitigation", "Verify recovered"):
            if not any(block.section == section for block in page.blocks):
                found.append(f"{path.name} has no command under {section}")
        if any(block.section not in SECTIONS[2:5] for block in page.blocks):
            found.append(f"{path.name} has a command that no section leads to")
    return found
