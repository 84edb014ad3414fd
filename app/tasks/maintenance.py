"""Care for the tenants' data: fresh views, no personal data where none belongs, nothing kept for too long."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from celery import current_app, shared_task
from sqlalchemy import Text, cast, delete, func, select

from app.broker import in_transaction
from app.db.models import Event
from app.db.session import get_session
from app.tasks.context import tenant_task

RETENTION_DAYS = 90
BATCH = 1_000

# Postgres's regular expressions, over the payload's text. They count suspects; they don't convict.
_PII = {
    "email": r"[[:alnum:]._%+-]+@[[:alnum:].-]+\.[[:alpha:]]{2,}",
    "phone": r"\+[0-9][0-9 ().-]{7,}[0-9]",
    "card": r"\m[0-9]{4}[ -]?[0-9]{4}[ -]?[0-9]{4}[ -]?[0-9]{1,7}\M",
}


@shared_task
def refresh_all_materialized_views() -> dict[str, list[str]]:
    """Refresh every materialized view of the schema; answers their names.

    Only its owner may refresh a view, and workers own nothing: the database function called here acts as the
    owner.
    """
    with get_session(None) as session:
        return {"refreshed": list(session.scalars(select(func.refresh_all_materialized_views())))}


@shared_task
def enqueue_for_every_tenant(task: str) -> dict[str, int]:
    """Enqueue a task for each tenant there is, with its `tenant_id`: for all of them, or for none.

    Args:
        task: full name of a task that takes a tenant's id and nothing else.
    """
    with get_session(None) as session, in_transaction(session):
        tenants = session.scalars(select(func.tenant_ids())).all()
        for tenant in tenants:
            current_app.send_task(task, kwargs={"tenant_id": str(tenant)})
    return {"enqueued": len(tenants)}


@shared_task
@tenant_task
def scan_for_pii_contamination(tenant_id: UUID) -> dict[str, Any]:
    """Count the tenant's events whose payload looks as if it held personal data, by kind; never shows any."""
    payload = cast(Event.payload, Text)
    suspects = [
        func.count().filter(payload.regexp_match(pattern)).label(kind) for kind, pattern in _PII.items()
    ]
    with get_session(tenant_id) as session:
        events = select(func.count().label("scanned"), *suspects).where(Event.tenant_id == tenant_id)
        counts = dict(session.execute(events).mappings().one())
    return {"scanned": counts.pop("scanned"), "suspects": counts}


@shared_task
@tenant_task
def enforce_data_retention(tenant_id: UUID, days: int = RETENTION_DAYS) -> dict[str, int]:
    """Delete the tenant's events older than `days`, a batch a transaction: no lock is held for long."""
    if days < 1:
        raise ValueError(f"days must be at least 1, not {days}")
    before = datetime.now(UTC) - timedelta(days=days)
    oldest = (
        select(Event.id)
        .where(Event.tenant_id == tenant_id, Event.occurred_at < before)
        .order_by(Event.occurred_at)
        .limit(BATCH)
    )
    batch = delete(Event).where(Event.id.in_(oldest)).returning(Event.id)
    deleted = 0
    with get_session(tenant_id) as session:
        while True:
            gone = len(session.scalars(batch, execution_options={"synchronize_session": False}).all())
            session.commit()
            deleted += gone
            if gone < BATCH:
                return {"deleted": deleted}
