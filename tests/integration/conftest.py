"""Where integration tests have their services' databases: on PostgreSQL, if a test or the whole run asks for it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.databases import EVERYWHERE, PLACE
from tidings.testing.databases import PostgreSQL


@pytest.fixture(autouse=EVERYWHERE)
async def on_postgresql(postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Give the test's services databases on PostgreSQL, which are dropped afterwards."""
    async with postgresql.isolated() as url:
        monkeypatch.setenv(PLACE, url)
        yield
