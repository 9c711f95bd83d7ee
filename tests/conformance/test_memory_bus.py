"""The embedded bus keeps the port's rules."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest

from tidings.adapters import open_bus
from tidings.buses import EventBus, Subscription
from tidings.buses.memory import MemoryBus, open_memory
from tidings.errors import ConfigurationError
from tidings.testing.bus_conformance import (
    RefusingBusConformance,
    RefusingBusEnvironment,
    event,
    events,
    send_all,
    take,
)


class MemoryEnvironment:
    def __init__(self) -> None:
        self._url = f"memory://{uuid4()}"
        self._harming: MemoryBus | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[EventBus]:
        async with open_bus(self._url) as bus:
            yield bus

    @asynccontextmanager
    async def _harm(self) -> AsyncIterator[MemoryBus]:
        bus = await open_memory(self._url)
        try:
            yield bus
        finally:
            await bus.close()

    async def delete_queue(self, name: str) -> None:
        async with self._harm() as bus:
            bus.delete_queue(name)

    async def drop_connections(self) -> None:
        async with self._harm() as bus:
            bus.drop_connections()

    async def occupy(self, name: str) -> None:
        async with self._harm() as bus:
            bus.occupy(name)

    async def refuse(self, name: str) -> None:
        async with self._harm() as bus:
            bus.refuse(name)


class TestMemoryBus(RefusingBusConformance):
    @pytest.fixture
    def environment(self) -> RefusingBusEnvironment:
        return MemoryEnvironment()


async def test_buses_of_one_name_are_one_until_the_last_closes() -> None:
    service = Subscription("inventory")
    first, second = await open_memory("memory://shared"), await open_memory("memory://shared")
    await first.provision(service)
    await first.close()
    await first.close()
    assert second.queued(service.queue) == 0
    await second.close()
    third = await open_memory("memory://shared")
    with pytest.raises(KeyError):
        third.queued(service.queue)
    await third.close()


async def test_a_full_queue_drops_its_oldest() -> None:
    service = Subscription("inventory")
    bus = MemoryBus("full", limit=3)
    await bus.provision(service)
    messages = events(5)
    async with bus.publisher() as publisher:
        await send_all(publisher, messages)
    async with bus.consume(service) as consumer:
        assert [delivery.message for delivery in await take(consumer, 3)] == messages[2:]
    await bus.close()


async def test_a_test_can_lose_repeat_and_reorder_messages() -> None:
    service = Subscription("inventory")
    bus = await open_memory("memory://tampered")
    await bus.provision(service)
    first, second, third = event(1), event(2), event(3)
    async with bus.publisher() as publisher:
        bus.tamper(lambda queue, message: {first.message_id: [], second.message_id: [third, second, second]}[
            message.message_id
        ])  # fmt: skip
        await publisher.send(first)
        await publisher.send(second)
        bus.tamper(None)
        await publisher.send(first)
    async with bus.consume(service) as consumer:
        assert [delivery.message for delivery in await take(consumer, 4)] == [third, second, second, first]
    assert bus.queued(service.queue) == 4
    bus.purge(service.queue)
    assert bus.queued(service.queue) == 0
    await bus.close()


@pytest.mark.parametrize("url", ["memory://a/b", "memory://a?limit=3", "memory://me:secret@a", "memory://a#b"])
async def test_a_url_with_more_than_a_name_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        await open_memory(url)
