"""The PostgreSQL store keeps the rules of the port, on a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tidings.adapters import open_store
from tidings.stores import EventStore
from tidings.testing.store_conformance import Reopen, StoreConformance


class TestPostgreSQL(StoreConformance):
    @pytest.fixture
    async def store(self, postgresql_url: str) -> AsyncIterator[EventStore]:
        async with open_store(postgresql_url) as store:
            yield store

    @pytest.fixture
    def reopen(self, postgresql_url: str) -> Reopen:
        return lambda: open_store(postgresql_url)
