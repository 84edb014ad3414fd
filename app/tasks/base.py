"""The base class of every task: its retry policy is the sheet's."""

import random
from typing import Any

from celery import Task


class PolicyTask(Task):
    """A task whose `retry` waits as its queue's entry in the sheet says.

    `max_retries`, `backoff` and `backoff_max` are set by annotations that are derived from the sheet.
    """

    abstract = True
    backoff = 1
    backoff_max = 60

    def retry(self, *args: Any, eta: Any = None, countdown: float | None = None, **options: Any) -> Any:
        """Try this task again later; without `eta` or `countdown` the wait doubles with every attempt."""
        if eta is None and countdown is None:
            wait = min(self.backoff * 2**self.request.retries, self.backoff_max)
            countdown = random.uniform(0.5, 1) * wait  # noqa: S311 - apart from each other is all they must be
        return super().retry(*args, eta=eta, countdown=countdown, **options)
