"""Who this work is for: the correlation id and the tenant id of the current task or request."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

CORRELATION_HEADER = "skeldir_correlation_id"
"""Message header from publisher to task to sub-task. (Celery's own `correlation_id` is the task's id.)"""

PUBLISHED_HEADER = "skeldir_published_at"
"""Message header: when it was published, in seconds since 1970; missing when it isn't to be run at once."""


@dataclass(frozen=True)
class Context:
    """What log lines and published messages say about the current work."""

    correlation_id: str | None = None
    tenant_id: UUID | None = None


_current: ContextVar[Context] = ContextVar("skeldir_context", default=Context())  # noqa: B039 - it is frozen


def current_context() -> Context:
    """The context of the work going on here."""
    return _current.get()


def set_context(context: Context) -> Context:
    """Replace the context; returns the one that was there, to be set again afterwards."""
    before = _current.get()
    _current.set(context)
    return before


def set_tenant(tenant_id: UUID | None) -> None:
    """The current work is for this tenant, until the context is replaced."""
    _current.set(replace(_current.get(), tenant_id=tenant_id))


@contextmanager
def correlation(correlation_id: str | None = None) -> Iterator[str]:
    """Everything published and logged in the block carries this correlation id, or a new one."""
    correlation_id = correlation_id or str(uuid4())
    before = set_context(replace(_current.get(), correlation_id=correlation_id))
    try:
        yield correlation_id
    finally:
        set_context(before)
