"""The Shipping service: one row per parcel, and one statement per move, which either finds the parcel where it must be
or changes nothing.

Between picking and handing over, the service hears its own `ShipmentPicked` come back through the log. That is the
window in which a parcel can be stopped: a request that stands in the log before `ShipmentPicked` wins, one behind it is
too late. Whoever is first, everybody sees the same, because all events of one order arrive in the order of the log.
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
    """Print the label while stock and payment are looked into."""
    row = {"order_id": event.order_id, "state": State.PREPARED, "country": event.country}
    await connection.execute(insert(shipments).values(row))


@shipping.on(OrderConfirmed)
async def pick(event: OrderConfirmed, context: Context, connection: AsyncConnection) -> None:
    """Pack the parcel."""
    if await _move(connection, event.order_id, State.PICKED):
        _tell(context, event.order_id, ShipmentPicked(order_id=event.order_id), "the order is confirmed")


@shipping.on(ShipmentPicked)
async def hand_over(event: ShipmentPicked, context: Context, connection: AsyncConnection) -> None:
    """Give it to the carrier, unless it was stopped since."""
    if await _move(connection, event.order_id, State.DISPATCHED):
        tracking = f"TD{crc32(event.order_id.encode()):010d}GB"
        dispatched = ShipmentDispatched(order_id=event.order_id, carrier=CARRIER, tracking=tracking)
        _tell(context, event.order_id, dispatched, f"handed to {CARRIER} as {tracking}")


@shipping.on(OrderCancellationRequested, OrderCancelled)
async def stop(
    event: OrderCancellationRequested | OrderCancelled, context: Context, connection: AsyncConnection
) -> None:
    """Keep the parcel here, if it still is. If not, `ShipmentDispatched` is in the log already and is the answer."""
    if await _move(connection, event.order_id, State.STOPPED):
        _tell(context, event.order_id, ShipmentStopped(order_id=event.order_id), "stopped before it was handed over")


async def _move(connection: AsyncConnection, order_id: str, to: State) -> bool:
    """Whether the parcel was where it must be for this move, and has made it."""
    legal = (shipments.c.order_id == order_id) & shipments.c.state.in_(BEFORE[to])
    moved = await connection.execute(update(shipments).where(legal).values(state=to))
    return moved.rowcount == 1


def _tell(context: Context, order_id: str, event: Event, reason: str) -> None:
    context.emit(f"shipment-{order_id}", event, metadata={"actor": "shipping", "reason": reason})
