"""Text that came from a failing job, made fit to be kept and to be shown."""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

ERROR_MESSAGE_LIMIT = 2000
"""Characters of an error message that are kept."""
TRACEBACK_LIMIT = 32_000
"""Characters of a traceback that are kept: its beginning and its end, which says what was raised."""

HIDDEN = "[hidden]"

_HIDDEN_NAME = (
    r"(?:pass(?:word|wd|phrase)?|pwd|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|authorization"
    r"|credentials?|cookie|session[_-]?id|dsn)"
)
# Every repetition has a bound: this runs on what a failing job said, and may not take longer than the job
# did.
_SECRETS = [
    (re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----.{0,8000}?(?:-----END|\Z)", re.S), HIDDEN),
    # scheme://user:password@host, also when the password holds an @
    (re.compile(r"(?P<keep>\w{1,20}://[^\s:/@]{0,100}:)\S{1,300}(?=@)"), rf"\g<keep>{HIDDEN}"),
    (re.compile(r"(?P<keep>\b(?:bearer|basic)\s{1,3})[\w.~+/=-]{6,4000}", re.I), rf"\g<keep>{HIDDEN}"),
    # password=…, "api_key": "…", --token=…
    (
        re.compile(
            rf"(?P<keep>{_HIDDEN_NAME}[\w-]{{0,30}}[\"']?\s{{0,3}}(?:=>|[=:])\s{{0,3}})"
            r"(?:\"(?:[^\"\\]|\\.){0,4000}\"|'(?:[^'\\]|\\.){0,4000}'|[^\s,;&)}\]]{1,4000})",
            re.I,
        ),
        rf"\g<keep>{HIDDEN}",
    ),
    (re.compile(r"\b(?:sk|pk|ghp|gho|xox[abp]|AKIA)[-_]?[A-Za-z0-9_-]{16,200}"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,2000}\.[\w-]{8,4000}\.[\w-]{0,2000}"), HIDDEN),  # a JSON web token
]
# One of these is in whatever the pattern of the same place finds.
_HINTS = [
    ("private key",),
    ("://",),
    ("bearer", "basic"),
    ("pass", "pwd", "secret", "token", "key", "authorization", "credential", "cookie", "session", "dsn"),
    ("sk", "pk", "ghp", "gho", "xox", "akia"),
    ("eyj",),
]
_PERSONAL = re.compile(
    rf"{_HIDDEN_NAME}|e[_-]?mail|phone|mobile|(?:first|last|full|sur|user|maiden)[_-]?name|^name$|address"
    r"|street|birth|ssn|passport|iban|card|account[_-]?n|tax[_-]?id|ip[_-]?addr",
    re.I,
)


def storable(text: str) -> str:
    """The text without what a text column can't hold: NUL and lone surrogates."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def without_secrets(text: str) -> str:
    """The text with what looks like a password, a key or a token cut out."""
    lower = text.lower()
    for hints, (pattern, replacement) in zip(_HINTS, _SECRETS, strict=True):
        if any(hint in lower for hint in hints):  # most texts have none, and looking for these is much faster
            text = pattern.sub(replacement, text)
    return text


def cut(text: str, limit: int, total: int | None = None) -> str:
    """At most `limit` characters, and where something is missing it says how much.

    Args:
        text: what is cut.
        limit: in characters.
        total: how long it was, when its middle is missing already.
    """
    if len(text) <= limit:
        return text
    room, total = limit - 60, total or len(text)
    head = room // 3
    return f"{text[:head]}\n[… {total - room:,} of {total:,} characters cut …]\n{text[-(room - head) :]}"


def kept(text: str, limit: int) -> str:
    """What is stored of a text of a failing job."""
    # Only the ends are looked at, so that no pattern has to run over megabytes.
    ends = text if len(text) <= 4 * limit else text[: 2 * limit] + text[-2 * limit :]
    return cut(without_secrets(storable(ends)), limit, len(text))


def printable(text: str) -> str:
    r"""The text with everything that could act on a terminal made visible; line breaks and tabs stay.

    Escape sequences, other control characters and what reverses or hides text (bidirectional and zero-width
    characters) become `\x1b` and the like.
    """
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def redacted(value: Any) -> Any:
    """A copy of decoded JSON with values hidden by the name they stand under, at any depth."""
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if _PERSONAL.search(str(key)) and item is not None else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [redacted(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value
