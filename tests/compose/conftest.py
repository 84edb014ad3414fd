"""compose.yaml brought up as a user does, under a name, ports and secrets of its own."""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = f"skeldir-compose-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:6]}"
CA = Path("/etc/ssl/certs/ca-certificates.crt")


def out(*command: str, timeout: float = 60, env: dict[str, str] | None = None) -> str:
    """What a command printed; its own words when it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def wait_until(true: Callable[[], bool], seconds: float, what: str) -> float:
    """Ask twice a second; how long it took."""
    began = monotonic()
    while not true():
        assert monotonic() - began < seconds, f"{what}: not within {seconds} s"
        sleep(0.5)
    return monotonic() - began


class Compose:
    """A project of compose.yaml."""

    def __init__(self, folder: Path) -> None:
        self.secrets = folder / "secrets"
        self.override = folder / "override.yaml"
        self.env = os.environ | {
            "SKELDIR_SECRETS": str(self.secrets),
            "SKELDIR_IMAGE": f"{PROJECT}-plane",
            "SKELDIR_DATABASE_IMAGE": f"{PROJECT}-database",
            **{f"{name.upper()}_IMAGE": f"{PROJECT}-{name}" for name in STAND_INS},
            # Any free ones
            "PROMETHEUS_PORT": "0",
            "ALERTMANAGER_PORT": "0",
        }

    def command(self, *arguments: str) -> list[str]:
        program = os.environ.get("SKELDIR_COMPOSE", "docker compose").split()
        return [*program, "-p", PROJECT, "-f", "compose.yaml", "-f", str(self.override), *arguments]

    def __call__(self, *arguments: str, timeout: float = 60) -> str:
        return out(*self.command(*arguments), timeout=timeout, env=self.env)

    def as_the_page_says(self, timeout: float) -> None:
        """Run the commands at the beginning of docs/compose.md."""
        page = (ROOT / "docs/compose.md").read_text()
        commands = page.partition("```sh\n")[2].partition("```")[0]
        project = {"COMPOSE_PROJECT_NAME": PROJECT, "COMPOSE_FILE": f"compose.yaml:{self.override}"}
        engine = 'docker() { shift; ${SKELDIR_COMPOSE:-command docker compose} "$@"; }\n'
        out("bash", "-euc", engine + commands, timeout=timeout, env=self.env | project)

    def skeldir(self, *arguments: str) -> str:
        return self("run", "--rm", "--no-TTY", "--no-deps", "skeldir", *arguments)

    def inspect(self, service: str) -> dict[str, Any]:
        """What Docker knows of a service's container."""
        container = self("ps", "--all", "--quiet", service).strip()
        inspected: list[dict[str, Any]] = json.loads(out("docker", "inspect", container))
        return inspected[0]

    def health(self, service: str) -> str:
        state = self.inspect(service)["State"]
        return str(state["Health"]["Status"]) if state["Running"] else "down"

    def address(self, service: str, port: int) -> str:
        return "http://" + self("port", service, str(port)).strip()


STAND_INS = ("python", "postgres", "prometheus", "alertmanager")


def build_stand_ins() -> None:
    """Images of the names that compose.yaml's variables get here, from Debian's packages."""
    (ROOT / ".lab").mkdir(exist_ok=True)
    with (ROOT / ".lab/images").open("a") as file:  # `./plane down` removes these
        file.writelines(f"{PROJECT}-{name}\n" for name in (*STAND_INS, "plane", "database"))
    base = out("lab/build-image", "bookworm", timeout=400).split()[-1]
    for name in STAND_INS:
        options = (f"--build-arg=BASE={base}", f"--target={name}", f"--tag={PROJECT}-{name}")
        out("docker", "build", *options, "tests/compose/images", timeout=300)


def names_files_of_this_machine(value: str) -> bool:
    """Whether one of pip's settings means files that aren't there in the build, as its certificates are."""
    return any(word.startswith(("/", "file:")) and word != str(CA) for word in value.split())


def lend_the_build(folder: Path, override: Path) -> None:
    """Lend the build what this machine's pip is configured with, and its certificates."""
    listed = out("python", "-m", "pip", "config", "list")
    given = dict(line.split("=", 1) for line in listed.splitlines())
    pip = ConfigParser(interpolation=None)
    pip["global"] = {
        key.rpartition(".")[2]: value.strip("'")
        for key, value in given.items()
        if not names_files_of_this_machine(value.strip("'"))
    }
    with (folder / "pip.conf").open("w") as file:
        pip.write(file)
    (folder / "ca.crt").write_bytes(CA.read_bytes() if CA.exists() else b"")
    names = ["pip.conf", "ca.crt"]
    override.write_text(
        yaml.safe_dump(
            {
                "services": {service: {"build": {"secrets": names}} for service in ("database", "migrate")},
                "secrets": {name: {"file": str(folder / name)} for name in names},
            }
        )
    )


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """The plane, up and healthy; afterwards nothing of it is left, whatever a test did."""
    folder = tmp_path_factory.mktemp("compose")
    compose = Compose(folder)
    lend_the_build(folder, compose.override)
    build_stand_ins()
    compose("down", "--volumes", "--remove-orphans")
    try:
        compose.as_the_page_says(timeout=500)
        yield compose
    except BaseException:
        print(compose("ps", "--all"), compose("logs", "--no-color", "--tail=50"))
        raise
    finally:
        compose("down", "--volumes", "--remove-orphans", "--timeout=10", timeout=120)
