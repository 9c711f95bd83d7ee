"""The file bus keeps the port's rules. TIDINGS_BUS names the bus, as it would for any service.

python -m pytest conformance.py
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from tidings import Event, EventData, Relay, Service, open_bus, open_store
from tidings.buses import EventBus
from tidings.settings import Settings
from tidings.testing.bus_conformance import BusConformance, BusEnvironment


class FileEnvironment:
    def __init__(self, url: str) -> None:
        self._url = url
        self._buses: list[Any] = []

    @asynccontextmanager
    async def open(self) -> AsyncIterator[EventBus]:
        async with open_bus(self._url) as bus:
            self._buses.append(bus)
            yield bus

    def _run(self, *statements: str, name: str) -> None:
        with closing(sqlite3.connect(self._url.removeprefix("file://"))) as database, database:
            for statement in statements:
                database.execute(statement, (name,))

    async def delete_queue(self, name: str) -> None:
        self._run("DELETE FROM queues WHERE name = ?", name=name)

    async def drop_connections(self) -> None:
        for bus in self._buses:
            for connection in list(bus.connections):
                connection.cut("the connection was cut")
        await asyncio.sleep(0)

    async def occupy(self, name: str) -> None:
        self._run("INSERT INTO queues (name) VALUES (?)", name=name)


class TestFileBus(BusConformance):
    @pytest.fixture
    def environment(self) -> BusEnvironment:
        return FileEnvironment(Settings().bus)


async def test_the_scheme_is_answered_by_this_package() -> None:
    async with open_bus(Settings().bus) as bus:
        assert type(bus).__module__ == "tidings_filebus"


class Counted(Event):
    number: int


async def test_a_service_over_it_handles_each_event_once_in_order(tmp_path: Path) -> None:
    service = Service("counting")
    seen: list[int] = []

    @service.on(Counted)
    async def count(event: Counted) -> None:
        seen.append(event.number)

    settings = Settings(store=f"sqlite:///{tmp_path}/log.db", database=f"sqlite:///{tmp_path}/counting.db")
    async with open_store(settings.store) as store, open_bus(settings.bus) as bus:
        await store.append("numbers", [EventData("Counted", b'{"number":%d}' % number) for number in range(300)])
        relay = asyncio.create_task(Relay(store, bus).run())
        try:
            async with service.running(settings, store=store, bus=bus), asyncio.timeout(30):
                while len(seen) < 300:
                    await asyncio.sleep(0.01)
        finally:
            relay.cancel()
            await asyncio.gather(relay, return_exceptions=True)
    assert seen == list(range(300))
