"""The embedded store beside what SQLite itself does on the same disk, in the same run.

    python -m tests.benchmarks.bench_store

Appending: 64 tasks, one event of 200 bytes each at a time, each to its own stream, every append durable.
Reading: the whole log through `read_all`, beside a cursor over the same rows and columns.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from queue import SimpleQueue
from statistics import median
from uuid import uuid4

from tidings.stores import EventData, EventStore
from tidings.stores.sqlite.log import CACHE_KIB
from tidings.stores.sqlite.store import open_sqlite

TASKS, EACH, ROUNDS = 64, 100, 9
READ_EVENTS, READ_ROUNDS = 120_000, 5
DATA = b"x" * 200
FLOORS = {"append / raw": 0.25, "append / thread": 0.60, "read / cursor": 0.30}
COLUMNS = "position, stream, version, type, data, metadata, is_json, id, ticks"
INSERT = "INSERT INTO log VALUES (NULL, ?, ?, 'Measured', ?, x'', 1, ?, ?)"

Row = tuple[str, int, bytes, bytes, int]


def connect(path: str) -> sqlite3.Connection:
    """Open a connection as the store does: every commit is durable."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    return connection


def row(task: int, version: int) -> Row:
    return f"measure-{task}", version, DATA, uuid4().bytes, time.time_ns() // 100


def commit(connection: sqlite3.Connection, rows: list[Row]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(INSERT, rows)
    connection.execute("COMMIT")


async def raw(connection: sqlite3.Connection, first: int) -> None:
    """Insert the same rows, 64 per commit, without anything else."""
    for version in range(first, first + EACH):
        commit(connection, [row(task, version) for task in range(TASKS)])


class Thread:
    """A minimal writer thread: a queue, 64 rows per commit, futures."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.loop = asyncio.get_running_loop()
        self.connection = connection
        self.queue: SimpleQueue[tuple[Row, asyncio.Future[None]] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while (item := self.queue.get()) is not None:
            group = [item]
            while len(group) < TASKS and not self.queue.empty():
                another = self.queue.get()
                assert another is not None
                group.append(another)
            commit(self.connection, [row for row, _ in group])
            self.loop.call_soon_threadsafe(self.settle, group)

    @staticmethod
    def settle(group: list[tuple[Row, asyncio.Future[None]]]) -> None:
        for _, future in group:
            future.set_result(None)

    async def append(self, row: Row) -> None:
        future: asyncio.Future[None] = self.loop.create_future()
        self.queue.put((row, future))
        await future


async def tasks(append: Callable[[int, int], Awaitable[object]], first: int, each: int = EACH) -> None:
    async def appender(task: int) -> None:
        for version in range(first, first + each):
            await append(task, version)

    await asyncio.gather(*(appender(task) for task in range(TASKS)))


async def seconds(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


async def empty_log(path: str) -> sqlite3.Connection:
    """Create a file with the store's schema and indexes, and open a plain connection to it."""
    await (await open_sqlite(f"sqlite:///{path}")).close()
    return connect(path)


async def measure_appends(folder: str) -> dict[str, float]:
    store = await open_sqlite(f"sqlite:///{folder}/store.db")
    with (
        closing(await empty_log(f"{folder}/raw.db")) as plain,
        closing(await empty_log(f"{folder}/thread.db")) as other,
    ):
        thread = Thread(other)
        times: list[tuple[float, float, float]] = []

        def to_store(task: int, _: int) -> Awaitable[object]:
            return store.append(f"measure-{task}", [EventData("Measured", DATA)])

        def to_thread(task: int, version: int) -> Awaitable[object]:
            return thread.append(row(task, version))

        for number in range(ROUNDS + 1):
            first = number * EACH
            taken = [0.0, 0.0, 0.0]
            for turn in range(3):  # each goes first in every third round
                way = (turn + number) % 3
                if way == 1:
                    taken[way] = await seconds(raw(plain, first))
                else:
                    taken[way] = await seconds(tasks(to_thread if way else to_store, first))
            times.append((taken[0], taken[1], taken[2]))
        thread.queue.put(None)
        thread.thread.join()
    await store.close()
    times = times[1:]  # the first warms up
    for name, place in (("store", 0), ("raw sqlite3, 64 a commit", 1), ("bare writer thread", 2)):
        print(f"  {name:<26}{TASKS * EACH / median(taken[place] for taken in times):>10,.0f} appends/s")
    return {
        "append / raw": median(taken[1] / taken[0] for taken in times),
        "append / thread": median(taken[2] / taken[0] for taken in times),
    }


async def read_all(store: EventStore) -> None:
    count = 0
    async for _ in store.read_all():
        count += 1
    assert count > READ_EVENTS


async def cursor(connection: sqlite3.Connection) -> None:
    count = 0
    for _ in connection.execute(f"SELECT {COLUMNS} FROM log ORDER BY position"):
        count += 1
    assert count > READ_EVENTS


async def measure_reads(folder: str) -> dict[str, float]:
    path = f"{folder}/read.db"
    store = await open_sqlite(f"sqlite:///{path}")
    for begin in range(0, READ_EVENTS, 1_000):
        await store.append(f"measure-{begin % 64}", [EventData("Measured", DATA) for _ in range(1_000)])
    with closing(connect(path)) as plain:
        times = [(await seconds(read_all(store)), await seconds(cursor(plain))) for _ in range(READ_ROUNDS + 1)][1:]
    await store.close()
    for name, place in (("store, read_all", 0), ("sqlite3 cursor", 1)):
        print(f"  {name:<26}{READ_EVENTS / median(taken[place] for taken in times):>10,.0f} events/s")
    return {"read / cursor": median(taken[1] / taken[0] for taken in times)}


async def measure(folder: str) -> int:
    print(f"embedded store on {os.cpu_count()} cores, SQLite {sqlite3.sqlite_version}; medians of interleaved rounds")
    ratios = {**await measure_appends(folder), **await measure_reads(folder)}
    for name, floor in FLOORS.items():
        verdict = "ok" if ratios[name] >= floor else "MISSED"
        print(f"  {name:<20}{ratios[name]:.2f}  (floor {floor:.2f}) {verdict}")
    return int(any(ratios[name] < floor for name, floor in FLOORS.items()))


def main() -> int:
    """Run the benchmark. Return exit status 1 when a floor is missed."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(measure(folder))


if __name__ == "__main__":
    sys.exit(main())
