"""Orders from the real file through all four services, from `OrderCreated` to the parcel, and back where they fail."""

from __future__ import annotations

from decimal import Decimal
from itertools import islice
from pathlib import Path

import pytest

from services.importer import Invoice, Kind, invoices, read_rows
from services.inventory import inventory
from services.inventory.events import GoodsReceived
from services.inventory.tables import stock
from services.order import Order, Status, orders, repository
from services.order.events import OrderDispatched, OrderLine
from services.payment import payment
from services.payment.tables import payments
from services.sales import countries, sales
from services.shipping import shipping
from services.shipping.tables import shipments
from tests.services.shop import CUP, OpenWorld, ledger, place, rows, types
from tidings.testing import World, world_seeds

DATA = Path(__file__).parents[2] / "services" / "data" / "online-retail.csv"


def some_invoices(count: int) -> list[Invoice]:
    found = (finding for finding in invoices(read_rows(DATA)) if isinstance(finding, Invoice))
    return list(islice((invoice for invoice in found if invoice.kind is Kind.ORDER), count))


async def trade(world: World, count: int) -> None:
    """The first real orders, with everything in stock except their best seller."""
    taken = some_invoices(count)
    for sku in {goods.sku for invoice in taken for goods in invoice.goods} - {"85123A"}:
        await world.append(f"goods-{sku}", GoodsReceived(sku=sku, quantity=10_000))
    await world.settled()
    for invoice in taken:
        lines = [OrderLine(sku=g.sku, quantity=g.quantity, unit_price=g.price) for g in invoice.goods]
        await place(world, invoice.number, *lines, country=invoice.country)


async def proves_agreement(world: World, count: int) -> None:
    """Assert that all databases, the gateway and the log agree, and that everything happened once."""
    await world.settled()
    found = [await repository.load(invoice.number) for invoice in some_invoices(count)]
    left = {order.id for order in found if order.status is Status.DISPATCHED}
    failed = {order.id for order in found if order.status is Status.CANCELLED}
    assert len(left | failed) == count
    assert left
    assert failed
    assert {row.order_id for row in await rows(world, shipping, shipments) if row.state == "dispatched"} == left
    charged = {row.order_id: row.pence for row in await rows(world, payment, payments) if row.state == "captured"}
    assert charged == {order.id: int(order.total * 100) for order in found if order.id in left}
    shelf = await rows(world, inventory, stock)
    assert sum(row.shipped for row in shelf) == sum(line.quantity for o in found if o.id in left for line in o.lines)
    assert all(row.reserved == 0 for row in shelf)
    log = await types(world)
    for once in ("OrderDispatched", "PaymentCaptured", "ShipmentDispatched", "OrderConfirmed", "ShipmentPicked"):
        assert log.count(once) == len(left), once
    assert log.count("OrderCancelled") == len(failed)
    assert all(entry.calls == 1 for entry in await ledger())


async def test_real_orders_reach_the_carrier_or_are_cancelled_and_all_books_agree(open_world: OpenWorld) -> None:
    async with open_world() as world:
        await trade(world, 25)
        await proves_agreement(world, 25)


async def test_services_that_were_away_catch_up(open_world: OpenWorld) -> None:
    async with open_world(orders, inventory) as world:
        await trade(world, 10)
        await world.settled()
        assert "ShipmentDispatched" not in await types(world)
        for service in (payment, shipping):
            await world.start(service)
        await proves_agreement(world, 10)


async def test_a_service_that_joins_late_reads_the_history_and_then_goes_on(open_world: OpenWorld) -> None:
    async with open_world() as world:
        await supplied(world)
        await place(world, "1", country="France")
        await world.settled()
        await world.start(sales)
        await place(world, "2", country="Japan")
        await world.settled()
        counted = {row.country: (row.sales, row.pence) for row in await rows(world, sales, countries)}
        assert counted == {"France": (1, 510), "Japan": (1, 510)}


@pytest.mark.parametrize(
    ("lines", "by", "gave_back"),
    [
        ([CUP, OrderLine(sku="NONE", quantity=1, unit_price=Decimal(1))], "inventory", "PaymentVoided"),
        ([OrderLine(sku="CUP", quantity=1, unit_price=Decimal("2.90"))], "payment", "StockReleased"),
    ],
)
async def test_when_one_side_fails_the_other_gives_back(
    open_world: OpenWorld, lines: list[OrderLine], by: str, gave_back: str
) -> None:
    async with open_world() as world:
        await supplied(world)
        await place(world, "1", *lines)
        await world.settled()
        order = await repository.load("1")
        assert (order.status, order.by) == (Status.CANCELLED, by)
        assert gave_back in await types(world)


async def test_a_customer_in_two_minds_is_cancelled_once(open_world: OpenWorld) -> None:
    async with open_world() as world:
        await supplied(world)
        await place(world, "1")
        for _ in range(2):
            await world.change(repository, "1", Order.cancel, "changed my mind")
        log = await types(world)
        for once in ("OrderCancelled", "PaymentVoided", "ShipmentStopped"):
            assert log.count(once) == 1, once


async def supplied(world: World) -> None:
    """Let goods arrive."""
    await world.append("goods-CUP", GoodsReceived(sku="CUP", quantity=100))
    await world.settled()


@world_seeds(3)
async def test_whatever_happens_all_books_agree(open_world: OpenWorld) -> None:
    async with open_world() as world:
        await supplied(world)
        for number in range(4):
            await place(world, str(number))
        await world.change(repository, "3", Order.cancel, "changed my mind")
        await world.settled()
        charged = {row.order_id for row in await rows(world, payment, payments) if row.state == "captured"}
        left = {event.order_id for event in world.events(of=OrderDispatched)}
        assert charged == left
        assert left >= {"0", "1", "2"}
        assert [(row.reserved, row.shipped) for row in await rows(world, inventory, stock)] == [(0, 2 * len(left))]
