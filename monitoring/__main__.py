"""`python -m monitoring COMMAND`: build and prove rules, dashboards and runbooks."""

import argparse
import json
import sys
from pathlib import Path

import yaml

from app.core.topology import TopologyError, load_topology
from monitoring import deployed


def _rules(arguments: argparse.Namespace) -> int:
    try:
        sheet = load_topology(overrides=json.loads(arguments.overrides))
    except TopologyError as error:
        sys.exit(str(error))
    found = deployed.rules(sheet, arguments.time_scale, arguments.runbook_url, arguments.dashboard_url)
    print(yaml.safe_dump(found, sort_keys=False, width=1000), end="")
    return 0


def _routes(arguments: argparse.Namespace) -> int:
    print(yaml.safe_dump(deployed.routes(arguments.time_scale), sort_keys=False), end="")
    return 0


def _dashboards(arguments: argparse.Namespace) -> int:
    from monitoring import dashboards  # noqa: PLC0415 - it takes a second, and a deployment needs none of it

    if not arguments.check:
        dashboards.write()
    elif stale := dashboards.stale():
        sys.exit(
            f"{', '.join(stale)}: not what app/top/panels.py says; run `python -m monitoring dashboards`"
        )
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from monitoring import check  # noqa: PLC0415 - as above

    findings = check.check()
    for found in findings.values():
        for problem in found:
            print(problem)
    for name, found in findings.items():
        print(f"{name}: {len(found)}")
    return int(any(findings.values()))


def _pasted(arguments: argparse.Namespace) -> int:
    from tests.runbooks import never_pasted  # noqa: PLC0415 - tests own the runner

    try:
        found = never_pasted(arguments.record)
    except OSError as error:
        sys.exit(f"no record of what was pasted: {error}; ./plane test leaves one")
    for problem in found:
        print(problem)
    print(f"commands of runbooks that nobody pasted: {len(found)}")
    return int(bool(found))


def main() -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m monitoring", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("rules", help="print an environment's rule file")
    command.add_argument("--overrides", default="{}", help="the inventory's skeldir_queue_overrides, as JSON")
    command.add_argument("--time-scale", type=float, default=1, help="divides every duration, for drills")
    command.add_argument("--runbook-url", default="https://runbooks.example")
    command.add_argument("--dashboard-url", default="https://grafana.example")
    command.set_defaults(run=_rules)
    command = commands.add_parser("routes", help="print Alertmanager's routes")
    command.add_argument("--time-scale", type=float, default=1, help="divides every duration, for drills")
    command.set_defaults(run=_routes)
    command = commands.add_parser("dashboards", help="write grafana/dashboards/")
    command.add_argument("--check", action="store_true", help="write nothing; fail when something is stale")
    command.set_defaults(run=_dashboards)
    command = commands.add_parser("check", help="prove all of it, and print four numbers that must be 0")
    command.set_defaults(run=_check)
    command = commands.add_parser("pasted", help="say which commands of runbooks a run of the tests left out")
    command.add_argument("record", type=Path, help="evidence/pasted.txt")
    command.set_defaults(run=_pasted)
    arguments = parser.parse_args()
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
