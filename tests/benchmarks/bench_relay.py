"""How much memory the relay takes while it carries 200,000 events from an embedded store to the memory bus.

python -m tests.benchmarks.bench_relay
"""

from __future__ import annotations

import asyncio
import resource
import sys
import tempfile
import time
from pathlib import Path

from tidings import EventData, EventStore, Relay, open_bus, open_store
from tidings.buses import EventBus, Subscription
from tidings.protocol.message import MARKER

EVENTS, WARM, BATCH = 200_000, 20_000, 500
LIMIT_MB = 30.0


def resident_mb() -> float:
    """Return the resident memory of this process, in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


async def fill(store: EventStore) -> None:
    for first in range(0, EVENTS, BATCH):
        events = [EventData("Measured", b"x" * 200) for _ in range(BATCH)]
        await store.append(f"measure-{first % 97}", events)


async def receive(bus: EventBus, subscription: Subscription) -> tuple[float, float, float]:
    """Take and settle every event. Return the memory after the 20,000th and the last one, and the seconds in
    between."""
    count, warm, began = 0, 0.0, 0.0
    async with bus.consume(subscription) as consumer:
        async for delivery in consumer:
            consumer.settle_through(delivery.tag)
            if delivery.message.type == MARKER:
                continue
            count += 1
            if count == WARM:
                warm, began = resident_mb(), time.perf_counter()
            if count == EVENTS:
                return warm, resident_mb(), time.perf_counter() - began
    raise AssertionError("the bus ended the deliveries")


async def measure(folder: str) -> int:
    subscription = Subscription("sink")
    async with open_store(f"sqlite:///{folder}/events.db") as store, open_bus("memory://bench") as bus:
        await bus.provision(subscription)
        await fill(store)
        relay = asyncio.create_task(Relay(store, bus).run())
        try:
            warm, last, seconds = await receive(bus, subscription)
        finally:
            relay.cancel()
            await asyncio.gather(relay, return_exceptions=True)
    grown = last - warm
    print(
        f"relay over {EVENTS:,} events: {warm:.0f} MiB after {WARM:,}, {last:.0f} MiB after the last: "
        f"{grown:+.1f} MiB (limit {LIMIT_MB:.0f}); {(EVENTS - WARM) / seconds:,.0f} events/s on this machine"
    )
    return int(grown > LIMIT_MB)


def main() -> int:
    """Run the benchmark. Return exit status 1 when memory grew over the limit."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(measure(folder))


if __name__ == "__main__":
    sys.exit(main())
