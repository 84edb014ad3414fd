"""The topology sheet (`app/topology.yml`), typed and checked: nothing else knows queues, tasks and ports."""

import re
from collections.abc import Hashable, Iterator, Mapping
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

DEFAULT_METRICS_PORT = 9540
"""Port of a worker that was started by hand; no queue of the sheet may take it."""

QUEUE_WAIT_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
"""Upper bounds of the histogram of queue waits, in seconds; a queue's target is one of them."""

# systemd.unit(5): an instance name must survive unescaped in a file name, a label and a Postgres identifier.
_QUEUE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_TASK_NAME = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)+")

_CLASS_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)

_Seconds = Annotated[int, Field(gt=0, strict=True)]
_Count = Annotated[int, Field(ge=1, strict=True)]
_Port = Annotated[int, Field(ge=1024, le=65535, strict=True)]
_Share = Annotated[float, Field(gt=0, lt=1)]


def _on_a_bound(seconds: float) -> float:
    if seconds not in QUEUE_WAIT_BOUNDS:
        bounds = ", ".join(f"{bound:g}" for bound in QUEUE_WAIT_BOUNDS)
        raise ValueError(
            f"{seconds:g} is no bound of the measured waits, so it can't be judged: use one of {bounds}"
        )
    return seconds


def legal_queue_name(name: str) -> str:
    """The name, if a queue may have it.

    Raises:
        ValueError: it may not; says what may stand in one.
    """
    if not _QUEUE_NAME.fullmatch(name):
        raise ValueError(
            "is not legal as the instance name of a systemd unit: "
            "use at most 40 lower-case letters, digits, '-' and '_', a letter first"
        )
    return name


_WaitTarget = Annotated[float, AfterValidator(_on_a_bound)]


class TopologyError(ValueError):
    """The sheet, an override of it or the schedule can't be used; `problems` holds one sentence each."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RetryPolicy(_Entry):
    """What is retried, and how: the wait in seconds doubles up to `backoff_max`.

    An error that is none of `transient` (full names of exception classes) is permanent at once. `jitter` is
    the
    share of each wait that is left to chance.
    """

    max_retries: Annotated[int, Field(ge=0, strict=True)]
    backoff: _Seconds
    backoff_max: _Seconds
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.5
    transient: tuple[str, ...] = (
        "builtins.ConnectionError",
        "builtins.TimeoutError",
        "sqlalchemy.exc.InterfaceError",
        "sqlalchemy.exc.OperationalError",
    )

    @field_validator("transient")
    @classmethod
    def _full_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not _CLASS_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is not the full name of an exception such as builtins.TimeoutError"
                )
        return names

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.backoff_max < self.backoff:
            raise ValueError(f"backoff_max ({self.backoff_max}) must not be below backoff ({self.backoff})")
        return self


class Queue(_Entry):
    """One queue of the sheet; times in seconds, `prefetch` in messages a child process.

    The targets are what its users may expect of it, and what its alerts are measured by: the share of jobs
    that succeed, and how long a due job may wait for a worker.
    """

    name: Annotated[str, AfterValidator(legal_queue_name)]
    exchange: str = Field(min_length=1)
    routing_key: str = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1)
    metrics_port: _Port
    concurrency: _Count
    prefetch: _Count
    soft_time_limit: _Seconds
    time_limit: _Seconds
    delivery_limit: _Count
    retry: RetryPolicy
    task_retry: dict[str, RetryPolicy] = {}
    success_target: _Share = 0.99
    queue_wait_target_seconds: _WaitTarget = 60

    @field_validator("tasks")
    @classmethod
    def _legal_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if not _TASK_NAME.fullmatch(task):
                raise ValueError(f"{task!r} is not a full task name such as app.tasks.reports.weekly")
            if tasks.count(task) > 1:
                raise ValueError(f"{task} is listed twice; remove one of the lines")
        return tasks

    @field_validator("metrics_port")
    @classmethod
    def _free_port(cls, port: int) -> int:
        if port == DEFAULT_METRICS_PORT:
            raise ValueError(f"{port} is kept for workers started by hand; choose another port")
        return port

    def retry_of(self, task: str) -> RetryPolicy:
        """The retry policy of one of its tasks: its own, or the queue's."""
        return self.task_retry.get(task, self.retry)

    @model_validator(mode="after")
    def _policies_have_a_task(self) -> Self:
        for task in self.task_retry:
            if task not in self.tasks:
                raise ValueError(
                    f"task_retry names {task}, which the queue doesn't carry; correct it or remove it"
                )
        return self

    @model_validator(mode="after")
    def _limits_agree(self) -> Self:
        if self.soft_time_limit >= self.time_limit:
            raise ValueError(
                f"soft_time_limit ({self.soft_time_limit}) must be below time_limit ({self.time_limit}), "
                "or no task could tidy up before it is killed"
            )
        return self


class _QueueOverride(_Entry):
    """What an inventory may change of a queue: numbers, never a name or a port."""

    concurrency: _Count | None = None
    prefetch: _Count | None = None
    soft_time_limit: _Seconds | None = None
    time_limit: _Seconds | None = None
    delivery_limit: _Count | None = None
    success_target: _Share | None = None
    queue_wait_target_seconds: _WaitTarget | None = None


