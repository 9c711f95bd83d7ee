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
from tidings import EventStore, Relay, open_bus, open_store
from tidings.protocol.message import Message
from tidings.testing.brokers import RabbitMQ

EVENTS, ROUNDS, FLOOR = 16_000, 5, 2.0


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
    row = f"relay to a quorum queue / aio-pika publisher, {WINDOW} confirms in flight"
    return verdict(row, ours[1:], peer[1:], FLOOR, EVENTS)  # the first round warms up


def main() -> int:
    """Run the benchmark. Return exit status 1 when the floor is missed."""
    return with_broker(measure)


if __name__ == "__main__":
    sys.exit(main())
