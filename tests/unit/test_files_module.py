"""The module `skeldir_files`, run as Ansible runs it: a process that gets its arguments as JSON."""

import grp
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODULE = Path(__file__).parents[2] / "plugins/modules/skeldir_files.py"
MINE = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}


def run(*files: dict[str, Any], **how: Any) -> dict[str, Any]:
    """Its answer to a list of files, each this test's own."""
    wanted = [{**MINE, **file, "path": str(file["path"])} for file in files]
    arguments = {"ANSIBLE_MODULE_ARGS": {"files": wanted, **{f"_ansible_{k}": v for k, v in how.items()}}}
    done = subprocess.run(
        [sys.executable, MODULE], input=json.dumps(arguments), capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture
def wanted(tmp_path: Path) -> list[dict[str, Any]]:
    """A folder, and a file in it."""
    folder = tmp_path / "etc"
    return [
        {"path": folder, "mode": "0750"},
        {"path": folder / "secret", "content": "über\n", "mode": "0600"},
    ]


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_makes_what_is_not_there_and_then_changes_nothing(tmp_path: Path, wanted: list[Any]) -> None:
    folder, file = tmp_path / "etc", tmp_path / "etc/secret"
    assert run(*wanted)["files"] == [str(folder), str(file)]
    assert (mode(folder), mode(file), file.read_text()) == (0o750, 0o600, "über\n")
    again = run(*wanted)
    assert (again["changed"], again["files"]) == (False, [])


@pytest.mark.parametrize("what", ["content", "mode", "mode of the folder"])
def test_mends_what_drifted_and_nothing_else(tmp_path: Path, wanted: list[Any], what: str) -> None:
    folder, file = tmp_path / "etc", tmp_path / "etc/secret"
    run(*wanted)
    match what:
        case "content":
            file.write_text("other\n")
        case "mode":
            file.chmod(0o666)
        case _:
            folder.chmod(0o777)
    answer = run(*wanted)
    assert answer["files"] == [str(folder if "folder" in what else file)]
    assert (mode(folder), mode(file), file.read_text()) == (0o750, 0o600, "über\n")


def test_a_dry_run_says_what_it_would_do_and_does_not(tmp_path: Path, wanted: list[Any]) -> None:
    answer = run(*wanted, check_mode=True, diff=True)
    assert len(answer["files"]) == 2
    assert "über\n" in [diff.get("after") for diff in answer["diff"]]
    assert not (tmp_path / "etc").exists()


@pytest.mark.parametrize("before", ["", "of last year"])
def test_a_secret_is_written_and_shown_nowhere(tmp_path: Path, before: str) -> None:
    file = tmp_path / "file"
    file.write_text(before)
    answer = run({"path": file, "secret": "of this year", "mode": "0600"}, diff=True)
    assert (answer["files"], file.read_text()) == ([str(file)], "of this year")
    assert "year" not in json.dumps(answer)


@pytest.mark.parametrize("wrong", ["a folder", "a link"])
def test_writes_nothing_when_something_else_is_in_the_way(
    tmp_path: Path, wanted: list[Any], wrong: str
) -> None:
    other = tmp_path / "other"
    if wrong == "a folder":
        other.mkdir()
    else:
        other.symlink_to(tmp_path)
    answer = run(*wanted, {"path": other, "content": "", "mode": "0644"})
    assert answer["failed"]
    assert str(other) in answer["msg"]
    assert not (tmp_path / "etc").exists()


def test_what_is_refused_is_not_put_in_place(tmp_path: Path) -> None:
    file = {"path": tmp_path / "file", "mode": "0644", "validate": "grep -q good %s"}
    assert run({**file, "content": "good\n"})["changed"]
    refused = run({**file, "content": "bad\n"})
    assert refused["failed"]
    assert str(tmp_path / "file") in refused["msg"]
    assert (tmp_path / "file").read_text() == "good\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
