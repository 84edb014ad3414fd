"""Sessions that act for one tenant, or for none."""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from sqlalchemy import Connection, event, text
from sqlalchemy.orm import Session, SessionTransaction

from app.db.engine import get_engine

__all__ = ["TENANT_GUC", "TenantRequired", "get_engine", "get_session", "parse_tenant_id", "set_tenant_guc"]

TENANT_GUC = "app.current_tenant_id"
"""The setting that the row-level security policies compare a row's tenant with."""

_SET = text("SELECT set_config(:guc, :tenant, :local)")


class TenantRequired(ValueError):  # noqa: N818 - it is the name of what is wrong
    """Work for a tenant came without one, or with something that is not a tenant's id."""


def parse_tenant_id(value: object) -> UUID:
    """A tenant's id from what a message carried.

    Raises:
        TenantRequired: it is missing or not a UUID.
    """
    if isinstance(value, UUID):
        return value
    if value is None:
        raise TenantRequired("tenant_id is missing: this task works for one tenant")
    try:
        return UUID(str(value))
    except ValueError:
        raise TenantRequired("tenant_id is not a UUID") from None


class _TenantSession(Session):
    """A session whose every transaction is its tenant's."""


@event.listens_for(_TenantSession, "after_begin")
def _act_for_the_tenant(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    if tenant := session.info.get("tenant_id"):
        connection.execute(_SET, {"guc": TENANT_GUC, "tenant": str(tenant), "local": True})


@contextmanager
def get_session(tenant_id: UUID | None) -> Iterator[Session]:
    """A session whose transactions see `tenant_id`'s rows, or no tenant's with None.

    It commits when the block ends and rolls back when it raises. A block may also commit by itself: each
    further transaction acts for the same tenant.
    """
    with _TenantSession(get_engine(), info={"tenant_id": tenant_id}) as session:
        yield session
        session.commit()  # an exception skips this, and closing the session rolls back


def set_tenant_guc(session: Session, tenant_id: UUID | None, local: bool = True) -> None:
    """Let a session act for a tenant, or for none.

    Args:
        session: any SQLAlchemy session on PostgreSQL.
        tenant_id: the tenant; None for nobody.
        local: for the current transaction only. Otherwise until the connection goes back to the pool, which
            forgets it, provided it is the pool of `get_engine`.
    """
    session.execute(_SET, {"guc": TENANT_GUC, "tenant": str(tenant_id or ""), "local": local})
