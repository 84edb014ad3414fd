"""The pages of alerts without a drill for what watches, pasted on the lab hosts."""

from pathlib import Path

import pytest
from testinfra.host import Host

from tests.rules.pasting import pages_for, work_through


@pytest.mark.parametrize("path", pages_for("exporter", "monitoring"), ids=lambda path: path.stem)
def test_a_page_can_be_worked_through(worker: Host, database: Host, path: Path) -> None:
    work_through(path, worker, database)
