"""The RabbitMQ demo's arithmetic and customers: a proof that cannot say no proves nothing, so each is made to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx
import pytest

from services.demo.fleet.audit import Effects, audit
from services.demo.fleet.comparison import compare
from services.demo.fleet.reading import Reading
from services.demo.fleet.shop import OverHttp, ShopFailed
from services.demo.fleet.traffic import Traffic
from services.demo.shop import Purchase
from services.importer import Goods, Invoice, Kind
from services.order.events import OrderLine
from tidings import RecordedEvent

MUG = {"sku": "MUG", "quantity": 2, "unit_price": "2.50"}
CUP = {"sku": "CUP", "quantity": 1, "unit_price": "0.10"}

LOG: list[tuple[str, dict[str, Any]]] = [
    ("GoodsReceived", {"sku": "MUG", "quantity": 9}),
    ("GoodsReceived", {"sku": "CUP", "quantity": 5}),
    ("OrderCreated", {"order_id": "1", "lines": [MUG, CUP, CUP]}),
    ("OrderCreated", {"order_id": "2", "lines": [MUG]}),
    ("ReturnReceived", {"return_id": "C1", "sku": "CUP", "quantity": 1}),
    ("PaymentDeclined", {"order_id": "2", "amount": "5.00"}),
    ("OrderCancelled", {"order_id": "2"}),
    ("PaymentCaptured", {"order_id": "1", "amount": "5.20"}),
    ("ShipmentDispatched", {"order_id": "1"}),
    ("OrderDispatched", {"order_id": "1"}),
]


def read(*events: tuple[str, dict[str, Any]], stream: str = "some-stream") -> Reading:
    reading = Reading()
    for position, (kind, data) in enumerate(events, 1):
        reading.hear(RecordedEvent(position, stream, 0, kind, json.dumps(data).encode(), b"", True, b"", 0))
    return reading


def same(name: str) -> str:
    return name


# ---- the same orders? ----------------------------------------------------------------


def differences(other: Reading, number_of: Callable[[str], str] = same) -> dict[str, str]:
    return {line.what: line.difference for line in compare(read(*LOG), other, number_of) if line.difference}


def test_the_same_trade_is_equal_in_another_order_and_under_other_order_ids() -> None:
    renamed = [
        (kind, data | ({"order_id": f"id-{data['order_id']}"} if "order_id" in data else {})) for kind, data in LOG
    ]
    last_first = sorted(renamed, key=lambda entry: entry[0] != "GoodsReceived")
    assert differences(read(*last_first), lambda order_id: order_id.removeprefix("id-")) == {}
    lines = {line.what: (line.embedded, line.fleet) for line in compare(read(*LOG), read(*LOG), same)}
    assert lines == {
        "orders": ("2", "2"),
        "lines": ("4", "4"),
        "returns": ("1", "1"),
        "gross value": ("£10.20", "£10.20"),
        "payment declines": ("1", "1"),
    }


def test_what_tidings_writes_for_itself_is_not_read() -> None:
    assert read(("OrderCreated", {"order_id": "1", "lines": [MUG]}), stream="tidings_relay-main").baskets == {}


@pytest.mark.parametrize(
    ("log", "what", "difference"),
    [
        ([*LOG[:3], *LOG[4:]], "orders", "1 missing (2)"),
        ([*LOG, ("OrderCreated", {"order_id": "3", "lines": [CUP]})], "orders", "1 too many (3)"),
        ([*LOG[:3], ("OrderCreated", {"order_id": "2", "lines": [CUP]}), *LOG[4:]], "lines", "1 different (2)"),
        (
            [*LOG[:3], ("OrderCreated", {"order_id": "2", "lines": [MUG | {"unit_price": "2.51"}]}), *LOG[4:]],
            "gross value",
            "1 different (2)",
        ),
        ([*LOG, ("ReturnReceived", {"return_id": "C1", "sku": "CUP", "quantity": 1})], "returns", "1 different (C1)"),
        ([*LOG[:5], *LOG[6:]], "payment declines", "1 missing (2)"),
        ([*LOG, ("PaymentDeclined", {"order_id": "1", "amount": "5.20"})], "payment declines", "1 too many (1)"),
    ],
)
def test_a_difference_is_found_and_named(log: list[tuple[str, dict[str, Any]]], what: str, difference: str) -> None:
    assert differences(read(*log))[what] == difference


def test_two_orders_of_one_invoice_are_found() -> None:
    doubled = read(*LOG, ("OrderCreated", {"order_id": "2b", "lines": [MUG]}))
    assert differences(doubled, lambda order_id: order_id.removesuffix("b"))["orders"] == "1 twice"


# ---- nothing twice? ------------------------------------------------------------------

DONE = Effects(
    moved={"MUG": (9, 0, 2), "CUP": (5, 1, 2)},
    reserved={"MUG": (0, 0), "CUP": (0, 0)},
    operations=[("order 1", "authorise"), ("order 1", "capture"), ("order 2", "decline")],
    calls=4,
    parcels={"1": "dispatched", "2": "stopped"},
    listed={"1": "dispatched", "2": "cancelled"},
    sales=1,
)


def broken(log: Reading, done: Effects) -> set[str]:
    return {check.what for check in audit(log, done) if not check.holds}


def test_good_effects_break_nothing() -> None:
    assert broken(read(*LOG), DONE) == set()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"moved": {**DONE.moved, "MUG": (18, 0, 2)}}, "each piece arrived and left once, article by article"),
        ({"moved": {**DONE.moved, "MUG": (9, 0, 4)}}, "each piece arrived and left once, article by article"),
        ({"moved": {"MUG": (9, 0, 2)}}, "each piece arrived and left once, article by article"),
        ({"reserved": {"MUG": (2, 0)}}, "every reserved piece belongs to an open order"),
        ({"operations": [*DONE.operations, ("order 1", "capture")]}, "the gateway did nothing twice for one order"),
        ({"parcels": {"1": "dispatched"}}, "one parcel per order, dispatched if the log says so"),
        ({"parcels": {"1": "dispatched", "2": "dispatched"}}, "one parcel per order, dispatched if the log says so"),
        ({"listed": {**DONE.listed, "2": "placed"}}, "Order's list agrees with the log about every order"),
        ({"listed": {"1": "dispatched"}}, "Order's list agrees with the log about every order"),
        ({"sales": 2}, "each sale and each refund was counted once"),
    ],
)
def test_an_effect_that_is_missing_or_was_repeated_is_found(change: dict[str, Any], what: str) -> None:
    assert what in broken(read(*LOG), replace(DONE, **change))


def test_an_event_that_was_said_twice_is_found_but_a_customer_may_ask_again() -> None:
    assert broken(read(*LOG, LOG[-2]), DONE) == {"no event of an order occurs twice"}
    asked = ("OrderCancellationRequested", {"order_id": "1"}), ("OrderCancellationRefused", {"order_id": "1"})
    assert broken(read(*LOG[:-1], *asked, *asked, LOG[-1]), DONE) == set()


# ---- customers who ask again ---------------------------------------------------------

PURCHASE = Purchase(
    "536365",
    [OrderLine(sku="MUG", description="A MUG", quantity=2, unit_price=Decimal("2.50"))],
    "17850",
    "United Kingdom",
    datetime(2010, 12, 1, 8, 26, tzinfo=UTC),
    "a test",
)
ORDER_ID = "2f2c4c4e-5a3c-4b57-8d6e-0c1f9a1b2c3d"


class Api:
    """A server that answers as told and remembers the requests."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self._answers: Iterator[httpx.Response | Exception] = iter(answers)
        self.asked: list[httpx.Request] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def shop(api: Api, patience: float = 10) -> OverHttp:
    return OverHttp(httpx.AsyncClient(transport=httpx.MockTransport(api), base_url="http://shop"), patience)


