"""Care for the tenants' data: fresh views, no personal data where none belongs, nothing kept for too long."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from celery import shared_task
from sqlalchemy import text

from app.db.session import get_session
from app.tasks.context import TRANSIENT, tenant_task

RETENTION_DAYS = 90
BATCH = 1_000

# POSIX expressions for Postgres, over the payload's text. They count suspects; they don't convict.
_PII = {
    "email": r"[[:alnum:]._%+-]+@[[:alnum:].-]+\.[[:alpha:]]{2,}",
    "phone": r"\+[0-9][0-9 ().-]{7,}[0-9]",
    "card": r"\m[0-9]{4}[ -]?[0-9]{4}[ -]?[0-9]{4}[ -]?[0-9]{1,7}\M",
}


@shared_task(autoretry_for=TRANSIENT)
def refresh_all_materialized_views() -> dict[str, list[str]]:
    """Refresh every materialized view of the schema; answers their names.

    Only its owner may refresh a view, and workers own nothing: the function they call here acts as the owner.
    """
    with get_session(None) as session:
        return {"refreshed": list(session.scalars(text("SELECT refresh_all_materialized_views()")))}


@shared_task(autoretry_for=TRANSIENT)
@tenant_task
def scan_for_pii_contamination(tenant_id: UUID) -> dict[str, Any]:
    """Count the tenant's events whose payload looks as if it held personal data, by kind; never shows any."""
    counts = ", ".join(f"count(*) FILTER (WHERE payload::text ~ :{kind}) AS {kind}" for kind in _PII)
    with get_session(tenant_id) as session:
        query = text(f"SELECT count(*) AS scanned, {counts} FROM events")  # noqa: S608 - names from above
        row = session.execute(query, _PII).one()
    return {"scanned": row.scanned, "suspects": {kind: getattr(row, kind) for kind in _PII}}


@shared_task(autoretry_for=TRANSIENT)
@tenant_task
def enforce_data_retention(tenant_id: UUID, days: int = RETENTION_DAYS) -> dict[str, int]:
    """Delete the tenant's events older than `days`, a batch a transaction: no lock is held for long."""
    if days < 1:
        raise ValueError(f"days must be at least 1, not {days}")
    before = datetime.now(UTC) - timedelta(days=days)
    oldest = "SELECT id FROM events WHERE occurred_at < :before ORDER BY occurred_at LIMIT :batch"
    delete = text(f"DELETE FROM events WHERE id IN ({oldest})")  # noqa: S608 - a constant
    deleted = 0
    with get_session(tenant_id) as session:
        while True:
            batch = session.execute(delete, {"before": before, "batch": BATCH}).rowcount  # type: ignore[attr-defined]
            session.commit()
            deleted += batch
            if batch < BATCH:
                return {"deleted": deleted}
