"""Add up the test reports of a run and close it with one line: how many passed, how many failed."""

import argparse
import sys
from pathlib import Path
from xml.etree import ElementTree

EXPECTED = Path(__file__).with_name("expected-tests")


def count(reports: list[Path]) -> tuple[int, int, int]:
    """Tests that passed, failed and were skipped, over JUnit files."""
    total = failed = skipped = 0
    for report in reports:
        for suite in ElementTree.parse(report).iter("testsuite"):  # noqa: S314 - pytest wrote it just now
            total += int(suite.get("tests", 0))
            failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped += int(suite.get("skipped", 0))
    return total - failed - skipped, failed, skipped


def main() -> int:
    """Print the closing line; a status other than 0 when anything failed or too little was run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evidence", type=Path, help="the folder with junit-*.xml")
    parser.add_argument("--stages-failed", type=int, default=0, help="stages that failed, tests or not")
    parser.add_argument("--any-number", action="store_true", help="don't expect the full number of tests")
    arguments = parser.parse_args()
    passed, failed, skipped = count(sorted(arguments.evidence.glob("junit-*.xml")))
    if arguments.stages_failed:
        print(f"{arguments.stages_failed} stages failed; see FAILED above.")
    expected = int(EXPECTED.read_text())
    missing = max(0, expected - passed - failed) if not arguments.any_number else 0
    if missing:
        print(f"Only {passed + failed} tests ran where at least {expected} were expected.")
    # A failed lint, or a test that never ran, is a failure for whoever reads only this line.
    failed = max(failed + missing, arguments.stages_failed)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
