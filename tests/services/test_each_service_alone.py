"""Each service in a world, with nobody else there: what it hears, it is told by the test."""

from __future__ import annotations

from decimal import Decimal

import pytest
from sqlalchemy.exc import IntegrityError

import services.inventory.events as inventory_hears
import services.order.events as order_hears
import services.payment.events as payment_hears
import services.shipping.events as shipping_hears
from services.inventory import inventory
from services.inventory.tables import stock
from services.order import Status, orders, repository
from services.payment import payment
from services.payment.gateway import (
    Answer,
    GatewayUnavailable,
    Operation,
    PaymentGateway,
    SandboxGateway,
    open_sandbox,
)
from services.payment.tables import payments
from services.shipping import shipping
from services.shipping.tables import shipments
from tests.services.shop import OpenWorld, ledger, place, rows, tell, types
from tidings.testing import World

# ---- order ---------------------------------------------------------------------------


async def test_order_confirms_when_stock_and_payment_are_there(open_world: OpenWorld) -> None:
    async with open_world(orders) as alone:
        await place(alone, "1")
        await tell(alone, order_hears.StockReserved(order_id="1"))
        assert (await repository.load("1")).status is Status.PLACED
        await tell(alone, order_hears.PaymentAuthorised(order_id="1"))
        assert (await repository.load("1")).status is Status.CONFIRMED
        await tell(alone, order_hears.ShipmentDispatched(order_id="1"))
        assert await types(alone, "order-1") == [
            "OrderCreated",
            "OrderReserved",
            "OrderAuthorised",
            "OrderConfirmed",
            "OrderDispatched",
        ]


async def test_order_cancels_with_the_reason_that_it_was_told(open_world: OpenWorld) -> None:
    async with open_world(orders) as alone:
        await place(alone, "1")
        await tell(alone, order_hears.StockRejected(order_id="1", reason="out of stock: 2 of CUP"))
        order = await repository.load("1")
        assert (order.status, order.reason, order.by) == (Status.CANCELLED, "out of stock: 2 of CUP", "inventory")


async def test_the_history_of_an_order_says_who_and_why(open_world: OpenWorld) -> None:
    async with open_world(orders) as alone:
        await place(alone, "1")
        why = {"actor": "inventory", "reason": "1 articles set aside"}
        await alone.append("reservation-1", order_hears.StockReserved(order_id="1"), metadata=why)
        await alone.settled()
        entries = [entry async for entry in repository.history("1")]
        assert entries[1].metadata["actor"] == "order"
        assert entries[1].metadata["reason"] == "inventory: 1 articles set aside"
        assert entries[1].causation_id is not None


# ---- inventory -----------------------------------------------------------------------


def wanted(order_id: str, **skus: int) -> inventory_hears.OrderCreated:
    lines = tuple(inventory_hears.OrderLine(sku=sku, quantity=quantity) for sku, quantity in skus.items())
    return inventory_hears.OrderCreated(order_id=order_id, lines=lines)


async def on_the_shelf(alone: World) -> dict[str, tuple[int, int, int]]:
    return {row.sku: (row.on_hand, row.reserved, row.shipped) for row in await rows(alone, inventory, stock)}


async def test_inventory_reserves_ships_and_takes_back(open_world: OpenWorld) -> None:
    async with open_world(inventory) as alone:
        received = inventory_hears.GoodsReceived(sku="CUP", quantity=10)
        await tell(alone, received, received)
        await tell(alone, wanted("1", CUP=3))
        assert await on_the_shelf(alone) == {"CUP": (17, 3, 0)}
        await tell(alone, inventory_hears.ShipmentDispatched(order_id="1"))
        assert await on_the_shelf(alone) == {"CUP": (17, 0, 3)}
        back = inventory_hears.ReturnReceived(return_id="C1", sku="CUP", quantity=2)
        new = inventory_hears.ReturnReceived(return_id="C2", sku="JAR", quantity=1)
        await tell(alone, back, new)
        assert await on_the_shelf(alone) == {"CUP": (19, 0, 3), "JAR": (1, 0, 0)}
        assert await types(alone, "reservation-1") == ["StockReserved"]


async def test_inventory_releases_once_and_only_what_was_reserved(open_world: OpenWorld) -> None:
    async with open_world(inventory) as alone:
        await tell(alone, inventory_hears.GoodsReceived(sku="CUP", quantity=3))
        cancelled = inventory_hears.OrderCancelled(order_id="1")
        await tell(alone, wanted("1", CUP=2), cancelled, cancelled)
        await tell(alone, wanted("2", CUP=9), inventory_hears.OrderCancelled(order_id="2"))
        assert await on_the_shelf(alone) == {"CUP": (3, 0, 0)}
        assert await types(alone, "reservation-1") == ["StockReserved", "StockReleased"]
        assert await types(alone, "reservation-2") == ["StockRejected"]


