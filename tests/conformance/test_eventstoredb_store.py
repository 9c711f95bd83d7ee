"""The EventStoreDB adapter keeps the rules of the port, against the project's own server, or a real one.

`TIDINGS_TEST_EVENTSTOREDB` names the real one: `esdb://localhost:2113?Tls=false`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tidings.server import EventStoreServer
from tidings.stores import Ability, EventStore
from tidings.stores.eventstoredb.store import open_eventstoredb
from tidings.testing.store_conformance import Reopen, StoreConformance


class Served(StoreConformance):
    release = ""

    @pytest.fixture
    async def url(self, tmp_path: Path) -> AsyncIterator[str]:
        real = os.environ.get("TIDINGS_TEST_EVENTSTOREDB")
        if real:
            yield real
        else:
            async with EventStoreServer(str(tmp_path / "log.db"), release=self.release) as server:
                yield server.uri

    @pytest.fixture
    async def store(self, url: str) -> AsyncIterator[EventStore]:
        store = await open_eventstoredb(url)
        yield store
        await store.close()

    @pytest.fixture
    def reopen(self, url: str) -> Reopen:
        @asynccontextmanager
        async def again() -> AsyncIterator[EventStore]:
            store = await open_eventstoredb(url)
            yield store
            await store.close()

        return again


class TestEventStoreDB(Served):
    release = "eventstoredb-24.2"

    @pytest.fixture
    async def abilities(self, store: EventStore) -> frozenset[Ability]:
        return await store.abilities() if os.environ.get("TIDINGS_TEST_EVENTSTOREDB") else frozenset()


@pytest.mark.skipif("TIDINGS_TEST_EVENTSTOREDB" in os.environ, reason="the real server is asked once")
class TestKurrentDB(Served):
    release = "kurrentdb-26.1"

    @pytest.fixture
    def abilities(self) -> frozenset[Ability]:
        return frozenset({Ability.APPEND_SEVERAL})
