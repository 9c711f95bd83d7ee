"""The Order service: it handles the events of the other three, and lets the order decide what they mean.

Every handler of another service's event does the same three things: load the order, let it decide, append the new
events. `context.change` does all of them. It starts over when another process was faster, and has its effect once even
when the handler runs again.

The service handles its own events, too: they update the list in `read_model.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from services.order import read_model
from services.order.events import (
    OrderCancellationRefused,
    OrderCancellationRequested,
    OrderCancelled,
    OrderConfirmed,
    OrderCreated,
    OrderDispatched,
    PaymentAuthorised,
    PaymentDeclined,
    ShipmentDispatched,
    ShipmentStopped,
    StockRejected,
    StockReserved,
)
from services.order.order import Order, OrderRefused
from services.order.placement import Placement
from tidings import Context, Retry, Service

__all__ = ["orders", "placements", "repository"]

orders = Service("order", tables=read_model.metadata)
repository = orders.repository(Order)
placements = orders.repository(Placement)

CONTRADICTED: Final = Retry(permanent=(OrderRefused,))
"""The default retries, but an event that contradicts the order is dead at once. Somebody has to look."""

# ---- events of other services: the order decides -----------------------------------------


@orders.on(StockReserved, retry=CONTRADICTED)
async def note_reserved(event: StockReserved, context: Context) -> None:
    """Tell the order that its goods are reserved, the first half of a confirmation."""
    await _decide(context, event.order_id, Order.note_reserved)


@orders.on(PaymentAuthorised, retry=CONTRADICTED)
async def note_authorised(event: PaymentAuthorised, context: Context) -> None:
    """Tell the order that its payment is authorised, the other half."""
    await _decide(context, event.order_id, Order.note_authorised)


@orders.on(StockRejected, retry=CONTRADICTED)
async def note_out_of_stock(event: StockRejected, context: Context) -> None:
    """Cancel the order: it is shipped completely or not at all."""
    await _decide(context, event.order_id, Order.note_failed, event.reason, "inventory")


@orders.on(PaymentDeclined, retry=CONTRADICTED)
async def note_declined(event: PaymentDeclined, context: Context) -> None:
    """Cancel the order, because nobody pays for it."""
    await _decide(context, event.order_id, Order.note_failed, event.reason, "payment")


@orders.on(ShipmentStopped, retry=CONTRADICTED)
async def note_stopped(event: ShipmentStopped, context: Context) -> None:
    """Cancel the order: its parcel was stopped in time."""
    await _decide(context, event.order_id, Order.note_stopped)


@orders.on(ShipmentDispatched, retry=CONTRADICTED)
async def note_dispatched(event: ShipmentDispatched, context: Context) -> None:
    """Tell the order that the carrier has its parcel."""
    await _decide(context, event.order_id, Order.note_dispatched)


async def _decide(context: Context, order_id: str, decision: Callable[..., None], *told: str) -> None:
    """Let the order decide. Its history shows which service reported what."""
    who = context.metadata.get("actor", "somebody")
    what = context.metadata.get("reason", context.event.type)
    why = {"actor": "order", "reason": f"{who}: {what}"}
    await context.change(repository, order_id, decision, *told, metadata=why)


# ---- its own events: the list follows --------------------------------------------------


@orders.on(OrderCreated)
async def list_order(event: OrderCreated, context: Context, connection: AsyncConnection) -> None:
    """Put a new order on top of the list."""
    await read_model.add(connection, event, context.position)


@orders.on(OrderConfirmed, OrderCancellationRequested, OrderCancellationRefused, OrderCancelled, OrderDispatched)
async def list_status(
    event: OrderConfirmed | OrderCancellationRequested | OrderCancellationRefused | OrderCancelled | OrderDispatched,
    connection: AsyncConnection,
) -> None:
    """Change the status of an order in the list."""
    await read_model.move(connection, event)
