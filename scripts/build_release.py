#!/usr/bin/env python3
"""Build a release of the application: one archive that a host installs without any network.

A release's id is the version and a hash over everything that goes into it, so it is known without
building (`--describe`) and an archive that exists is never built again. An archive is for one
Python and one architecture and holds the application's wheel, its locked dependencies as wheels, pip
itself, the migrations and `release.json`. Its bytes depend on its id and target alone.

`release.json` also holds a fingerprint for each queue: of its own entry in the sheet, of the modules of its
own tasks, of all that queues share and of the locks. A unit must be restarted when its fingerprint changes,
and need not be when only another queue's does. The entries themselves are there, too: on the way back to this
release, ports and limits are its own, whatever the checkout says by then.

Where packages come from is pip's own configuration (`pip.conf`, `PIP_*`).
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from app.core.topology import Topology, TopologyError, load_topology  # noqa: E402 - this checkout's own

PIP_TIMEOUT = 900
"""Seconds for one run of pip, retries included."""

PLATFORMS = ("manylinux_2_28", "manylinux2014", "manylinux_2_17")
"""What wheels may be built for: PEP 600 names that Debian 12's glibc (2.36) satisfies."""


class BuildError(Exception):
    """The release can't be built; the message is one sentence."""


def sources() -> Iterator[Path]:
    """Every file that goes into a release, sorted, relative to the project."""
    files = [Path(name) for name in ("README.md", "LICENSE", "pyproject.toml", "alembic.ini")]
    files += [Path("requirements/app.txt"), Path("requirements/tools.txt"), Path("scripts/build_release.py")]
    for folder in ("app", "alembic"):
        files += [path.relative_to(PROJECT) for path in (PROJECT / folder).rglob("*") if path.is_file()]
    yield from sorted(path for path in files if "__pycache__" not in path.parts and (PROJECT / path).exists())


def digest(parts: Iterator[tuple[str, bytes]]) -> str:
    """A hash over names and contents, neither of which can run into the next."""
    total = hashlib.sha256()
    for name, content in parts:
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()[:12]


def queue_fingerprints(topology: Topology, files: list[Path]) -> dict[str, str]:
    """A hash by queue over what its worker runs: see this module's description."""
    module_of = {task: Path(*task.split(".")[:-1]) for task in topology.queue_by_task}

    def owners(path: Path) -> set[str]:
        """The queues whose tasks live in a file; none when queues share it."""
        return {
            topology.queue_by_task[task].name
            for task, module in module_of.items()
            if path == module.with_suffix(".py") or module in path.parents
        }

    # What the scheduler alone reads restarts no worker.
    apart = {Path("app/topology.yml"), Path("app/schedule.yml")}
    shared = [path for path in files if path.parts[0] == "app" and path not in apart]
    shared.append(Path("requirements/app.txt"))

    def parts(queue: str) -> Iterator[tuple[str, bytes]]:
        yield "entry", topology.queues[queue].model_dump_json().encode()
        for path in shared:
            if not owners(path) or queue in owners(path):
                yield str(path), (PROJECT / path).read_bytes()

    return {queue: digest(parts(queue)) for queue in topology.queues}


def describe() -> dict[str, Any]:
    """What `release.json` holds: `id`, `version`, the queues' fingerprints and their entries in the sheet."""
    files = list(sources())
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    topology = load_topology()
    content = digest((str(path), (PROJECT / path).read_bytes()) for path in files)
    return {
        "id": f"{version}-{content}",
        "version": version,
        "queues": queue_fingerprints(topology, files),
        "sheet": topology.model_dump(mode="json")["queues"],
    }


def find(identity: str, python: str, arch: str, folder: Path) -> tuple[dict[str, Any], Path]:
    """What `release.json` says in the archive of a release that was built before, and that archive."""
    archive = folder / f"skeldir-{identity}-py{python}-{arch}.tar.gz"
    if not archive.exists():
        built = sorted(path.name for path in folder.glob(f"skeldir-*-py{python}-{arch}.tar.gz"))
        raise BuildError(f"{archive.name} is not in {folder}, which has {', '.join(built) or 'no release'}")
    with tarfile.open(archive) as tar:
        member = tar.extractfile("release.json")
        if member is None:
            raise BuildError(f"{archive} holds no release.json")
        return json.load(member), archive


def locked(name: str, lock: Path) -> str:
    """One package's lines, hashes included, out of a lock file."""
    lines = lock.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"{name}=="))
    end = next(
        (number for number in range(start + 1, len(lines)) if not lines[number].startswith(" ")), len(lines)
    )
    return "\n".join(lines[start:end]) + "\n"


