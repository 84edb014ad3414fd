"""Checks of the plane itself."""

from datetime import timedelta
from typing import Any

from celery import current_task, shared_task
from sqlalchemy import text

from app.db.session import TENANT_GUC, get_session, parse_tenant_id
from app.dlq.archive import tend
from app.observability.context import set_tenant


class PingFailed(RuntimeError):  # noqa: N818 - it is the name of what is wrong
    """A ping was asked to fail, to see what becomes of a failure."""


@shared_task
def tend_dead_letters(
    resolved_days: int = 30, ignored_days: int = 90, stuck_hours: int = 1
) -> dict[str, int]:
    """Delete dead letters that are over and were exported; settle replays whose outcome nobody reported.

    Args:
        resolved_days: how long a resolved one is kept.
        ignored_days: how long an ignored one is kept.
        stuck_hours: how long a replay may be under way without a message.

    Returns:
        Counts: `purged`, `not_exported` (due, and kept until they are exported), `resolved` and `returned`.
    """
    with get_session(None) as session:
        return tend(
            session,
            resolved_after=timedelta(days=resolved_days),
            ignored_after=timedelta(days=ignored_days),
            stuck_after=timedelta(hours=stuck_hours),
        )


@shared_task
def ping(fail: bool = False, tenant_id: str | None = None) -> dict[str, Any]:
    """Answer from whatever worker took it; it may be sent to any queue.

    Args:
        fail: raise `PingFailed` instead.
        tenant_id: also open a transaction as this tenant, and answer which tenant the database saw.
    """
    answer = {
        "pong": True,
        "queue": (current_task.request.delivery_info or {}).get("routing_key"),
        "worker": current_task.request.hostname,
    }
    if tenant_id is not None:
        tenant = parse_tenant_id(tenant_id)
        set_tenant(tenant)
        with get_session(tenant) as session:
            answer["tenant_id"] = session.scalar(text("SELECT current_setting(:guc)"), {"guc": TENANT_GUC})
    if fail:
        raise PingFailed("the ping was asked to fail")
    return answer
