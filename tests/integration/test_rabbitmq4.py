"""What RabbitMQ 4 decides differently: the delivery limit of quorum queues, sizes, and what it means to remove."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiormq
import pytest
from structlog.testing import capture_logs

from tidings import open_bus
from tidings.buses import Subscription
from tidings.buses.rabbitmq.topology import QUEUE_BYTES
from tidings.protocol.message import BODY_LIMIT
from tidings.testing.bus_conformance import event, events, send_all, take

SERVICE = Subscription("inventory")
OLD: dict[str, Any] = {
    "x-queue-type": "quorum",
    "x-single-active-consumer": True,
    "x-overflow": "drop-head",
    "x-max-length-bytes": QUEUE_BYTES,
}
"""Arguments of a queue that was made while the broker was a RabbitMQ 3."""
CRASHES = 25
"""More than the deliveries after which RabbitMQ 4 drops a message by default."""


@asynccontextmanager
async def another_client(url: str) -> AsyncIterator[aiormq.abc.AbstractChannel]:
    connection = await aiormq.connect(url)
    try:
        yield await connection.channel()
    finally:
        await connection.close()


@pytest.mark.rabbitmq4
async def test_what_a_service_took_in_many_crashes_is_still_there(bus_url: str) -> None:
    async with open_bus(bus_url) as bus:
        await bus.provision(SERVICE)
        messages = events(3)
        async with bus.publisher() as publisher:
            await send_all(publisher, messages)
        for _ in range(CRASHES):
            async with bus.consume(SERVICE) as consumer:
                assert len(await take(consumer, 3)) == 3
        async with bus.consume(SERVICE) as consumer:
            last = await take(consumer, 3)
            assert sorted(delivery.message.message_id for delivery in last) == sorted(
                message.message_id for message in messages
            )
            consumer.settle_through(last[-1].tag)


@pytest.mark.rabbitmq4
async def test_the_largest_event_fits_through_the_brokers_default(bus_url: str) -> None:
    async with open_bus(bus_url) as bus:
        await bus.provision(SERVICE)
        async with bus.publisher() as publisher:
            await publisher.send(event(1, data=b"x" * BODY_LIMIT))
        async with bus.consume(SERVICE) as consumer:
            (delivery,) = await take(consumer, 1)
            assert len(delivery.message.body) == BODY_LIMIT


@pytest.mark.only_rabbitmq4
@pytest.mark.parametrize(("limit", "found", "said"), [(None, "none", "RabbitMQ 4 takes 20"), (7, "7", "limit of 7")])
async def test_a_queue_with_a_delivery_limit_is_taken_as_it_is_and_named(
    bus_url: str, limit: int | None, found: str, said: str
) -> None:
    """As those are that a broker brings from its time as a RabbitMQ 3."""
    arguments = OLD if limit is None else OLD | {"x-delivery-limit": limit}
    async with another_client(bus_url) as channel:
        await channel.queue_declare(SERVICE.queue, durable=True, arguments=arguments)
    async with open_bus(bus_url) as bus:
        with capture_logs() as logs:
            await bus.provision(SERVICE)
        assert [(line["event"], line["found"]) for line in logs] == [("bus.delivery_limit_differs", found)]
        queue = (await bus.inspect([SERVICE]))[1]
        assert (queue.state, said in queue.detail) == ("fits", True)
        assert "rabbitmqctl delete_queue tidings.inventory" in queue.detail
        await bus.delete([SERVICE])
        with capture_logs() as logs:
            await bus.provision(SERVICE)
        assert logs == []
        assert (await bus.inspect([SERVICE]))[1].detail == ""
