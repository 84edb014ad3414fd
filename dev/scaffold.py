"""`skeldir new queue` and `skeldir new task`: the sheet's entry, the module, its test and the README's row.

Everything is made and checked before the first file is written, and taken back when the plane refuses it.
"""

import ast
import keyword
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from app.core.topology import Queue, Topology, TopologyError, legal_queue_name, load_topology
from dev import ROOT
from dev.server import BIN

SHEET = Path("app/topology.yml")
README = Path("README.md")
REGENERATE = "ansible-playbook -i inventory/single playbooks/compose.yml"
FIRST_TASK = "example"

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_LAST_PORT = 65_535

_QUEUE = """
  {queue}:
    exchange: {queue}
    routing_key: {queue}
    tasks:
      - {task}
    metrics_port: {port}
    concurrency: 1
    prefetch: 1
    soft_time_limit: 60
    time_limit: 90
    delivery_limit: 3
    retry: {{max_retries: 3, backoff: 2, backoff_max: 120}}
"""
_TASK = '''

@shared_task
def {name}() -> dict[str, str]:
    """Say that it was done: put the work here."""
    return {{"status": "done"}}
'''
_TASK_TEST = """

def test_{name}() -> None:
    assert {module}.{name}() == {{"status": "done"}}
"""
_TENANT_TASK = '''

@shared_task
@tenant_task
def {name}(tenant_id: UUID) -> dict[str, str]:
    """Say for whom it was done: put the work here."""
    # `with get_session(tenant_id) as session:` sees this tenant's rows and no others.
    return {{"tenant_id": str(tenant_id)}}
'''
_TENANT_TASK_TEST = """

def test_{name}_works_for_a_tenant_and_for_nobody_else() -> None:
    tenant = uuid4()
    assert {module}.{name}(tenant_id=tenant) == {{"tenant_id": str(tenant)}}
    with pytest.raises(TenantRequired):
        {module}.{name}(tenant_id=None)
"""
_IMPORTS = {
    "shared_task": "from celery import shared_task",
    "tenant_task": "from app.tasks.context import tenant_task",
    "UUID": "from uuid import UUID",
    "uuid4": "from uuid import uuid4",
    "pytest": "import pytest",
    "TenantRequired": "from app.db.session import TenantRequired",
}


class Refused(Exception):  # noqa: N818 - it is what becomes of the request
    """It can't be made so; a sentence that says why and what to do. Nothing was changed."""


def new_queue(name: str, root: Path = ROOT) -> list[Path]:
    """Add a queue with one task, `example`.

    Returns:
        The files that were written, in the checkout.

    Raises:
        Refused: nothing was changed.
    """
    try:
        legal_queue_name(name)
    except ValueError as error:
        raise Refused(f"{name!r} {error}.") from None
    sheet = _sheet(root)
    if name in sheet.queues:
        raise Refused(f"There is a queue {name} in {SHEET} already: choose another name.")
    module = _module(name)
    if keyword.iskeyword(module):
        raise Refused(f"{name} is a word of Python, so no module can have it as its name: choose another.")
    for path in (_code(module), _test(module)):
        if (root / path).exists():
            raise Refused(f"{path} is there already: choose another name than {name}, or remove the file.")
    task = f"app.tasks.{module}.{FIRST_TASK}"
    entry = _QUEUE.format(queue=name, task=task, port=_free_port(sheet))
    written = {SHEET: (root / SHEET).read_text().rstrip("\n") + "\n" + entry}
    queue = _added(written[SHEET], name, {*sheet.queue_by_task, task}).queues[name]
    written |= _module_and_test(root, name, FIRST_TASK, tenant=False)
    written |= _readme(root, sheet, queue)
    return _write(root, written)


def new_task(queue: str, name: str, *, tenant: bool, root: Path = ROOT) -> list[Path]:
    """Add a task to a queue.

    Args:
        queue: the queue's name.
        name: the function's name; the task is `app.tasks.QUEUE.NAME`.
        tenant: it works for one tenant.
        root: the checkout.

    Returns:
        The files that were written, in the checkout.

    Raises:
        Refused: nothing was changed.
    """
    sheet = _sheet(root)
    if queue not in sheet.queues:
        raise Refused(f"There is no queue {queue} in {SHEET}, which has {', '.join(sheet.queues)}.")
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise Refused(
            f"{name!r} can't be a task's name: use lower-case letters, digits and '_', a letter first, and no"
            " word of Python."
        )
    task = f"app.tasks.{_module(queue)}.{name}"
    if task in sheet.queue_by_task:
        raise Refused(
            f"The queue {sheet.queue_by_task[task].name} carries {task} already: choose another name."
        )
    lines = (root / SHEET).read_text().split("\n")
    lines.insert(_after_last_task(lines, queue), f"      - {task}")
    written = {SHEET: "\n".join(lines)}
    _added(written[SHEET], queue, {*sheet.queue_by_task, task})
    written |= _module_and_test(root, queue, name, tenant=tenant)
    written |= _readme(root, sheet, sheet.queues[queue], name)
    return _write(root, written)


def regenerate(root: Path = ROOT) -> bool:
    """Make what compose.yaml has of the sheet anew; whether that worked."""
    command: list[str | Path] = [BIN / "ansible-playbook", *REGENERATE.split()[1:]]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.returncode == 0


def _sheet(root: Path) -> Topology:
    try:
        return load_topology(root / SHEET)
    except TopologyError as error:
        raise Refused(f"The sheet must be right before anything is added to it.\n{error}") from error


def _module(queue: str) -> str:
    return queue.replace("-", "_")


def _code(module: str) -> Path:
    return Path("app/tasks", f"{module}.py")


