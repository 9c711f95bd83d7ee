"""The trade of the five days: orders and returns of the file, and a few live orders. It writes through the shop and the
warehouse, which refuse what exists already, so importing twice creates nothing twice.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Final

from services.demo.customers import LIVE, Mood, mood_of
from services.demo.shop import Purchase, Shop
from services.demo.tally import Tally
from services.demo.warehouse import Warehouse
from services.importer import Invoice, Kind
from services.order.events import OrderLine

__all__ = ["LIVE_COUNTRY", "LIVE_ORDERS", "place_live", "take_in"]

LIVE_COUNTRY: Final = "Iceland"
"""A country from which nobody bought anything in the five days."""
LIVE_ORDERS: Final = 3
MUG: Final = OrderLine(sku="DEMO-MUG", description="MUG", quantity=1, unit_price=Decimal("12.50"))


async def take_in(invoice: Invoice, source: str, shop: Shop, warehouse: Warehouse) -> bool:
    """Place an invoice's order, or book in its return. Return whether it is a new order. Some customers cancel at
    once."""
    source = f"invoice {invoice.number}, line {invoice.line} of {source}"
    if invoice.kind is Kind.RETURN:
        await warehouse.take_back(invoice, source)
        return False
    lines = [
        OrderLine(sku=goods.sku, description=goods.description, quantity=goods.quantity, unit_price=goods.price)
        for goods in invoice.goods
    ]
    purchase = Purchase(invoice.number, lines, invoice.customer, invoice.country, invoice.date, source)
    is_new = await shop.place(purchase)
    if is_new and mood_of(invoice.number) is Mood.AT_ONCE:
        await shop.cancel(invoice.number)
    return is_new


async def place_live(tally: Tally, shop: Shop, warehouse: Warehouse) -> None:
    """Place live orders for goods that are delivered first. Each run has its own."""
    run = 1 + sum(order_id.startswith(LIVE) for order_id in tally.orders) // LIVE_ORDERS
    await warehouse.receive_again(MUG.sku, LIVE_ORDERS, run)
    for number in range(1, LIVE_ORDERS + 1):
        order_id, now = f"{LIVE}{run}.{number}", datetime.now(UTC)
        await shop.place(Purchase(order_id, [MUG], None, LIVE_COUNTRY, now, f"live order of run {run}"))