def run(what: str, *command: str) -> None:
    """Run one command of the build; a failure becomes one sentence with the command's own last error."""
    try:
        subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True, timeout=PIP_TIMEOUT)  # noqa: S603 - our own arguments
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{what} took more than {PIP_TIMEOUT} seconds and was given up") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        said = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        silent = "; the package index doesn't answer" if "connection broken by" in error.stderr else ""
        raise BuildError(f"{what} failed: {said.removeprefix('ERROR: ')}{silent}") from error


def download(python: str, arch: str, wheelhouse: Path, lock: Path, scratch: Path) -> None:
    """Put the locked dependencies for a target, and pip, into the wheelhouse; every hash is checked."""
    tag = "cp" + python.replace(".", "")
    pip = scratch / "pip.txt"
    pip.write_text(locked("pip", PROJECT / "requirements/tools.txt"))
    platforms = [f"--platform={platform}_{arch}" for platform in PLATFORMS]
    run(
        f"downloading the locked dependencies for Python {python} on {arch} as pip is configured",
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"),
        *("--retries=3", "--timeout=30", "--no-deps", "--require-hashes", "--only-binary=:all:"),
        *(f"--python-version={python}", "--implementation=cp"),
        *(f"--abi={tag}", "--abi=abi3", "--abi=none"),
        *platforms,
        *(f"--dest={wheelhouse}", f"--requirement={lock}", f"--requirement={pip}"),
    )


def pack(archive: Path, root: Path) -> None:
    """Write a tar.gz whose bytes depend on the files alone; it appears whole or not at all."""

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = "root"
        info.mode = 0o755 if info.isdir() else 0o644
        return info

    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=1) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in sorted(root.rglob("*")):
            tar.add(path, arcname=str(path.relative_to(root)), recursive=False, filter=anonymous)
    part = archive.with_name(f".{archive.name}.{os.getpid()}")
    part.write_bytes(buffer.getvalue())
    part.replace(archive)


def build(release: dict[str, Any], python: str, arch: str, archive: Path) -> None:
    """Build the archive of a release for one target."""
    with tempfile.TemporaryDirectory(prefix="skeldir-release-") as scratch:
        root = Path(scratch, "release")
        wheelhouse = root / "wheelhouse"
        wheelhouse.mkdir(parents=True)
        lock = PROJECT / "requirements/app.txt"
        download(python, arch, wheelhouse, lock, Path(scratch))
        run(
            "building the application's wheel",
            *(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheelhouse)),
        )
        (pip,) = wheelhouse.glob("pip-*.whl")
        pip.rename(root / "pip.whl")  # a host runs it straight from the file
        (wheel,) = wheelhouse.glob("skeldir_worker_plane-*.whl")
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        (root / "requirements.txt").write_text(
            f"skeldir-worker-plane=={release['version']} --hash=sha256:{sha256}\n{lock.read_text()}"
        )
        for path in sources():
            if path.parts[0] in ("alembic", "alembic.ini"):
                target = root / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((PROJECT / path).read_bytes())
        (root / "release.json").write_text(json.dumps(release, indent=2) + "\n")
        archive.parent.mkdir(parents=True, exist_ok=True)
        pack(archive, root)


def main() -> int:
    """Print what the release is; build its archive when it doesn't exist yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--describe", action="store_true", help="only print release.json; build nothing")
    parser.add_argument(
        "--release", help="the id of a release that was built before, instead of this checkout's"
    )
    parser.add_argument("--python", default="3.11", help="the target's Python, such as 3.11")
    parser.add_argument("--arch", default="x86_64", help="the target's architecture as uname -m says it")
    parser.add_argument("--dest", type=Path, default=PROJECT / "dist", help="the folder for archives")
    arguments = parser.parse_args()
    try:
        if arguments.release:
            release, archive = find(arguments.release, arguments.python, arguments.arch, arguments.dest)
            print(json.dumps(release | {"archive": str(archive), "built": False}))
            return 0
        release = describe()
        archive = arguments.dest / f"skeldir-{release['id']}-py{arguments.python}-{arguments.arch}.tar.gz"
        built = not arguments.describe and not archive.exists()
        if built:
            build(release, arguments.python, arguments.arch, archive)
    except (BuildError, TopologyError, OSError) as error:
        print(f"The release can't be had: {error}.", file=sys.stderr)
        return 1
    print(json.dumps(release | {"archive": str(archive), "built": built}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
