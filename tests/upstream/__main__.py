"""Run kombu's or Celery's integration suite, from the released source, on a Postgres of its own.

    python -m tests.upstream kombu|celery [PYTEST ARGUMENTS…]

Takes a minute for kombu's and twenty for Celery's. What is known to fail, and why, is in
docs/celery-compatibility.md.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path

from tests.postgres import ROOT, provisioned_cluster

PLUGINS = (
    *("pytest", "pytest-timeout", "pytest-rerunfailures", "pytest-subtests", "pytest-order", "pytest-click"),
    *("pytest-celery", "pytest-freezer", "redis", "pymemcache", "django", "cryptography"),
)
FILES = {
    "kombu": ("test_postgres.py",),
    "celery": (
        *("test_tasks.py", "test_inspect.py", "test_canvas.py", "test_group_chains.py", "test_loader.py"),
        *("test_worker.py", "test_connection_recovery.py", "test_security.py"),
    ),
}


def main(name: str, arguments: list[str]) -> int:
    """Fetch, install, run; returns pytest's exit status."""
    with tempfile.TemporaryDirectory(prefix=f"upstream-{name}-") as directory:
        wanted = f"{name}=={version(name)}"
        pip = [sys.executable, "-m", "pip", "--quiet"]
        subprocess.run(
            [*pip, "download", "--no-deps", "--no-binary=:all:", f"--dest={directory}", wanted], check=True
        )
        [archive] = Path(directory).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(directory, filter="data")
        suite = archive.with_name(archive.name.removesuffix(".tar.gz"))
        shutil.copy(ROOT / "tests/upstream/kombu_suite.py", suite / "t/integration/test_postgres.py")
        environment = Path(directory) / "venv"
        venv.create(environment, with_pip=False)
        install = [*pip, f"--python={environment}/bin/python", "install"]
        locked = ["--no-deps", "--require-hashes", "-r", str(ROOT / "requirements/app.txt")]
        subprocess.run([*install, *locked], check=True)
        subprocess.run([*install, *PLUGINS], check=True)
        clusters = provisioned_cluster()
        dsn = next(clusters).copy_database("skeldir", "upstream").dsn()
        try:
            return subprocess.run(
                [
                    *(f"{environment}/bin/python", "-m", "pytest", "-p", "tests.upstream.plugin"),
                    *("-p", "no:cacheprovider", "-o", "addopts=", "-o", "python_classes=test_* Test*"),
                    *("--timeout=90", "-q", *(f"t/integration/{file}" for file in FILES[name]), *arguments),
                ],
                cwd=suite,
                env={
                    **os.environ,
                    "PATH": f"{environment}/bin:{os.environ['PATH']}",
                    "PYTHONPATH": str(ROOT),
                    "DATABASE_URL": dsn,
                    "TEST_BROKER": f"sqla+{dsn}",
                    "TEST_BACKEND": f"db+{dsn}",
                },
                check=False,
            ).returncode
        finally:
            clusters.close()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in FILES:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
