"""What the demo writes into the log: opening stock, the orders and returns of the file, a few live orders.

Everything begins a stream of its own whose name follows from the data. So a second run tries it all again, and the
store refuses what is there: importing twice creates nothing twice, wherever the first run was interrupted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from typing import Final, NamedTuple, TypeVar

from services.demo.customers import LIVE, Mood, call, mood_of
from services.demo.tally import Tally
from services.importer import Invoice, Kind
from services.inventory import inventory
from services.inventory.events import GoodsReceived, ReturnReceived
from services.order import Order, repository
from services.order.events import OrderLine
from tidings import NO_STREAM, Event
from tidings.errors import WrongExpectedVersion

__all__ = ["LIVE_COUNTRY", "LIVE_ORDERS", "place_live", "receive", "take_in"]

T = TypeVar("T")

AT_ONCE: Final = 64
"""Deliveries and returns under way at the same time, so that they share the store's commits."""

LIVE_COUNTRY: Final = "Iceland"
"""Nobody there bought anything in the five days."""
LIVE_ORDERS: Final = 3
MUG: Final = OrderLine(sku="DEMO-MUG", description="MUG", quantity=1, unit_price=Decimal("12.50"))


class _Goods(NamedTuple):
    stream: str
    event: Event


async def receive(stock: dict[str, int]) -> int:
    """Deliveries of these articles; how many are new."""
    goods = (_Goods(f"goods-{sku}", GoodsReceived(sku=sku, quantity=pieces)) for sku, pieces in stock.items())
    return await _book_in(goods, "opening stock")


async def take_in(invoice: Invoice, source: str) -> bool:
    """Whether an invoice is a new order. Customers who regret it at once call at once; returns are booked in."""
    source = f"invoice {invoice.number}, line {invoice.line} of {source}"
    if invoice.kind is Kind.RETURN:
        await _book_in(_came_back(invoice), source)
        return False
    lines = [
        OrderLine(sku=goods.sku, description=goods.description, quantity=goods.quantity, unit_price=goods.price)
        for goods in invoice.goods
    ]
    is_new = await _place(invoice.number, lines, invoice.customer, invoice.country, invoice.date, source)
    if is_new and mood_of(invoice.number) is Mood.AT_ONCE:
        await call(invoice.number)
    return is_new


async def place_live(tally: Tally) -> None:
    """Orders of this run, for goods that come with it: each run has other ones."""
    run = 1 + sum(order_id.startswith(LIVE) for order_id in tally.orders) // LIVE_ORDERS
    await _book_in(
        [_Goods(f"goods-{MUG.sku}-{run}", GoodsReceived(sku=MUG.sku, quantity=LIVE_ORDERS))], f"for run {run}"
    )
    for number in range(1, LIVE_ORDERS + 1):
        await _place(f"{LIVE}{run}.{number}", [MUG], None, LIVE_COUNTRY, datetime.now(UTC), f"live order of run {run}")


def _came_back(invoice: Invoice) -> Iterator[_Goods]:
    for number, goods in enumerate(invoice.goods, 1):
        returned = ReturnReceived(return_id=invoice.number, sku=goods.sku, quantity=goods.quantity)
        yield _Goods(f"return-{invoice.number}.{number}", returned)


async def _place(
    order_id: str, lines: Sequence[OrderLine], customer: str | None, country: str, at: datetime, reason: str
) -> bool:
    why = {"actor": f"customer {customer}" if customer else "guest", "reason": reason}
    return await _is_new(lambda: repository.create(order_id, Order.place, lines, customer, country, at, metadata=why))


async def _book_in(all_goods: Iterable[_Goods], reason: str) -> int:
    why = {"actor": "warehouse", "reason": reason}

    async def append(goods: _Goods) -> bool:
        return await _is_new(lambda: inventory.append(*goods, expected=NO_STREAM, metadata=why))

    made = 0
    for together in _batches(all_goods, AT_ONCE):
        made += sum(await asyncio.gather(*map(append, together)))
    return made


async def _is_new(begin: Callable[[], Awaitable[object]]) -> bool:
    """Whether a stream was begun; False when it exists, because an earlier run began it."""
    try:
        await begin()
    except WrongExpectedVersion:
        return False
    return True


def _batches(things: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(things)
    while batch := list(islice(iterator, size)):
        yield batch
