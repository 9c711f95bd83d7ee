"""Handlers with a session on PostgreSQL and SQLite, beside FastStream's subscriber and a bare loop.

    python -m tests.benchmarks.bench_databases

On PostgreSQL (a server of its own, which flushes each commit), both sides have a pool of 20 connections. Queues and
clocks are those of `bench_service`; the peer inserts a row into an inbox in the transaction of the effect, because
without one a message that is delivered twice has its effect twice. On SQLite, the messages wait in the memory bus.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from faststream import AckPolicy
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker, create_async_engine

from tests.benchmarks.bench_service import Counter
from tests.benchmarks.path import (
    PREFETCH,
    Measured,
    drop_queue,
    fill,
    handled_from_memory,
    make_queue,
    messages_of,
    publish,
    verdict,
    with_broker,
)
from tidings import Context, EventStore, Service, Settings, open_bus, open_store
from tidings.buses import Subscription
from tidings.protocol.message import Message
from tidings.testing.brokers import RabbitMQ
from tidings.testing.databases import PostgreSQLServer, server_for_tests

ROUNDS = 3
EVENTS = 3000
FEW = 600
"""Events of the row in which one side handles one after the other."""
SECONDS = 0.005
"""What some handlers wait for before their first statement."""
POOL = 20
FLOORS = {"one INSERT": 3.5, "one INSERT, connection": 5.0, "5 ms and one INSERT": 3.2, "bare": 0.45, "late": 8.0}

tables = sa.MetaData()
effects = sa.Table("effects", tables, sa.Column("number", sa.Integer, primary_key=True), sa.Column("key", sa.String))
peers = sa.MetaData()
peers_effects = effects.to_metadata(peers)
inbox = sa.Table("inbox", peers, sa.Column("message", sa.String, primary_key=True))


def row(event: Measured) -> dict[str, Any]:
    return {"number": event.number, "key": event.key}


# ---- ours --------------------------------------------------------------------------------


def service_of(counter: Counter, kind: str) -> Service:
    service = Service("bench", tables=tables, prefetch=PREFETCH)

    async def by_session(event: Measured, session: AsyncSession) -> None:
        await session.execute(sa.insert(effects).values(row(event)))
        counter.count()

    async def by_connection(event: Measured, connection: AsyncConnection) -> None:
        await connection.execute(sa.insert(effects).values(row(event)))
        counter.count()

    async def after_waiting(event: Measured, session: AsyncSession) -> None:
        await asyncio.sleep(SECONDS)
        await session.execute(sa.insert(effects).values(row(event)))
        counter.count()

    async def late(event: Measured, context: Context) -> None:
        await asyncio.sleep(SECONDS)
        async with context.session() as session:
            await session.execute(sa.insert(effects).values(row(event)))

    handlers: dict[str, Callable[..., Awaitable[None]]] = {
        "one INSERT, connection": by_connection,
        "5 ms and one INSERT": after_waiting,
        "late": late,
    }
    service.on(Measured)(handlers.get(kind, by_session))
    return service


async def tidings(url: str, database: str, store: EventStore, messages: list[Message], kind: str) -> float:
    counter = Counter(len(messages))
    last = {message.bucket: int(message.headers["tidings-position"]) for message in messages}
    settings = Settings(store="memory://", bus=url, database=f"{database}?connections={POOL}")
    marks = sa.text("SELECT coalesce(sum(position), 0) FROM tidings_watermarks WHERE position > 0")
    engine = create_async_engine(database, isolation_level="AUTOCOMMIT")
    service = service_of(counter, kind)
    async with (
        engine.connect() as looking,
        open_bus(url) as bus,
        service.running(settings, store=store, bus=bus),
    ):
        began = time.perf_counter()
        await counter.ended.wait()
        while await looking.scalar(marks) != sum(last.values()):
            await asyncio.sleep(0.002)
        took = time.perf_counter() - began
    await engine.dispose()
    return took


# ---- the peers ---------------------------------------------------------------------------


@asynccontextmanager
async def peers_sessions(database: str) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    engine = create_async_engine(database, pool_size=POOL, max_overflow=0, pool_timeout=300)
    async with engine.begin() as connection:
        await connection.run_sync(peers.create_all)
    yield async_sessionmaker(engine)
    await engine.dispose()


async def faststream(url: str, database: str, events: int, seconds: float) -> float:
    counter = Counter(events)
    async with peers_sessions(database) as sessions:

        async def write(event: Measured) -> None:
            if seconds:
                await asyncio.sleep(seconds)
            async with sessions.begin() as session:
                await session.execute(sa.insert(inbox).values(message=str(event.number)))
                await session.execute(sa.insert(peers_effects).values(row(event)))
            counter.count()

        broker = RabbitBroker(url, default_channel=Channel(prefetch_count=PREFETCH), logger=None)
        queue = RabbitQueue(Subscription("peer").queue, queue_type=QueueType.QUORUM, durable=True, declare=False)
        broker.subscriber(queue, ack_policy=AckPolicy.REJECT_ON_ERROR, no_reply=True)(write)
        async with broker:
            began = time.perf_counter()
            await broker.start()
            await counter.ended.wait()
            return time.perf_counter() - began


async def bare(database: str, messages: list[Message]) -> float:
    """Decode and insert, 64 events a commit: no broker, no inbox, one connection."""
    async with peers_sessions(database) as sessions:
        began = time.perf_counter()
        for first in range(0, len(messages), 64):
            async with sessions.begin() as session:
                for message in messages[first : first + 64]:
                    event = Measured.model_validate_json(message.body)
                    await session.execute(sa.insert(peers_effects).values(row(event)))
        return time.perf_counter() - began


# ---- the rows ----------------------------------------------------------------------------


async def measure_row(url: str, server: PostgreSQLServer, store: EventStore, messages: list[Message], kind: str) -> int:
    ours: list[float] = []
    peer: list[float] = []
    for number in range(ROUNDS + 1):
        async with server.isolated() as database:
            for name in ("bench", "peer"):
                await make_queue(url, name)
            await publish(url, messages)

            async def theirs(database: str = database) -> float:
                if kind == "bare":
                    return await bare(database, messages)
                return await faststream(url, database, len(messages), SECONDS if kind.startswith("5 ms") else 0.0)

            async def mine(database: str = database) -> float:
                # Both have a table of this name: ours is emptied between.
                return await tidings(url, database, store, messages, kind)

            for way in (mine, theirs) if number % 2 else (theirs, mine):
                took = await way()
                (ours if way is mine else peer).append(took)
                await emptied(database)
            for name in ("bench", "peer"):
                await drop_queue(url, name)
    against = "a bare SQLAlchemy loop at 64 a commit" if kind == "bare" else "FastStream with an inbox row"
    named = "one INSERT" if kind == "bare" else kind
    return verdict(
        f"service on PostgreSQL, handler with {named} / {against}", ours[1:], peer[1:], FLOORS[kind], len(messages)
    )


async def emptied(database: str) -> None:
    engine = create_async_engine(database)
    async with engine.begin() as connection:
        await connection.execute(sa.delete(effects))
    await engine.dispose()


async def measure_late(folder: Path, store: EventStore, messages: list[Message]) -> int:
    """A handler on SQLite that waits before it takes its session, beside one that has it injected and waits so."""
    ours: list[float] = []
    injected: list[float] = []
    for number in range(ROUNDS + 1):
        for way, kind in ((ours, "late"), (injected, "5 ms and one INSERT")):
            service = service_of(Counter(len(messages)), kind)
            database = f"sqlite:///{folder}/{kind[0]}{number}.db"
            way.append(await handled_from_memory(service, database, store, messages))
    row = "service on SQLite, handler with 5 ms and then a session / with an injected one"
    return verdict(row, ours[1:], injected[1:], FLOORS["late"], len(messages))


async def measure(url: str, folder: Path, broker: RabbitMQ) -> int:
    try:
        with server_for_tests() as server:
            async with open_store(f"sqlite:///{folder}/events.db") as store:
                await fill(store, EVENTS)
                messages = await messages_of(store)
                missed = await measure_late(folder, store, messages[:FEW])
                for kind in ("one INSERT", "one INSERT, connection", "5 ms and one INSERT", "bare"):
                    missed |= await measure_row(url, server, store, messages, kind)
            return missed
    except pytest.skip.Exception as missing:
        print(f"NOT MEASURED: {missing}")
        return 1


def main() -> int:
    """Run the benchmark. Return exit status 1 when a floor is missed."""
    return with_broker(measure)


if __name__ == "__main__":
    sys.exit(main())
