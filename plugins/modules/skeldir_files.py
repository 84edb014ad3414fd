#!/usr/bin/python3
"""The module `skeldir_files`: files and folders of a host, all of them in one call."""

import os
import shlex
import stat
import tempfile
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: skeldir_files
short_description: Several small files and folders in one call
description:
  - Does for a list what M(ansible.builtin.copy) with O(ansible.builtin.copy#module:content) and
    M(ansible.builtin.file) do for one file each.
  - Those take five connections a file to find that nothing is to be done; a run that changes nothing
    consists of little else.
  - Nothing is written when a folder is where a file is wanted, or the other way round.
  - Can also say what keeps the service that reads them from running with them as they are now.
options:
  files:
    description: In this order, so a folder goes before what is in it.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Where it is.
        type: path
        required: true
      content:
        description: What a file holds; without it and O(files[].secret) this is a folder.
        type: str
      secret:
        description: What a file holds, where that is never to be shown, in a diff or elsewhere.
        type: str
      owner:
        description: Whose it is.
        type: str
        default: root
      group:
        description: Whose it is, too.
        type: str
        default: root
      mode:
        description: Who may do what with it.
        type: raw
        required: true
      validate:
        description: A command that must find a new content good, with C(%s) for the file it is tried in.
        type: str
  unit:
    description: The service that reads the files.
    type: str
  read:
    description: More paths that the service reads; those of O(files) need not be among them.
    type: list
    elements: path
    default: []
"""

EXAMPLES = """
- skeldir_files:
    files:
      - {path: /etc/skeldir, mode: "0755"}
      - path: /etc/skeldir/beat.env
        content: "{{ lookup('ansible.builtin.template', 'beat.env.j2') }}"
        mode: "0644"
"""

RETURN = """
files:
  description: The paths that changed.
  type: list
  returned: always
lacks:
  description:
    - Why the service does not run with its files, or would not after a boot, a few words each.
    - A process tells since when it runs; a file that is younger was never read by it. So a run that was
      interrupted between file and restart is healed by the next one.
  type: list
  returned: with O(unit)
"""

_FILE = {
    "path": {"type": "path", "required": True},
    "content": {"type": "str"},
    "secret": {"type": "str", "no_log": True},
    "owner": {"type": "str", "default": "root"},
    "group": {"type": "str", "default": "root"},
    "mode": {"type": "raw", "required": True},
    "validate": {"type": "str"},
}


def main() -> None:
    """Run as Ansible runs a module."""
    module = AnsibleModule(
        argument_spec={
            "files": {"type": "list", "elements": "dict", "required": True, "options": _FILE},
            "unit": {"type": "str"},
            "read": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    os.umask(0o077)  # what is new is nobody else's until it has its mode
    wanted = module.params["files"]
    for file in wanted:
        file["shown"] = file["secret"] is None
        file["content"] = file["content"] if file["shown"] else file["secret"]
    if wrong := [sentence for file in wanted if (sentence := _in_the_way(file))]:
        module.fail_json(msg="; ".join(wrong))
    diffs: list[dict[str, Any]] = []
    changed = [file["path"] for file in wanted if _make(module, file, diffs)]
    answer = {"changed": bool(changed), "files": changed, "diff": diffs}
    if unit := module.params["unit"]:
        answer["lacks"] = _lacks(
            module,
            unit,
            [file["path"] for file in wanted if file["content"] is not None] + module.params["read"],
        )
    module.exit_json(**answer)


def _lacks(module: AnsibleModule, unit: str, paths: list[str]) -> list[str]:
    """Why the service does not run with these files."""
    command = ["systemctl", "show", "--property=MainPID,LoadState,UnitFileState", unit]
    shown = module.run_command(command, check_rc=True)[1]
    state = dict(line.split("=", 1) for line in shown.splitlines())
    if state["LoadState"] == "not-found":
        return ["there is no such unit"]
    lacks = [] if state["UnitFileState"] == "enabled" else ["it isn't enabled"]
    since = _began(state["MainPID"])
    if since is None:
        return [*lacks, "it doesn't run"]
    # Within a second of it nobody can tell which was first.
    younger = [path for path in paths if os.path.lexists(path) and os.lstat(path).st_mtime > since + 1]
    return lacks + [f"{path} is younger than its process" for path in younger]


def _began(process: str) -> float | None:
    """When a process began, as seconds since 1970; proc(5)."""
    try:
        with open(f"/proc/{process}/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
    except FileNotFoundError:
        return None
    with open("/proc/uptime") as file:
        up = float(file.read().split()[0])
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


def _in_the_way(file: dict[str, Any]) -> str | None:
    path = file["path"]
    if file["content"] is None:
        is_other = os.path.lexists(path) and not os.path.isdir(path)
        return f"{path} is to be a folder, and something else is there" if is_other else None
    is_other = os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode)
    return f"{path} is to be a file, and something else is there" if is_other else None


def _make(module: AnsibleModule, file: dict[str, Any], diffs: list[dict[str, Any]]) -> bool:
    """Let it be as it should be; whether it was not."""
    path, content = file["path"], file["content"]
    diff: dict[str, Any] = {}
    changed = _make_folder(module, path) if content is None else _write(module, file, diff)
    if diff:
        diffs.append(diff)
    attributes: dict[str, Any] = {}
    changed = module.set_fs_attributes_if_different(
        module.load_file_common_arguments(file), changed, diff=attributes
    )
    if attributes.get("before") != attributes.get("after"):
        diffs.append(attributes)
    return bool(changed)


def _make_folder(module: AnsibleModule, path: str) -> bool:
    if os.path.isdir(path):
        return False
    if not module.check_mode:
        os.mkdir(path)
    return True


def _write(module: AnsibleModule, wanted: dict[str, Any], diff: dict[str, Any]) -> bool:
    path, content = wanted["path"], wanted["content"]
    new = content.encode()
    try:
        with open(path, "rb") as file:
            old = file.read()
    except FileNotFoundError:
        old = None
    if old == new:
        return False
    if wanted["shown"]:
        diff.update(before=(old or b"").decode(errors="replace"), after=content)
    else:
        diff.update(before="" if old is None else "what it held\n", after="a secret\n")
    diff.update(before_header=path, after_header=path)
    if not module.check_mode:
        handle, temporary = tempfile.mkstemp(dir=module.tmpdir)
        with open(handle, "wb") as file:
            file.write(new)
        if wanted["validate"]:
            _try(module, wanted["validate"], path, temporary)
        module.atomic_move(temporary, path)
    return True


def _try(module: AnsibleModule, command: str, path: str, temporary: str) -> None:
    words = [word.replace("%s", temporary) for word in shlex.split(command)]
    status, out, err = module.run_command(words)
    if status:
        module.fail_json(
            msg=f"{path} stays as it was, {words[0]} refuses the new one: {(err or out).strip()}"
        )


if __name__ == "__main__":
    main()
