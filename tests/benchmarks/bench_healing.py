"""A pass over the log, from which a new service reads history, beside a plain read of `$all` with the same handler.

    python -m tests.benchmarks.bench_healing

The handler does nothing. The plain reader decodes each event and calls it, and does no more: it reads no metadata,
bounds no call in time, and after a restart it would begin again. The service does so in lanes, with a deadline for each
attempt and the event's facts in every line of the log, and its clock stops when the floor says that everything is
settled durably. The log is in EventStoreDB's protocol, from a server in a process of its own (`bench_eventstoredb` says
which). Two rows for comparison have no floor: one beside a reader by hand that does the least that a consumer which may
be restarted does, and one with the log in a file that this process reads itself, where there is no `$all`.

The garbage collector is set as `tidings run` sets it (`tidings.hosting.collector`), for both sides.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from statistics import median
from uuid import uuid4

from tests.benchmarks.bench_eventstoredb import served
from tests.benchmarks.path import Measured, fill, quiet, verdict
from tidings import EventStore, Service, Settings, open_bus, open_store
from tidings.hosting.collector import spared_by_the_collector
from tidings.modelling.codec import decode, read_metadata
from tidings.protocol.message import Marker
from tidings.protocol.position import CARRIED

EVENTS, ROUNDS, FLOOR = 30_000, 7, 0.5
EACH = 1_000
"""Events of the reader by hand between two commits of its position."""


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


async def reader_by_hand(store: EventStore, handler: Trivial, database: str) -> float:
    """Measure a reader that reads the metadata, bounds each call in time, and commits its position as it goes."""
    began = time.perf_counter()
    with closing(sqlite3.connect(database, isolation_level=None, check_same_thread=False)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE IF NOT EXISTS reached (position INTEGER)")

        async def commit(position: int) -> None:
            await asyncio.to_thread(connection.execute, "INSERT INTO reached VALUES (?)", (position,))

        count, position = 0, -1
        async for event in store.read_all(filter=CARRIED):
            async with asyncio.timeout(30):
                await handler.see(decode(event, Measured, read_metadata(event)))
            count, position = count + 1, event.position
            if count % EACH == 0:
                await commit(position)
        await commit(position)
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
        while not running.consuming:  # its queue is bound
            await asyncio.sleep(0.002)
        began = time.perf_counter()
        await publisher.send(Marker(await store.log_id(), head, head, {}).encode())
        while running.floor < head:
            await asyncio.sleep(0.002)
        return time.perf_counter() - began


async def measure(url: str, databases: str, row: str, floor: float | None, *, by_hand: bool = False) -> int:
    took: dict[str, list[float]] = {}
    used: dict[str, list[float]] = {}
    handler = Trivial()
    async with open_store(url) as store:
        await fill(store, EVENTS)
        with spared_by_the_collector():
            for number in range(ROUNDS + 1):
                ways = {
                    "plain read": plain_read(store, handler),
                    "pass": healing_pass(store, handler, f"sqlite:///{databases}/{number}.db"),
                }
                if by_hand:
                    ways["reader by hand"] = reader_by_hand(store, handler, f"{databases}/by-hand.db")
                for name, way in ways.items():
                    began = time.process_time()
                    took.setdefault(name, []).append(await way)
                    used.setdefault(name, []).append(time.process_time() - began)
                assert handler.calls == len(ways) * EVENTS * (number + 1), "an event was read, and handled not once"
    ours = took["pass"][1:]  # the first round warms up
    missed = verdict(f"healing pass / {row}", ours, took["plain read"][1:], floor, EVENTS)
    if by_hand:
        verdict("healing pass / reader by hand that may be restarted", ours, took["reader by hand"][1:], None, EVENTS)
    each = (f"{name} {median(times[1:]) / EVENTS * 1e6:.1f}" for name, times in used.items())
    print(f"  µs of this process's CPU per event: {', '.join(each)}", flush=True)
    return missed


def main() -> int:
    """Run the benchmark. Return exit status 1 when a floor is missed."""
    quiet()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as databases, served(folder) as uri:
        missed = asyncio.run(measure(uri, databases, "plain $all read", FLOOR, by_hand=True))
    with tempfile.TemporaryDirectory() as folder:
        return (
            asyncio.run(measure(f"sqlite:///{folder}/events.db", folder, "plain read of an embedded log", None))
            or missed
        )


if __name__ == "__main__":
    sys.exit(main())
