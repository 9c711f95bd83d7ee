"""The audit: was any event handled twice, or never? It compares effects in tables and ledger with the events behind
them.

A watermark shows what a service believes; these checks look at what it did. Sums (pieces, sales) reveal a repetition by
themselves; rows are compared one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import func, select

from services.demo.books import Engines, rows_of
from services.demo.fleet.reading import Reading
from services.demo.invariants import Check
from services.inventory import inventory
from services.inventory.tables import lines, reservations, stock
from services.order import orders
from services.order.read_model import listed
from services.payment.gateway import open_sandbox
from services.sales import countries, sales
from services.shipping import shipping
from services.shipping.tables import shipments

__all__ = ["Effects", "audit", "read_effects"]

_AGAIN: Final = ("OrderCancellationRequested", "OrderCancellationRefused")
"""Events that may occur more than once per order: a customer who is refused may ask again."""


@dataclass(frozen=True, slots=True)
class Effects:
    """The effects in the services' tables and in the gateway's ledger."""

    moved: Mapping[str, tuple[int, int, int]]
    """Pieces received, returned and shipped, by sku."""
    reserved: Mapping[str, tuple[int, int]]
    """Pieces reserved by sku: in the stock table, and in the open reservations."""
    operations: Sequence[tuple[str, str]]
    """Reference and operation of each entry in the gateway's ledger."""
    calls: int
    """Number of calls to the gateway."""
    parcels: Mapping[str, str]
    """Order id to state."""
    listed: Mapping[str, str]
    """Order id to status, in Order's list."""
    sales: int
    """Sales and pounds over all countries."""


async def read_effects(engines: Engines, ledger: Path) -> Effects:
    """Read the effects. Call it when everything is settled."""
    shelves = await rows_of(engines, inventory, select(stock))
    is_open = reservations.c.state == "reserved"
    held = (
        select(lines.c.sku, func.sum(lines.c.quantity).label("pieces"))
        .join(reservations)
        .where(is_open)
        .group_by(lines.c.sku)
    )
    promised = {row.sku: row.pieces for row in await rows_of(engines, inventory, held)}
    async with open_sandbox(ledger) as gateway:
        entries = await gateway.ledger()
    parcels = await rows_of(engines, shipping, select(shipments.c.order_id, shipments.c.state))
    list_rows = await rows_of(engines, orders, select(listed.c.order_id, listed.c.status))
    sold = await rows_of(engines, sales, select(func.coalesce(func.sum(countries.c.sales), 0)))
    return Effects(
        moved={row.sku: (row.received, row.returned, row.shipped) for row in shelves},
        reserved={row.sku: (row.reserved, promised.get(row.sku, 0)) for row in shelves},
        operations=[(entry.reference, str(entry.operation)) for entry in entries],
        calls=sum(entry.calls for entry in entries),
        parcels={row.order_id: row.state for row in parcels},
        listed={row.order_id: row.status for row in list_rows},
        sales=sold[0][0],
    )


def audit(log: Reading, done: Effects) -> Iterator[Check]:
    """Return every check, whether it holds or not."""
    events = {key: number for key, number in log.said.items() if key[1] not in _AGAIN}
    twice = [f"{kind} of {order_id}" for (order_id, kind), number in events.items() if number > 1]
    yield _check("no event of an order occurs twice", f"{len(events):,} events", twice)

    asked = log.moved
    wrong = [sku for sku in asked.keys() | done.moved.keys() if asked.get(sku) != done.moved.get(sku, (0, 0, 0))]
    pieces = sum(sum(places) for places in asked.values())
    yield _check(
        "each piece arrived and left once, article by article", f"{pieces:,} of {len(asked):,} articles", wrong
    )

    wrong = [sku for sku, (shelf, promised) in done.reserved.items() if shelf != promised]
    yield _check("every reserved piece belongs to an open order", f"{sum(n for n, _ in done.reserved.values())}", wrong)

    repeated = [f"{what} of {whose}" for (whose, what), number in Counter(done.operations).items() if number > 1]
    numbers = f"{len(done.operations):,} effects of {done.calls:,} calls"
    yield _check("the gateway did nothing twice for one order", numbers, repeated)

    wrong = list(log.baskets.keys() ^ done.parcels.keys())
    wrong += [name for name, state in done.parcels.items() if (state == "dispatched") != (name in log.dispatched)]
    yield _check("one parcel per order, dispatched if the log says so", f"{len(done.parcels)} parcels", wrong)

    wrong = [order_id for order_id in log.states.keys() | done.listed.keys() if not _same(log, done, order_id)]
    yield _check("Order's list agrees with the log about every order", f"{len(done.listed)} orders", wrong)

    kinds = Counter(kind for (_, kind), number in log.said.items() for _ in range(number))
    expected = kinds["PaymentCaptured"] - kinds["PaymentRefunded"]
    numbers = f"{done.sales} = {kinds['PaymentCaptured']} - {kinds['PaymentRefunded']}"
    yield Check("each sale and each refund was counted once", numbers, done.sales == expected)


def _same(log: Reading, done: Effects, order_id: str) -> bool:
    return log.states.get(order_id) == done.listed.get(order_id)


def _check(what: str, numbers: str, wrong: Sequence[str]) -> Check:
    if wrong:
        numbers += f"; {len(wrong)} wrong, the first: {min(wrong)}"
    return Check(what, numbers, not wrong)
