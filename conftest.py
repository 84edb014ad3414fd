"""A failure that another try hid stays in the report."""

from collections.abc import Generator

import pytest

from scripts.count_tests import FAILED_BEFORE


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note what a test failed with."""
    report = yield
    if report.failed and call.excinfo:
        item.user_properties.append((FAILED_BEFORE, call.excinfo.exconly().partition("\n")[0]))
    return report
