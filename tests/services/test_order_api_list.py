"""The list of orders over HTTP: its pages, and how it keeps up with what was just written."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from httpx import ASGITransport, AsyncClient

import services.order.events as order_hears
from services.order import api as order_api
from services.order import orders, repository
from services.order.api import api
from services.order.events import OrderCreated
from services.order.order import Order
from services.order.read_model import listed
from tests.integration.embedded import settings_for
from tests.services.counter import CUPS, ORDER, Counter, OpenCounter, problem
from tests.services.shop import CUP, PLACED_AT, on_files, tell
from tidings import Relay, Runtime, wire_name
from tidings._support.tasks import supervised
from tidings.errors import DatabaseUnavailable
from tidings.protocol.position import CARRIED


async def ids(at: Counter, **asked: str | int) -> list[str]:
    """Return the ids on one page."""
    answer = await at.http.get("/orders", params=asked)
    assert answer.status_code == 200, answer.text
    return [order["id"] for order in answer.json()["orders"]]


async def pages(at: Counter, first: str) -> list[list[str]]:
    """Return the ids on all pages, by following the links."""
    found, url = [], first
    while url:
        answer = await at.http.get(url)
        found.append([order["id"] for order in answer.json()["orders"]])
        assert ("next" in answer.links) == (answer.json()["next"] is not None)
        url = answer.links.get("next", {}).get("url", "")
    return found


async def test_who_writes_finds_it_in_the_list_at_once(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        for _ in range(10):
            order_id = await at.placed()
            assert (await ids(at))[0] == order_id
            await at.cancel(order_id)
            assert (await ids(at, status="cancelled"))[0] == order_id


async def test_the_list_says_what_one_needs_to_know(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        order_id = await at.placed(lines=[CUPS, CUPS])
        answer = await at.http.get("/orders")
        assert answer.json() == {
            "orders": [
                {
                    "id": order_id,
                    "status": "placed",
                    "customer_id": "17850",
                    "country": "France",
                    "placed_at": "2010-12-01T08:26:00+00:00",
                    "lines": 2,
                    "total": "10.20",
                }
            ],
            "next": None,
        }


async def test_pages_are_stable_while_orders_come_in(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        placed = [await at.placed() for _ in range(7)][::-1]
        assert await pages(at, "/orders?limit=3") == [placed[:3], placed[3:6], placed[6:]]
        assert await pages(at, "/orders?limit=7") == [placed]
        first = (await at.http.get("/orders", params={"limit": 3})).json()
        await at.placed()
        assert await ids(at, limit=3, cursor=first["next"]) == placed[3:6]


async def test_the_list_can_be_asked_for_some_orders_only(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        mine = [await at.placed(customer_id="me") for _ in range(3)][::-1]
        theirs = await at.placed(customer_id="them")
        guest = await at.placed(customer_id=None)
        await at.cancel(mine[0])
        assert await ids(at, customer_id="me") == mine
        assert await ids(at, customer_id="them") == [theirs]
        assert await ids(at, status="placed") == [guest, theirs, *mine[1:]]
        assert await ids(at, status="placed", customer_id="me") == mine[1:]
        assert await ids(at, status="dispatched") == []
        assert await pages(at, "/orders?limit=1&customer_id=me&status=placed") == [[each] for each in mine[1:]]


async def test_the_list_follows_an_order_to_its_end(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        order_id = await at.placed()
        news = [
            (order_hears.StockReserved(order_id=order_id), "placed"),
            (order_hears.PaymentAuthorised(order_id=order_id), "confirmed"),
            (None, "cancelling"),
            (order_hears.ShipmentDispatched(order_id=order_id), "dispatched"),
        ]
        for event, status in news:
            await (tell(at.world, event) if event else at.cancel(order_id))
            assert await ids(at, status=status) == [order_id]


async def test_a_list_that_nobody_writes_lets_orders_through_and_says_that_it_lags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no relay at first, as if the bus were down."""
    monkeypatch.setattr(order_api, "WRITE_WAITS", 0.05)
    monkeypatch.setattr(order_api, "LIST_WAITS", 0.05)
    async with (
        Runtime(orders, settings=settings_for(tmp_path), relay=False) as runtime,
        AsyncClient(transport=ASGITransport(api), base_url="http://shop") as http,
    ):
        placed = await http.post("/orders", json=ORDER)
        assert placed.status_code == 201
        assert (await http.get(placed.headers["Location"])).status_code == 200
        assert (await http.get("/orders")).json()["orders"] == []
        position = placed.headers["Tidings-Position"]
        for asked in ({"params": {"after_position": position}}, {"headers": {"Tidings-Position": position}}):
            answer = await http.get("/orders", **asked)  # type: ignore[arg-type]
            problem(answer, 503, "list-lags")
            assert int(answer.headers["Retry-After"]) > 0

        monkeypatch.setattr(order_api, "LIST_WAITS", 30.0)
        waiting = asyncio.create_task(http.get("/orders", headers={"Tidings-Position": position}))
        async with supervised(Relay(runtime.store, runtime.bus, marker_seconds=0.1).run()):
            answer = await waiting
        assert [order["id"] for order in answer.json()["orders"]] == [placed.json()["id"]]


async def test_a_position_that_the_log_has_not_reached_is_not_waited_for(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        problem(await at.http.get("/orders", params={"after_position": 10**9}), 409, "position-ahead")


async def test_a_database_that_does_not_answer_is_no_fault_of_the_caller(
    open_counter: OpenCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable() -> None:
        raise DatabaseUnavailable("database sqlite:////secret/order.db: locked")

    async with open_counter() as at:
        with monkeypatch.context() as broken:
            broken.setattr(orders.running_now.database, "reading", unavailable)
            answer = await at.http.get("/orders")
            assert problem(answer, 503, "unavailable")["detail"].endswith("Repeat the request.")
            assert "secret" not in answer.text
            assert (await at.place()).status_code == 201, "an order does not need the list"


async def test_an_order_older_than_the_list_is_left_out_and_nothing_is_dead(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        order_id = await at.placed()
        async with at.world.session(orders) as session:
            await session.execute(listed.delete())
        assert (await at.cancel(order_id)).status_code == 200
        assert await ids(at) == []


async def test_a_new_database_lists_all_orders_again(tmp_path: Path) -> None:
    async with on_files(tmp_path, orders) as before:
        for order_id in ("1", "2"):
            await repository.create(order_id, Order.place, [CUP], None, "France", PLACED_AT)
        await repository.change("1", Order.cancel, "changed my mind")
        await before.settled()
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"order.db{suffix}").unlink(missing_ok=True)
    async with on_files(tmp_path, orders) as after:
        await after.settled()
        async with after.engine(orders).connect() as connection:
            rows = {row.order_id: row.status for row in await connection.execute(listed.select())}
        assert rows == {"1": "cancelled", "2": "placed"}
        log = [event.type async for event in after.store.read_all(filter=CARRIED)]
        assert log.count(wire_name(OrderCreated)) == 2
