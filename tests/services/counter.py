"""The counter of the shop: Order alone in a world, asked over HTTP without a network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

from httpx import AsyncClient, Response

from services.order import orders
from services.order.api import api
from tests.services.shop import types
from tidings.testing import World

CUPS: Final[dict[str, Any]] = {"sku": "CUP", "description": "RED CUP", "quantity": 2, "unit_price": "2.55"}
ORDER: Final[dict[str, Any]] = {
    "customer_id": "17850",
    "country": "France",
    "lines": [CUPS],
    "placed_at": "2010-12-01T08:26:00Z",
}

OpenCounter = Callable[[], AbstractAsyncContextManager["Counter"]]
"""See the fixture `open_counter`."""


class Counter:
    """Order alone, asked over HTTP. Get one from the fixture `open_counter`."""

    def __init__(self, http: AsyncClient, world: World) -> None:
        self.http = http
        self.world = world

    async def place(self, key: str | None = None, **other: Any) -> Response:
        """POST `ORDER` to /orders, with some fields replaced."""
        headers = {"Idempotency-Key": key} if key is not None else {}
        return await self.http.post("/orders", json=ORDER | other, headers=headers)

    async def placed(self, **other: Any) -> str:
        """Place an order. Return its id."""
        answer = await self.place(**other)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    async def cancel(self, order_id: str, **headers: str) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post(f"/orders/{order_id}/cancel", json={"reason": "changed my mind"}, headers=named)

    async def created(self) -> int:
        """Return the number of orders in the log."""
        return (await types(self.world)).count("OrderCreated")


def problem(answer: Response, status: int, kind: str = "") -> dict[str, Any]:
    """Return the problem document of an answer. Asserts its status and type."""
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json"), answer.text
    document: dict[str, Any] = answer.json()
    assert document["type"] == (f"urn:problem:{kind}" if kind else "about:blank"), document
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    assert document["instance"]
    assert document["correlation_id"] == answer.headers["X-Correlation-ID"]
    return document


@asynccontextmanager
async def counter() -> AsyncIterator[Counter]:
    async with World(orders) as world, world.client(api, base_url="http://shop") as http:
        yield Counter(http, world)
        await world.settled()
