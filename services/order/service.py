"""The Order service: it listens to the other three, and lets the order decide what that means.

An order's state is its events, so every handler of the others' events is the same three steps: load the order, let it
decide, append what it decided. `context.change` does them, again when somebody else was faster, and once even when the
handler is repeated.

It listens to itself, too: what its orders say is written to the list in `read_model.py`, which people page through.
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
from tidings import Context, Retry, Service

__all__ = ["orders", "repository"]

orders = Service("order", tables=read_model.metadata)
repository = orders.repository(Order)

CONTRADICTED: Final = Retry(permanent=(OrderRefused,))
"""What an order refuses to believe, it refuses the next time, too: somebody has to look."""

# ---- what others tell: the order decides -----------------------------------------------


@orders.on(StockReserved, retry=CONTRADICTED)
async def note_reserved(event: StockReserved, context: Context) -> None:
    """Half of what a confirmation needs."""
    await _decide(context, event.order_id, Order.note_reserved)


@orders.on(PaymentAuthorised, retry=CONTRADICTED)
async def note_authorised(event: PaymentAuthorised, context: Context) -> None:
    """The other half."""
    await _decide(context, event.order_id, Order.note_authorised)


@orders.on(StockRejected, retry=CONTRADICTED)
async def note_out_of_stock(event: StockRejected, context: Context) -> None:
    """An order is shipped whole or not at all."""
    await _decide(context, event.order_id, Order.note_failed, event.reason, "inventory")


@orders.on(PaymentDeclined, retry=CONTRADICTED)
async def note_declined(event: PaymentDeclined, context: Context) -> None:
    """No money, no goods."""
    await _decide(context, event.order_id, Order.note_failed, event.reason, "payment")


@orders.on(ShipmentStopped, retry=CONTRADICTED)
async def note_stopped(event: ShipmentStopped, context: Context) -> None:
    """The customer was faster than the carrier."""
    await _decide(context, event.order_id, Order.note_stopped)


@orders.on(ShipmentDispatched, retry=CONTRADICTED)
async def note_dispatched(event: ShipmentDispatched, context: Context) -> None:
    """The carrier has it."""
    await _decide(context, event.order_id, Order.note_dispatched)


async def _decide(context: Context, order_id: str, decision: Callable[..., None], *told: str) -> None:
    """Tell the order; its history will say who told it what."""
    who = context.metadata.get("actor", "somebody")
    what = context.metadata.get("reason", context.event.type)
    why = {"actor": "order", "reason": f"{who}: {what}"}
    await context.change(repository, order_id, decision, *told, metadata=why)


# ---- what its own orders say: the list follows -----------------------------------------


@orders.on(OrderCreated)
async def list_order(event: OrderCreated, context: Context, connection: AsyncConnection) -> None:
    """A new order stands at the top of the list."""
    await read_model.add(connection, event, context.position)


@orders.on(OrderConfirmed, OrderCancellationRequested, OrderCancellationRefused, OrderCancelled, OrderDispatched)
async def list_status(
    event: OrderConfirmed | OrderCancellationRequested | OrderCancellationRefused | OrderCancelled | OrderDispatched,
    connection: AsyncConnection,
) -> None:
    """It stays where it is, and changes its status."""
    await read_model.move(connection, event)
