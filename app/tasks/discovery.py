"""Which tasks have code, and whether the sheet agrees."""

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules

from app import tasks
from app.core.topology import Topology


def discover(sheet: Topology) -> None:
    """Import every module of `app/tasks`, and every other module whose tasks the sheet names."""
    modules = {f"{tasks.__name__}.{module.name}" for module in iter_modules(tasks.__path__)}
    named = {task.rpartition(".")[0] for task in sheet.queue_by_task if not task.startswith("celery.")}
    for module in sorted(modules | {name for name in named if _exists(name)}):
        import_module(module)


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent doesn't exist either
        return False


def disagreements(registered: Iterable[str], sheet: Topology) -> list[str]:
    """What differs between the tasks that have code and those the sheet names, a sentence each."""
    registered = set(registered)
    own = sorted(task for task in registered if not task.startswith("celery."))
    return [
        f"The task {task} has code but no queue: add it to a queue in app/topology.yml, or remove the code."
        for task in own
        if task not in sheet.queue_by_task
    ] + [
        f"The queue {queue.name} carries the task {task}, which has no code: "
        "write it, or remove it from app/topology.yml."
        for task, queue in sheet.queue_by_task.items()
        if task not in registered
    ]
