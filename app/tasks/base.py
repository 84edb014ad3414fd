"""The base class of every task: its retry policy is the sheet's."""

import random
from importlib import import_module
from typing import Any

from celery import Task

from app.core.config import ConfigurationError
from app.core.topology import RetryPolicy


def retry_options(policy: RetryPolicy) -> dict[str, Any]:
    """A policy of the sheet as attributes of a task.

    Raises:
        ConfigurationError: an exception it names doesn't exist.
    """
    return {
        "autoretry_for": tuple(map(_exception, policy.transient)),
        "max_retries": policy.max_retries,
        "backoff": policy.backoff,
        "backoff_max": policy.backoff_max,
        "jitter": policy.jitter,
    }


def _exception(name: str) -> type[Exception]:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, Exception)):
        raise ConfigurationError(f"app/topology.yml calls {name} transient, but there is no such exception.")
    return found


class PolicyTask(Task):
    """A task whose `retry` waits as its queue's entry in the sheet says.

    `retry_options` makes Celery's annotations of it: a task author writes nothing.
    """

    abstract = True
    backoff = 1
    backoff_max = 60
    jitter = 0.5

    def retry(self, *args: Any, eta: Any = None, countdown: float | None = None, **options: Any) -> Any:
        """Try this task again later; without `eta` or `countdown` the wait doubles with every attempt."""
        if eta is None and countdown is None:
            wait = min(self.backoff * 2**self.request.retries, self.backoff_max)
            countdown = random.uniform(1 - self.jitter, 1) * wait  # noqa: S311 - apart from each other is all they must be
        return super().retry(*args, eta=eta, countdown=countdown, **options)
