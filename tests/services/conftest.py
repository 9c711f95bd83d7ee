"""A shop to open in a folder of the test's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.services.counter import OpenCounter, counter
from tests.services.shop import OpenShop, shop


@pytest.fixture
def open_shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenShop:
    """`async with open_shop(orders, inventory) as running` opens a shop. Opened again, it continues where it was
    closed."""
    monkeypatch.setenv("PAYMENT_LEDGER", str(tmp_path / "gateway.db"))
    return partial(shop, tmp_path)


@pytest.fixture
def open_counter(open_shop: OpenShop) -> OpenCounter:
    """`async with open_counter() as at` runs Order alone, with an HTTP client."""
    return partial(counter, open_shop)
