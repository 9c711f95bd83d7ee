"""Order's HTTP API as the demo's customers use it: they repeat a request, with the same key, until they get an
answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx

from services.demo.shop import REASON, Purchase
from services.order.events import OrderCreated
from tidings import RecordedEvent, wire_name

__all__ = ["OverHttp", "ShopFailed", "over_http"]

PATIENCE: Final = 60.0
"""Seconds for which a customer repeats a request."""
PAUSES: Final = (0.1, 1.0)
"""Seconds between two requests: the first pause, and the longest."""


class ShopFailed(Exception):
    """An unexpected answer, or none for too long."""


class OverHttp:
    """A `Shop` over HTTP. Get one from `over_http`."""

    def __init__(self, client: httpx.AsyncClient, patience: float = PATIENCE) -> None:
        self._client = client
        self._patience = patience
        self._numbers: dict[str, str] = {}
        """Order's id to the number of its invoice."""
        self._ids: dict[str, str] = {}
        """The other way round."""
        self.answered = 0
        """Orders that the API accepted."""
        self.asked_again = 0
        """Requests that were lost or refused for the moment, and repeated."""

    async def place(self, purchase: Purchase) -> bool:
        """See `Shop.place`. The invoice number is the Idempotency-Key, and the correlation id of all that comes of the
        order. Always True, because the API answers a repeated request like the first one. Raises `ShopFailed`.
        """
        number = purchase.number
        document: dict[str, Any] = {
            "country": purchase.country,
            "placed_at": purchase.at.isoformat(),
            "lines": [line.model_dump(mode="json") for line in purchase.lines],
        }
        if purchase.customer is not None:
            document["customer_id"] = purchase.customer
        answer = await self._ask("/orders", document, {"Idempotency-Key": number, "X-Correlation-ID": number})
        order_id = answer.json().get("id") if answer.status_code == 201 else None
        if not order_id or order_id != self._ids.setdefault(number, order_id):
            raise ShopFailed(f"invoice {number} was answered {answer.status_code}: {answer.text[:500]}")
        self._numbers[order_id] = number
        self.answered += 1
        return True

    async def cancel(self, number: str) -> None:
        """See `Shop.cancel`. Raises `ShopFailed`."""
        answer = await self._ask(f"/orders/{self.id_of(number)}/cancel", {"reason": REASON}, {})
        if answer.status_code not in (200, 409):  # 409: it has left already
            raise ShopFailed(f"cancelling {number} was answered {answer.status_code}: {answer.text[:500]}")

    def hear(self, event: RecordedEvent) -> None:
        """See `Shop.hear`. An order's correlation id is the number of its invoice."""
        if event.type == wire_name(OrderCreated):
            order_id, number = event.stream.partition("-")[2], str(json.loads(event.metadata)["$correlationId"])
            self._numbers[order_id], self._ids[number] = number, order_id

    def number_of(self, order_id: str) -> str:
        """See `Shop.number_of`."""
        return self._numbers.get(order_id, "")

    def id_of(self, number: str) -> str:
        """Return the id of the order of an invoice that was placed here."""
        return self._ids[number]

    async def _ask(self, path: str, document: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
        """Send a POST, and repeat it while there is no answer, or 503."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        pause, longest = PAUSES
        while True:
            try:
                answer = await self._client.post(path, json=document, headers=headers)
                if answer.status_code != 503:
                    return answer
                said = answer.text[:500]
            except httpx.TransportError as error:
                said = f"{type(error).__name__} {error}".strip()
            if loop.time() > deadline:
                raise ShopFailed(f"POST {path} has had no answer for {self._patience:g} s: {said}")
            self.asked_again += 1
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)


@asynccontextmanager
async def over_http(port: int) -> AsyncIterator[OverHttp]:
    """Return the shop at a port of this machine."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=15, trust_env=False) as client:
        yield OverHttp(client)
