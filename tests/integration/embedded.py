"""A whole system in one folder for tests: store, memory bus, fast relay, services with an audit row per effect.

Run as a program it is a process to be killed: `python -m tests.integration.embedded FOLDER WHEN`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.databases import database_url
from tests.integration.served import open_log
from tidings import ANY, Context, Event, EventData, EventStore, Relay, Retry, Service, Settings, open_bus
from tidings._support.tasks import supervised
from tidings.buses import Publisher
from tidings.buses.memory import MemoryBus
from tidings.database.tables import dead, staged, watermarks
from tidings.errors import StreamNotFound
from tidings.hosting.running import RunningService
from tidings.operations.verify import Report, verify
from tidings.stores import Appended, Expected, RecordedEvent

QUICK = Retry(attempts=3, delay=0.01, hold=None, hold_key=False)

tables = sa.MetaData()
audit = sa.Table(
    "audit",
    tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.String),
    sa.Column("n", sa.Integer),
    sa.Column("note", sa.String, unique=True),
)


class Happened(Event, key="key"):
    key: str
    n: int = 0


class Followed(Event, key="key"):
    key: str
    n: int = 0


Row = tuple[str, int]
Effect = Callable[[Happened, Context, AsyncSession], Awaitable[None]]


async def note(session: AsyncSession, event: Happened) -> None:
    await session.execute(sa.insert(audit).values(key=event.key, n=event.n))


def auditing(name: str = "audit", effect: Effect | None = None, *, retry: Retry = QUICK, **options: Any) -> Service:
    """Declare a service that writes an audit row per `Happened`, and then calls `effect`."""
    service = Service(name, tables=tables, **options)

    @service.on(Happened, retry=retry)
    async def handle(event: Happened, context: Context, session: AsyncSession) -> None:
        await note(session, event)
        if effect is not None:
            await effect(event, context, session)

    return service


def emitting(name: str = "audit") -> Service:
    async def follow(event: Happened, context: Context, session: AsyncSession) -> None:
        context.emit(f"followed-{event.key}", Followed(key=event.key, n=event.n))

    return auditing(name, follow)


class Wrapped(Protocol):
    def __call__(self, store: EventStore) -> EventStore: ...


@dataclass
class World:
    store: EventStore
    bus: MemoryBus
    running: list[RunningService]

    async def append(self, *events: Happened | Followed, stream: str | None = None) -> None:
        """Append each key's events to its own stream, in order."""
        of: dict[str, list[Happened | Followed]] = defaultdict(list)
        for event in events:
            of[stream or f"{type(event).__name__}-{event.key}"].append(event)
        service = self.running[0].service
        assert isinstance(service, Service)
        await asyncio.gather(*(service.append(name, *group) for name, group in of.items()))

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        """Publish by hand, once every service has its queue."""
        await until(lambda: all(running.consuming for running in self.running))
        async with self.bus.publisher() as publisher:
            yield publisher

    async def report(self) -> Report:
        return await verify(self.store, [(running.service, running.database) for running in self.running])

    async def settled(self, seconds: float = 90.0) -> Report:
        async def ok() -> bool:
            return (await self.report()).ok

        await until(ok, seconds)
        return await self.report()


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 60.0) -> None:
    """Wait for a condition, or fail."""
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.01)


def settings_for(folder: Path, bus: str | None = None) -> Settings:
    return Settings(
        store=f"sqlite:///{folder}/log.db",
        bus=bus or f"memory://{uuid4().hex}",
        database=database_url(folder),
    )


@asynccontextmanager
async def embedded(
    folder: Path, *services: Service, wrap: Wrapped | None = None, relay: bool = True, **more: Any
) -> AsyncIterator[World]:
    """Run services on the files of `folder`, with a bus of their own and a relay that sends markers often. `more` are
    further settings."""
    settings = settings_for(folder).model_copy(update=more)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_log(folder))
        bus = await stack.enter_async_context(open_bus(settings.bus))
        assert isinstance(bus, MemoryBus)
        seen = wrap(store) if wrap else store
        running = [
            await stack.enter_async_context(service.running(settings, store=seen, bus=bus)) for service in services
        ]
        if relay:
            carrier = Relay(store, bus, marker_seconds=0.2, checkpoint_seconds=0.1, seal=settings.seal)
            await stack.enter_async_context(supervised(carrier.run()))
        yield World(store, bus, running)


async def rows(service: Service) -> list[Row]:
    """Return the audit rows in the order in which they were written."""
    async with service.engine.connect() as connection:
        found = await connection.execute(sa.select(audit.c.key, audit.c.n).order_by(audit.c.id))
        return [(row.key, row.n) for row in found]


async def letters(service: Service) -> list[sa.Row[Any]]:
    async with service.engine.connect() as connection:
        return list(await connection.execute(sa.select(dead).order_by(dead.c.id)))


async def count(service: Service, table: sa.Table) -> int:
    async with service.engine.connect() as connection:
        return (await connection.scalar(sa.select(sa.func.count()).select_from(table))) or 0


async def highest_watermark(service: Service) -> int:
    async with service.engine.connect() as connection:
        return (await connection.scalar(sa.select(sa.func.max(watermarks.c.position)))) or -1


def many(number: int, keys: int) -> list[Happened]:
    return [Happened(key=f"k{n * 7919 % keys}", n=n) for n in range(number)]


def assert_once_in_order(found: Sequence[Row], events: Iterable[Happened]) -> None:
    """Assert that no effect is lost or doubled, and that each key is in order."""
    expected = sorted((event.key, event.n) for event in events)
    assert len(found) == len(expected), f"{len(found)} effects of {len(expected)} events"
    assert sorted(found) == expected
    by_key: dict[str, list[int]] = defaultdict(list)
    for key, n in found:
        by_key[key].append(n)
    for key, numbers in by_key.items():
        assert numbers == sorted(numbers), f"out of order in {key}"


async def followed(store: EventStore) -> list[Row]:
    """Return the emitted events from the log."""
    found = []
    async for event in store.read_all():
        if event.type == "Followed":
            told = Followed.model_validate_json(event.data)
            found.append((told.key, told.n))
    return found


class StoreAround:
    """A store that passes everything on. Tests override the methods that should fail."""

    def __init__(self, store: EventStore) -> None:
        self.inner = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        return await self.inner.append(stream, events, expected=expected)

    async def read_backwards(self, stream: str) -> list[RecordedEvent]:
        try:
            return [event async for event in self.inner.read_stream(stream, backwards=True)]
        except StreamNotFound:
            return []


class Killing(StoreAround):
    """A store that kills its process around the 40th append."""

    def __init__(self, store: EventStore, when: str) -> None:
        super().__init__(store)
        self.when = when
        self.appends = 0

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        self.appends += 1
        fatal = self.appends == 40
        if fatal and self.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        done = await self.inner.append(stream, events, expected=expected)
        if fatal and self.when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return done


async def main(folder: Path, when: str) -> None:
    service = emitting()

    def wrap(store: EventStore) -> EventStore:
        return Killing(store, when)

    async with embedded(folder, service, wrap=wrap) as world:
        print("running", flush=True)
        await world.settled(100)
        assert await count(service, staged) == 0
        print("settled", flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
