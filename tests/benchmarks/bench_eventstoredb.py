"""The EventStoreDB adapter beside esdbclient's asynchronous client, on the same server in the same run.

    python -m tests.benchmarks.bench_eventstoredb

Appending: 1,024 appends in flight, one event of 200 bytes each; the peer as fast as it goes, with 100 tasks. Reading:
the whole log by `read_all`, and from its beginning by a subscription. The server is the project's own, in a process of
its own; `TIDINGS_TEST_EVENTSTOREDB` names a real one: `esdb://localhost:2113?Tls=false`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

from esdbclient import AsyncEventStoreDBClient, NewEvent, StreamState

from tests.integration.eventstoredb import Server
from tidings.stores import CaughtUp, EventData, EventStore
from tidings.stores.eventstoredb.store import open_eventstoredb

ROUNDS = 5
IN_FLIGHT, EACH = 1_024, 10
PEER_TASKS, PEER_EACH = 100, 10
LOG, PEER_LOG = 40_000, 10_000
DATA = b"x" * 200
FLOORS = {"append": 4.0, "read $all": 3.0, "catch up": 3.5}

Work = Callable[[], Awaitable[int]]


async def rate(work: Work) -> float:
    """Return how many events the call handles per second."""
    began = time.perf_counter()
    count = await work()
    return count / (time.perf_counter() - began)


def ours(store: EventStore) -> dict[str, Work]:
    async def append() -> int:
        run = uuid4().hex

        async def writer(task: int) -> None:
            for _ in range(EACH):
                await store.append(f"ours-{run}-{task}", [EventData("Measured", DATA)])

        await asyncio.gather(*(writer(task) for task in range(IN_FLIGHT)))
        return IN_FLIGHT * EACH

    async def read() -> int:
        count = 0
        async for _ in store.read_all(limit=LOG):
            count += 1
        return count

    async def catch_up() -> int:
        count = 0
        async for item in store.subscribe_all():
            if isinstance(item, CaughtUp) or count == LOG:
                return count
            count += 1
        raise AssertionError("the subscription ended")

    return {"append": append, "read $all": read, "catch up": catch_up}


def peers(client: AsyncEventStoreDBClient) -> dict[str, Work]:
    async def append() -> int:
        run = uuid4().hex

        async def writer(task: int) -> None:
            for _ in range(PEER_EACH):
                event = NewEvent(type="Measured", data=DATA)
                await client.append_to_stream(f"peer-{run}-{task}", current_version=StreamState.ANY, events=event)

        await asyncio.gather(*(writer(task) for task in range(PEER_TASKS)))
        return PEER_TASKS * PEER_EACH

    async def read() -> int:
        return await taken(await client.read_all(filter_exclude=(), limit=PEER_LOG))

    async def catch_up() -> int:
        return await taken(await client.subscribe_to_all(filter_exclude=()))

    async def taken(source: Any) -> int:
        async with source:
            count = 0
            async for _ in source:
                count += 1
                if count == PEER_LOG:
                    break
        return count

    return {"append": append, "read $all": read, "catch up": catch_up}


@contextmanager
def served(folder: str) -> Iterator[str]:
    """Yield the URI of a server."""
    real = os.environ.get("TIDINGS_TEST_EVENTSTOREDB")
    if real:
        yield real
        return
    server = Server(Path(folder) / "log.db")
    server.start()
    try:
        yield f"esdb://127.0.0.1:{server.port}?Tls=false"
    finally:
        server.kill()


async def measure(uri: str) -> int:
    store = await open_eventstoredb(uri)
    client = AsyncEventStoreDBClient(uri)
    await client.connect()
    for begin in range(0, LOG, 1_000):
        await store.append(f"log-{begin}", [EventData("Measured", DATA) for _ in range(1_000)])
    mine, theirs = ours(store), peers(client)
    print(f"EventStoreDB adapter on {os.cpu_count()} cores; medians of {ROUNDS} interleaved rounds")
    missed = False
    for name, floor in FLOORS.items():
        rates = [(await rate(mine[name]), await rate(theirs[name])) for _ in range(ROUNDS + 1)][1:]
        ratio = median(own / peer for own, peer in rates)
        own, peer = (median(pair[place] for pair in rates) for place in (0, 1))
        verdict = "ok" if ratio >= floor else "MISSED"
        print(
            f"  {name:<10}{own:>10,.0f}/s  esdbclient {peer:>8,.0f}/s  {ratio:>5.1f} x  (floor {floor:.1f}) {verdict}"
        )
        missed = missed or ratio < floor
    await client.close()
    await store.close()
    return int(missed)


def main() -> int:
    """Run the benchmark. Return exit status 1 when a floor is missed."""
    with tempfile.TemporaryDirectory() as folder, served(folder) as uri:
        return asyncio.run(measure(uri))


if __name__ == "__main__":
    sys.exit(main())
