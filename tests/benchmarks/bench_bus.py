"""The relay, from the embedded store to a quorum queue, beside a raw aio-pika publisher of the same messages.

python -m tests.benchmarks.bench_bus
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.path import (
    WINDOW,
    aio_pika_exchange,
    drop_queue,
    fill,
    make_queue,
    messages_of,
    peers_message,
    seconds,
    verdict,
    with_broker,
)
from tests.clients import through
from tidings import EventStore, Relay, open_bus, open_store
from tidings.protocol.message import Message
from tidings.testing.brokers import RabbitMQ

EVENTS, ROUNDS, FLOOR = 16_000, 5, 2.0
CLIENTS_EVENTS, CLIENTS_ROUNDS, CLIENTS_FLOOR = 8_000, 3, 2.0


async def relay(store: EventStore, url: str, name: str) -> None:
    """Measure from connecting to the last confirm. A relay with a new name begins at the beginning of the log."""
    head = await store.head()
    async with open_bus(url) as bus:
        carrier = Relay(store, bus, name=name, window=WINDOW)
        running = asyncio.create_task(carrier.run())
        while carrier.confirmed < head and not running.done():
            await asyncio.sleep(0.002)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert carrier.confirmed >= head


async def aio_pika_publisher(messages: Sequence[Message], url: str) -> None:
    """Measure from connecting to the last confirm, with 256 tasks that each have one message in flight."""
    waiting = iter(messages)

    async with aio_pika_exchange(url) as exchange:

        async def send() -> None:
            for message in waiting:
                await exchange.publish(peers_message(message), routing_key="", mandatory=True)

        await asyncio.gather(*(send() for _ in range(WINDOW)))


async def measure(url: str, folder: Path, broker: RabbitMQ) -> int:
    ours: list[float] = []
    peer: list[float] = []
    async with open_store(f"sqlite:///{folder}/events.db") as store:
        await fill(store, EVENTS)
        messages = await messages_of(store)
        for number in range(ROUNDS + 1):
            for way in (ours, peer) if number % 2 else (peer, ours):
                await make_queue(url, "sink")
                work = relay(store, url, f"round-{number}") if way is ours else aio_pika_publisher(messages, url)
                way.append(await seconds(work))
                await drop_queue(url, "sink")
        clients = await measure_clients(url, folder)
    row = f"relay to a quorum queue / aio-pika publisher, {WINDOW} confirms in flight"
    return max(verdict(row, ours[1:], peer[1:], FLOOR, EVENTS), clients)  # the first round warms up


async def measure_clients(url: str, folder: Path) -> int:
    """The same relay through Tidings' own AMQP client, and through aio-pika (`?client=aio-pika`)."""
    default: list[float] = []
    aio_pika: list[float] = []
    async with open_store(f"sqlite:///{folder}/clients.db") as store:
        await fill(store, CLIENTS_EVENTS)
        for number in range(CLIENTS_ROUNDS + 1):
            for way in (default, aio_pika) if number % 2 else (aio_pika, default):
                await make_queue(url, "sink")
                bus = url if way is default else through(url, "aio-pika")
                way.append(await seconds(relay(store, bus, f"{len(default)}-{len(aio_pika)}-{number}")))
                await drop_queue(url, "sink")
    return verdict("relay, default client / client=aio-pika", default[1:], aio_pika[1:], CLIENTS_FLOOR, CLIENTS_EVENTS)


def main() -> int:
    """Run the benchmark. Return exit status 1 when the floor is missed."""
    return with_broker(measure)


if __name__ == "__main__":
    sys.exit(main())
