"""The Shipping service: one row per parcel, and one statement per move, which either finds the parcel where it must be
or changes nothing.

Between picking and handing over, the service receives its own `ShipmentPicked` from the log. A parcel can be stopped
until then: a request before `ShipmentPicked` in the log is in time, one behind it is too late. All services see the
same result, because all events of one order arrive in the order of the log.
"""

from __future__ import annotations

from binascii import crc32
from typing import Final

from sqlalchemy import insert, update
from sqlalchemy.ext.asyncio import AsyncConnection

from services.shipping.events import (
    OrderCancellationRequested,
    OrderCancelled,
    OrderConfirmed,
    OrderCreated,
    ShipmentDispatched,
    ShipmentPicked,
    ShipmentStopped,
)
from services.shipping.tables import BEFORE, State, metadata, shipments
from tidings import Context, Event, Service

__all__ = ["shipping"]

shipping = Service("shipping", tables=metadata)

CARRIER: Final = "Royal Mail"


@shipping.on(OrderCreated)
async def prepare(event: OrderCreated, connection: AsyncConnection) -> None:
    """Print the label while Inventory and Payment do their part."""
    row = {"order_id": event.order_id, "state": State.PREPARED, "country": event.country}
    await connection.execute(insert(shipments).values(row))


@shipping.on(OrderConfirmed)
async def pick(event: OrderConfirmed, context: Context, connection: AsyncConnection) -> None:
    """Pack the parcel."""
    if await _move(connection, event.order_id, State.PICKED):
        _tell(context, event.order_id, ShipmentPicked(order_id=event.order_id), "the order is confirmed")


@shipping.on(ShipmentPicked)
async def hand_over(event: ShipmentPicked, context: Context, connection: AsyncConnection) -> None:
    """Give the parcel to the carrier, unless it was stopped."""
    if await _move(connection, event.order_id, State.DISPATCHED):
        tracking = f"TD{crc32(event.order_id.encode()):010d}GB"
        dispatched = ShipmentDispatched(order_id=event.order_id, carrier=CARRIER, tracking=tracking)
        _tell(context, event.order_id, dispatched, f"handed to {CARRIER} as {tracking}")


@shipping.on(OrderCancellationRequested, OrderCancelled)
async def stop(
    event: OrderCancellationRequested | OrderCancelled, context: Context, connection: AsyncConnection
) -> None:
    """Stop the parcel if it is still here. If not, `ShipmentDispatched` is in the log already."""
    if await _move(connection, event.order_id, State.STOPPED):
        _tell(context, event.order_id, ShipmentStopped(order_id=event.order_id), "stopped before it was handed over")


async def _move(connection: AsyncConnection, order_id: str, to: State) -> bool:
    """Make a move. Return False if the parcel's state does not allow it; then nothing was changed."""
    legal = (shipments.c.order_id == order_id) & shipments.c.state.in_(BEFORE[to])
    moved = await connection.execute(update(shipments).where(legal).values(state=to))
    return moved.rowcount == 1


def _tell(context: Context, order_id: str, event: Event, reason: str) -> None:
    context.emit(f"shipment-{order_id}", event, metadata={"actor": "shipping", "reason": reason})
