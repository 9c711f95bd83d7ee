"""The list of all orders, newest first: a table that follows the orders' events. It decides nothing.

An order's state is in its stream. But no stream can answer "which orders of this customer are confirmed?", so this
table keeps the answer ready. Its rows lag behind the log by some milliseconds, and by more while the service is down.
Delete the service's database, and the list is built again from the log.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Final

import structlog
from sqlalchemy import BigInteger, Column, Index, Integer, MetaData, Select, String, Table, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from services.order.events import (
    OrderCancellationRefused,
    OrderCancellationRequested,
    OrderCancelled,
    OrderConfirmed,
    OrderCreated,
    OrderDispatched,
)
from services.order.order import Status
from tidings import Event

__all__ = ["add", "listed", "metadata", "move", "page"]

log = structlog.get_logger("order.list")

metadata = MetaData()

listed = Table(
    "listed_orders",
    metadata,
    Column("position", BigInteger, primary_key=True, autoincrement=False, comment="of OrderCreated: never changes"),
    Column("order_id", String(64), nullable=False, unique=True),
    Column("customer_id", String(64), comment="null for a guest"),
    Column("country", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("placed_at", String(40), nullable=False, comment="as the customer's clock had it, with its zone"),
    Column("lines", Integer, nullable=False, comment="how many"),
    Column("total", String(40), nullable=False, comment="pounds; text, because no database shall round it"),
)
Index("listed_by_customer", listed.c.customer_id, listed.c.position)
Index("listed_by_status", listed.c.status, listed.c.position)

AFTER: Final[dict[type[Event], Status]] = {
    OrderConfirmed: Status.CONFIRMED,
    OrderCancellationRequested: Status.CANCELLING,
    OrderCancellationRefused: Status.CONFIRMED,
    OrderCancelled: Status.CANCELLED,
    OrderDispatched: Status.DISPATCHED,
}
"""Type of event to the status that an order has after it."""


async def add(connection: AsyncConnection, event: OrderCreated, position: int) -> None:
    """Add a new order to the list."""
    total = sum((line.amount for line in event.lines), Decimal())
    row = {
        "position": position,
        "order_id": event.order_id,
        "customer_id": event.customer_id,
        "country": event.country,
        "status": Status.PLACED,
        "placed_at": event.placed_at.isoformat(),
        "lines": len(event.lines),
        "total": f"{total:f}",
    }
    await connection.execute(insert(listed).values(row))


async def move(
    connection: AsyncConnection,
    event: OrderConfirmed | OrderCancellationRequested | OrderCancellationRefused | OrderCancelled | OrderDispatched,
) -> None:
    """Change the status of an order. Its events come in the order of the log, so the last one is right."""
    found = await connection.execute(
        update(listed).where(listed.c.order_id == event.order_id).values(status=AFTER[type(event)])
    )
    if not found.rowcount:
        log.warning(
            "order.not_listed",
            order_id=event.order_id,
            advice="it was placed before this service kept a list: give the service a new database to list it, too",
        )


def page(
    limit: int, *, before: int | None = None, status: str | None = None, customer_id: str | None = None
) -> Select[Any]:
    """Return the `limit` newest orders that were created before position `before`.

    A position never changes, so new orders do not move others to another page.
    """
    query = select(listed).order_by(listed.c.position.desc()).limit(limit)
    if before is not None:
        query = query.where(listed.c.position < before)
    if status is not None:
        query = query.where(listed.c.status == status)
    if customer_id is not None:
        query = query.where(listed.c.customer_id == customer_id)
    return query
