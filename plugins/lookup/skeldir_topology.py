"""The lookup `skeldir_topology`: the queues of this checkout's app/topology.yml."""

import json
import sys
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: skeldir_topology
short_description: The queues of app/topology.yml, typed and checked
description:
  - Returns the mapping of queue names to their entries, with the inventory's overrides applied.
  - With the term C(exporter) or C(beat) it returns the exporter's or the scheduler's entry.
  - The sheet is the one of the checkout this plugin lies in; no host and no fact is needed.
options:
  _terms:
    description: The part of the sheet, C(queues), C(exporter) or C(beat).
    type: list
    elements: str
    default: [queues]
  overrides:
    description: Numbers by queue name.
    type: dict
    default: {}
  only:
    description: Names of the queues to return; empty for all.
    type: list
    elements: str
    default: []
  problems:
    description: Return what is wrong with sheet, overrides and schedule, a sentence each, instead of a part.
    type: bool
    default: false
"""

EXAMPLES = """
- ansible.builtin.debug:
    msg: "{{ lookup('skeldir_topology', overrides=skeldir_queue_overrides).llm.metrics_port }}"
"""

RETURN = """
_raw:
  description: One mapping of queue names to entries, or with O(problems) a list of sentences.
  type: list
"""

_PROJECT = Path(__file__).resolve().parents[2]


class LookupModule(LookupBase):  # type: ignore[misc]
    """Reads the sheet by the application's own loader, so that both can't disagree."""

    def run(self, terms: list[Any], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[Any]:
        """Return `[queues]`, or the list of problems when asked for it."""
        self.set_options(var_options=variables, direct=kwargs)
        # Ansible's values carry tags; the loader is given plain ones.
        overrides = json.loads(json.dumps(self.get_option("overrides")))
        if str(_PROJECT) not in sys.path:
            sys.path.insert(0, str(_PROJECT))
        try:
            from app.core.topology import TopologyError, load_topology  # noqa: PLC0415 - needs the path above
        except ImportError as error:
            raise AnsibleError(
                f"the sheet can't be read: {error}; install requirements/tools.txt beside Ansible"
            ) from error
        try:
            topology = load_topology(overrides=overrides)
            if self.get_option("problems"):
                # It brings Celery along, and every task that asks for the sheet would wait for that.
                from app.beat.schedule import load_schedule  # noqa: PLC0415

                load_schedule(topology)
        except TopologyError as error:
            if self.get_option("problems"):
                return str(error).splitlines()
            raise AnsibleError(str(error)) from error
        if self.get_option("problems"):
            return []
        sheet = topology.model_dump(mode="json")
        if only := self.get_option("only"):
            sheet["queues"] = {name: entry for name, entry in sheet["queues"].items() if name in only}
        return [sheet[part] for part in terms or ["queues"]]
