"""docs/inventory.md, made from the roles' argument specs: `python -m dev.inventory > docs/inventory.md`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dev import ROOT

_TOP = """\
# What an inventory may say

<!-- Made from the roles' argument specs: `python -m dev.inventory > docs/inventory.md`. A test compares. -->

An inventory names hosts in three groups and says what differs from the defaults. `database` holds one host,
`workers` any number, `monitoring` one or none; a group `beat` names the hosts that may run the scheduler,
if not the first two workers. [`inventory/production`](../inventory/production) is an example to copy,
[sizing.md](sizing.md) says what numbers to choose.

What must fit together (queues and who serves them, secrets, ports, connections) is checked before any host is
changed; types and choices are checked where each role begins.

## What several roles read

| variable | of | is |
| --- | --- | --- |
"""
SHARED = {
    "skeldir_address": (
        "a host",
        "where other hosts reach it; default, the address of its IPv4 default route",
    ),
    "skeldir_queues": ("a worker host", "the queues it serves, a list; default, all of the sheet"),
    "skeldir_database_host": ("all", "needed: the address under which workers reach the database"),
    "skeldir_database_port": ("all", "its port; default 5432"),
    "skeldir_database_name": ("all", "the database's name; default `skeldir`"),
    "skeldir_database_options": (
        "all",
        "libpq's options, as in a URL; default `sslmode=verify-full` with the plane's own authority",
    ),
    "skeldir_secrets": (
        "all",
        "needed: passwords of at least 16 characters for `app_owner`, `app_user`, `app_rw` and `app_ro`,"
        " best in a vault; `grafana_admin` where there is Grafana",
    ),
    "skeldir_secrets_next": ("all", "the same, new, while `playbooks/rotate.yml` puts them in place"),
    "skeldir_secrets_folder": (
        "all",
        "where Ansible keeps passwords that it makes itself; default `.secrets` in the inventory's folder",
    ),
    "skeldir_login_suffix": ("nowhere", "what `playbooks/rotate.yml` adds to the database roles' names"),
    "skeldir_queue_overrides": (
        "all",
        'numbers of this environment by queue, such as `{"llm": {"concurrency": 4}}`: `concurrency`,'
        " `prefetch`, `soft_time_limit`, `time_limit`, `delivery_limit`, `success_target`,"
        " `queue_wait_target_seconds`",
    ),
    "skeldir_drills_allowed": ("all", "true on a staging plane, whose alerts may be drilled; default false"),
    "skeldir_time_scale": ("all", "how much sooner alerts ring, on a staging plane alone; default 1"),
}
"""Variables that more than one role reads; argument specs know only a role's own."""


def page() -> str:
    """The whole page."""
    rows = [f"| `{name}` | {of} | {what} |" for name, (of, what) in SHARED.items()]
    return _TOP + "\n".join(rows) + "\n" + "".join(_section(role) for role in _roles())


def _roles() -> Iterator[Path]:
    yield from sorted(path.parents[1] for path in ROOT.glob("roles/*/meta/argument_specs.yml"))


def _section(role: Path) -> str:
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    main = specs["main"]
    options = main.get("options") or {}
    if not options:
        return ""
    file = role / "defaults/main.yml"
    defaults = (yaml.safe_load(file.read_text()) if file.exists() else None) or {}
    lines = [
        f"\n## `{role.name}`: {main['short_description']}\n",
        "| variable | type | default | is |",
        "| --- | --- | --- | --- |",
        *_rows(options, defaults, ""),
    ]
    return "\n".join(lines) + "\n"


def _rows(options: dict[str, Any], defaults: dict[str, Any], above: str) -> Iterator[str]:
    for name, option in options.items():
        description = option["description"]
        said = " ".join(description) if isinstance(description, list) else description
        if choices := option.get("choices"):
            said += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
        cells = [
            f"`{above}{name}`",
            _type(option),
            _default(name, option, defaults),
            said.replace("|", "\\|"),
        ]
        yield f"| {' | '.join(' '.join(cell.split()) for cell in cells)} |"
        yield from _rows(option.get("options") or {}, {}, f"{above}{name}.")


def _type(option: dict[str, Any]) -> str:
    kind: str = option["type"]
    return f"{kind} of {option['elements']}" if "elements" in option else kind


def _default(name: str, option: dict[str, Any], defaults: dict[str, Any]) -> str:
    if option.get("required"):
        return "needed"
    value = option.get("default", defaults.get(name))
    if value is None or value in ("", {}, []) or "{{" in str(value):
        return ""
    shown = value if isinstance(value, str) else json.dumps(value)
    return f"`{shown}`" if len(shown) <= 60 else "see the role"


if __name__ == "__main__":
    print(page(), end="")