class Exporter(_Entry):
    """The one process a plane that tells Prometheus about the database."""

    port: _Port


class Beat(_Entry):
    """The scheduler: a process on each host that may run it, one of them active."""

    port: _Port


class Topology(_Entry):
    """All queues of the sheet, by name, in the sheet's order, the exporter and the scheduler."""

    queues: dict[str, Queue] = Field(min_length=1)
    exporter: Exporter | None = None
    beat: Beat | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_the_queues(cls, sheet: Any) -> Any:
        if not isinstance(sheet, dict) or not isinstance(sheet.get("queues"), dict):
            return sheet
        queues = {
            name: entry | {"name": name} if isinstance(entry, dict) and "name" not in entry else entry
            for name, entry in sheet["queues"].items()
        }
        return sheet | {"queues": queues}

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        owners: dict[tuple[str, Hashable], str] = {}
        for queue in self.queues.values():
            claims: list[tuple[str, Hashable]] = [("metrics_port", queue.metrics_port)]
            claims += [("task", task) for task in queue.tasks]
            claims += [("exchange and routing_key", (queue.exchange, queue.routing_key))]
            for kind, value in claims:
                owner = owners.setdefault((kind, value), queue.name)
                if owner != queue.name:
                    shown = " / ".join(value) if isinstance(value, tuple) else value
                    raise ValueError(
                        f"{kind} {shown} is claimed by the queues {owner} and {queue.name}; change one"
                    )
        for name, service in (("exporter", self.exporter), ("beat", self.beat)):
            if service and (taken := owners.get(("metrics_port", service.port))):
                raise ValueError(
                    f"{name}.port {service.port} is the metrics_port of the queue {taken}; change one"
                )
        if self.exporter and self.beat and self.exporter.port == self.beat.port:
            raise ValueError(f"beat.port {self.beat.port} is the exporter's; change one")
        return self

    @cached_property
    def queue_by_task(self) -> dict[str, Queue]:
        """The queue that carries a task, by the task's full name."""
        return {task: queue for queue in self.queues.values() for task in queue.tasks}


class _SheetLoader(yaml.SafeLoader):
    """YAML's safe loader, which otherwise lets the last of two equal keys win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice; rename or remove one", node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


def load_topology(
    path: Path | None = None, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> Topology:
    """Read the sheet, apply an environment's overrides and check everything.

    Args:
        path: the sheet; without it the one that belongs to this release of the package.
        overrides: numbers by queue name, such as `{"llm": {"concurrency": 4}}`.

    Raises:
        TopologyError: with a sentence for each thing that must be changed.
    """
    source, sheet = read_sheet("topology.yml", path)
    topology = _validated(source, sheet)
    return _overridden(topology, overrides) if overrides else topology


def read_sheet(name: str, path: Path | None = None) -> tuple[str, Any]:
    """The name, for messages, and the content of a YAML file in which no key stands twice.

    Args:
        name: of the file of that name in this release of the package.
        path: another file to read in its place.

    Raises:
        TopologyError: it can't be read.
    """
    source = str(path) if path else f"app/{name}"
    try:
        text = path.read_text() if path else files("app").joinpath(name).read_text()
        return source, yaml.load(text, Loader=_SheetLoader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise TopologyError(source, [f"can't be read: {error.strerror}"]) from error
    except yaml.YAMLError as error:
        raise TopologyError(source, [f"is not valid YAML: {_yaml_problem(error)}"]) from error


def _validated(source: str, sheet: Any) -> Topology:
    try:
        return Topology.model_validate(sheet)
    except ValidationError as error:
        raise TopologyError(source, list(sentences(error))) from error


def _overridden(topology: Topology, overrides: Mapping[str, Mapping[str, Any]]) -> Topology:
    source = "skeldir_queue_overrides"
    unknown = [name for name in overrides if name not in topology.queues]
    if unknown:
        known = ", ".join(topology.queues)
        raise TopologyError(
            source,
            [f"{name}: there is no such queue in app/topology.yml, which has {known}" for name in unknown],
        )
    sheet = topology.model_dump(mode="json")
    for name, numbers in overrides.items():
        try:
            checked = _QueueOverride.model_validate(numbers)
        except ValidationError as error:
            raise TopologyError(source, [f"{name}.{sentence}" for sentence in sentences(error)]) from error
        sheet["queues"][name] |= checked.model_dump(exclude_none=True)
    return _validated(source, sheet)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error)


def sentences(error: ValidationError) -> Iterator[str]:
    """One sentence a problem: the entry, what is wrong with it and what was found there."""
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        match problem["type"]:
            case "extra_forbidden":
                yield f"{where}: is not a known key; correct its spelling or remove it"
            case "missing":
                yield f"{where}: is missing; add it"
            case "value_error":
                message = str(problem["ctx"]["error"])
                yield f"{where}: {message}" if where else message
            case _:
                yield f"{where or 'the sheet'}: {problem['msg']} (found {problem['input']!r})"