async def test_a_hundred_orders_at_once_get_what_is_there_and_no_more(open_world: OpenWorld) -> None:
    async with open_world(inventory) as alone:
        await tell(alone, inventory_hears.GoodsReceived(sku="CUP", quantity=50))
        await tell(alone, *(wanted(str(number), CUP=3) for number in range(100)))
        assert await on_the_shelf(alone) == {"CUP": (2, 48, 0)}
        log = await types(alone)
        assert (log.count("StockReserved"), log.count("StockRejected")) == (16, 84)


async def test_not_even_a_mistake_can_lose_a_piece(open_world: OpenWorld) -> None:
    async with open_world(inventory) as alone:
        await tell(alone, inventory_hears.GoodsReceived(sku="CUP", quantity=1))
        async with alone.session(inventory) as session:
            for mistake in ({"on_hand": 2}, {"on_hand": -1, "reserved": 2}):
                with pytest.raises(IntegrityError, match="CHECK constraint failed"):
                    await session.execute(stock.update().values(mistake))


# ---- payment -------------------------------------------------------------------------


def to_pay(order_id: str, amount: str) -> payment_hears.OrderCreated:
    line = payment_hears.OrderLine(quantity=2, unit_price=Decimal(amount) / 2)
    return payment_hears.OrderCreated(order_id=order_id, lines=(line,))


async def states(alone: World) -> dict[str, tuple[str, int]]:
    return {row.order_id: (row.state, row.pence) for row in await rows(alone, payment, payments)}


async def test_payment_charges_a_confirmed_order_and_refunds_it(open_world: OpenWorld) -> None:
    async with open_world(payment) as alone:
        await tell(alone, to_pay("1", "10.50"), payment_hears.OrderConfirmed(order_id="1"))
        assert await states(alone) == {"1": ("captured", 1050)}
        await tell(alone, payment_hears.OrderCancelled(order_id="1"))
        assert await states(alone) == {"1": ("refunded", 1050)}
        assert await types(alone, "payment-1") == ["PaymentAuthorised", "PaymentCaptured", "PaymentRefunded"]
        assert [entry.operation for entry in await ledger()] == ["authorise", "capture", "refund"]


class Unreliable(SandboxGateway):
    """A gateway whose first call with each key takes effect and does not answer."""

    def __init__(self, inner: SandboxGateway, failing: int) -> None:
        self.inner = inner
        self.failing = failing
        self.seen: dict[str, int] = {}

    def fail(self, key: str) -> None:
        self.seen[key] = self.seen.get(key, 0) + 1
        if self.seen[key] <= self.failing:
            raise GatewayUnavailable("no answer")

    async def authorise(self, amount: Decimal, *, reference: str, key: str) -> Answer:
        answer = await self.inner.authorise(amount, reference=reference, key=key)
        self.fail(key)
        return answer

    async def capture(self, authorisation: str, *, key: str) -> None:
        await self.inner.capture(authorisation, key=key)
        self.fail(key)


async def test_payment_survives_a_gateway_that_acts_and_does_not_answer(open_world: OpenWorld) -> None:
    async with open_sandbox(":memory:") as gateway:
        unreliable = Unreliable(gateway, failing=2)
        async with open_world(payment, resources={PaymentGateway: unreliable}) as alone:
            alone.tolerate(GatewayUnavailable)
            await tell(alone, to_pay("1", "10.50"), payment_hears.OrderConfirmed(order_id="1"))
            assert await states(alone) == {"1": ("captured", 1050)}
            assert await types(alone, "payment-1") == ["PaymentAuthorised", "PaymentCaptured"]
        assert [(entry.operation, entry.calls) for entry in await gateway.ledger()] == [
            (Operation.AUTHORISE, 3),
            (Operation.CAPTURE, 3),
        ]


# ---- shipping ------------------------------------------------------------------------


def to_ship(order_id: str) -> tuple[shipping_hears.OrderCreated, shipping_hears.OrderConfirmed]:
    created = shipping_hears.OrderCreated(order_id=order_id, country="France")
    return created, shipping_hears.OrderConfirmed(order_id=order_id)


async def parcels(alone: World) -> dict[str, str]:
    return {row.order_id: row.state for row in await rows(alone, shipping, shipments)}


async def test_shipping_prepares_picks_and_hands_over(open_world: OpenWorld) -> None:
    async with open_world(shipping) as alone:
        created, confirmed = to_ship("1")
        await tell(alone, created)
        assert await parcels(alone) == {"1": "prepared"}
        await tell(alone, confirmed)
        assert await parcels(alone) == {"1": "dispatched"}
        assert await types(alone, "shipment-1") == ["ShipmentPicked", "ShipmentDispatched"]
