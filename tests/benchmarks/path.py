"""What the rows about RabbitMQ share: the broker, the events, their messages, the peer's message, the verdict.

It measures nothing itself.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from uuid import uuid4

import aio_pika
import pytest
import structlog

from tidings import Event, EventStore, Service, Settings, open_bus
from tidings.buses import Subscription
from tidings.buses.rabbitmq.topology import EXCHANGE
from tidings.modelling.codec import encode
from tidings.protocol.message import Marker, Message
from tidings.protocol.message import encode as message_of
from tidings.protocol.position import Chain, carried
from tidings.testing.brokers import RabbitMQ, rabbitmq_for_tests

WINDOW = 256
"""Messages in flight that are not confirmed."""
PREFETCH = 1000
STREAMS, KEYS = 64, 500


class Measured(Event, key="key"):
    """An event of 200 bytes as JSON."""

    key: str
    number: int
    text: str


def measured(number: int) -> Measured:
    event = Measured(key=f"key-{number * 7919 % KEYS:03}", number=number, text="")
    return event.model_copy(update={"text": "x" * (200 - len(event.model_dump_json()))})


async def fill(store: EventStore, count: int) -> None:
    """Append `count` events as a service does."""
    for first in range(0, count, 500):
        for stream in range(STREAMS):
            numbers = range(first + stream, min(first + 500, count), STREAMS)
            if numbers:
                events = [encode(measured(number), id=uuid4()) for number in numbers]
                await store.append(f"measured-{stream}", events)


async def messages_of(store: EventStore, after: int = -1) -> list[Message]:
    """Return the messages that the relay would publish after a position, without markers. Each has 13 headers."""
    chain, log, messages = Chain(after), await store.log_id(), []
    async for event in store.read_all(after=after):
        if (bucket := carried(event)) is not None:
            previous = chain.stamp(bucket, event.position)
            messages.append(message_of(event, log=log, previous=previous, bucket=bucket))
    assert all(len(message.headers) == 13 for message in messages)
    return messages


def peers_message(message: Message) -> aio_pika.Message:
    """Return the same message for aio-pika."""
    return aio_pika.Message(
        message.body,
        headers={
            name: bytearray(value) if isinstance(value, bytes) else value for name, value in message.headers.items()
        },
        content_type=message.content_type,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        correlation_id=message.correlation_id,
        message_id=message.message_id,
        type=message.type,
        app_id=message.app_id,
    )


async def publish(url: str, messages: Sequence[Message]) -> None:
    """Publish messages in order into every bound queue, and wait for all confirms."""
    async with open_bus(url) as bus, bus.publisher() as publisher:
        for first in range(0, len(messages), WINDOW):
            await asyncio.gather(*(publisher.send(message) for message in messages[first : first + WINDOW]))


async def make_queue(url: str, service: str) -> None:
    """Create a queue as Tidings does for a service: a quorum queue that is bound to every event. Peers use the same
    kind."""
    async with open_bus(url) as bus:
        await bus.provision(Subscription(service))


async def drop_queue(url: str, service: str) -> None:
    async with await aio_pika.connect(url) as connection, await connection.channel() as channel:
        await channel.queue_delete(Subscription(service).queue)


@asynccontextmanager
async def aio_pika_exchange(url: str) -> AsyncIterator[aio_pika.abc.AbstractExchange]:
    """Return the exchange on a channel with confirms, on which a message that reaches no queue raises."""
    async with (
        await aio_pika.connect(url) as connection,
        connection.channel(publisher_confirms=True, on_return_raises=True) as channel,
    ):
        yield await channel.get_exchange(EXCHANGE)


async def handled_from_memory(service: Service, database: str, store: EventStore, messages: Sequence[Message]) -> float:
    """Return the seconds from the first delivery until a service has settled messages that wait in a memory bus: every
    effect is committed, and every watermark if the service keeps them."""
    name = f"memory://{uuid4()}"
    last = int(messages[-1].headers["tidings-position"])
    touched = {message.bucket: int(message.headers["tidings-position"]) for message in messages}
    end = Marker(await store.log_id(), last, -1, {bucket: at for bucket, at in touched.items() if bucket is not None})
    async with open_bus(name) as bus, bus.publisher() as publisher:
        await bus.provision(Subscription(service.name))
        for message in (*messages, end.encode()):
            await publisher.send(message)
        settings = Settings(store="memory://", bus=name, database=database)
        async with service.running(settings, store=store, bus=bus) as running:
            began = time.perf_counter()
            while running.floor < last:
                await asyncio.sleep(0.002)
            return time.perf_counter() - began


async def seconds(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


def verdict(row: str, ours: Sequence[float], peer: Sequence[float], floor: float | None, count: int) -> int:
    """Print the row's rates and the median of the rounds' ratios. Return 1 if it is below the floor."""
    ratio = median(theirs / mine for mine, theirs in zip(ours, peer, strict=True))
    missed = floor is not None and ratio < floor
    judged = "(no floor)" if floor is None else f"(floor {floor:.2f}) {'MISSED' if missed else 'ok'}"
    print(
        f"{row}: {ratio:.2f} x {judged}; "
        f"tidings {count / median(ours):,.0f}/s, peer {count / median(peer):,.0f}/s, {len(ours)} rounds",
        flush=True,
    )
    return int(missed)


def quiet() -> None:
    """Log warnings only: nobody reads the other lines, and one costs more than an event."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def with_broker(measure: Callable[[str, Path, RabbitMQ], Awaitable[int]]) -> int:
    """Run `measure(url, folder, broker)` on a broker and an empty folder of its own."""

    async def run(broker: RabbitMQ, folder: str) -> int:
        async with broker.isolated() as url:
            return await measure(url, Path(folder), broker)

    quiet()
    try:
        with rabbitmq_for_tests() as broker, tempfile.TemporaryDirectory() as folder:
            return asyncio.run(run(broker, folder))
    except (pytest.skip.Exception, pytest.fail.Exception) as missing:
        print(f"NOT MEASURED: {missing}")
        return 1
