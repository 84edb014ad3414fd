"""Add up the test reports of a run: what failed, then one line with how many passed and failed."""

import argparse
import sys
from pathlib import Path
from xml.etree import ElementTree

EXPECTED = Path(__file__).with_name("expected-tests")
"""How many tests a full run executes at least."""
FAILED_BEFORE = "failed before"
"""Property of a test that failed and was tried again: the first line of what it said (see conftest.py)."""


def main() -> int:
    """Print the closing line; a status other than 0 when anything failed or too little was run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evidence", type=Path, help="the folder with junit-*.xml")
    parser.add_argument("--stages-failed", type=int, default=0, help="stages that failed, tests or not")
    parser.add_argument("--any-number", action="store_true", help="don't expect the full number of tests")
    arguments = parser.parse_args()

    outcomes: dict[tuple[str, str | None, str | None], str] = {}
    for report in sorted(
        arguments.evidence.glob("junit-*.xml")
    ):  # junit-real2.xml comes after junit-real.xml
        for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 - pytest wrote it just now
            test = (report.stem.rstrip("2"), case.get("classname"), case.get("name"))
            name = f"{case.get('classname')}::{case.get('name')} ({report.name})"
            trouble = [*case.findall("failure"), *case.findall("error")]
            again = case.find(f"properties/property[@name='{FAILED_BEFORE}']")
            if trouble:
                outcomes[test] = "failed"
                said = trouble[0].get("message", "").partition("\n")[0]
                print(f"FAILED {name}: {said[:300]}")
            elif case.find("skipped") is not None:
                outcomes[test] = "skipped"
            else:
                if outcomes.get(test) == "failed":
                    print(f"  but passed when tried again: {name}")
                elif again is not None and outcomes.get(test) == "passed":
                    print(f"passed only when tried again: {name}: {again.get('value', '')[:300]}")
                outcomes[test] = "passed"
    passed, failed, skipped = (
        list(outcomes.values()).count(outcome) for outcome in ("passed", "failed", "skipped")
    )
    if skipped:
        print(f"{skipped} tests were skipped.")
    if arguments.stages_failed:
        print(f"{arguments.stages_failed} stages failed; see FAILED above.")
    missing = 0 if arguments.any_number else max(0, int(EXPECTED.read_text()) - passed - failed)
    if missing:
        print(f"{missing} of the expected tests did not run.")
    # A failed lint, or a test that never ran, is a failure for whoever reads only this line.
    failed = max(failed + missing, arguments.stages_failed)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
