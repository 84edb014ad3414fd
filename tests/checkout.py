"""The files of this checkout, as a commit of it would have them."""

import shutil
import subprocess
from pathlib import Path

from dev import ROOT


def project_files() -> list[Path]:
    """Every file that git knows or would take, where it lies."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def copy_tree(target: Path) -> Path:
    """A copy of them, to change without touching the checkout."""
    for path in project_files():
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return target
