"""How long from append to handled at 500 events a second, beside aio-pika from publish to consumed at the same rate.

    python -m tests.benchmarks.bench_latency [--seconds 60]

Both run in one process and loop, in turns. An event's clock starts when it was due, not when its turn came: a stall
counts for everything that it delays. The peer has neither store nor database: this is what the broker alone takes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from uuid import uuid4

import aio_pika

from tests.benchmarks.path import (
    PREFETCH,
    STREAMS,
    Measured,
    aio_pika_exchange,
    drop_queue,
    make_queue,
    measured,
    peers_message,
    with_broker,
)
from tidings import Relay, Service, Settings, open_bus, open_store
from tidings._support.tasks import supervised
from tidings.buses import Subscription
from tidings.modelling.codec import encode
from tidings.protocol.message import encode as message_of
from tidings.protocol.position import carried
from tidings.stores import RecordedEvent
from tidings.testing.brokers import RabbitMQ

RATE, TURNS, LIMIT = 500, 4, 5.0
WARM = RATE // 2
"""Events at the beginning of each turn that do not count."""

Send = Callable[[int], Awaitable[object]]
Arrived = Callable[[int], None]


async def at_rate(send: Send, count: int, due: list[float]) -> None:
    """Begin one `send` every 1/500 s, whether earlier ones have ended or not."""
    loop = asyncio.get_running_loop()
    began = loop.time() + 0.1
    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            due.append(began + number / RATE)
            await asyncio.sleep(max(0.0, due[-1] - loop.time()))
            tasks.create_task(_awaited(send(number)))


async def _awaited(sending: Awaitable[object]) -> None:
    await sending


@asynccontextmanager
async def tidings(url: str, folder: Path, arrived: Arrived) -> AsyncIterator[Send]:
    """Measure our side: store, relay, RabbitMQ, and a service whose event counts as handled when its handler
    returns."""
    service = Service("bench", prefetch=PREFETCH)

    @service.on(Measured)
    async def see(event: Measured) -> None:
        arrived(event.number)

    settings = Settings(bus=url, store=f"sqlite:///{folder}/events.db", database=f"sqlite:///{folder}/bench.db")
    async with open_store(settings.store) as store, open_bus(url) as bus:

        async def append(number: int) -> None:
            await store.append(f"measured-{number % STREAMS}", [encode(measured(number), id=uuid4())])

        async with service.running(settings, store=store, bus=bus), supervised(Relay(store, bus).run()):
            yield append


@asynccontextmanager
async def aio_pika_alone(url: str, arrived: Arrived) -> AsyncIterator[Send]:
    """Measure aio-pika: publish with confirms, consume on a second connection, acknowledge each message."""
    await make_queue(url, "peer")

    async def consume(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        arrived(Measured.model_validate_json(message.body).number)
        await message.ack()

    async with aio_pika_exchange(url) as exchange, await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=PREFETCH)
        queue = await channel.get_queue(Subscription("peer").queue)
        await queue.consume(consume)

        async def publish(number: int) -> None:
            event = encode(measured(number), id=uuid4())
            recorded = RecordedEvent(
                number + 1, f"measured-{number % STREAMS}", number, event.type, event.data, event.metadata, True,
                event.id.bytes, time.time_ns() // 100,
            )  # fmt: skip
            message = message_of(recorded, log=event.id, previous=number, bucket=carried(recorded) or 0)
            await exchange.publish(peers_message(message), routing_key="", mandatory=True)

        yield publish
    await drop_queue(url, "peer")


async def latencies(way: Callable[[Arrived], AbstractAsyncContextManager[Send]], count: int) -> list[float]:
    due: list[float] = []
    handled: dict[int, float] = {}
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def arrived(number: int) -> None:
        handled[number] = loop.time()
        if len(handled) == count:
            done.set()

    async with way(arrived) as send:
        await at_rate(send, count, due)
        async with asyncio.timeout(30):
            await done.wait()
    return [handled[number] - due[number] for number in range(WARM, count)]


def percentile(ordered: list[float], share: float) -> float:
    return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)]


async def measure(url: str, folder: Path, seconds: float) -> int:
    ours: list[float] = []
    peer: list[float] = []
    count = int(RATE * seconds / TURNS)
    for number in range(TURNS):
        place = folder / str(number)
        place.mkdir()
        ours += await latencies(partial(tidings, url, place), count)
        await drop_queue(url, "bench")
        peer += await latencies(partial(aio_pika_alone, url), count)
    for name, found in (("append to handled", ours), ("aio-pika, publish to consumed", peer)):
        found.sort()
        shown = ", ".join(f"p{100 * share:g} {percentile(found, share):.1f} ms" for share in (0.5, 0.99, 0.999))
        print(f"{name} at {RATE} events/s, {len(found):,} events: {shown}")
    ratio = percentile(ours, 0.99) / percentile(peer, 0.99)
    print(f"p99 / aio-pika's p99: {ratio:.2f} x (limit {LIMIT:.2f}) {'ok' if ratio < LIMIT else 'MISSED'}")
    return int(ratio >= LIMIT)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark. Return exit status 1 when the limit is missed."""
    parser = argparse.ArgumentParser(prog="bench_latency")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each side, in four turns (60)")
    options = parser.parse_args(arguments or [])

    async def run(url: str, folder: Path, broker: RabbitMQ) -> int:
        return await measure(url, folder, options.seconds)

    return with_broker(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
