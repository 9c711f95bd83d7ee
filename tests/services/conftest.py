"""Worlds of the services. `make services` runs the tests that open one again, on a real RabbitMQ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.inventory import inventory
from services.order import api as order_api
from services.order import orders
from services.payment import payment
from services.shipping import shipping
from tests.services.counter import OpenCounter, counter
from tests.services.shop import OpenWorld
from tidings import Service
from tidings.testing import World

WORLDS = ("open_world", "open_counter")
"""Fixtures that open a world."""
AT_THE_DOOR = "test_order_api_abuse"
"""Module whose requests are refused, so that no event of theirs reaches a broker."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder that open a world in which something happens."""
    for item in items:
        opens = any(fixture in getattr(item, "fixturenames", ()) for fixture in WORLDS)
        if opens and item.path.stem != AT_THE_DOOR:
            item.add_marker(pytest.mark.worlds)


@pytest.fixture
def open_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenWorld:
    """`async with open_world(orders, inventory) as world` opens a world of these services; without any, of all four.
    The gateway outlives their processes."""
    monkeypatch.setenv("PAYMENT_LEDGER", str(tmp_path / "gateway.db"))

    def opened(*services: Service, **more: Any) -> World:
        return World(*(services or (orders, inventory, payment, shipping)), **more)

    return opened


@pytest.fixture
def open_counter(monkeypatch: pytest.MonkeyPatch) -> OpenCounter:
    """`async with open_counter() as at` runs Order alone, with an HTTP client. It waits for the list, however slow the
    machine is."""
    monkeypatch.setattr(order_api, "WRITE_WAITS", 30.0)
    monkeypatch.setattr(order_api, "LIST_WAITS", 30.0)
    return counter
