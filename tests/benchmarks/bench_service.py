"""A service from its quorum queue to the committed watermark, beside FastStream's subscriber on a queue like it.

    python -m tests.benchmarks.bench_service

Both queues are filled by the same publishes, and each side has its turn alone. The clock starts before anything is
asked of the broker (FastStream's connection is made before, ours within), and stops when the last message was handled:
ours when the database says so. The garbage collector is set as `tidings run` sets it (`tidings.hosting.collector`),
for both sides.

Two more rows say what receipts cost (`tidings.protocol.receipts`), by the CPU of this process, because a disk that is
faster or slower in one of the rounds would hide it. One has a floor: a service beside what it takes without the time
within `Receipts`, in the same run, so that it holds on a busy machine, too. The other is the service with receipts
beside the same service without, which counts the longer rows in the database as well.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sqlalchemy as sa
from faststream import AckPolicy
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from tests.benchmarks.path import (
    PREFETCH,
    Measured,
    drop_queue,
    fill,
    make_queue,
    messages_of,
    publish,
    verdict,
    with_broker,
)
from tidings import EventStore, Service, Settings, open_bus, open_store
from tidings.buses import Subscription
from tidings.database.receipts import Receipts
from tidings.hosting.collector import spared_by_the_collector
from tidings.protocol.message import Message
from tidings.testing.brokers import RabbitMQ

ROUNDS = 4
EVENTS = {"without session": 12_000, "one INSERT": 2_500}
FLOORS = {"without session": 2.5, "one INSERT": 1.0}
RECEIPTS_FLOOR = 0.95
NO_RECEIPTS: dict[str, Any] = dict.fromkeys(
    ("accept", "pass_over", "tails", "settle", "committed", "settled", "due"), lambda *given: {}
)
"""Methods of receipts that do nothing: rows keep the receipts that they began with."""
CLOCKED = ("tails", "settle", "committed", "settled", "due")
"""Methods of receipts that take their time once for each commit or marker."""

tables = sa.MetaData()
effects = sa.Table("effects", tables, sa.Column("number", sa.Integer, primary_key=True), sa.Column("key", sa.String))


class Counter:
    """Notices when every event was handled."""

    def __init__(self, events: int) -> None:
        self.left = events
        self.ended = asyncio.Event()

    def count(self) -> None:
        self.left -= 1
        if not self.left:
            self.ended.set()


# ---- ours --------------------------------------------------------------------------------


def service_of(counter: Counter, insert: bool) -> Service:
    service = Service("bench", tables=tables, prefetch=PREFETCH)
    if insert:

        @service.on(Measured)
        async def write(event: Measured, session: AsyncSession) -> None:
            await session.execute(sa.insert(effects).values(number=event.number, key=event.key))
            counter.count()

    else:

        @service.on(Measured)
        async def see(event: Measured) -> None:
            counter.count()

    return service


async def committed(database: Path, watermarks: int) -> None:
    """Wait until the sum of the stored watermarks says that every bucket's last event is committed."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        while True:
            [(found,)] = connection.execute("SELECT sum(position) FROM tidings_watermarks WHERE position > 0")
            if found == watermarks:
                return
            await asyncio.sleep(0.002)


