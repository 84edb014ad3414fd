"""The operator's command: sentences, tables, JSON, and exit statuses that scripts can tell apart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.core.topology import load_topology

SKELDIR = Path(sys.prefix) / "bin" / "skeldir"
DATABASE_URL = "postgresql://nobody:geheim@127.0.0.1:1/nowhere"


def skeldir(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SKELDIR, *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_sheet_is_checked_without_a_configuration() -> None:
    done = skeldir("topology", "check")
    assert done.returncode == 0, done.stderr


def test_the_sheet_is_shown_as_json_with_overrides() -> None:
    done = skeldir("topology", "show", "--json", "--overrides", '{"llm": {"concurrency": 9}}')
    shown = json.loads(done.stdout)
    assert shown["queues"].keys() == load_topology().queues.keys()
    assert shown["queues"]["llm"]["concurrency"] == 9


def test_the_sheet_is_shown_as_this_host_has_it(tmp_path: Path) -> None:
    (tmp_path / "skeldir_queue_overrides").write_text('{"llm": {"concurrency": 9}}')
    done = skeldir("topology", "show", "--json", CREDENTIALS_DIRECTORY=str(tmp_path))
    assert json.loads(done.stdout)["queues"]["llm"]["concurrency"] == 9


def test_the_sheet_is_shown_as_a_table_that_cuts_nothing() -> None:
    done = skeldir("topology", "show")
    for queue in load_topology().queues.values():
        assert all(word in done.stdout for word in (queue.name, str(queue.metrics_port), *queue.tasks))


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "named"),
    [
        (["topology", "check", "--overrides", '{"nope": {}}'], {}, 78, "nope"),
        (["topology", "check", "--overrides", "nope"], {}, 2, "JSON"),
        (["topology", "check", "--overrides", "[]"], {}, 2, "--overrides"),
        (["topology", "show"], {"SKELDIR_QUEUE_OVERRIDES": "nope"}, 78, "SKELDIR_QUEUE_OVERRIDES"),
        (["nope"], {}, 2, "nope"),
        (["worker", "nope"], {"DATABASE_URL": DATABASE_URL}, 78, "nope"),
        (["worker", "llm"], {}, 78, "DATABASE_URL"),
        (["worker", "llm"], {"DATABASE_URL": "mysql://u:geheim@h"}, 78, "DATABASE_URL"),
        (
            ["worker", "llm"],
            {"DATABASE_URL": DATABASE_URL, "SKELDIR_QUEUE_OVERRIDES": '{"nope": {}}'},
            78,
            "nope",
        ),
        (["ping", "--queue", "nope"], {"DATABASE_URL": DATABASE_URL}, 2, "nope"),
        (["ping"], {}, 78, "DATABASE_URL"),
        (["ping"], {"DATABASE_URL": DATABASE_URL}, 1, "database"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    arguments: list[str], environment: dict[str, str], status: int, named: str
) -> None:
    done = skeldir(*arguments, **environment)
    assert done.returncode == status, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert "geheim" not in done.stdout + done.stderr
    assert done.stdout == ""
