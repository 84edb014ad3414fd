"""What an expression is said to read."""

import pytest

from app.top.panels import filled_in
from monitoring.promql import reads, selectors


@pytest.mark.parametrize(
    ("expression", "read"),
    [
        ("sum by (queue) (rate(a_total[5m])) / b", {"a_total", "b"}),
        ('up{job="node"} == 0 or absent(up{job="x"})', {"up"}),
        ("a:b:c > on (queue) group_left (port) 14.4 * (1 - d:e)", {"a:b:c", "d:e"}),
        ('label_replace(a, "port", "$1", "instance", ".*:([0-9]+)")', {"a"}),
        ("a > 1e6 and on (table) time() - b > 3600 unless c offset 5m", {"a", "b", "c"}),
        ("vector(1)", set()),
    ],
)
def test_names(expression: str, read: set[str]) -> None:
    assert {name for name, _ in selectors(expression)} == read


def test_a_label_that_no_series_has_is_seen() -> None:
    (selector,) = selectors('a_total{kind="hard", queue=~"x"}')
    assert reads(selector, 'a_total{kind="hard",queue="llm"}')
    assert not reads(selector, 'a_total{kind="soft",queue="llm"}')
    assert not reads(selector, 'b_total{kind="hard",queue="llm"}')


def test_variables_are_filled_in() -> None:
    assert filled_in('rate(a{queue=~"$queue"}[$__rate_interval])', "5m") == 'rate(a{queue=~".*"}[5m])'
