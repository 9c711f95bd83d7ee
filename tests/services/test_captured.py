"""A dead letter of the shop becomes a test with `tidings capture`, which fails as the event failed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.inventory import inventory
from services.order import Order, orders, repository
from services.order.events import ShipmentDispatched
from tests.services.shop import CUP, PLACED_AT, on_files
from tests.unit.command_line import invoke, pytest_in

CUSTOMER = "Iceland"


@pytest.fixture
def reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A parcel is dispatched of an order that is cancelled, because nothing is in stock. Return why two services gave
    the event up."""

    async def happen() -> list[str]:
        async with on_files(tmp_path, orders, inventory) as runtime:
            await repository.create("1001", Order.place, [CUP], None, CUSTOMER, PLACED_AT)
            await runtime.settled()
            await orders.append("told", ShipmentDispatched(order_id="1001"))
            await runtime.settled()
            return [letter.reason for part in (await runtime.verify()).services for letter in part.dead]

    found = asyncio.run(happen())
    monkeypatch.setenv("TIDINGS_STORE", f"sqlite:///{tmp_path}/events.db")
    monkeypatch.setenv("TIDINGS_DATABASE", f"sqlite:///{tmp_path}/{{service}}.db")
    monkeypatch.setenv("TIDINGS_SERVICES", "services.order.service:orders,services.inventory:inventory")
    return found


@pytest.mark.timeout(300)
def test_a_dead_letter_of_the_shop_fails_again_in_a_test(reasons: list[str], tmp_path: Path) -> None:
    assert [reason.partition(":")[0] for reason in reasons] == ["OrderRefused", "Contradiction"]
    texts: list[str] = []
    for service in ("order", "inventory"):
        ended = invoke("capture", "dead:1", "--service", service, *(("--redact", "country") if not texts else ()))
        assert ended.code == 0, ended.err
        texts.append(ended.out)
        (tmp_path / f"test_{service}.py").write_text(ended.out, encoding="utf-8")
    assert CUSTOMER not in texts[0]
    assert "StockRejected(" in texts[0], "another service's event is stated"
    assert "OrderCancelled" not in texts[0], "what the service decides itself is not"
    said = pytest_in(tmp_path)
    assert "2 failed in" in said
    for module, reason in zip(("order.order", "inventory.service"), reasons, strict=True):
        assert f"services.{module}.{reason}\n" in said
