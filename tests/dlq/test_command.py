"""`skeldir dlq` as an operator types it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.core.config import get_settings
from app.db.session import get_engine
from app.dlq.classify import Failure
from app.dlq.command import dlq_cli
from tests.dlq.plane import TENANT_A, Plane, payload

EVIL = "\x1b[2Jpwned [bold red]x[/] :smile: \u202eabc"


class Terminal:
    """Types commands as one role."""

    def __init__(self, plane: Plane, role: str = "app_rw") -> None:
        self.plane = plane
        self.role = role

    def type(self, *words: str, fails: bool = False, **environment: str) -> str:
        get_settings.cache_clear()
        get_engine.cache_clear()
        variables = {"DATABASE_URL": self.plane.database.dsn(self.role), "USER": "maria", "LOGNAME": "maria"}
        done = CliRunner().invoke(dlq_cli, words, env=variables | {"COLUMNS": "300"} | environment)
        if get_engine.cache_info().currsize:
            get_engine().dispose()
        assert (done.exit_code != 0) == fails, done.output
        assert not done.exception or isinstance(done.exception, SystemExit), done.exception
        assert "\x1b" not in done.output
        return done.output if fails else done.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self.type(*words, "--json"))


@pytest.fixture(scope="module")
def plane(shared_plane: Plane) -> Plane:
    """One database: each test has its own rows."""
    return shared_plane


@pytest.fixture
def terminal(plane: Plane) -> Terminal:
    return Terminal(plane)


def test_from_what_failed_to_what_succeeded(plane: Plane, terminal: Terminal, tmp_path: Path) -> None:
    """The way through a burst: groups, one row, a dry run, the replay, its progress."""
    rows = [
        plane.fail(
            payload(tenant_id=TENANT_A, email="a@b.example"),
            Failure.of("permanent", "KeyError", f"no user {n} {EVIL}"),
        )
        for n in range(3)
    ]
    [group] = terminal.json("groups", "--error-type", "KeyError")
    assert (group["count"], group["tenants"]) == (3, 1)
    assert group["fingerprint"] in terminal.type("groups")
    listed = terminal.type("list", "--group", group["fingerprint"])
    assert all(str(row) in listed for row in rows)
    assert "\\x1b[2Jpwned [bold red]x[/] :smile: \\u202eabc" in listed
    shown = terminal.type("show", str(rows[0]))
    assert "a@b.example" not in shown
    assert "[hidden]" in shown
    assert "a@b.example" in terminal.type("show", str(rows[0]), "--reveal")
    assert "a@b.example" not in json.dumps(terminal.json("show", str(rows[0])))

    [planned] = terminal.json("replay", "--group", group["fingerprint"], "--dry-run", "--limit", "2")
    assert (planned["eligible"], planned["refused"]) == (2, {"beyond the limit": 1})
    assert plane.messages() == []
    assert "--reason" in terminal.type("replay", "--group", group["fingerprint"], fails=True)
    [now] = terminal.json(
        "replay", "--group", group["fingerprint"], "--limit", "2", "--reason", "fixed in 1.2"
    )
    assert (now["state"], now["total"], now["in_flight"]) == ("done", 2, 2)
    assert plane.succeed() == 2
    assert "2 succeeded" in terminal.type("replay", "--progress", str(now["id"]))
    assert terminal.json("replay", "--history")[0]["id"] == now["id"]

    terminal.type("note", str(rows[2]), "--note", "ask the bank")
    terminal.type("assign", str(rows[2]), "--to", "juan")
    assert "1 ignored" in terminal.type("ignore", str(rows[2]), "--reason", "harmless", "--as", "juan")
    assert [(e["action"], e["actor"]) for e in terminal.json("show", str(rows[2]))["history"]] == [
        ("noted", "maria"),
        ("assigned", "maria"),
        ("ignored", "juan"),
    ]
    out = tmp_path / "out.jsonl"
    purged = (
        "purge",
        "--state",
        "resolved",
        "--state",
        "ignored",
        "--reason",
        "over",
        "--export",
        str(out),
        "--yes",
    )
    assert "3 purged" in terminal.type(*purged)
    assert out.stat().st_mode & 0o777 == 0o600
    assert "3 imported" in terminal.type("import", str(out), "--reason", "looked too early")
    assert "already" in terminal.type("import", str(out), "--reason", "again")
    assert "can't be written" in terminal.type(*purged, fails=True)
    assert "resolved" in terminal.type("stats")


def test_an_edited_message(plane: Plane, terminal: Terminal, tmp_path: Path) -> None:
    row = plane.fail(payload(args=[1]), Failure.of("permanent", "TypeError", "m"))
    new = tmp_path / "new.json"
    new.write_text('{"args": [2]}')
    words = ("replay", str(row), "--message", str(new), "--reason", "typo")
    assert "right of its own" in terminal.type(*words, fails=True)
    plane.database.rows("GRANT EXECUTE ON FUNCTION celery_task_failure_edit TO app_rw; SELECT 1")
    terminal.type(*words)
    assert "[2]" in terminal.type("show", str(row), "--json").replace("\n", "").replace(" ", "")
    plane.succeed()
    row = plane.fail(payload(args=[1]), Failure.of("permanent", "TypeError", "m"))
    editor = f"cp {new}"  # the editor's argument is where the message is
    terminal.type("replay", str(row), "--edit", "--reason", "typo", EDITOR=editor)
    assert len(plane.messages()) == 1
    plane.succeed()


def test_pages_and_both_ends_of_an_empty_list(plane: Plane, terminal: Terminal) -> None:
    rows = [plane.fail(failure=Failure.of("timeout", "Paged", "m")) for _ in range(3)]
    assert "No dead letters." in terminal.type("list", "--error-type", "Nothing")
    assert f"--before {rows[1]}" in terminal.type("list", "--error-type", "Paged", "--limit", "2")
    assert [
        row["id"] for row in terminal.json("list", "--error-type", "Paged", "--before", str(rows[1]))
    ] == [rows[0]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "99999"), "no dead letter 99999"),
        (("replay", "--reason", "r"), "--all"),
        (("replay", "--error-type", "Nope", "--reason", "r"), "none of these"),
        (("replay", "1", "--to", "nowhere", "--reason", "r"), "no queue nowhere"),
        (("replay", "--resume", "99999"), "no replay 99999"),
        (("ignore", "--reason", "r"), "every dead letter"),
        (("ignore", "1", "--reason", " "), "reason"),
        (("note", "--note", "n"), "every dead letter"),
        (("purge", "--reason", "r", "--without-export", "--yes"), "open"),
        (("purge", "--state", "ignored", "--reason", "r"), "--export"),
        (("list", "--since", "yesterday"), "neither an age"),
        (("list", "--class", "bad"), "bad"),
        (("list", "--tenant", "x"), "x"),
        (("list", "0"), "greater"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_sentence(
    plane: Plane, terminal: Terminal, words: tuple[str, ...], said: str
) -> None:
    plane.fail()
    assert said in terminal.type(*words, fails=True)


def test_without_a_database_it_says_what_to_do() -> None:
    done = subprocess.run(
        [Path(sys.prefix) / "bin" / "skeldir", "dlq", "list"],
        env={"PATH": os.environ["PATH"], "DATABASE_URL": "postgresql://app_rw:hunter2@127.0.0.1:1/skeldir"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "can't be used" in done.stderr
    assert "hunter2" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_reader_counts_and_reads_no_more(plane: Plane) -> None:
    plane.fail()
    reader = Terminal(plane, "app_ro")
    assert reader.json("stats")
    for words in (("list",), ("groups",), ("show", "1"), ("ignore", "1", "--reason", "r")):
        assert "may not" in reader.type(*words, fails=True)
