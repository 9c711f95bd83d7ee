"""The Inventory service: reserves all of an order or nothing, and never promises what is not there.

Handlers for one order run one after the other, but many orders run at once and want the same articles. So the question
"is there enough?" and the taking are one statement, whose row count is the answer:

    UPDATE stock SET on_hand = on_hand - 3, ... WHERE sku = '85123A' AND on_hand >= 3

The framework commits a handler's changes together with its note that the event is done. So each event moves stock once,
and no handler needs to ask whether it has seen an event before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from sqlalchemy import Integer, bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from services.inventory.events import (
    GoodsReceived,
    OrderCancelled,
    OrderCreated,
    OrderLine,
    ReturnReceived,
    ShipmentDispatched,
    Shortage,
    StockRejected,
    StockReleased,
    StockReserved,
)
from services.inventory.tables import lines, metadata, reservations, stock
from tidings import Context, Retry, Service

__all__ = ["inventory"]

inventory = Service("inventory", tables=metadata)

_NAMED = 3
"""Missing articles named in a reason that people read; the event has all of them."""


# ---- goods come in -------------------------------------------------------------------


@inventory.on(GoodsReceived)
async def receive(event: GoodsReceived, connection: AsyncConnection) -> None:
    """A delivery: more on hand."""
    await _book_in(connection, event.sku, on_hand=event.quantity, received=event.quantity)


@inventory.on(ReturnReceived)
async def take_back(event: ReturnReceived, connection: AsyncConnection) -> None:
    """A return: on hand again. What was shipped stays shipped, as the file never says which order it came from."""
    await _book_in(connection, event.sku, on_hand=event.quantity, returned=event.quantity)


async def _book_in(connection: AsyncConnection, sku: str, **more: int) -> None:
    # Update, else insert, cannot collide: both events have the sku as their key, so one runs after the other.
    sums = {place: stock.c[place] + pieces for place, pieces in more.items()}
    known = await connection.execute(update(stock).where(stock.c.sku == sku).values(sums))
    if not known.rowcount:
        await connection.execute(insert(stock).values(sku=sku, **more))


# ---- orders ask for them -------------------------------------------------------------


class _OutOfStock(Exception):
    """Leaves the savepoint, so that whatever was taken is put back."""


@inventory.on(OrderCreated)
async def reserve(event: OrderCreated, context: Context, connection: AsyncConnection) -> None:
    """Set every line aside, or none."""
    wanted = _by_sku(event.lines)
    missing: list[Shortage] = []
    try:
        async with connection.begin_nested():
            missing = [Shortage(sku=sku, wanted=n) for sku, n in wanted.items() if not await _take(connection, sku, n)]
            if missing:
                raise _OutOfStock
            await _remember(connection, event.order_id, wanted)
    except _OutOfStock:
        reason = _explain(missing)
        rejected = StockRejected(order_id=event.order_id, reason=reason, missing=tuple(missing))
        _tell(context, event.order_id, rejected, reason)
    else:
        _tell(context, event.order_id, StockReserved(order_id=event.order_id), f"{len(wanted)} articles set aside")


@inventory.on(OrderCancelled)
async def release(event: OrderCancelled, context: Context, connection: AsyncConnection) -> None:
    """Put back what was set aside, if anything was."""
    held = await _end(connection, event.order_id, "released")
    if held:
        await connection.execute(PUT_BACK, held)
        _tell(context, event.order_id, StockReleased(order_id=event.order_id), "the order was cancelled")


class Contradiction(Exception):
    """Another service says what cannot be. No retry heals it; somebody has to look."""


@inventory.on(ShipmentDispatched, retry=Retry(permanent=(Contradiction,)))
async def ship(event: ShipmentDispatched, connection: AsyncConnection) -> None:
    """What was set aside has left the house."""
    held = await _end(connection, event.order_id, "shipped")
    if not held:
        raise Contradiction(f"order {event.order_id} left the house, but nothing is set aside for it; look at its log")
    await connection.execute(SHIP, held)


# ---- the statements ------------------------------------------------------------------

_QUANTITY: Final = bindparam("pieces", type_=Integer)
_THIS: Final = stock.c.sku == bindparam("article")

TAKE: Final = (
    update(stock)
    .where(_THIS, stock.c.on_hand >= _QUANTITY)
    .values(on_hand=stock.c.on_hand - _QUANTITY, reserved=stock.c.reserved + _QUANTITY)
)
PUT_BACK: Final = (
    update(stock).where(_THIS).values(on_hand=stock.c.on_hand + _QUANTITY, reserved=stock.c.reserved - _QUANTITY)
)
SHIP: Final = (
    update(stock).where(_THIS).values(reserved=stock.c.reserved - _QUANTITY, shipped=stock.c.shipped + _QUANTITY)
)


async def _take(connection: AsyncConnection, sku: str, quantity: int) -> bool:
    """Move from on hand to reserved, if there is enough: whatever runs at once, on hand is never below zero."""
    return (await connection.execute(TAKE, {"article": sku, "pieces": quantity})).rowcount == 1


async def _remember(connection: AsyncConnection, order_id: str, wanted: Mapping[str, int]) -> None:
    await connection.execute(insert(reservations).values(order_id=order_id, state="reserved"))
    rows = [{"order_id": order_id, "sku": sku, "quantity": quantity} for sku, quantity in wanted.items()]
    await connection.execute(insert(lines), rows)


async def _end(connection: AsyncConnection, order_id: str, state: str) -> list[dict[str, object]]:
    """End a reservation that is still open; what it held, for the statements above, or nothing when there was none."""
    is_open = (reservations.c.order_id == order_id) & (reservations.c.state == "reserved")
    ended = await connection.execute(update(reservations).where(is_open).values(state=state))
    if not ended.rowcount:
        return []
    held = select(lines.c.sku, lines.c.quantity).where(lines.c.order_id == order_id).order_by(lines.c.sku)
    return [{"article": row.sku, "pieces": row.quantity} for row in await connection.execute(held)]


# ---- words ---------------------------------------------------------------------------


def _by_sku(order_lines: Iterable[OrderLine]) -> dict[str, int]:
    """Pieces per article, as it may stand in several lines; sorted, so that no two orders wait for each other."""
    total: Counter[str] = Counter()
    for line in order_lines:
        total[line.sku] += line.quantity
    return dict(sorted(total.items()))


def _explain(missing: list[Shortage]) -> str:
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return f"out of stock: {', '.join(map(str, missing[:_NAMED]))}{more}"


def _tell(context: Context, order_id: str, event: StockReserved | StockRejected | StockReleased, reason: str) -> None:
    context.emit(f"reservation-{order_id}", event, metadata={"actor": "inventory", "reason": reason})
