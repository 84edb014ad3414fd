"""The service `migrate`: runs what the role `schema` would run on a host, chosen by its own pending.py.

Migrations of the branch `contract` take away what workers of the release before still use, and those run
while this does: they wait until SKELDIR_CONTRACT is `true`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Compare, say what waits, upgrade."""
    pending = Path(__file__).with_name("pending.py")
    compared = subprocess.run(  # noqa: S603 - nothing of it comes from outside
        [sys.executable, "-I", pending], stdout=subprocess.PIPE, text=True, check=False
    )
    if compared.returncode:
        sys.exit(compared.returncode)  # it said why
    found = json.loads(compared.stdout)
    everything = os.environ.get("SKELDIR_CONTRACT", "").lower() == "true"
    if found["unknown"]:
        print(
            f"The database has {', '.join(found['unknown'])}, which this release doesn't know;"
            " a later release made it, and it stays."
        )
    if found["contract"] and not everything:
        print(
            f"{', '.join(found['contract'])} would take away what the release before uses, and waits:"
            " once all services run this release, SKELDIR_CONTRACT=true docker compose run --rm migrate."
        )
    targets: list[str] = []
    if everything and found["pending"] + found["contract"]:
        targets = ["heads"]
    elif found["pending"]:
        targets = found["targets"]
    for target in targets:
        alembic = Path(sys.executable).with_name("alembic")
        upgraded = subprocess.run([alembic, "upgrade", target], check=False)  # noqa: S603 - as above
        if upgraded.returncode:
            sys.exit(upgraded.returncode)


if __name__ == "__main__":
    main()
