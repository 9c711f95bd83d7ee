"""The RabbitMQ adapter keeps the port's rules, on a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiormq
import pytest

from tidings.adapters import open_bus
from tidings.buses import EventBus
from tidings.buses.rabbitmq.bus import RabbitMQBus
from tidings.testing.bus_conformance import BusConformance, BusEnvironment


class RabbitMQEnvironment:
    """Harms the broker through another client library, so that the adapter does not judge itself."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._buses: list[RabbitMQBus] = []

    @asynccontextmanager
    async def open(self) -> AsyncIterator[EventBus]:
        async with open_bus(self._url) as bus:
            assert isinstance(bus, RabbitMQBus)
            self._buses.append(bus)
            yield bus

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[aiormq.abc.AbstractChannel]:
        connection = await aiormq.connect(self._url)
        try:
            yield await connection.channel()
        finally:
            await connection.close()

    async def delete_queue(self, name: str) -> None:
        async with self._channel() as channel:
            await channel.queue_delete(name)

    async def drop_connections(self) -> None:
        for bus in self._buses:
            for connection in bus.connections:
                connection.cut()
        await asyncio.sleep(0)

    async def occupy(self, name: str) -> None:
        async with self._channel() as channel:
            await channel.queue_declare(name, durable=True)


class TestRabbitMQBus(BusConformance):
    @pytest.fixture
    def environment(self, amqp_url: str) -> BusEnvironment:
        return RabbitMQEnvironment(amqp_url)