async def test_an_order_is_asked_for_with_the_same_key_until_there_is_an_answer() -> None:
    lost, busy, placed = httpx.ReadError("reset"), httpx.Response(503), httpx.Response(201, json={"id": ORDER_ID})
    api = Api(httpx.ConnectError("refused"), lost, busy, placed)
    counter = shop(api)
    assert await counter.place(PURCHASE)
    assert {request.headers["Idempotency-Key"] for request in api.asked} == {"536365"}
    assert len({request.content for request in api.asked}) == 1
    assert json.loads(api.asked[0].content) == {
        "customer_id": "17850",
        "country": "United Kingdom",
        "placed_at": "2010-12-01T08:26:00+00:00",
        "lines": [{"sku": "MUG", "description": "A MUG", "quantity": 2, "unit_price": "2.50"}],
    }
    assert (counter.answered, counter.asked_again) == (1, 3)
    assert counter.number_of(ORDER_ID) == "536365"


def created(order_id: str, number: str) -> RecordedEvent:
    metadata = json.dumps({"$correlationId": number}).encode()
    return RecordedEvent(1, f"order-{order_id}", 0, "OrderCreated", b"{}", metadata, True, b"1" * 16, 0)


async def test_a_customer_who_has_no_answer_yet_learns_from_the_log_which_order_it_is() -> None:
    api = Api(httpx.Response(200), httpx.Response(201, json={"id": "another"}))
    counter = shop(api)
    counter.hear(created(ORDER_ID, "536365"))
    assert counter.number_of(ORDER_ID) == "536365"
    await counter.cancel("536365")
    assert api.asked[0].url.path == f"/orders/{ORDER_ID}/cancel"
    with pytest.raises(ShopFailed, match="invoice 536365 was answered 201"):
        await counter.place(PURCHASE)


