"""Checks of the plane itself."""

from typing import Any

from celery import current_task, shared_task
from sqlalchemy import text

from app.db.session import TENANT_GUC, get_session, parse_tenant_id
from app.observability.context import set_tenant


class PingFailed(RuntimeError):  # noqa: N818 - it is the name of what is wrong
    """A ping was asked to fail, to see what becomes of a failure."""


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
