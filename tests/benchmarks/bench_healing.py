"""A pass over the log, from which a new service reads history, beside a plain read of `$all` with the same handler.

    python -m tests.benchmarks.bench_healing

The handler does nothing. The plain reader decodes each event and calls it. The service does so in lanes, with a
deadline for each attempt and the event's facts in every line of the log, and its clock stops when the floor says that
everything is settled durably. The log is in EventStoreDB's protocol, from a server in a process of its own
(`bench_eventstoredb` says which). A second row, for comparison, has the log in a file that this process reads itself:
there is no `$all` there, its plain read needs half of the time, and no floor was set.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from uuid import uuid4

from tests.benchmarks.bench_eventstoredb import served
from tests.benchmarks.path import Measured, fill, quiet, verdict
from tidings import EventStore, Service, Settings, open_bus, open_store
from tidings.modelling.codec import decode
from tidings.protocol.message import Marker
from tidings.protocol.position import CARRIED

EVENTS, ROUNDS, FLOOR = 30_000, 7, 0.5


class Trivial:
    """A handler that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    async def see(self, event: Measured) -> None:
        self.calls += 1


async def plain_read(store: EventStore, handler: Trivial) -> float:
    began = time.perf_counter()
    async for event in store.read_all(filter=CARRIED):
        await handler.see(decode(event, Measured))
    return time.perf_counter() - began


async def healing_pass(store: EventStore, handler: Trivial, database: str) -> float:
    """Measure from the first marker that a new service hears until it has settled its history."""
    service = Service("bench")
    service.on(Measured)(handler.see)
    head, name = await store.head(), f"memory://{uuid4()}"
    settings = Settings(store="memory://", bus=name, database=database)
    async with (
        open_bus(name) as bus,
        bus.publisher() as publisher,
        service.running(settings, store=store, bus=bus) as running,
    ):
        began = time.perf_counter()
        await publisher.send(Marker(await store.log_id(), head, head, {}).encode())
        while running.floor < head:
            await asyncio.sleep(0.002)
        return time.perf_counter() - began


async def measure(url: str, databases: str, row: str, floor: float | None) -> int:
    ours: list[float] = []
    peer: list[float] = []
    handler = Trivial()
    async with open_store(url) as store:
        await fill(store, EVENTS)
        for number in range(ROUNDS + 1):
            peer.append(await plain_read(store, handler))
            ours.append(await healing_pass(store, handler, f"sqlite:///{databases}/{number}.db"))
            assert handler.calls == 2 * EVENTS * (number + 1), "an event was read, and the handler not called once"
    return verdict(f"healing pass / {row}", ours[1:], peer[1:], floor, EVENTS)  # the first warms up


def main() -> int:
    """Run the benchmark. Return exit status 1 when a floor is missed."""
    quiet()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as databases, served(folder) as uri:
        missed = asyncio.run(measure(uri, databases, "plain $all read", FLOOR))
    with tempfile.TemporaryDirectory() as folder:
        return (
            asyncio.run(measure(f"sqlite:///{folder}/events.db", folder, "plain read of an embedded log", None))
            or missed
        )


if __name__ == "__main__":
    sys.exit(main())
