"""Four services, a few orders that want the same goods, and every order of events that hypothesis can think of."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inventory.events import GoodsReceived, ReturnReceived
from services.inventory.tables import reservations, stock
from services.order import Order, OrderRefused, Status
from services.order.events import OrderLine
from services.payment.gateway import Operation
from services.payment.tables import payments
from services.shipping.tables import shipments
from tests.services.world import World, world

SERVICES = ("order", "inventory", "payment", "shipping")
PLACED_AT = datetime(2010, 12, 1, tzinfo=UTC)

DECLINED = Decimal("2.90")
"""Amount that the sandbox declines."""

# Three orders over two scarce articles: not all of them can be had, and the second will not be paid.
CUPS = OrderLine(sku="cup", quantity=2, unit_price=Decimal("1.00"))
JAR = OrderLine(sku="jar", quantity=1, unit_price=Decimal("4.99"))
WANTED = {"1": [CUPS, JAR], "2": [OrderLine(sku="cup", quantity=1, unit_price=DECLINED)], "3": [JAR, CUPS]}
RECEIVED = {"cup": 3, "jar": 5}
RETURNED = 1

TOLD = {
    "PaymentAuthorised": Operation.AUTHORISE,
    "PaymentDeclined": Operation.DECLINE,
    "PaymentCaptured": Operation.CAPTURE,
    "PaymentVoided": Operation.VOID,
    "PaymentRefunded": Operation.REFUND,
}

Step = tuple[str, str]

steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["handle", "handle", "handle", "dies", "emit", "emit"]), st.sampled_from(SERVICES)),
        st.tuples(st.sampled_from(["place", "cancel"]), st.sampled_from(sorted(WANTED))),
    ),
    max_size=120,
)


async def open_shop(shop: World) -> None:
    for sku, quantity in RECEIVED.items():
        await shop.say(f"goods-{sku}", GoodsReceived(sku=sku, quantity=quantity))
    await shop.run_dry()
    await shop.say("return-1", ReturnReceived(return_id="1", sku="cup", quantity=RETURNED))


async def take(shop: World, step: Step) -> None:
    what, whom = step
    if what == "place" and not shop.said(whom):
        await shop.repository.create(whom, Order.place, WANTED[whom], None, "France", PLACED_AT)
    elif what == "cancel" and shop.said(whom):
        before = await shop.repository.load(whom)
        try:
            await shop.repository.change(whom, Order.cancel, "changed my mind")
        except OrderRefused:
            assert before.status is Status.DISPATCHED
    elif what in ("handle", "dies"):
        await shop.handle(whom, dies=what == "dies")
    elif what == "emit":
        await shop.emit(whom)


async def check_always(shop: World) -> None:
    """Assert what holds at every moment."""
    for row in await shop.rows("inventory", stock):
        assert row.on_hand >= 0
        assert row.on_hand + row.reserved + row.shipped == row.received + row.returned
    for order_id in WANTED:
        said = set(shop.said(order_id))
        assert not {"OrderCancelled", "OrderDispatched"} <= said
        assert not {"OrderCancelled", "ShipmentDispatched"} <= said, "it left the house and was cancelled"


async def check_at_the_end(shop: World) -> None:
    """Assert what holds when no service has anything left to do."""
    parcels = {row.order_id: row.state for row in await shop.rows("shipping", shipments)}
    money = {row.order_id: row.state for row in await shop.rows("payment", payments)}
    goods = {row.order_id: row.state for row in await shop.rows("inventory", reservations)}
    for order_id in filter(shop.said, WANTED):
        order = await shop.repository.load(order_id)
        assert order.status.final, shop.said(order_id)
        left = order.status is Status.DISPATCHED
        assert parcels[order_id] == ("dispatched" if left else "stopped")
        assert money[order_id] in (("captured",) if left else ("voided", "refunded", "declined"))
        assert goods.get(order_id) in (("shipped",) if left else ("released", None))
    assert all(row.reserved == 0 for row in await shop.rows("inventory", stock))
    await check_ledger(shop)


async def check_ledger(shop: World) -> None:
    """Assert that the gateway did what Payment says, once each, however often it was called."""
    done = [(entry.reference, entry.operation) for entry in await shop.gateway.ledger()]
    assert len(done) == len(set(done))
    said = [(f"order {order_id}", TOLD[kind]) for order_id in WANTED for kind in shop.said(order_id) if kind in TOLD]
    assert sorted(said) == sorted(done)


async def scenario(chosen: Sequence[Step]) -> None:
    async with world() as shop:
        await open_shop(shop)
        for step in chosen:
            await take(shop, step)
            await check_always(shop)
        await shop.run_dry()
        await check_always(shop)
        await check_at_the_end(shop)


@settings(deadline=None, max_examples=100)
@given(steps)
def test_every_interleaving_ends_with_goods_money_and_parcels_in_agreement(chosen: list[Step]) -> None:
    asyncio.run(scenario(chosen))


# ---- the races that matter, one by one -------------------------------------------------


async def until(shop: World, order_id: str, kind: str) -> None:
    """Let services work until an event of this type and order is in the log, and no step longer."""
    while kind not in shop.said(order_id):
        progress = False
        for name in SERVICES:
            for act in (shop.handle, shop.emit):
                progress |= await act(name)
                if kind in shop.said(order_id):
                    return
        assert progress, f"{kind} never comes: {shop.said(order_id)}"


async def cancel(shop: World, order_id: str) -> None:
    await shop.repository.change(order_id, Order.cancel, "changed my mind")


@pytest.mark.parametrize(
    ("moment", "end", "also"),
    [
        ("OrderCreated", "OrderCancelled", "PaymentVoided"),
        ("StockReserved", "OrderCancelled", "StockReleased"),
        ("OrderConfirmed", "OrderCancelled", "PaymentRefunded"),
        ("ShipmentPicked", "OrderDispatched", "OrderCancellationRefused"),
        ("ShipmentDispatched", "OrderDispatched", "OrderCancellationRefused"),
    ],
)
async def test_a_customer_who_cancels_at_this_moment(moment: str, end: str, also: str) -> None:
    async with world() as shop:
        await open_shop(shop)
        await take(shop, ("place", "1"))
        await until(shop, "1", moment)
        await cancel(shop, "1")
        await shop.run_dry()
        assert end in shop.said("1")
        assert also in shop.said("1")
        await check_always(shop)
        await check_at_the_end(shop)


async def test_a_cancelled_order_leaves_its_goods_to_the_next() -> None:
    async with world() as shop:
        await open_shop(shop)
        await take(shop, ("place", "1"))
        await cancel(shop, "1")
        await shop.run_dry()
        await take(shop, ("place", "3"))
        await shop.run_dry()
        assert "OrderDispatched" in shop.said("3")


async def test_a_declined_payment_gives_the_goods_back() -> None:
    async with world() as shop:
        await open_shop(shop)
        await take(shop, ("place", "2"))
        await shop.run_dry()
        order = await shop.repository.load("2")
        assert (order.status, order.by) == (Status.CANCELLED, "payment")
        assert "StockReleased" in shop.said("2")
        await check_at_the_end(shop)


async def test_every_process_that_dies_before_its_commit_repeats_itself_without_harm() -> None:
    async with world() as shop:
        await open_shop(shop)
        await take(shop, ("place", "1"))

        busy = True
        while busy:
            busy = False
            for name in SERVICES:
                before = shop.actors[name].position
                busy |= await shop.handle(name, dies=True)
                if shop.actors[name].position == before:
                    await shop.handle(name)
                busy |= await shop.emit(name)
        assert "OrderDispatched" in shop.said("1")
        assert {entry.calls for entry in await shop.gateway.ledger()} == {2}
        await check_always(shop)
        await check_at_the_end(shop)
