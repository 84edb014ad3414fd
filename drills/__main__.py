"""`./plane drill ALERT…`: make an alert's fault on a staging plane, and work through its page.

Needs an inventory that says skeldir_drills_allowed: true (docs/monitoring.md). The exit status is 0 when
every drill came to its end.
"""

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from drills.faults import DRILLS, UNDRILLED
from drills.plane import Refused, plane_of
from drills.run import Outcome, Run
from drills.watch import Watch
from tests.rules.runbooks import alert_pages


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows under each other, the first one being their heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _listed() -> str:
    alerts = [page.stem for page in alert_pages()]
    return table(
        [
            ("alert", "drill"),
            *(
                (alert, DRILLS[alert].what if alert in DRILLS else f"- ({UNDRILLED[alert]})")
                for alert in alerts
            ),
        ]
    )


def _shown(outcomes: list[Outcome]) -> str:
    def seconds(number: float | None) -> str:
        return "-" if number is None else f"{number:.0f}"

    return table(
        [
            ("alert", "fires", "told", "to", "mended", "over", "outcome"),
            *(
                (
                    each.alert,
                    seconds(each.fired),
                    seconds(each.told),
                    each.by or "-",
                    seconds(each.mended),
                    seconds(each.over),
                    each.problem.partition("\n")[0][:90] or "ok",
                )
                for each in outcomes
            ),
        ]
    )


def main() -> int:
    """Run the drills that are named and say how each went."""
    parser = argparse.ArgumentParser(prog="./plane drill", description=__doc__)
    parser.add_argument("alerts", nargs="*", metavar="ALERT", help="whose drill; see --list")
    parser.add_argument(
        "--all", action="store_true", help="every drill, side by side where that disturbs none"
    )
    parser.add_argument("--list", action="store_true", help="what drills there are")
    parser.add_argument(
        "--inventory", "-i", type=Path, default=Path("inventory/lab"), help="the plane (inventory/lab)"
    )
    parser.add_argument("--json", type=Path, help="a file for the outcomes, as JSON")
    arguments = parser.parse_args()
    if arguments.list:
        print(_listed())
        return 0
    if unknown := set(arguments.alerts) - set(DRILLS):
        parser.error(f"there is no drill of {', '.join(sorted(unknown))}; --list shows which there are")
    if bool(arguments.alerts) == arguments.all:
        parser.error("name alerts, or say --all; --list shows which drills there are")
    wanted = {alert: drill for alert, drill in DRILLS.items() if arguments.all or alert in arguments.alerts}
    try:
        plane = plane_of(arguments.inventory)
    except Refused as refused:
        sys.exit(f"plane: {refused}")

    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", flush=True)

    watch = Watch(plane)

    def stop(*_: object) -> None:
        # What is undone now must be undone: from here on nobody is interrupted, and no child is.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        say("stopping: every fault is undone first")
        watch.stop()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        watch.wait(
            lambda look: [each for each in look.messages if each.labels["alertname"] == "Watchdog"],
            120,
            "Alertmanager tells the drills' receiver nothing of its Watchdog (see roles/drill_receiver)",
        )
    except TimeoutError as error:
        sys.exit(f"plane: {error}")
    outcomes = Run(plane, watch, say).together(wanted)
    print(f"\n{_shown(outcomes)}")
    failed = [each for each in outcomes if each.problem]
    for each in failed:
        print(f"\n{each.alert}: {each.problem}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
