"""`@tenant_task`: what a task needs that works for one tenant."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from celery import current_task

from app.db.session import parse_tenant_id
from app.observability.context import current_context, set_context, set_tenant

P = ParamSpec("P")
R = TypeVar("R")


def tenant_task(function: Callable[P, R]) -> Callable[P, R]:
    """Require `tenant_id`, hand it on as a UUID and put it into every log line of the task.

    It stands below `@shared_task`. The task opens its transactions with `get_session(tenant_id)`, which sets
    `app.current_tenant_id` for exactly those.

    Raises:
        TypeError: the function has no parameter `tenant_id`.
    """
    signature = inspect.signature(function)
    if "tenant_id" not in signature.parameters:
        raise TypeError(f"{function.__qualname__} is a tenant task, so it needs a parameter tenant_id")

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind_partial(*args, **kwargs)
        tenant_id = parse_tenant_id(bound.arguments.get("tenant_id"))
        bound.arguments["tenant_id"] = tenant_id
        before = current_context()
        set_tenant(tenant_id)
        try:
            return function(*bound.args, **bound.kwargs)
        finally:
            # In a worker the context outlives the function: the line about the outcome names the tenant too.
            if not current_task or current_task.request.called_directly:
                set_context(before)

    return run
