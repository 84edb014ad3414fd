"""The staging plane of an inventory: which host is what, and commands for root on them."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testinfra.host import Host
from testinfra.utils.ansible_runner import get_ansible_config, get_ansible_host

# What is asked of every host: how it is reached, as Ansible's own variables say, and where things are.
_CONNECTION = (
    *("connection", "host", "port", "user", "private_key_file"),
    *("ssh_private_key_file", "ssh_common_args", "ssh_extra_args"),
)
_OWN = {
    "allowed": "skeldir_drills_allowed | default(false)",
    "time_scale": "skeldir_time_scale | default(1)",
    "groups": "group_names",
    "home": "app_home | default('/opt/skeldir')",
    "prometheus": (
        "(prometheus_listen_address | default('127.0.0.1')) ~ ':' ~ (prometheus_port | default(9090))"
    ),
    "alertmanager": (
        "(alertmanager_listen_address | default('127.0.0.1')) ~ ':' ~ (alertmanager_port | default(9093))"
    ),
    "receiver": "'127.0.0.1:' ~ (drill_receiver_port | default(9095))",
}
PLACES = {"worker": "workers", "exporter": "workers", "database": "database", "monitoring": "monitoring"}
"""Where a page's commands are for, and the group whose first host that is. `workers` is all of its group."""


class Refused(Exception):  # noqa: N818 - what happened
    """No drill begins, and nothing was changed; the message says why."""


@dataclass
class Plane:
    """Hosts by place, and what the inventory says of them."""

    hosts: dict[str, Host]
    groups: dict[str, list[str]]
    facts: dict[str, Any]
    """What the inventory says of the monitoring host."""

    def run(self, place: str, script: str) -> tuple[int, str]:
        """Run a script in bash as root; its exit status, and what it printed on both outputs."""
        return self._run(self.groups[PLACES[place]][0], script)

    def do(self, place: str, script: str) -> str:
        """Run a script that must succeed, with `workers` on each of them.

        Raises:
            RuntimeError: it ended with another status than 0.
        """
        names = self.groups["workers"] if place == "workers" else self.groups[PLACES[place]][:1]
        said = ""
        for name in names:
            status, output = self._run(name, f"export SKELDIR_HOME={self.facts['home']}\n{script}")
            if status:
                raise RuntimeError(f"on {name} a script ended with {status}: {output[-2000:]}{script}")
            said += output
        return said

    def _run(self, name: str, script: str) -> tuple[int, str]:
        # Not from the home of who signed in, which others may not enter: psql says so each time.
        done = self.hosts[name].run("bash -c %s", f"cd / && exec 2>&1\n{script}")
        return done.rc, done.stdout


def plane_of(inventory: Path) -> Plane:
    """The plane of an inventory that says of itself that drills may be made there.

    Raises:
        Refused: it says no such thing, can't be read, or has nothing that watches.
    """
    hostvars = _hostvars(inventory)
    if not hostvars:
        raise Refused(f"{inventory} names no host")
    if strangers := [name for name, facts in hostvars.items() if facts["allowed"] is not True]:
        raise Refused(
            f"{inventory} is not marked as a staging plane: drills stop and kill what runs there. Where that "
            f"is wanted set skeldir_drills_allowed: true (it is missing for {', '.join(strangers)})."
        )
    groups = {
        group: [name for name, facts in hostvars.items() if group in facts["groups"]]
        for group in PLACES.values()
    }
    if empty := [group for group, names in groups.items() if not names]:
        raise Refused(
            f"{inventory} has no host in the group {', '.join(empty)}, so no drill can be made there"
        )
    config = get_ansible_config()
    inventory_of = {"_meta": {"hostvars": hostvars}, "all": {"hosts": list(hostvars)}}
    hosts: dict[str, Host] = {}
    for name in {name for names in groups.values() for name in names}:
        host = get_ansible_host(config, inventory_of, name)
        if host is None:
            raise Refused(f"drills can't use the connection {hostvars[name]['ansible_connection']} of {name}")
        hosts[name] = host
    return Plane(hosts, groups, hostvars[groups["monitoring"][0]])


def _hostvars(inventory: Path) -> dict[str, dict[str, Any]]:
    wanted = {f"ansible_{name}": f"ansible_{name} | default('')" for name in _CONNECTION} | _OWN
    message = ", ".join(f"'{name}': {expression}" for name, expression in wanted.items())
    # Not `all`: Ansible takes whatever lies in an inventory's folder for names of hosts.
    command = [
        "ansible",
        ":".join(sorted(set(PLACES.values()))),
        f"--inventory={inventory}",
        "--module-name=ansible.builtin.debug",
    ]
    done = subprocess.run(
        [
            Path(sys.executable).with_name(command[0]),
            *command[1:],
            f"--args={json.dumps({'msg': f'{{{{ {{{message}}} }}}}'})}",
        ],
        env=os.environ | {"ANSIBLE_CALLBACK_RESULT_FORMAT": "json", "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Refused(f"{inventory} can't be read: {(done.stdout + done.stderr)[-2000:]}")
    found = {}
    for match in re.finditer(r"^(\S+) \| SUCCESS => ", done.stdout, re.MULTILINE):
        facts = json.JSONDecoder().raw_decode(done.stdout, match.end())[0]["msg"]
        facts["ansible_connection"] = facts["ansible_connection"] or "ssh"
        facts["ansible_host"] = facts["ansible_host"] or match[1]
        # The playbooks say `become` themselves. Everything is done as root.
        root = {"local": os.geteuid() == 0, "ssh": facts["ansible_user"] == "root"}
        facts["ansible_become"] = not root.get(facts["ansible_connection"], True)
        found[match[1]] = {name: value for name, value in facts.items() if value != ""}
    return found
