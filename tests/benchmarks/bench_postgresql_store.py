"""The PostgreSQL store beside raw asyncpg on the same server, in the same run.

    python -m tests.benchmarks.bench_postgresql_store

Appending: 64 tasks, one event of 200 bytes each at a time, each to its own stream, every append durable. The peers
write the same rows into a table with the same indexes, 64 a transaction, and answer nobody: `executemany` in a
transaction, and one INSERT of arrays. Reading: the whole log through `read_all`, beside `fetch` of the same pages.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any
from uuid import uuid4

import asyncpg
from sqlalchemy.engine import make_url

from tests.benchmarks.bench_store import seconds, tasks
from tidings import open_store
from tidings.stores import EventData, EventStore
from tidings.stores.postgresql.schema import key_of
from tidings.testing.databases import server_for_tests

TASKS, EACH, ROUNDS = 64, 40, 7
READ_EVENTS, READ_ROUNDS, PAGE = 60_000, 5, 512
DATA = b"x" * 200
FLOORS = {"append / executemany": 0.6, "append / one INSERT": 0.6, "read / fetch": 0.4}
COLUMNS = "position, version, ticks, key, id, is_json, stream, type, data, metadata"
EXECUTEMANY = f"INSERT INTO tidings_log.events ({COLUMNS}) VALUES ($1, $2, $3, $4, $5, true, $6, $7, $8, '')"
ONE_INSERT = (
    f"INSERT INTO tidings_log.events ({COLUMNS}) SELECT p, v, t, k, i, true, s, y, d, '' FROM "
    "unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::uuid[], $5::uuid[], $6::bytea[], $7::bytea[], $8::bytea[]) "
    "AS r (p, v, t, k, i, s, y, d)"
)


class Raw:
    """A plain connection to an empty log, which inserts rows without asking anything."""

    def __init__(self, connection: Any, arrays: bool) -> None:
        self.connection = connection
        self.arrays = arrays
        self.position = 1

    def rows(self, version: int) -> list[tuple[object, ...]]:
        made: list[tuple[object, ...]] = []
        for task in range(TASKS):
            self.position += 1
            stream = f"measure-{task}"
            row = self.position, version, time.time_ns() // 100, key_of(stream), uuid4()
            made.append((*row, stream.encode(), b"Measured", DATA))
        return made

    async def run(self, first: int) -> None:
        for version in range(first, first + EACH):
            rows = self.rows(version)
            if self.arrays:
                await self.connection.execute(ONE_INSERT, *map(list, zip(*rows, strict=True)))
            else:
                async with self.connection.transaction():
                    await self.connection.executemany(EXECUTEMANY, rows)


async def measure_appends(store: EventStore, peers: list[Raw]) -> dict[str, float]:
    def append(task: int, _: int) -> Awaitable[object]:
        return store.append(f"measure-{task}", [EventData("Measured", DATA)])

    ways: list[Callable[[int], Awaitable[object]]] = [
        lambda first: tasks(append, first, EACH),
        peers[0].run,
        peers[1].run,
    ]
    times = []
    for number in range(ROUNDS + 1):
        taken = [0.0] * len(ways)
        for turn in range(len(ways)):  # each goes first in every third round
            way = (turn + number) % len(ways)
            taken[way] = await seconds(ways[way](number * EACH))
        times.append(taken)
    times = times[1:]  # the first warms up
    for name, place in (("store", 0), ("asyncpg, executemany", 1), ("asyncpg, one INSERT", 2)):
        print(f"  {name:<26}{TASKS * EACH / median(taken[place] for taken in times):>10,.0f} appends/s")
    return {
        "append / executemany": median(taken[1] / taken[0] for taken in times),
        "append / one INSERT": median(taken[2] / taken[0] for taken in times),
    }


async def read_all(store: EventStore) -> None:
    count = 0
    async for _ in store.read_all():
        count += 1
    assert count > READ_EVENTS


async def fetch_all(connection: Any) -> None:
    position, count = 0, 0
    while True:
        rows = await connection.fetch(
            f"SELECT {COLUMNS} FROM tidings_log.events WHERE position > $1 ORDER BY position LIMIT {PAGE}", position
        )
        count += len(rows)
        if len(rows) < PAGE:
            break
        position = rows[-1][0]
    assert count > READ_EVENTS


async def measure_reads(store: EventStore, connection: Any) -> dict[str, float]:
    for begin in range(0, READ_EVENTS, 1_000):
        await store.append(f"measure-{begin % 64}", [EventData("Measured", DATA) for _ in range(1_000)])
    times = [(await seconds(read_all(store)), await seconds(fetch_all(connection))) for _ in range(READ_ROUNDS + 1)][1:]
    for name, place in (("store, read_all", 0), ("asyncpg, fetch", 1)):
        print(f"  {name:<26}{READ_EVENTS / median(taken[place] for taken in times):>10,.0f} events/s")
    return {"read / fetch": median(taken[1] / taken[0] for taken in times)}


async def measure(server: str) -> int:
    url = make_url(server)
    connections = []
    async with open_store(server) as store:
        for name in ("peer_one", "peer_two"):
            other = url.set(drivername="postgresql", database=name).render_as_string(hide_password=False)
            first = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
            await first.execute(f"CREATE DATABASE {name}")
            await first.close()
            async with open_store(other):  # makes the table and its indexes
                connections.append(await asyncpg.connect(other))
        ratios = await measure_appends(store, [Raw(connections[0], False), Raw(connections[1], True)])
        own = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
        ratios |= await measure_reads(store, own)
        for connection in (*connections, own):
            await connection.close()
    for name, floor in FLOORS.items():
        verdict = "ok" if ratios[name] >= floor else "MISSED"
        print(f"  {name:<22}{ratios[name]:.2f}  (floor {floor:.2f}) {verdict}")
    return int(any(ratios[name] < floor for name, floor in FLOORS.items()))


def main() -> int:
    """Run the benchmark. Return exit status 1 when a floor is missed."""
    with server_for_tests() as server:  # which flushes each commit
        return asyncio.run(measure(server.url))


if __name__ == "__main__":
    sys.exit(main())
