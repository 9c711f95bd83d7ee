"""What single handlers of the services do with an event: what they emit, and what they leave in their tables."""

from __future__ import annotations

from decimal import Decimal

import pytest
from sqlalchemy import insert

import services.inventory.events as inventory
import services.payment.events as payment
import services.sales.service as sales
import services.shipping.events as shipping
from services.inventory.service import Contradiction, release, reserve, ship
from services.inventory.tables import stock
from services.payment.gateway import PaymentGateway, open_sandbox
from services.payment.service import give_back
from services.payment.tables import payments
from services.shipping.service import hand_over, stop
from services.shipping.tables import shipments
from tidings.testing import given

TEN = inventory.GoodsReceived(sku="CUP", quantity=10)


def wanted(*lines: tuple[str, int]) -> inventory.OrderCreated:
    ordered = tuple(inventory.OrderLine(sku=sku, quantity=quantity) for sku, quantity in lines)
    return inventory.OrderCreated(order_id="1", lines=ordered)


def cups(on_hand: int, reserved: int = 0) -> dict[str, object]:
    return {"sku": "CUP", "on_hand": on_hand, "reserved": reserved, "shipped": 0, "received": 10, "returned": 0}


# ---- inventory -----------------------------------------------------------------------


def test_inventory_reserves_all_lines_or_none() -> None:
    rejected = inventory.StockRejected(
        order_id="1",
        reason="out of stock: 1 of JAR, 2 of MUG, 1 of TIN and 1 more",
        missing=tuple(
            inventory.Shortage(sku=sku, wanted=pieces)
            for sku, pieces in (("JAR", 1), ("MUG", 2), ("TIN", 1), ("URN", 1))
        ),
    )
    lines = ("CUP", 3), ("JAR", 1), ("MUG", 2), ("TIN", 1), ("URN", 1)
    given(TEN).handling(reserve, wanted(*lines)).emits(("reservation-1", rejected)).leaves(stock, cups(10))


def test_inventory_adds_up_lines_of_the_same_article() -> None:
    short = inventory.StockRejected(
        order_id="1", reason="out of stock: 12 of CUP", missing=(inventory.Shortage(sku="CUP", wanted=12),)
    )
    given(TEN).handling(reserve, wanted(("CUP", 6), ("CUP", 6))).emits(short).leaves(stock, cups(10))
    reserved = inventory.StockReserved(order_id="1")
    given(TEN).handling(reserve, wanted(("CUP", 5), ("CUP", 5))).emits(reserved).leaves(stock, cups(0, 10))


def test_inventory_puts_back_what_was_reserved_once() -> None:
    cancelled = inventory.OrderCancelled(order_id="1")
    released = inventory.StockReleased(order_id="1")
    given(TEN, wanted(("CUP", 2))).handling(release, cancelled).emits(released).leaves(stock, cups(10))
    given(TEN, wanted(("CUP", 2)), cancelled).handling(release, cancelled).nothing().leaves(stock, cups(10))


def test_goods_that_leave_without_being_set_aside_are_never_swallowed() -> None:
    sent = inventory.ShipmentDispatched(order_id="1")
    says = "order 1 was shipped, but nothing is reserved for it; look at its events"
    given(TEN, wanted(("CUP", 11))).handling(ship, sent).raises(Contradiction, match=says).leaves(stock, cups(10))


# ---- payment -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amount", "state", "operations", "emitted"),
    [
        ("10.50", "voided", ["authorise", "void"], [payment.PaymentVoided(order_id="1", amount=Decimal("10.50"))]),
        ("2.90", "declined", ["decline"], []),  # there is nothing to give back
    ],
)
async def test_payment_gives_back_what_it_had(
    amount: str, state: str, operations: list[str], emitted: list[payment.PaymentVoided]
) -> None:
    line = payment.OrderLine(quantity=2, unit_price=Decimal(amount) / 2)
    created = payment.OrderCreated(order_id="1", lines=(line,))
    async with open_sandbox(":memory:") as gateway:
        handling = given(created).handling(
            give_back, payment.OrderCancelled(order_id="1"), resources={PaymentGateway: gateway}
        )
        (row,) = (await handling.emits(*emitted)).rows(payments)
        assert [entry.operation for entry in await gateway.ledger()] == operations
    assert row["state"] == state


# ---- shipping ------------------------------------------------------------------------


def parcel(state: str) -> dict[str, str]:
    return {"order_id": "1", "state": state, "country": "France"}


@pytest.mark.parametrize("news", [shipping.OrderCancelled, shipping.OrderCancellationRequested])
@pytest.mark.parametrize("state", ["prepared", "picked"])
def test_shipping_stops_a_parcel_that_is_still_here(
    news: type[shipping.OrderCancelled | shipping.OrderCancellationRequested], state: str
) -> None:
    here = insert(shipments).values(parcel(state))
    stopped = shipping.ShipmentStopped(order_id="1")
    given(here).handling(stop, news(order_id="1")).emits(("shipment-1", stopped)).leaves(shipments, parcel("stopped"))


@pytest.mark.parametrize("state", ["stopped", "dispatched"])
def test_shipping_stops_nothing_twice_and_nothing_that_has_left(state: str) -> None:
    there = insert(shipments).values(parcel(state))
    given(there).handling(stop, shipping.OrderCancelled(order_id="1")).nothing().leaves(shipments, parcel(state))


def test_shipping_hands_over_no_parcel_that_was_stopped() -> None:
    stopped = insert(shipments).values(parcel("stopped"))
    given(stopped).handling(hand_over, shipping.ShipmentPicked(order_id="1")).nothing()


# ---- sales ---------------------------------------------------------------------------


def test_sales_counts_per_country_and_takes_refunds_off() -> None:
    orders = [
        sales.OrderCreated(order_id=order_id, country=country)
        for order_id, country in (("1", "France"), ("2", "France"), ("3", "Japan"))
    ]
    paid = [sales.PaymentCaptured(order_id=order.order_id, amount=Decimal("0.29")) for order in orders]
    refunded = sales.PaymentRefunded(order_id="2", amount=Decimal("0.29"))
    given(*orders, *paid).handling(sales.subtract, refunded).nothing().leaves(
        sales.countries, {"country": "France", "sales": 1, "pence": 29}, {"country": "Japan", "sales": 1, "pence": 29}
    )
