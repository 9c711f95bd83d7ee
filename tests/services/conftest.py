"""A shop to open in a folder of the test's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from services.inventory import inventory
from services.order import api as order_api
from services.order import orders
from services.payment import payment
from services.shipping import shipping
from tests.services.counter import OpenCounter, counter
from tests.services.shop import OpenShop, OpenWorld, shop
from tidings.testing import World


@pytest.fixture
def open_shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenShop:
    """`async with open_shop(orders, inventory) as running` opens a shop. Opened again, it continues where it was
    closed."""
    monkeypatch.setenv("PAYMENT_LEDGER", str(tmp_path / "gateway.db"))
    return partial(shop, tmp_path)


@pytest.fixture
def open_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenWorld:
    """`async with open_world() as world` opens a world of the four services. The gateway outlives their processes."""
    monkeypatch.setenv("PAYMENT_LEDGER", str(tmp_path / "gateway.db"))
    return partial(World, orders, inventory, payment, shipping)


@pytest.fixture
def open_counter(open_shop: OpenShop, monkeypatch: pytest.MonkeyPatch) -> OpenCounter:
    """`async with open_counter() as at` runs Order alone, with an HTTP client. It waits for the list, however slow the
    machine is."""
    monkeypatch.setattr(order_api, "WRITE_WAITS", 30.0)
    monkeypatch.setattr(order_api, "LIST_WAITS", 30.0)
    return partial(counter, open_shop)
