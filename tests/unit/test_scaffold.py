"""`skeldir new`: what is refused changes nothing, what is made fits what is there.

That the made code passes every check and runs is shown by tests/integration/test_dev.py.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from app.core.topology import load_topology
from dev.scaffold import Refused, new_queue, new_task
from tests.postgres import BIN, ROOT


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "app", tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests/unit").mkdir(parents=True)
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def everything(root: Path) -> dict[Path, str]:
    return {
        path: path.read_text()
        for path in root.rglob("*")
        if path.is_file() and not {"__pycache__", ".ruff_cache"} & set(path.parts)
    }


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("llm", "llm"),
        ("Upper", "Upper"),
        ("two words", "two words"),
        ("a/b", "a/b"),
        ("x" * 41, "x" * 41),
        ("", "unit"),
        ("class", "word of Python"),
        ("base", "app/tasks/base.py"),  # a module that carries no queue
    ],
)
def test_a_queue_that_cannot_be_is_refused(root: Path, name: str, named: str) -> None:
    before = everything(root)
    with pytest.raises(Refused, match=named):
        new_queue(name, root)
    assert everything(root) == before


@pytest.mark.parametrize(
    ("queue", "name", "named"),
    [
        ("nowhere", "weekly", "nowhere"),
        ("housekeeping", "ping", "ping"),  # carried already
        ("housekeeping", "timedelta", "timedelta"),  # what the module imports
        ("housekeeping", "Weekly", "Weekly"),
        ("housekeeping", "a-b", "a-b"),
        ("housekeeping", "import", "import"),
        ("housekeeping", "shared_task", "shared_task"),
    ],
)
def test_a_task_that_cannot_be_is_refused(root: Path, queue: str, name: str, named: str) -> None:
    before = everything(root)
    with pytest.raises(Refused, match=named):
        new_task(queue, name, tenant=False, root=root)
    assert everything(root) == before


def test_what_the_plane_would_refuse_is_taken_back(root: Path) -> None:
    (root / "app/tasks/stray.py").write_text(
        "from celery import shared_task\n\n\n@shared_task\ndef lost() -> None: ...\n"
    )
    before = everything(root)
    with pytest.raises(Refused, match="lost"):
        new_queue("bulk-mail", root)
    assert everything(root) == before


def test_what_is_made_fits_what_is_there(root: Path) -> None:
    old = (root / "app/topology.yml").read_text()
    last_port = max(queue.metrics_port for queue in load_topology().queues.values())

    new_queue("bulk-mail", root)
    assert (root / "app/topology.yml").read_text().startswith(old)  # comments and all
    new_task("llm", "summary", tenant=True, root=root)  # in a module that has the imports
    new_task("housekeeping", "weekly", tenant=True, root=root)  # in one that lacks some

    sheet = load_topology(root / "app/topology.yml")
    assert sheet.queues["bulk-mail"].metrics_port == last_port + 1
    assert {
        task: sheet.queue_by_task[task].name
        for task in sheet.queue_by_task.keys() - load_topology().queue_by_task
    } == {
        "app.tasks.bulk_mail.example": "bulk-mail",
        "app.tasks.llm.summary": "llm",
        "app.tasks.housekeeping.weekly": "housekeeping",
    }
    readme = (root / "README.md").read_text()
    assert "`app.tasks.bulk_mail.example`" in readme
    assert "`.summary`" in readme
    checked = subprocess.run(
        [BIN / "ruff", "check", "app", "tests"], cwd=root, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
