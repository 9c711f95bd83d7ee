"""Orders from the real file through all four services, from `OrderCreated` to the parcel, and back where they fail."""

from __future__ import annotations

from decimal import Decimal
from itertools import islice
from pathlib import Path

import pytest
import sqlalchemy as sa

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
from tests.services.shop import CUP, PLACED_AT, OpenShop, OpenWorld, Shop
from tidings.testing import World, world_seeds

DATA = Path(__file__).parents[2] / "services" / "data" / "online-retail.csv"
FOUR = (orders, inventory, payment, shipping)


def some_invoices(count: int) -> list[Invoice]:
    found = (finding for finding in invoices(read_rows(DATA)) if isinstance(finding, Invoice))
    return list(islice((invoice for invoice in found if invoice.kind is Kind.ORDER), count))


async def trade(running: Shop, count: int) -> None:
    """The first real orders, with everything in stock except their best seller."""
    taken = some_invoices(count)
    for sku in {goods.sku for invoice in taken for goods in invoice.goods} - {"85123A"}:
        await inventory.append(f"goods-{sku}", GoodsReceived(sku=sku, quantity=10_000))
    await running.runtime.settled()
    for invoice in taken:
        lines = [OrderLine(sku=g.sku, quantity=g.quantity, unit_price=g.price) for g in invoice.goods]
        await running.place(invoice.number, *lines, country=invoice.country)


async def proves_agreement(running: Shop, count: int) -> None:
    """Assert that all databases, the gateway and the log agree, and that everything happened once."""
    await running.runtime.settled()
    found = [await repository.load(invoice.number) for invoice in some_invoices(count)]
    left = {order.id for order in found if order.status is Status.DISPATCHED}
    failed = {order.id for order in found if order.status is Status.CANCELLED}
    assert len(left | failed) == count
    assert left
    assert failed
    assert {row.order_id for row in await running.rows(shipping, shipments) if row.state == "dispatched"} == left
    charged = {row.order_id: row.pence for row in await running.rows(payment, payments) if row.state == "captured"}
    assert charged == {order.id: int(order.total * 100) for order in found if order.id in left}
    shelf = await running.rows(inventory, stock)
    assert sum(row.shipped for row in shelf) == sum(line.quantity for o in found if o.id in left for line in o.lines)
    assert all(row.reserved == 0 for row in shelf)
    log = await running.log()
    for once in ("OrderDispatched", "PaymentCaptured", "ShipmentDispatched", "OrderConfirmed", "ShipmentPicked"):
        assert log.count(once) == len(left), once
    assert log.count("OrderCancelled") == len(failed)
    assert all(entry.calls == 1 for entry in await running.ledger())


async def test_real_orders_reach_the_carrier_or_are_cancelled_and_all_books_agree(open_shop: OpenShop) -> None:
    async with open_shop(*FOUR) as running:
        await trade(running, 25)
        await proves_agreement(running, 25)


async def test_the_same_services_over_rabbitmq(open_shop: OpenShop, amqp_url: str) -> None:
    async with open_shop(*FOUR, bus=amqp_url) as running:
        await trade(running, 25)
        await proves_agreement(running, 25)


async def test_services_that_were_away_catch_up(open_shop: OpenShop) -> None:
    async with open_shop(orders, inventory) as running:
        await trade(running, 10)
        await running.runtime.settled()
        assert "ShipmentDispatched" not in await running.log()
    async with open_shop(*FOUR) as running:
        await proves_agreement(running, 10)


async def test_a_service_that_joins_late_reads_the_history_and_then_goes_on(open_shop: OpenShop) -> None:
    async with open_shop(*FOUR) as running:
        await inventory.append("goods-CUP", GoodsReceived(sku="CUP", quantity=100))
        await running.place("1", country="France")
        await running.runtime.settled()
        await running.runtime.start(sales)
        await running.runtime.settled()
        await running.place("2", country="Japan")
        await running.runtime.settled()
        rows = {row.country: (row.sales, row.pence) for row in await running.rows(sales, countries)}
        assert rows == {"France": (1, 510), "Japan": (1, 510)}


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
        await world.change(repository, "1", Order.place, lines, None, "France", PLACED_AT)
        await world.settled()
        order = await repository.load("1")
        assert (order.status, order.by) == (Status.CANCELLED, by)
        assert gave_back in types(world)


async def test_a_customer_in_two_minds_is_cancelled_once(open_world: OpenWorld) -> None:
    async with open_world() as world:
        await supplied(world)
        await world.change(repository, "1", Order.place, [CUP], None, "France", PLACED_AT)
        for _ in range(2):
            await world.change(repository, "1", Order.cancel, "changed my mind")
        await world.settled()
        for once in ("OrderCancelled", "PaymentVoided", "ShipmentStopped"):
            assert types(world).count(once) == 1, once


async def supplied(world: World) -> None:
    """Let goods arrive."""
    await world.append("goods-CUP", GoodsReceived(sku="CUP", quantity=100))
    await world.settled()


def types(world: World) -> list[str]:
    return [event.type for event in world.events()]


@world_seeds(3)
async def test_whatever_happens_all_books_agree(open_world: OpenWorld) -> None:
    async with open_world() as world:
        await supplied(world)
        for number in range(4):
            await world.change(repository, str(number), Order.place, [CUP], None, "France", PLACED_AT)
        await world.change(repository, "3", Order.cancel, "changed my mind")
        await world.settled()
        async with world.session(payment) as session:
            charged = set(await session.scalars(sa.select(payments.c.order_id).where(payments.c.state == "captured")))
        left = {event.order_id for event in world.events(of=OrderDispatched)}
        assert charged == left
        assert left >= {"0", "1", "2"}
        async with world.session(inventory) as session:
            assert (await session.execute(sa.select(stock.c.reserved, stock.c.shipped))).all() == [(0, 2 * len(left))]
