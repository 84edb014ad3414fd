"""A kombu transport that makes Postgres a broker that loses nothing: take, hold, fence, acknowledge, wake.

How it works is told where it happens: `alembic/versions` has the statements, `holder` how life and death are
told apart, `place` how a queue stays fast, `transport` how it is fed into Celery's event loop.
"""

from collections.abc import Mapping
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, _transport_cache

from app.broker.holder import DeadMessage, OnDead, rescued
from app.broker.publishing import batch, in_transaction

__all__ = ["DeadMessage", "OnDead", "batch", "in_transaction", "register", "rescued"]


def register(
    delivery_limits: Mapping[str, int] | None = None, on_dead: OnDead | None = None, **options: Any
) -> None:
    """Put this transport behind kombu's `sqla` alias, for every connection of the process.

    Args:
        delivery_limits: by queue, the deliveries after which a message that ends its worker is given up.
        on_dead: called in the transaction that removes a message that will not be delivered again, with a
        cursor of
            that transaction; whatever it raises undoes both. Without it such a message stays in its table,
            held for nobody, with `kombu_message.dead` set.
        options: further transport options; `broker_transport_options` of a connection outrank all of these.
    """
    from app.broker.transport import Transport  # noqa: PLC0415 - kombu imports it by name

    TRANSPORT_ALIASES["sqla"] = TRANSPORT_ALIASES["sqlalchemy"] = "app.broker.transport:Transport"
    for alias in ("sqla", "sqlalchemy"):
        _transport_cache.pop(alias, None)
    Transport.defaults = {"delivery_limits": dict(delivery_limits or {}), "on_dead": on_dead, **options}
