"""The Order service: it listens to the other three, and lets the order decide what that means.

It has no tables. An order's state is its events, so every handler is the same three steps: load the order, let it
decide, append what it decided. `context.change` does them, again when somebody else was faster, and once even when the
handler is repeated.
"""

from __future__ import annotations

from collections.abc import Callable

from services.order.events import (
    PaymentAuthorised,
    PaymentDeclined,
    ShipmentDispatched,
    ShipmentStopped,
    StockRejected,
    StockReserved,
)
from services.order.order import Order
from tidings import Context, Service

__all__ = ["orders", "repository"]

orders = Service("order")
repository = orders.repository(Order)


@orders.on(StockReserved)
async def note_reserved(event: StockReserved, context: Context) -> None:
    """Half of what a confirmation needs."""
    await _decide(context, event.order_id, Order.note_reserved)


@orders.on(PaymentAuthorised)
async def note_authorised(event: PaymentAuthorised, context: Context) -> None:
    """The other half."""
    await _decide(context, event.order_id, Order.note_authorised)


@orders.on(StockRejected)
async def note_out_of_stock(event: StockRejected, context: Context) -> None:
    """An order is shipped whole or not at all."""
    await _decide(context, event.order_id, Order.note_failed, event.reason, "inventory")


@orders.on(PaymentDeclined)
async def note_declined(event: PaymentDeclined, context: Context) -> None:
    """No money, no goods."""
    await _decide(context, event.order_id, Order.note_failed, event.reason, "payment")


@orders.on(ShipmentStopped)
async def note_stopped(event: ShipmentStopped, context: Context) -> None:
    """The customer was faster than the carrier."""
    await _decide(context, event.order_id, Order.note_stopped)


@orders.on(ShipmentDispatched)
async def note_dispatched(event: ShipmentDispatched, context: Context) -> None:
    """The carrier has it."""
    await _decide(context, event.order_id, Order.note_dispatched)


async def _decide(context: Context, order_id: str, decision: Callable[..., None], *told: str) -> None:
    """Tell the order; its history will say who told it what."""
    who = context.metadata.get("actor", "somebody")
    what = context.metadata.get("reason", context.event.type)
    why = {"actor": "order", "reason": f"{who}: {what}"}
    await context.change(repository, order_id, decision, *told, metadata=why)