async def tidings(
    url: str,
    folder: Path,
    store: EventStore,
    messages: list[Message],
    insert: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    counter = Counter(len(messages))
    last = {message.bucket: int(message.headers["tidings-position"]) for message in messages}
    settings = Settings(store="memory://", bus=url, database=f"sqlite:///{folder}/ours.db")
    async with open_bus(url) as bus, service_of(counter, insert).running(settings, store=store, bus=bus):
        began = clock()
        await counter.ended.wait()
        await committed(folder / "ours.db", sum(last.values()))
        return clock() - began


# ---- the peer ----------------------------------------------------------------------------

Handle = Callable[[Measured], Awaitable[None]]


def durable(connection: sqlite3.Connection, record: object) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


@asynccontextmanager
async def inserting(folder: Path, counter: Counter) -> AsyncIterator[Handle]:
    """Handle each message in a transaction of its own, on a pool with one aiosqlite connection. SQLite has one writer,
    so waiting for the pool is faster than finding the database locked."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{folder}/peer.db", pool_size=1, max_overflow=0, pool_timeout=300)
    sa.event.listen(engine.sync_engine, "connect", durable)
    async with engine.begin() as connection:
        await connection.run_sync(tables.create_all)
    sessions = async_sessionmaker(engine)

    async def write(event: Measured) -> None:
        async with sessions.begin() as session:
            await session.execute(sa.insert(effects).values(number=event.number, key=event.key))
        counter.count()

    yield write
    await engine.dispose()


@asynccontextmanager
async def seeing(folder: Path, counter: Counter) -> AsyncIterator[Handle]:
    async def see(event: Measured) -> None:
        counter.count()

    yield see


async def faststream(url: str, folder: Path, events: int, insert: bool) -> float:
    """Subscribe: acknowledge after processing, without logger and replies, on the existing queue."""
    counter = Counter(events)
    async with (inserting if insert else seeing)(folder, counter) as handle:
        broker = RabbitBroker(url, default_channel=Channel(prefetch_count=PREFETCH), logger=None)
        queue = RabbitQueue(Subscription("peer").queue, queue_type=QueueType.QUORUM, durable=True, declare=False)
        broker.subscriber(queue, ack_policy=AckPolicy.REJECT_ON_ERROR, no_reply=True)(handle)
        async with broker:
            began = time.perf_counter()
            await broker.start()
            await counter.ended.wait()
            return time.perf_counter() - began


# ---- the rows ----------------------------------------------------------------------------


async def measure_row(url: str, folder: Path, store: EventStore, messages: list[Message], row: str) -> int:
    insert = row == "one INSERT"
    ours: list[float] = []
    peer: list[float] = []
    for number in range(ROUNDS + 1):
        for name in ("bench", "peer"):
            await make_queue(url, name)
        await publish(url, messages)
        place = folder / f"{insert}-{number}"
        place.mkdir()
        for way in (ours, peer) if number % 2 else (peer, ours):
            if way is ours:
                way.append(await tidings(url, place, store, messages, insert))
            else:
                way.append(await faststream(url, place, len(messages), insert))
        for name in ("bench", "peer"):
            await drop_queue(url, name)
    return verdict(f"service, handler {row} / FastStream", ours[1:], peer[1:], FLOORS[row], len(messages))


class Clocked:
    """Counts the seconds of CPU within methods of receipts."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def clocked(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            began = time.thread_time()
            result = method(*given)
            self.seconds += time.thread_time() - began
            return result

        return call


async def measure_receipts(url: str, folder: Path, store: EventStore, messages: list[Message], row: str) -> int:
    insert = row == "one INSERT"
    took: list[float] = []
    without: list[float] = []
    apart: list[float] = []
    for number in range(ROUNDS + 1):
        for on in (True, False) if number % 2 else (False, True):
            await make_queue(url, "bench")
            await publish(url, messages)
            place = folder / f"receipts-{insert}-{on}-{number}"
            place.mkdir()
            clock = Clocked()
            methods = {name: clock.clocked(getattr(Receipts, name)) for name in CLOCKED} if on else NO_RECEIPTS
            with patch.multiple(Receipts, **methods):
                seconds = await tidings(url, place, store, messages, insert, time.process_time)
            if on:
                took.append(seconds)
                apart.append(seconds - clock.seconds)
            else:
                without.append(seconds)
            await drop_queue(url, "bench")
    count, what = len(messages), f"handler {row}, by CPU"
    verdict(f"service with receipts / without them, {what}", took[1:], without[1:], None, count)
    return verdict(f"service / without the time within receipts, {what}", took[1:], apart[1:], RECEIPTS_FLOOR, count)


async def measure(url: str, folder: Path, broker: RabbitMQ) -> int:
    async with open_store(f"sqlite:///{folder}/events.db") as store:
        await fill(store, max(EVENTS.values()))
        messages = await messages_of(store)
        ways = (measure_row, measure_receipts)
        with spared_by_the_collector():
            return max([await way(url, folder, store, messages[: EVENTS[row]], row) for way in ways for row in EVENTS])


def main() -> int:
    """Run the benchmark. Return exit status 1 when a floor is missed."""
    return with_broker(measure)


if __name__ == "__main__":
    sys.exit(main())