def _test(module: str) -> Path:
    return Path("tests/unit", f"test_{module}_tasks.py")


def _free_port(sheet: Topology) -> int:
    """The one behind the last port of the sheet."""
    taken = [queue.metrics_port for queue in sheet.queues.values()]
    taken += [service.port for service in (sheet.exporter, sheet.beat) if service]
    if max(taken) == _LAST_PORT:
        raise Refused(f"No port is left behind {_LAST_PORT}: add the queue to {SHEET} by hand.")
    return max(taken) + 1


def _added(text: str, queue: str, tasks: set[str]) -> Topology:
    """The new sheet, when it is right and has exactly the tasks that are expected."""
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        file.write(text)
        file.flush()
        try:
            sheet = load_topology(Path(file.name))
        except TopologyError as error:
            reasons = "\n".join(error.problems)
            raise Refused(f"That can't be in {SHEET}: {reasons}") from error
    if set(sheet.queue_by_task) != tasks or queue not in sheet.queues:
        raise Refused(f"{SHEET} isn't written as this command knows it: add the entry by hand.")
    return sheet


def _after_last_task(lines: list[str], queue: str) -> int:
    """Where the list of a queue's tasks ends."""
    found, inside = 0, False
    for number, line in enumerate(lines):
        if re.match(r"  \S", line) or re.match(r"\S", line):
            inside = line.split("#")[0].strip() in (f"{queue}:", f'"{queue}":')
        elif inside and re.match(r"      - \S", line):
            found = number + 1
        elif inside and found and re.match(r"    [^\s#]", line):
            break
    if not found:
        raise Refused(f"{SHEET} isn't written as this command knows it: add the task by hand.")
    return found


def _module_and_test(root: Path, queue: str, name: str, *, tenant: bool) -> dict[Path, str]:
    module = _module(queue)
    body, test = (_TENANT_TASK, _TENANT_TASK_TEST) if tenant else (_TASK, _TASK_TEST)
    needs = {"shared_task", "tenant_task", "UUID"} if tenant else {"shared_task"}
    return {
        _code(module): _extended(
            _code(module), body.format(name=name), needs, root=root, name=name, queue=queue
        ),
        _test(module): _extended(
            _test(module),
            test.format(name=name, module=module),
            {module, *(("uuid4", "pytest", "TenantRequired") if tenant else ())},
            root=root,
            name=re.findall(r"def (\S+)\(", test)[0].format(name=name),
            queue=queue,
        ),
    }


def _extended(path: Path, body: str, needs: set[str], *, root: Path, name: str, queue: str) -> str:
    """A module with more in it, and with the imports which that needs."""
    file = root / path
    text = file.read_text() if file.exists() else f'"""The tasks of the queue `{queue}`."""\n'
    tree = ast.parse(text)
    known = _names(tree)
    if name in known | needs:
        raise Refused(f"{path} has something of the name {name} already: choose another.")
    imports = [_IMPORTS.get(need, f"from app.tasks import {need}") for need in sorted(needs - known)]
    if imports:
        lines = text.split("\n")
        first = next((n.lineno - 1 for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)), None)
        docstring = ast.get_docstring(tree, clean=False) is not None
        here = first if first is not None else (tree.body[0].end_lineno or 0) if docstring else 0
        lines[here:here] = [*([] if first is not None else [""]), *imports]
        text = "\n".join(lines)
    return _tidy(root, path, text.rstrip("\n") + "\n" + body)


def _names(tree: ast.Module) -> set[str]:
    """What a module has at its top."""
    found = set()
    for node in tree.body:
        match node:
            case ast.Import(names) | ast.ImportFrom(names=names):
                found |= {alias.asname or alias.name.split(".")[0] for alias in names}
            case ast.FunctionDef(name) | ast.ClassDef(name):
                found.add(name)
            case ast.Assign(targets):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id)):
                found.add(id)
    return found


def _tidy(root: Path, path: Path, text: str) -> str:
    """The same with its imports in order, as the project's linter wants it."""
    for words in (["check", "--fix", "--quiet", "--select", "I"], ["format", "--quiet"]):
        done = subprocess.run(
            [BIN / "ruff", *words, "--stdin-filename", path, "-"],
            cwd=root,
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Refused(f"ruff can't read what {path} would be: {done.stderr.strip()}")
        text = done.stdout
    return text


def _readme(root: Path, sheet: Topology, queue: Queue, task: str | None = None) -> dict[Path, str]:
    """The table of the queues, where the README still has it."""
    lines = (root / README).read_text().split("\n")
    rows = {
        name: n for n, line in enumerate(lines) for name in sheet.queues if line.startswith(f"| `{name}` |")
    }
    if task is None and rows:
        row = f"| `{queue.name}` | {', '.join(f'`{name}`' for name in queue.tasks)} | {queue.metrics_port} |"
        lines.insert(max(rows.values()) + 1, row)
    elif task is not None and queue.name in rows:
        cells = lines[rows[queue.name]].split(" | ")
        cells[1] += f", `.{task}`"
        lines[rows[queue.name]] = " | ".join(cells)
    return {README: "\n".join(lines)}


def _write(root: Path, written: dict[Path, str]) -> list[Path]:
    """Write it all, and take it back when code and sheet don't fit."""
    before = {path: (root / path).read_text() if (root / path).exists() else None for path in written}
    for path, text in written.items():
        (root / path).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", "from app.cli import main; main()", "topology", "check"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        for path, old in before.items():
            if old is None:
                (root / path).unlink()
            else:
                (root / path).write_text(old)
        raise Refused(f"The plane would not start with it, so nothing was changed:\n{done.stderr.strip()}")
    return [path for path, old in before.items() if old != written[path]]
