"""The Inventory service: reserves all goods of an order or none, and never more than there are.

Handlers for one order run one after the other, but many orders run at the same time and want the same articles. So one
statement both checks the stock and takes from it, and its row count says whether there was enough:

    UPDATE stock SET on_hand = on_hand - 3, ... WHERE sku = '85123A' AND on_hand >= 3

Tidings commits a handler's changes together with the watermark. So each event moves stock once, and no handler needs to
check whether it has seen an event before.
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
"""Missing articles that a reason names. The event has all of them."""


# ---- goods arrive --------------------------------------------------------------------


@inventory.on(GoodsReceived)
async def receive(event: GoodsReceived, connection: AsyncConnection) -> None:
    """Add a delivery to the stock on hand."""
    await _book_in(connection, event.sku, on_hand=event.quantity, received=event.quantity)


@inventory.on(ReturnReceived)
async def take_back(event: ReturnReceived, connection: AsyncConnection) -> None:
    """Add a return to the stock on hand. The order keeps its goods as shipped: the file does not say which order it
    was."""
    await _book_in(connection, event.sku, on_hand=event.quantity, returned=event.quantity)


async def _book_in(connection: AsyncConnection, sku: str, **more: int) -> None:
    # Update, else insert, is safe: events of one sku have the same key, so they run one after the other.
    sums = {place: stock.c[place] + pieces for place, pieces in more.items()}
    known = await connection.execute(update(stock).where(stock.c.sku == sku).values(sums))
    if not known.rowcount:
        await connection.execute(insert(stock).values(sku=sku, **more))


# ---- orders need them ----------------------------------------------------------------


class _OutOfStock(Exception):
    """Raised out of the savepoint, so that goods already taken are put back."""


@inventory.on(OrderCreated)
async def reserve(event: OrderCreated, context: Context, connection: AsyncConnection) -> None:
    """Reserve every line, or none."""
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
    """Put back the goods that were reserved, if any."""
    held = await _end(connection, event.order_id, "released")
    if held:
        await connection.execute(PUT_BACK, held)
        _tell(context, event.order_id, StockReleased(order_id=event.order_id), "the order was cancelled")


class Contradiction(Exception):
    """Another service reports something impossible. A retry would not help: somebody has to look."""


@inventory.on(ShipmentDispatched, retry=Retry(permanent=(Contradiction,)))
async def ship(event: ShipmentDispatched, connection: AsyncConnection) -> None:
    """Mark the reserved goods as shipped."""
    held = await _end(connection, event.order_id, "shipped")
    if not held:
        raise Contradiction(f"order {event.order_id} was shipped, but nothing is reserved for it; look at its events")
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
    """Move pieces from on hand to reserved, if there are enough. On hand never falls below zero, whatever runs
    concurrently."""
    return (await connection.execute(TAKE, {"article": sku, "pieces": quantity})).rowcount == 1


async def _remember(connection: AsyncConnection, order_id: str, wanted: Mapping[str, int]) -> None:
    await connection.execute(insert(reservations).values(order_id=order_id, state="reserved"))
    rows = [{"order_id": order_id, "sku": sku, "quantity": quantity} for sku, quantity in wanted.items()]
    await connection.execute(insert(lines), rows)


async def _end(connection: AsyncConnection, order_id: str, state: str) -> list[dict[str, object]]:
    """End a reservation that is still open. Return what it held, for the statements above, or nothing if there was
    none."""
    is_open = (reservations.c.order_id == order_id) & (reservations.c.state == "reserved")
    ended = await connection.execute(update(reservations).where(is_open).values(state=state))
    if not ended.rowcount:
        return []
    held = select(lines.c.sku, lines.c.quantity).where(lines.c.order_id == order_id).order_by(lines.c.sku)
    return [{"article": row.sku, "pieces": row.quantity} for row in await connection.execute(held)]


# ---- helpers -------------------------------------------------------------------------


def _by_sku(order_lines: Iterable[OrderLine]) -> dict[str, int]:
    """Add up the pieces per article. Sorted, so that no two orders deadlock."""
    total: Counter[str] = Counter()
    for line in order_lines:
        total[line.sku] += line.quantity
    return dict(sorted(total.items()))


def _explain(missing: list[Shortage]) -> str:
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return f"out of stock: {', '.join(map(str, missing[:_NAMED]))}{more}"


def _tell(context: Context, order_id: str, event: StockReserved | StockRejected | StockReleased, reason: str) -> None:
    context.emit(f"reservation-{order_id}", event, metadata={"actor": "inventory", "reason": reason})
