"""The whole path over the PostgreSQL store: everybody's first day, and every event once while the server is harmed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from uuid import uuid4

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
from tests.integration.test_first_day import ORDERS, first_day
from tidings import Relay, Service, open_bus, open_store
from tidings._support.tasks import supervised
from tidings.buses.memory import MemoryBus
from tidings.testing.databases import PostgreSQLServer


@pytest.mark.parametrize("order", ORDERS, ids=["-".join(order) for order in ORDERS])
@pytest.mark.parametrize("bus", ["memory", "rabbitmq"])
async def test_the_first_events_are_handled_whatever_begins_first(
    tmp_path: Path, postgresql_url: str, request: pytest.FixtureRequest, bus: str, order: tuple[str, ...]
) -> None:
    bus_url = f"memory://{uuid4().hex}" if bus == "memory" else request.getfixturevalue("amqp_url")
    await asyncio.wait_for(first_day(tmp_path, nullcontext(postgresql_url), bus_url, order), 60)


@asynccontextmanager
async def world(folder: Path, url: str, service: Service) -> AsyncIterator[World]:
    settings = settings_for(folder)
    async with open_store(url) as store, open_bus(settings.bus) as bus, open_store(url) as carried:
        assert isinstance(bus, MemoryBus)
        relay = Relay(carried, bus, marker_seconds=0.2, checkpoint_seconds=0.1)
        async with service.running(settings, store=store, bus=bus) as running, supervised(relay.run()):
            yield World(store, bus, [running])


@pytest.mark.parametrize("fault", ["none", "killed", "stopped", "paused"])
async def test_every_event_has_its_effects_once_and_in_order(
    tmp_path: Path, postgresql_server: PostgreSQLServer, fault: str
) -> None:
    events, service = many(600, 20), emitting()
    async with postgresql_server.isolated() as url, world(tmp_path, url, service) as world_:
        await world_.append(*events[:200])
        appending = asyncio.ensure_future(world_.append(*events[200:400]))
        await asyncio.sleep(0)
        if fault == "killed":
            await asyncio.to_thread(postgresql_server.kill)
            await asyncio.to_thread(postgresql_server.start)
        elif fault == "stopped":
            await asyncio.to_thread(postgresql_server.stop)
            await asyncio.to_thread(postgresql_server.start)
        elif fault == "paused":
            await asyncio.to_thread(postgresql_server.pause)
            await asyncio.sleep(0.5)  # so long is the fault
            await asyncio.to_thread(postgresql_server.resume)
        await appending
        await world_.append(*events[400:])
        await world_.settled()
        assert_once_in_order(await rows(service), events)

        async def all_followed() -> bool:
            return len(await followed(world_.store)) >= len(events)

        await until(all_followed)
        assert_once_in_order(await followed(world_.store), events)
