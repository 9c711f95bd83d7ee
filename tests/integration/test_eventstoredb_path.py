"""The whole path over EventStoreDB: every event once and in order, while the server is killed or stopped.

The service and the relay are those of the embedded tests; the store is the adapter on a server that dies.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.integration.embedded import (
    World,
    assert_once_in_order,
    emitting,
    followed,
    many,
    rows,
    settings_for,
    until,
)
from tests.integration.eventstoredb import Server
from tidings import Relay, Service, open_bus, open_store
from tidings._support.tasks import supervised
from tidings.buses.memory import MemoryBus


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server.db")
    server.start()
    yield server
    server.kill()


@asynccontextmanager
async def world(folder: Path, server: Server, service: Service) -> AsyncIterator[World]:
    settings = settings_for(folder)
    url = f"esdb://127.0.0.1:{server.port}?Tls=false&DefaultDeadline=30"  # for a killed server to start
    async with open_store(url) as store, open_bus(settings.bus) as bus, open_store(url) as carried:
        assert isinstance(bus, MemoryBus)
        relay = Relay(carried, bus, marker_seconds=0.2, checkpoint_seconds=0.1)
        async with service.running(settings, store=store, bus=bus) as running, supervised(relay.run()):
            yield World(store, bus, [running])


@pytest.mark.parametrize("fault", ["none", "killed", "stopped"])
async def test_every_event_has_its_effects_once_and_in_order(tmp_path: Path, server: Server, fault: str) -> None:
    events, service = many(600, 20), emitting()
    async with world(tmp_path, server, service) as world_:
        await world_.append(*events[:200])
        appending = asyncio.ensure_future(world_.append(*events[200:400]))
        if fault == "killed":
            server.kill()
            await asyncio.to_thread(server.start)
        elif fault == "stopped":
            server.signal(signal.SIGSTOP)
            await asyncio.sleep(0.5)  # so long is the fault
            server.signal(signal.SIGCONT)
        await appending
        await world_.append(*events[400:])
        await world_.settled()
        assert_once_in_order(await rows(service), events)

        async def all_followed() -> bool:
            return len(await followed(world_.store)) >= len(events)

        await until(all_followed)
        assert_once_in_order(await followed(world_.store), events)