@pytest.mark.parametrize("answer", [httpx.Response(422, text="no"), httpx.Response(201, json={}), httpx.Response(500)])
async def test_an_answer_that_nobody_expected_is_not_taken_for_an_order(answer: httpx.Response) -> None:
    with pytest.raises(ShopFailed, match=r"invoice 536365 was answered \d+"):
        await shop(Api(answer)).place(PURCHASE)


async def test_a_shop_that_never_answers_is_given_up_and_named() -> None:
    with pytest.raises(ShopFailed, match="POST /orders has had no answer for 0 s: ConnectError refused"):
        await shop(Api(httpx.ConnectError("refused")), patience=0).place(PURCHASE)


async def test_a_cancellation_that_comes_too_late_is_an_answer_and_an_unknown_order_is_none() -> None:
    placed = httpx.Response(201, json={"id": ORDER_ID})
    api = Api(placed, httpx.Response(200), httpx.Response(409), httpx.Response(404))
    counter = shop(api)
    await counter.place(PURCHASE)
    await counter.cancel("536365")
    await counter.cancel("536365")
    assert api.asked[1].url.path == f"/orders/{ORDER_ID}/cancel"
    with pytest.raises(ShopFailed, match="cancelling 536365 was answered 404"):
        await counter.cancel("536365")


# ---- traffic -------------------------------------------------------------------------


def invoice(number: int) -> Invoice:
    goods = (Goods("MUG", "A MUG", 1, Decimal(1)),)
    return Invoice(Kind.ORDER, str(number), datetime(2010, 12, 1, tzinfo=UTC), None, "France", goods, number)


async def test_traffic_goes_as_far_as_it_may_and_takes_each_invoice_in_once() -> None:
    taken: list[str] = []

    async def take_in(invoice: Invoice) -> None:
        await asyncio.sleep(0)
        taken.append(invoice.number)

    traffic = Traffic([invoice(number) for number in range(50)], take_in)
    running = asyncio.create_task(traffic.run())
    await traffic.go_on(20)
    await traffic.reached(20)
    for _ in range(100):
        await asyncio.sleep(0)
    assert (traffic.done, len(taken)) == (20, 20), "no further than it may"
    await traffic.go_on(1000)
    await traffic.reached(1000)
    await running
    assert sorted(taken, key=int) == [str(number) for number in range(50)]


async def test_traffic_stops_with_the_first_invoice_that_cannot_be_taken_in() -> None:
    async def refuse(invoice: Invoice) -> None:
        raise ShopFailed("no")

    traffic = Traffic([invoice(1)], refuse)
    await traffic.go_on(1)
    with pytest.raises(ExceptionGroup) as failed:
        await traffic.run()
    assert failed.group_contains(ShopFailed, match="no")
