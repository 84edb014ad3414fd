"""As much of PromQL as is needed to know which series an expression reads."""

import re

from monitoring.recordings import name_of

_MATCHERS = re.compile(r"([a-zA-Z_:][\w:]*)?\s*\{([^{}]*)\}")
_EQUAL = re.compile(r'(\w+)\s*=\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_NAME = re.compile(r"(?<![\w.$:])([a-zA-Z_:][\w:]*)\b(?!\s*\()")
_WORDS = frozenset(
    ("and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "group_left", "group_right")
)

Selector = tuple[str, tuple[tuple[str, str], ...]]
"""A metric's name, and the labels whose values are given."""


def selectors(expression: str) -> set[Selector]:
    """What an expression reads."""
    found = {
        (match[1], tuple(sorted(_EQUAL.findall(match[2]))))
        for match in _MATCHERS.finditer(expression)
        if match[1]
    }
    rest = _MATCHERS.sub(" ", expression)
    rest = re.sub(r'"[^"]*"|\[[^\]]*\]', " ", rest)
    rest = re.sub(r"\boffset\s+\w+", " ", rest)
    rest = _GROUPING.sub(" ", rest)
    return found | {(name, ()) for name in _NAME.findall(rest) if name not in _WORDS}


def reads(selector: Selector, series: str) -> bool:
    """Whether a selector finds a series that is written as `name{label="value",…}`."""
    name, labels = selector
    return name_of(series) == name and all(f'{label}="{value}"' in series for label, value in labels)
